"""Any folder of class folders, such as ImageNet: too big for the device, hence streamed by worker processes."""

import os
import weakref
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from rld_lightning.data.augment import Normalize
from rld_lightning.data.base import Batch, ImageDataModule, stratified_split
from rld_lightning.data.image_list import ImageList, find_splits
from rld_lightning.data.loader import EpochLoader
from rld_lightning.data.randaugment import randaugment_image
from rld_lightning.data.sampler import EpochSampler

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class StreamedImages(Dataset):
    """Decode and transform single images; a key is the index of an image and the seed of its augmentation.

    Args:
        images: The files.
        transform: Applied to each uint8 image (3, H, W); must give equal shapes.
        strong: Applied to the same image for a second view, likewise.
    """

    def __init__(self, images: ImageList, transform: v2.Transform, strong: v2.Transform | None = None) -> None:
        self.images = images
        # The second draws after the first, which is therefore the same with and without it.
        self.transforms = [transform] if strong is None else [transform, strong]

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor | int, ...]:
        """Return the first view, the class, the index and, where there is one, the second view."""
        index, seed = key
        image = read_image(os.fsdecode(self.images.paths[index]))
        # Transforms draw from the global generator. Seeding it for each image makes the result independent of which
        # worker loads it, and restoring it leaves the random state of training alone. Only the CPU generator: the
        # common `torch.manual_seed` would touch CUDA's in every worker.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            first, *second = (transform(image) for transform in self.transforms)
        return first, self.images.labels[index], index, *second

    def __len__(self) -> int:
        return len(self.images.labels)


def read_image(path: str) -> Tensor:
    """Read an image file of any mode of 8 bits (grey, palette, alpha, CMYK) as uint8 RGB (3, H, W)."""
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):  # which Pillow would clip to white
                raise OSError(f"mode {image.mode} has more than 8 bits a channel")
            return v2.functional.pil_to_tensor(image.convert("RGB"))
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path} cannot be read as an image ({error}): replace or delete it.") from error


class KeySampler:
    """Yield, for each step of a sampler's epoch, the keys of the batch: pairs of an index and an augmentation seed."""

    def __init__(self, sampler: EpochSampler) -> None:
        self.sampler = sampler
        self.start = 0

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order, generator = self.sampler.draw_order()
        seeds = torch.randint(1 << 32, order.shape, generator=generator)
        keys = torch.stack([order, seeds], dim=1)[self.sampler.positions]
        for step in self.sampler.steps[self.start :]:
            yield keys[step].tolist()


class StreamingLoader(EpochLoader):
    """Yield batches that worker processes decode; they are normalised on the device.

    Images cross the process boundary and the bus as uint8, a quarter of their size as floats.

    Args:
        dataset: Gives the uint8 image, the class, the index and perhaps a second view for a key.
        sampler: Which samples this process takes.
        normalize: Turns uint8 images into the model's input.
        device: Where batches are delivered.
        num_workers: Worker processes, 0 to decode in this one.
    """

    def __init__(
        self,
        dataset: StreamedImages,
        sampler: EpochSampler,
        normalize: Normalize,
        *,
        device: torch.device,
        num_workers: int,
    ) -> None:
        super().__init__(sampler)
        self.normalize = normalize
        self.device = device
        self._keys = KeySampler(sampler)
        self._workers = DataLoader(
            dataset,
            batch_sampler=self._keys,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=device.type == "cuda",
            # The base seed of the workers is drawn from here instead of the random state of training.
            generator=torch.Generator(),
        )
        # The workers must be told to stop before the garbage collector gets to their queues: in a reference cycle, and
        # trainers are full of them, it closes the queues first and then waits five seconds for each deaf worker.
        weakref.finalize(self, _stop_workers, self._workers)

    def _batches(self, start: int) -> Iterator[Batch]:
        self._keys.start = start
        for batch in self._workers:
            images, label, index, *strong = (values.to(self.device, non_blocking=True) for values in batch)
            images, *strong = (self.normalize(view.permute(0, 2, 3, 1).contiguous()) for view in (images, *strong))
            yield Batch(images, label, index, *strong)


def _stop_workers(loader: DataLoader) -> None:
    loader._iterator = None


