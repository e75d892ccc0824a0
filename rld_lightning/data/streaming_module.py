"""Base class of data sets whose images are decoded by worker processes: folders and shards."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torchvision.transforms import v2

from rld_lightning.data.augment import Normalize
from rld_lightning.data.bad_images import BAD_IMAGES, BadImageReport
from rld_lightning.data.base import ImageDataModule
from rld_lightning.data.crops import CentreCrop, RandomCropFlip
from rld_lightning.data.decode import DECODERS
from rld_lightning.data.sampler import EpochSampler
from rld_lightning.data.stratified import stratified_split, stratified_subset
from rld_lightning.data.streaming import Images, StreamedImages, StreamingLoader
from rld_lightning.limits import LARGEST_RESIZE, LARGEST_SIDE

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class StreamingDataModule(ImageDataModule):
    """Data sets too large for the device, decoded by worker processes.

    Args:
        name: name of the data set.
        image_size: height and width of the model's input.
        resize: length of an evaluation image's shorter side before the centre crop; by default
            ``image_size / 0.875``, 256 for 224.
        scale: range of a random training crop's share of the area.
        num_workers: decoding processes per training process.
        decode: ``"auto"`` decodes in the workers, JPEG and WebP with torchvision and other formats with Pillow, and
            large JPEGs at reduced size if the training crop allows it; ``"pil"`` with Pillow only, always at full size;
            ``"cuda"`` decodes JPEGs on the GPU with nvJPEG, which frees the workers and rounds differently.
        bad_images: how to handle files that cannot be read as an image, or that claim more pixels than
            :data:`~rld_lightning.data.decode.MOST_PIXELS`. ``"replace"`` trains on the next image of the same class
            instead, skips them in evaluation, and reports each once; a split without any readable image is still an
            error. ``"error"`` stops the run at the first.
        bad_images_file: file that lists them, for all processes of a run; none by default.
        mean: mean of each channel; by default ImageNet's.
        std: standard deviation of each channel; by default ImageNet's.
        options: see :class:`~rld_lightning.data.base.ImageDataModule`.

    Attributes:
        ignored_val_fraction: the requested ``val_fraction`` if the data have separate validation and test splits;
            nothing is then held out, and ``val_fraction`` is set to 0. Otherwise 0.
    """

    # Class of the data set in the workers, and the word for the source of the images in messages.
    _dataset: type[StreamedImages] = StreamedImages
    _kind = "folder"

    def __init__(
        self,
        *,
        name: str,
        image_size: int = 224,
        resize: int | None = None,
        scale: Sequence[float] = (0.08, 1.0),
        num_workers: int = 4,
        decode: str = "auto",
        bad_images: str = "replace",
        bad_images_file: str | Path | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        for option, value, allowed in (("decode", decode, DECODERS), ("bad_images", bad_images, BAD_IMAGES)):
            if value not in allowed:
                raise ValueError(f"{option}={value!r} is unknown; choose {' or '.join(allowed)}.")
        if decode == "cuda" and not torch.cuda.is_available():
            raise ValueError("data.decode=cuda is for NVIDIA GPUs and none is there; use data.decode=auto.")
        self.name = name
        self._set_look(image_size, resize, mean, std)
        self.scale = tuple(scale)
        self.num_workers = num_workers
        self.decode = decode
        self.bad_images = bad_images
        self.bad_image_report = BadImageReport(None if bad_images_file is None else Path(bad_images_file))
        self.ignored_val_fraction = 0.0
        self._loaders: WeakSet[StreamingLoader] = WeakSet()

    def _set_look(
        self,
        image_size: int = 224,
        resize: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        self.resize = round(image_size / 0.875) if resize is None else resize
        if not 0 < image_size <= self.resize:
            raise ValueError(
                f"data.image_size={image_size} and data.resize={self.resize} do not fit: the centre crop must be "
                "positive and not larger than the resized image."
            )
        if image_size > LARGEST_SIDE or self.resize > LARGEST_RESIZE:
            raise ValueError(
                f"data.image_size={image_size} and data.resize={self.resize} are too large: {LARGEST_SIDE} and "
                f"{LARGEST_RESIZE} pixels at most."
            )
        self.image_shape = (3, image_size, image_size)
        self.mean = tuple(IMAGENET_MEAN if mean is None else mean)
        self.std = tuple(IMAGENET_STD if std is None else std)

    def find_splits(self) -> Mapping[str, Images]:
        """Finds the images of ``"train"``, ``"test"`` and, if the source has its own, ``"val"``."""
        raise NotImplementedError

    @cached_property
    def splits(self) -> Mapping[str, Images]:
        """The images of ``"train"``, ``"test"`` and, if it is not the test split, ``"val"``."""
        splits = self._held_out()
        if self.subset < 1:
            train = splits["train"]
            splits["train"] = train.take(stratified_subset(train.labels, self.subset, self.seed))
        return splits

    def _held_out(self) -> dict[str, Images]:
        """Returns the splits after holding out validation images, before ``subset``."""
        splits = dict(self.find_splits())
        if "val" in splits and self.val_fraction > 0:
            self.ignored_val_fraction, self.val_fraction = (
                self.val_fraction,
                0.0,
            )  # so that messages and files state the actual value
        elif self.val_fraction > 0:
            train = splits["train"]
            kept, held_out = stratified_split(
                train.labels, self.val_fraction, self.seed, "val_fraction", train.class_names
            )
            splits |= {"train": train.take(kept), "val": train.take(held_out)}
        return splits

    @property
    def class_names(self) -> list[str]:  # type: ignore[override]  # known once the images are listed
        """The names of the classes, in the order of the labels."""
        return self.splits["train"].class_names

    @property
    def num_classes(self) -> int:  # type: ignore[override]
        """The number of classes."""
        return len(self.class_names)

    def setup(self, stage: str | None = None) -> None:
        """Lists the images."""
        splits = self.splits
        self._sizes = tuple(len(splits[name].labels) for name in ("train", self.val_split, "test"))

    def train_transform(self) -> v2.Transform:
        """Creates the transform of a uint8 training image ``(3, H, W)``."""
        if not self.augment:
            return self.eval_transform()
        return RandomCropFlip(self.image_shape[1:], self.scale, self.flip)

    def eval_transform(self) -> v2.Transform:
        """Creates the transform of a uint8 evaluation image ``(3, H, W)``."""
        return CentreCrop(self.resize, self.image_shape[1:])

    @property
    def train_label(self) -> Tensor:
        """Class of each training image, int64 ``(N,)``, on the CPU."""
        return self.splits["train"].labels

    def train_dataloader(self) -> StreamingLoader:
        """Returns a loader of this process's augmented, shuffled training batches."""
        return self._for_training(self._loader("train", self.train_sampler(), self.train_transform(), training=True))

    def _eval_loader(self, split: str, sampler: EpochSampler) -> StreamingLoader:
        return self._loader(split, sampler, self.eval_transform())

    def _loader(
        self, split: str, sampler: EpochSampler, transform: v2.Transform, *, training: bool = False
    ) -> StreamingLoader:
        if self.decode == "cuda" and self.device.type != "cuda":
            raise ValueError(
                f"data.decode=cuda needs a run on a GPU, and this one is on {self.device}; use data.decode=auto."
            )
        dataset = self._dataset(
            self.splits[split],
            transform,
            strong=training and self.strong_view,
            decode=self.decode,
            replace=training and self.bad_images == "replace",
        )
        loader = StreamingLoader(
            dataset,
            sampler,
            Normalize(self.mean, self.std, *self.image_shape[1:], self.device),
            device=self.device,
            num_workers=self.num_workers,
            report=self.bad_image_report if self.bad_images == "replace" else None,
        )
        self._loaders.add(loader)
        return loader

    def teardown(self, stage: str | None = None) -> None:
        """Ends the workers of all loaders, since a trainer keeps its loaders and the next training would fork them."""
        for loader in list(self._loaders):
            loader.close()

    def on_exception(self, exception: BaseException) -> None:
        """Ends the workers if training fails or is stopped; Lightning does not call :meth:`teardown` then."""
        self.teardown()

    @property
    def eval_resize(self) -> int:
        """Length of an evaluation image's shorter side before the centre crop."""
        return self.resize

    @property
    def has_own_validation(self) -> bool:
        """Whether validation runs on other images than the test split's."""
        return super().has_own_validation or "val" in self.splits

    def describe(self) -> str:
        """One line for the console; mentions an ignored ``val_fraction``."""
        fraction = self.ignored_val_fraction
        ignored = f", so data.val_fraction={fraction:g} is ignored" if fraction else ""
        return f"{super().describe()}{ignored}"

    @property
    def validated_on(self) -> str:
        """The validation images in words, to complete "validated on"."""
        if self.val_fraction > 0 or not self.has_own_validation:
            return super().validated_on
        return f"the {self.val_size:,} images of the {self._kind}'s own validation split"
