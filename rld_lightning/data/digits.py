"""Digits: 1,797 hand-written digits of 8x8 pixels from scikit-learn. Trains in seconds, without a download."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rld_lightning.data.in_memory import InMemoryDataModule
from rld_lightning.data.stratified import stratified_split

# There is no official test split; this one is the same for every seed, so that results are comparable.
TEST_FRACTION = 0.2
TEST_SEED = 0
CLASS_NAMES = [str(digit) for digit in range(10)]


class DigitsDataModule(InMemoryDataModule):
    """Hand-written digits, 1,437 for training and 360 for testing, as grey RGB images.

    Source: Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI 1998, as shipped by
    :func:`sklearn.datasets.load_digits`. Mean and standard deviation are those of the training part at 8x8 pixels.

    Args:
        image_size: height and width of the images; resized bilinearly if not 8.
        padding: black pixels added around a training image before cropping.
        flip: whether training images are mirrored; digits are not mirror symmetric.
        options: see :class:`~rld_lightning.data.base.ImageDataModule`.
    """

    name = "digits"
    num_classes = 10
    class_names = CLASS_NAMES
    mean = (0.3054, 0.3054, 0.3054)
    std = (0.3760, 0.3760, 0.3760)

    def __init__(self, *, image_size: int = 8, padding: int = 1, flip: bool = False, **options: Any) -> None:
        super().__init__(padding=padding, flip=flip, **options)
        if image_size < 1:
            raise ValueError(f"image_size={image_size} must be positive; the original images have 8 pixels a side.")
        self.image_shape = (3, image_size, image_size)

    def read_split(self, train: bool) -> tuple[Tensor, Tensor]:
        """Returns the fixed 80% for training or the remaining 20%, stratified.

        Grey values 0..16 are scaled to 0..255.
        """
        from sklearn.datasets import load_digits  # here, as the import takes a second

        digits = load_digits()
        labels = torch.from_numpy(digits.target).long()
        chosen = stratified_split(labels, TEST_FRACTION, TEST_SEED)[0 if train else 1]
        grey = torch.from_numpy(digits.images).float().unsqueeze(1) * (255 / 16)
        if grey.shape[-2:] != self.image_shape[1:]:
            grey = F.interpolate(grey, self.image_shape[1:], mode="bilinear", antialias=True)
        images = grey.round().clamp(0, 255).byte().permute(0, 2, 3, 1).expand(-1, -1, -1, 3)
        return images[chosen].contiguous(), labels[chosen]
