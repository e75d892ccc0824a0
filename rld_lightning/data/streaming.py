"""Decodes single images in worker processes, and normalises batches of them on the device."""

import gc
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.transforms import v2

from rld_lightning.data.augment import Normalize
from rld_lightning.data.bad_images import BadImage, BadImageReport
from rld_lightning.data.base import Batch
from rld_lightning.data.crops import REDUCING_GAP, RandomCropFlip
from rld_lightning.data.decode import (
    REDUCTIONS,
    BadImageError,
    Header,
    decode_image,
    decode_jpegs,
    read_header,
    turn,
)
from rld_lightning.data.loader import EpochLoader
from rld_lightning.data.randaugment import randaugment_image
from rld_lightning.data.sampler import EpochSampler
from rld_lightning.errors import UserError

# More consecutive unreadable files of a class are an error.
MOST_REPLACEMENTS = 8

Key = tuple[int, int]


class UnreadableImagesError(UserError, ValueError):
    """Raised for unreadable images without which a run would be meaningless."""


class Images(Protocol):
    """The encoded images of a split, from any source."""

    @property
    def class_names(self) -> list[str]:
        """The names of the classes, in the order of the labels."""

    @property
    def labels(self) -> Tensor:
        """Classes, int64 ``(N,)``."""

    def take(self, index: Tensor) -> "Images":
        """Returns the images at ``index`` ``(M,)`` as a list."""

    def path(self, index: int) -> str:
        """Returns an image's name for messages."""

    def read(self, index: int) -> Tensor:
        """Reads the bytes of an image's file, uint8 ``(N,)``.

        Raises:
            BadImageError: this image cannot be read; others may be readable.
        """


class Sample(NamedTuple):
    """The result of loading a key.

    ``index`` is the position of the image that was read and ``label`` its class. ``views`` has one or two images
    ``(3, H, W)``, or is empty if none could be read. ``bad`` are the files that could not be read before.
    """

    index: int  # type: ignore[assignment]  # hides a method of tuple
    label: Tensor
    views: list[Tensor]
    bad: list[BadImage]


class Encoded(NamedTuple):
    """A JPEG file for decoding on the device, which does not apply the EXIF ``orientation``."""

    key: Key
    content: Tensor
    orientation: int


class StreamedImages(Dataset[Sample | Encoded]):
    """Decodes and transforms single images; a key is an image's index and the seed of its augmentation.

    Args:
        images: the images.
        transform: applied to each uint8 image ``(3, H, W)``; all results must have the same shape.
        strong: whether to add a second view: the same image transformed again and strongly augmented.
        decode: ``"auto"``, ``"pil"`` or ``"cuda"``; see
            :class:`~rld_lightning.data.streaming_module.StreamingDataModule`.
        replace: whether the next readable image of the same class replaces an unreadable one.
    """

    def __init__(
        self,
        images: Images,
        transform: v2.Transform,
        *,
        strong: bool = False,
        decode: str = "auto",
        replace: bool = False,
    ) -> None:
        self.images = images
        self.transform = transform
        self.strong = strong
        self.decode = decode
        self.replace = replace

    def __getitem__(self, key: Key) -> Sample | Encoded:
        """Returns an image, or a file for decoding on the device."""
        if self.decode == "cuda":
            try:
                content = self.images.read(key[0])
                header = read_header(content)
            except BadImageError:
                return self.load(key)
            if header.format == "JPEG":
                return Encoded(key, content, header.orientation)
        return self.load(key)

    def __len__(self) -> int:
        return len(self.images.labels)

    def key_sampler(self, sampler: EpochSampler) -> "KeySampler":
        """Creates the batch sampler for a sampler's epochs."""
        return KeySampler(sampler)

    def load(self, key: Key) -> Sample:
        """Reads, decodes and transforms an image on the CPU."""
        index, seed = key
        bad = []
        for candidate in self._candidates(index):
            try:
                content = self.images.read(candidate)
                header = read_header(content)
                image = decode_image(content, self.decode, self._draw_reduction(header, seed), header)
            except BadImageError as error:
                bad.append(BadImage(self.images.path(candidate), str(error)))
            else:
                return self.sample(candidate, self.views(image, seed), bad)
        return self.sample(index, [], bad)

    def sample(self, index: int, views: list[Tensor], bad: Sequence[BadImage] = ()) -> Sample:
        """Creates the :class:`Sample` of an image."""
        return Sample(index, self.images.labels[index], views, list(bad))

    def views(self, image: Tensor, seed: int) -> list[Tensor]:
        """Transforms a uint8 image ``(3, H, W)`` on its device."""
        # Transforms draw from the global generator. Seeding it for each image makes the result independent of the
        # worker, and restoring it keeps the random state of training. Only the CPU generator: `torch.manual_seed` would
        # also seed CUDA's in every worker.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            views = [self.transform(image)]
            if self.strong:
                # Drawn last, so that the first view is the same with and without this one.
                views.append(randaugment_image(self.transform(image)))
        return views

    def _draw_reduction(self, header: Header, seed: int) -> int:
        """Draws the crops of a large JPEG in advance, and returns the factor by which decoding may reduce it."""
        if self.decode == "pil" or header.format != "JPEG" or not isinstance(self.transform, RandomCropFlip):
            return 1
        size = header.height, header.width
        if any(
            image < REDUCTIONS[-1] * REDUCING_GAP * crop for image, crop in zip(size, self.transform.size, strict=True)
        ):
            return 1
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return min(self.transform.draw_reduction(*size) for _ in range(1 + self.strong))

    def _candidates(self, index: int) -> Iterator[int]:
        yield index
        if self.replace:
            same_class = (self.images.labels == self.images.labels[index]).nonzero().squeeze(1)
            same_class = same_class.roll(-int((same_class <= index).sum()))
            yield from same_class[: min(MOST_REPLACEMENTS, len(same_class) - 1)].tolist()