class ImageFolderDataModule(ImageDataModule):
    """A folder of class folders of images.

    Three layouts are understood. ``root/train`` beside one of ``root/{val,valid,validation,test}``: the latter is the
    test split, as ImageNet's ``val`` is. ``root/train``, one of ``root/{val,valid,validation}`` and ``root/test``, all
    with class folders: validation and test split are different. ``root/<class>/...``: a fixed, stratified
    ``test_fraction`` of the images is the test split.

    Args:
        root: The folder.
        image_size: Side of the square images that the model sees.
        resize: Shorter side that evaluation images are resized to before the centre is cropped; by default
            ``image_size / 0.875``, 256 for 224.
        scale: Range of the share of the area that a random training crop covers.
        test_fraction: Share of the images in the test split, if the folder does not say.
        num_workers: Decoding processes for each training process.
        mean: Mean of each channel; by default ImageNet's, as are its models.
        std: Standard deviation of each channel.
        name: Name of the data set, by default that of the folder.
        options: See :class:`~rld_lightning.data.base.ImageDataModule`.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        image_size: int = 224,
        resize: int | None = None,
        scale: tuple[float, float] = (0.08, 1.0),
        test_fraction: float = 0.2,
        num_workers: int = 4,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        name: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.root = Path(root)
        self.resize = round(image_size / 0.875) if resize is None else resize
        if not 0 < image_size <= self.resize:
            raise ValueError(
                f"image_size={image_size} and resize={self.resize} do not fit: the centre crop must be positive and "
                "not larger than the resized image."
            )
        if not 0 < test_fraction < 1:
            raise ValueError(f"test_fraction={test_fraction} must be in (0, 1), 0.2 for a fifth of the images.")
        self.image_shape = (3, image_size, image_size)
        self.scale = tuple(scale)
        self.test_fraction = test_fraction
        self.num_workers = num_workers
        self.mean = tuple(mean)
        self.std = tuple(std)
        self.name = self.root.resolve().name if name is None else name

    @cached_property
    def splits(self) -> dict[str, ImageList]:
        """The files of ``"train"``, ``"test"`` and, where it is not the test split, ``"val"``."""
        splits = find_splits(self.root, self.test_fraction)
        if self.val_fraction > 0:
            train = splits["train"]
            kept, held_out = stratified_split(train.labels, self.val_fraction, self.seed, "val_fraction")
            splits |= {"train": train.take(kept), "val": train.take(held_out)}
        return splits

    @property
    def class_names(self) -> list[str]:
        """The names of the class folders, sorted."""
        return self.splits["train"].class_names

    @property
    def num_classes(self) -> int:
        """The number of class folders."""
        return len(self.class_names)

    def setup(self, stage: str | None = None) -> None:
        """List the files."""
        splits = self.splits
        self._sizes = tuple(len(splits[name].labels) for name in ("train", self._val_name, "test"))

    def train_transform(self) -> v2.Transform:
        """Return what is done to a uint8 training image (3, H, W)."""
        if not self.augment:
            return self.eval_transform()
        size = self.image_shape[1:]
        crop = v2.RandomResizedCrop(size, scale=self.scale, antialias=True)
        return v2.Compose([crop, v2.RandomHorizontalFlip()]) if self.flip else crop

    def strong_transform(self) -> v2.Transform:
        """Return what is done to a uint8 training image (3, H, W) for its strong view."""
        return v2.Compose([self.train_transform(), randaugment_image])

    def eval_transform(self) -> v2.Transform:
        """Return what is done to a uint8 evaluation image (3, H, W)."""
        return v2.Compose([v2.Resize(self.resize, antialias=True), v2.CenterCrop(self.image_shape[1:])])

    @property
    def train_label(self) -> Tensor:
        """Class of each training image, int64 (N,), on the CPU."""
        return self.splits["train"].labels

    def train_dataloader(self) -> StreamingLoader:
        """Return the augmented, shuffled training batches of this process."""
        strong = self.strong_transform() if self.strong_view else None
        return self._loader("train", self.train_sampler(), self.train_transform(), strong)

    def val_dataloader(self) -> StreamingLoader:
        """Return the held-out training images, the folder's own validation split, or else the test split."""
        return self._loader(self._val_name, self.eval_sampler(self.val_size), self.eval_transform())

    def test_dataloader(self) -> StreamingLoader:
        """Return the test split, each image exactly once over all processes."""
        return self._loader("test", self.eval_sampler(self.test_size), self.eval_transform())

    def _loader(self, split: str, sampler: EpochSampler, *transforms: v2.Transform | None) -> StreamingLoader:
        normalize = Normalize(self.mean, self.std, *self.image_shape[1:], self.device)
        dataset = StreamedImages(self.splits[split], *transforms)
        return StreamingLoader(dataset, sampler, normalize, device=self.device, num_workers=self.num_workers)

    @property
    def _val_name(self) -> str:
        return "val" if "val" in self.splits else "test"

    @property
    def has_own_validation(self) -> bool:
        """Whether validation runs on other images than the test split's."""
        return super().has_own_validation or self._val_name == "val"

    @property
    def validated_on(self) -> str:
        """What validation runs on, in words that complete "validated on"."""
        if self.val_fraction > 0 or self._val_name == "test":
            return super().validated_on
        return f"the {self.val_size:,} images of the folder's own validation split"
