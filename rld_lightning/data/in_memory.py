"""Small data sets: a split is one uint8 tensor on the training device, augmented in whole batches."""

from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rld_lightning.data.augment import (
    CropFlip,
    Normalize,
    count_views,
    crop_flip,
    draw_crop_flip,
    number_views,
    pad_images,
    view_of_number,
)
from rld_lightning.data.base import Batch, ImageDataModule
from rld_lightning.data.loader import EpochLoader
from rld_lightning.data.randaugment import RandAugment, RandAugmentDraw, draw_randaugment
from rld_lightning.data.sampler import EpochSampler
from rld_lightning.data.stratified import stratified_split, stratified_subset

_IMAGES_AT_ONCE = 1024  # images to prepare at once on a GPU


class Split(NamedTuple):
    """All images of a split, uint8 ``(N, H, W, 3)``, and their classes, int64 ``(N,)``."""

    images: Tensor
    labels: Tensor

    def take(self, index: Tensor) -> "Split":
        """Returns the samples at ``index`` ``(M,)`` as a split."""
        return Split(self.images[index], self.labels[index])

    def to(self, device: torch.device) -> "Split":
        """Returns the split on ``device``."""
        return Split(self.images.to(device), self.labels.to(device))


class InMemoryLoader(EpochLoader):
    """Yields the batches of a split on the device.

    The order, the crops and the flips of an epoch are drawn at its start and moved to the device at once, so that a
    step only launches kernels and never synchronises with the device.

    Args:
        split: the samples, with images padded by ``padding`` on each side.
        sampler: selects the samples of this process.
        normalize: converts uint8 crops to the model's input, on the device of the split.
        padding: the padding of the images, which is the largest shift of a crop.
        flip: whether crops are mirrored with probability 1/2.
        strong_view: whether each batch has a second, strongly augmented view.
        origin: position of each sample in the full training split, for numbering its views, int64 ``(N,)``; None to not
            number them.
    """

    def __init__(
        self,
        split: Split,
        sampler: EpochSampler,
        normalize: Normalize,
        *,
        padding: int = 0,
        flip: bool = False,
        strong_view: bool = False,
        origin: Tensor | None = None,
    ) -> None:
        super().__init__(sampler)
        self.split = split
        self.normalize = normalize
        self.padding = padding
        self.flip = flip
        self.strong_view = strong_view
        self.origin = origin

    def _batches(self, start: int) -> Iterator[Batch]:
        order, generator = self.sampler.draw_order()
        index = self._local(order)
        label = self.split.labels[index]
        draw = self._draw_crops(generator)
        view = self._number_views(index, draw)
        if self.strong_view:
            # Drawn last, so that the first view is the same with and without this one.
            strong_draw, augment = self._draw_crops(generator), self._draw_randaugment(generator)
        number = start
        for steps in self._step_groups(self.sampler.steps[start:]):
            some = slice(steps[0].start, steps[-1].stop)
            images = self.normalize(self._crop(index[some], draw, some))
            for step in steps:
                own, strong = images[step.start - some.start : step.stop - some.start], None
                if self.strong_view:
                    strong = self.normalize(augment(self._crop(index[step], strong_draw, step), number))
                yield Batch(own, label[step], index[step], strong, None if view is None else view[step])
                number += 1

    def _step_groups(self, steps: Sequence[slice]) -> Iterator[Sequence[slice]]:
        """Groups steps whose images are prepared at once: on a GPU, launching kernels is slower than running them."""
        each = 1 if self.split.images.device.type == "cpu" else max(1, _IMAGES_AT_ONCE // self.batch_size)
        return (steps[first : first + each] for first in range(0, len(steps), each))

    @property
    def _crop_size(self) -> tuple[int, int]:
        height, width = (extent - 2 * self.padding for extent in self.split.images.shape[1:3])
        return height, width

    def _draw_crops(self, generator: torch.Generator) -> CropFlip | None:
        if not (self.padding or self.flip):
            return None
        drawn = draw_crop_flip(self.sampler.size, padding=self.padding, flip=self.flip, generator=generator)
        return CropFlip(*map(self._local, drawn))

    def _number_views(self, index: Tensor, draw: CropFlip | None) -> Tensor | None:
        if self.origin is None:
            return None
        views, origin = count_views(self.padding, self.flip), self.origin[index]
        return origin * views + (0 if draw is None else number_views(draw, self.padding, self.flip))

    def _draw_randaugment(self, generator: torch.Generator) -> RandAugment:
        drawn = draw_randaugment(self.sampler.size, *self._crop_size, generator)
        local = RandAugmentDraw(*(values[self.sampler.positions] for values in drawn))
        return RandAugment(local, self.sampler.steps, *self._crop_size, self.split.images.device)

    def _crop(self, index: Tensor, draw: CropFlip | None, step: slice) -> Tensor:
        if draw is None:
            return self.split.images[index]
        return crop_flip(self.split.images, index, CropFlip(*(values[step] for values in draw)), *self._crop_size)

    def _local(self, values: Tensor) -> Tensor:
        """Selects this process's share of values for all positions ``(N,)``, on the device."""
        return values[self.sampler.positions].to(self.split.images.device)


class InMemoryDataModule(ImageDataModule):
    """A data set that fits on the training device.

    A subclass names the data set, downloads it in ``prepare_data`` and returns a split in ``read_split``.

    Attributes:
        splits: after ``setup``, ``"train"`` (padded), ``"test"`` and, if images are held out, ``"val"``.

    Args:
        padding: black pixels added around a training image, before cropping it to the original size.
        options: see :class:`~rld_lightning.data.base.ImageDataModule`.
    """

    def __init__(self, *, padding: int = 4, **options: Any) -> None:
        super().__init__(**options)
        if padding < 0:
            raise ValueError(f"padding={padding} must not be negative: 0 switches cropping off.")
        self.padding = padding if self.augment else 0
        self.splits: dict[str, Split] = {}

    def read_split(self, train: bool) -> tuple[Tensor, Tensor]:
        """Reads a split from disk.

        Args:
            train: whether to read the training or the test split.

        Returns:
            the images, uint8 ``(N, H, W, 3)``, and their classes, int64 ``(N,)``, both on the CPU.
        """
        raise NotImplementedError

    def setup(self, stage: str | None = None) -> None:
        """Reads all splits once, and moves them to the trainer's device."""
        if not self.splits:
            train, test = Split(*self.read_split(train=True)), Split(*self.read_split(train=False))
            splits, origin = {"test": test}, torch.arange(len(train.labels))
            self._views = len(origin) * count_views(self.padding, self._flips)
            self._pixels_digest = _digest(train.images)  # takes a tenth of the time of reading them
            if self.val_fraction > 0:
                origin, held_out = stratified_split(
                    train.labels, self.val_fraction, self.seed, "val_fraction", self.class_names
                )
                train, splits["val"] = train.take(origin), train.take(held_out)
            if self.subset < 1:
                chosen = stratified_subset(train.labels, self.subset, self.seed)
                train, origin = train.take(chosen), origin[chosen]
            self._origin = origin
            splits["train"] = Split(pad_images(train.images, self.padding), train.labels)
            self.splits = splits
        self.splits = {name: split.to(self.device) for name, split in self.splits.items()}
        self._origin = self._origin.to(self.device)
        self._sizes = tuple(len(self.splits[name].labels) for name in ("train", self.val_split, "test"))

    def take_over(self, other: "InMemoryDataModule") -> None:
        """Shares the data that another module with the same options has read."""
        self.splits, self._origin = dict(other.splits), other._origin
        self._views, self._pixels_digest = other._views, other._pixels_digest

    @property
    def train_label(self) -> Tensor:
        """Class of each training image, int64 ``(N,)``, on the trainer's device."""
        self._split_sizes()  # raises if nothing is loaded yet
        return self.splits["train"].labels

    @property
    def train_views(self) -> int | None:
        """Number of crops and flips of all training images, held out or not; None if images are mixed."""
        self._split_sizes()
        return None if self.mix else self._views

    def val_facts(self) -> dict[str, str | list[float]] | None:
        """Plain values that determine the validation images and their order."""
        images = _digest(self.splits[self.val_split].images)
        return {"data": self.name, "images": images, "mean": list(self.mean), "std": list(self.std)}

    def views_of(self, images: slice) -> Tensor:
        """Returns the numbers of all views of a slice of the training images, int64, in ascending order."""
        views = count_views(self.padding, self._flips)
        return (self._origin[images, None] * views + torch.arange(views, device=self._origin.device)).flatten()

    def look_at(self, view: Tensor) -> Batch:
        """Returns the views with these numbers ``(B,)`` as a batch like those of training."""
        split, views = self.splits["train"], count_views(self.padding, self._flips)
        index = torch.searchsorted(self._origin, view // views)
        draw, (_, height, width) = view_of_number(view % views, self.padding, self._flips), self.image_shape
        images = self._normalize(self.device)(crop_flip(split.images, index, draw, height, width))
        return Batch(images, split.labels[index], index, view=view)

    def views_facts(self) -> dict[str, str | int | float | list[float]]:
        """Plain values that determine the content of the views: all pixels, the crops and flips, the normalisation."""
        self._split_sizes()
        return {
            "data": self.name,
            "images": self._pixels_digest,
            "padding": self.padding,
            "flip": self._flips,
            "mean": list(self.mean),
            "std": list(self.std),
        }

    @property
    def _flips(self) -> bool:
        return self.flip and self.augment

    @property
    def _usual_eval_batch(self) -> int:
        return super()._usual_eval_batch if self.device.type == "cpu" else 1024

    def train_dataloader(self) -> InMemoryLoader:
        """Returns a loader of this process's augmented, shuffled training batches."""
        sampler = self.train_sampler()
        loader = InMemoryLoader(
            self.splits["train"],
            sampler,
            self._normalize(self.device),
            padding=self.padding,
            flip=self._flips,
            strong_view=self.strong_view,
            origin=self._origin,
        )
        return self._for_training(loader)

    def _eval_loader(self, split: str, sampler: EpochSampler) -> InMemoryLoader:
        return InMemoryLoader(self.splits[split], sampler, self._normalize(self.splits[split].images.device))

    def _normalize(self, device: torch.device) -> Normalize:
        _, height, width = self.image_shape
        return Normalize(self.mean, self.std, height, width, device)


def _digest(images: Tensor) -> str:
    return blake2b(images.cpu().contiguous().numpy().data, digest_size=16).hexdigest()