class Stacked(NamedTuple):
    """The readable samples of a batch.

    ``tensors`` are labels ``(B,)``, indices ``(B,)`` and one or two views ``(B, 3, H, W)``, or empty if B is 0;
    ``bad`` are the files that could not be read.
    """

    tensors: list[Tensor]
    bad: list[BadImage]


def stack(samples: Sequence[Sample]) -> Stacked:
    """Stacks the readable samples."""
    read = [(sample.label, sample.index, *sample.views) for sample in samples if sample.views]
    bad = [image for sample in samples for image in sample.bad]
    return Stacked(default_collate(read) if read else [], bad)


class KeySampler:
    """Yields, for each step of a sampler's epoch, the keys of the batch: pairs of an index and an augmentation seed."""

    def __init__(self, sampler: EpochSampler) -> None:
        self.sampler = sampler
        self.start = 0

    def __len__(self) -> int:
        return len(self.sampler)

    def draw(self) -> Tensor:
        """Draws the keys of all steps of this process, concatenated, int64 ``(M, 2)``."""
        order, generator = self.sampler.draw_order()
        seeds = torch.randint(1 << 32, order.shape, generator=generator)
        return torch.stack([order, seeds], dim=1)[self.sampler.positions]

    def __iter__(self) -> Iterator[Any]:
        keys = self.draw()
        for step in self.sampler.steps[self.start :]:
            yield keys[step].tolist()


class StreamingLoader(EpochLoader):
    """Yields batches decoded by worker processes and normalised on the device.

    Images are transferred between processes and to the device as uint8, a quarter of their size as floats.

    If the data set has ``replace``, unreadable images are replaced, so that every batch keeps its size. Otherwise they
    are skipped: an evaluation gets each readable image once, in the same number of batches, some of which may be empty.
    A split without any readable image is an error: a process that has seen none yet searches the whole split, so that
    all processes reach the same result.

    Args:
        dataset: loads the uint8 views of a key's image.
        sampler: selects the samples of this process.
        normalize: converts uint8 images to the model's input.
        device: device of the batches.
        num_workers: number of worker processes; 0 to decode in this one.
        report: reports unreadable images; without it they are errors.
    """

    def __init__(
        self,
        dataset: StreamedImages,
        sampler: EpochSampler,
        normalize: Normalize,
        *,
        device: torch.device,
        num_workers: int,
        report: BadImageReport | None = None,
    ) -> None:
        super().__init__(sampler)
        self.dataset = dataset
        self.normalize = normalize
        self.device = device
        self.report = report
        self._some_readable = False
        self._keys = dataset.key_sampler(sampler)
        on_device = dataset.decode == "cuda"
        self._workers = DataLoader(
            dataset,
            batch_sampler=self._keys,
            num_workers=num_workers,
            collate_fn=list if on_device else stack,
            persistent_workers=num_workers > 0,
            worker_init_fn=_freeze_parent_objects,
            pin_memory=device.type == "cuda" and not on_device,
            # Otherwise the workers' base seed would be drawn from the random state of training.
            generator=torch.Generator(),
        )
        # Stop the workers before garbage collection: in a reference cycle, as trainers have, it would close their
        # queues first and then wait five seconds for each unreachable worker.
        weakref.finalize(self, _stop_workers, self._workers)

    def close(self) -> None:
        """Ends the workers, even within an epoch; the next iteration starts new ones."""
        _stop_workers(self._workers)

    def _batches(self, start: int) -> Iterator[Batch]:
        self._keys.start = start
        for delivered, step in zip(self._deliveries(), self.sampler.steps[start:], strict=True):
            stacked = delivered if isinstance(delivered, Stacked) else stack(self._decode(delivered))
            if stacked.bad:
                self._handle(stacked, step.stop - step.start)
            if not stacked.tensors:
                self._check_some_readable(stacked.bad[-1])
                yield self._empty()
                continue
            self._some_readable = True
            queued = self.device.type == "cuda"  # else a copy may come after its source, which is not pinned, is gone
            label, index, *views = (values.to(self.device, non_blocking=queued) for values in stacked.tensors)
            images, *strong = (self.normalize(view.permute(0, 2, 3, 1).contiguous()) for view in views)
            yield Batch(images, label, index, strong[0] if strong else None)

    def _deliveries(self) -> Iterator[Stacked | list[Sample | Encoded]]:
        try:
            yield from self._workers
        except UserError as error:
            # A worker's error arrives with its traceback as text, which ends in the error's name and message.
            kind, text = type(error), str(error).rstrip().rpartition("\n")[2]
            raise kind(text.removeprefix(f"{kind.__module__}.{kind.__name__}: ")) from None

    def _decode(self, delivered: list[Sample | Encoded]) -> list[Sample]:
        """Decodes the encoded files on the device, and those that it cannot decode on the CPU."""
        encoded = [item for item in delivered if isinstance(item, Encoded)]
        images = iter(decode_jpegs([item.content for item in encoded], self.device))
        samples = []
        for item in delivered:
            if isinstance(item, Sample):
                sample = item
            elif (image := next(images)) is None:
                sample = self.dataset.load(item.key)
            else:
                views = self.dataset.views(turn(image, item.orientation), item.key[1])
                sample = self.dataset.sample(item.key[0], views)
            samples.append(sample._replace(views=[view.to(self.device) for view in sample.views]))
        return samples

    def _handle(self, stacked: Stacked, expected: int) -> None:
        path, reason = stacked.bad[-1]
        if self.report is None:
            raise UnreadableImagesError(
                f"{path} cannot be read as an image ({reason}): replace or delete it, or set data.bad_images=replace."
            )
        if not self.dataset.replace:
            self.report.add(stacked.bad, "it is left out of the evaluation.")
            return
        self.report.add(stacked.bad, "another image of its class takes its place.")
        if stacked.tensors and len(stacked.tensors[0]) == expected:
            return
        raise UnreadableImagesError(
            f"{path} cannot be read as an image ({reason}), nor can the images of its class that would take its place: "
            "check the folder and its disk."
        )

    def _check_some_readable(self, bad: BadImage) -> None:
        """Raises ``UnreadableImagesError`` if the split has no readable image."""
        size = len(self.dataset)
        if not self._some_readable and not any(self.dataset.load((index, 0)).views for index in range(size)):
            raise UnreadableImagesError(
                f"none of the {size:,} images of the split can be read, such as {bad.path} ({bad.reason}): check the "
                "folder and its disk, or convert the images."
            )
        self._some_readable = True

    def _empty(self) -> Batch:
        images = self.normalize(torch.empty(0, *self.normalize.mean.shape, dtype=torch.uint8, device=self.device))
        label, index = torch.empty(2, 0, dtype=torch.int64, device=self.device)
        return Batch(images, label, index)


def _stop_workers(loader: DataLoader[Any]) -> None:
    iterator, loader._iterator = loader._iterator, None
    if iterator is not None and loader.num_workers:  # an unfinished epoch may still hold it
        iterator._shutdown_workers()  # type: ignore[attr-defined]  # defined with workers only


def _freeze_parent_objects(worker: int) -> None:
    """Excludes the parent's objects from a worker's garbage collection, which might end the parent's own workers."""
    gc.freeze()
