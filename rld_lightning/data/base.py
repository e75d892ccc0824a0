"""The common interface of the data sets."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar, cast

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from rld_lightning.data.mix import Mix, Other
from rld_lightning.data.sampler import EpochSampler
from rld_lightning.errors import some
from rld_lightning.limits import SEEDS


class Batch(NamedTuple):
    """A batch of a loader, on the training device; ``x, y = batch[:2]`` are images and labels.

    Attributes:
        images: normalised float32 images ``(B, 3, H, W)``, ``channels_last`` except on Apple's GPUs.
        label: classes, int64 ``(B,)``.
        index: positions in the split, int64 ``(B,)``; losses with a memory bank need them.
        strong: strongly augmented views of the same samples, otherwise like ``images``; ``None`` unless
            ``strong_view`` is set.
        view: number of each image's view among the finitely many of all training images, int64 ``(B,)`` in
            [0, ``train_views``); ``None`` if their number is not finite, and in evaluation.
        other: the second label and its share, if images are mixed; else ``None``.
    """

    images: Tensor
    label: Tensor
    index: Tensor  # type: ignore[assignment]  # hides a method of tuple
    strong: Tensor | None = None
    view: Tensor | None = None
    other: Other | None = None


def as_batch(batch: Any) -> Batch:
    """Converts the batch of any loader to a :class:`Batch`.

    Args:
        batch: a ``Batch``, or a list or tuple of tensors ``(images, label)`` or ``(images, label, index)``. Without
            ``index``, which losses with a memory need, it is ``None``.

    Raises:
        ValueError: it has another form.
    """
    if isinstance(batch, Batch):
        return batch
    if isinstance(batch, list | tuple) and len(batch) in (2, 3) and all(isinstance(part, Tensor) for part in batch):
        images, label, *index = batch
        return Batch(images, label, *(index or cast(list[Tensor], [None])))
    raise ValueError(
        f"a loader yields {type(batch).__name__}, which is not a batch to train on; it must be (images, label), "
        "(images, label, index) or a rld_lightning.data.Batch."
    )


class _Resumable(Protocol):
    mix: Mix | None

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


_Loader = TypeVar("_Loader", bound=_Resumable)


class ImageDataModule(LightningDataModule):
    """Base class of the data sets: splits, batch sizes, samplers and a description.

    Args:
        batch_size: training batch over *all* processes; each processes ``batch_size / world_size`` images of it.
        eval_batch_size: largest evaluation batch over all processes; by default 256, or 1,024 for images stored on a
            GPU, where launching a small batch takes as long as a large one.
        val_fraction: share of the training split to hold out for validation, stratified, in [0, 1). With 0 validation
            runs on the test split, as in the literature; use more than 0 for tuning.
        subset: share of the training images to train on, stratified, in (0, 1], for quick trials; validation and test
            images do not change.
        seed: seed of the validation split, of the subset, of the order of training samples and of their augmentation.
        augment: whether training images are augmented.
        flip: whether augmentation mirrors images with probability 1/2.
        shuffle: whether training samples are shuffled in each epoch.
        drop_last: whether the last, smaller training batch of an epoch is dropped.
        mixup: parameter of Mixup: pairs of training images are mixed with shares of Beta(mixup, mixup); 0 for none.
            See :class:`~rld_lightning.data.mix.Mix`.
        cutmix: parameter of CutMix: boxes are pasted, with areas of Beta(cutmix, cutmix); 0 for none.
        strong_view: whether training batches have a second view of their samples, for methods such as MLKD: augmented
            like the first with new random draws, and then by :class:`~rld_lightning.data.randaugment.RandAugment`. The
            first view is the same with and without it.

    Attributes:
        name: short name of the data set, such as ``"cifar100"``.
        num_classes: C.
        class_names: the C names, in the order of the labels.
        image_shape: ``(3, H, W)`` of a batch's images.
        mean: mean of each channel for the normalisation, for values in [0, 1].
        std: standard deviation of each channel, for values in [0, 1].
        split_options: the options that determine the held-out images, by their keys in weights files.
    """

    is_benchmark: ClassVar[bool] = False  # whether published tables report results on it
    split_options: ClassVar[dict[str, str]] = {"data_seed": "seed", "val_fraction": "val_fraction"}
    name: str
    num_classes: int
    class_names: list[str]
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __init__(
        self,
        *,
        batch_size: int = 64,
        eval_batch_size: int | None = None,
        val_fraction: float = 0.0,
        subset: float = 1.0,
        seed: int = 0,
        augment: bool = True,
        flip: bool = True,
        shuffle: bool = True,
        drop_last: bool = False,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        strong_view: bool = False,
    ) -> None:
        super().__init__()
        for option, value in (("batch_size", batch_size), ("eval_batch_size", eval_batch_size)):
            if value is not None and value < 1:
                raise ValueError(f"{option}={value} must be at least 1.")
        if not 0 <= val_fraction < 1:
            raise ValueError(
                f"val_fraction={val_fraction} must be in [0, 1): 0 validates on the test split, "
                "0.1 holds out a tenth of the training split."
            )
        if not 0 < subset <= 1:
            raise ValueError(f"subset={subset} must be in (0, 1]: 1 trains on all images, 0.01 on a hundredth of them.")
        if not 0 <= seed < SEEDS:
            raise ValueError(f"seed={seed} must be in [0, 2**32), the range that scikit-learn accepts.")
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.val_fraction = val_fraction
        self.subset = subset
        self.seed = seed
        self.augment = augment
        self.flip = flip
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.mix = Mix(mixup, cutmix, seed)
        self.strong_view = strong_view
        self._sizes: tuple[int, ...] | None = None
        self._train_loader: Callable[[], _Resumable | None] = lambda: None
        self._train_state: dict[str, Any] | None = None

    @property
    def rank(self) -> int:
        """Global rank of this process in the attached trainer, 0 without one."""
        return 0 if self.trainer is None else self.trainer.global_rank

    @property
    def world_size(self) -> int:
        """Number of processes of the attached trainer, 1 without one."""
        return 1 if self.trainer is None else self.trainer.world_size

    @property
    def device(self) -> torch.device:
        """Device of the batches: the attached trainer's, or the CPU without one."""
        return torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Moves a batch to the device; returns one that is already there without checking each of its tensors."""
        if isinstance(batch, Batch) and batch.images.device == device:
            return batch
        moved: Batch = super().transfer_batch_to_device(batch, device, dataloader_idx)
        return moved

    @property
    def train_label(self) -> Tensor:
        """Class of each training image, int64 ``(N,)``, indexed by a batch's ``index``, for losses with a memory."""
        raise NotImplementedError

    @property
    def train_views(self) -> int | None:
        """Number of views of all training images under augmentation, held out or not; ``None`` if not finite.

        A view's number stands for the same crop and flip of the same image in all runs with equal :meth:`views_facts`.
        """
        return None

    def val_facts(self) -> dict[str, str | list[float]] | None:
        """Plain values that determine the validation images and their order; None if they are not known."""
        return None

    def views_of(self, images: slice) -> Tensor:
        """Returns the numbers of all views of a slice of the training images, int64, in ascending order."""
        raise NotImplementedError(f"{type(self).__name__} does not number its views")

    def look_at(self, view: Tensor) -> Batch:
        """Returns the views with these numbers ``(B,)`` as a batch like those of training."""
        raise NotImplementedError(f"{type(self).__name__} does not number its views")

    def views_facts(self) -> dict[str, str | int | float | list[float]]:
        """Plain values that determine the content of the views; only if ``train_views`` is a number."""
        raise NotImplementedError(f"{type(self).__name__} does not number its views")

    @property
    def train_size(self) -> int:
        """Number of training images."""
        return self._split_sizes()[0]

    @property
    def val_size(self) -> int:
        """Number of validation images."""
        return self._split_sizes()[1]

    @property
    def test_size(self) -> int:
        """Number of images in the test split."""
        return self._split_sizes()[2]

    def describe(self) -> str:
        """One line for the console: name, classes, sizes and what validation runs on."""
        shape = "x".join(map(str, self.image_shape))
        subset = f" (subset {self.subset:g})" if self.subset < 1 else ""
        return (
            f"{self.name}: {self.num_classes} classes, {shape}, {self.train_size:,} train{subset} and "
            f"{self.test_size:,} test images, validated on {self.validated_on}{self._class_order()}"
        )

    def _class_order(self) -> str:
        """Returns a caution if other code is likely to have the classes in another order: numbers sorted as text."""
        names = self.class_names
        if not all(map(str.isdecimal, names)) or names == sorted(names, key=int):
            return ""
        caution = f"caution: classes in text order ({some(names)})"
        return f"; {caution}, a network trained elsewhere may have them in numeric order"

    def normalize_with(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        """Changes the normalisation of images, to that of the student's pretrained weights.

        Args:
            mean: mean of each channel, for values in [0, 1].
            std: standard deviation of each channel.
        """
        self.mean, self.std = mean, std

    def val_sample(self, batch_size: int) -> Iterable[Batch]:
        """Returns the validation images in an order that mixes the classes, for callers that use only the first ones.

        The order is fixed, and every process gets all images.

        Args:
            batch_size: images in a batch.
        """
        order = torch.randperm(self.val_size, generator=torch.Generator().manual_seed(0))
        return self._eval_loader(self.val_split, EpochSampler(self.val_size, list(order.split(batch_size))))

    def val_dataloader(self) -> Iterable[Batch]:
        """Returns a loader of the held-out training images, the data set's own validation split, or the test split."""
        return self._eval_loader(self.val_split, self.eval_sampler(self.val_size))

    def test_dataloader(self) -> Iterable[Batch]:
        """Returns a loader of the test split, with each image exactly once over all processes."""
        return self._eval_loader("test", self.eval_sampler(self.test_size))

    def _eval_loader(self, split: str, sampler: EpochSampler) -> Iterable[Batch]:
        """Returns a loader of a split without augmentation."""
        raise NotImplementedError

    def train_sampler(self) -> EpochSampler:
        """Creates the sampler of this process's share of the training split."""
        sampler = EpochSampler.for_training(
            self.train_size,
            self.batch_size,
            seed=self.seed,
            shuffle=self.shuffle,
            drop_last=self.drop_last,
            rank=self.rank,
            world_size=self.world_size,
        )
        sampler.repeat = bool(getattr(self.trainer, "overfit_batches", 0))
        return sampler

    @property
    def largest_eval_batch(self) -> int:
        """Largest evaluation batch over all processes: ``eval_batch_size`` or its default."""
        return self.eval_batch_size or self._usual_eval_batch

    @property
    def _usual_eval_batch(self) -> int:
        return 256

    def eval_sampler(self, size: int) -> EpochSampler:
        """Creates the sampler of this process's share of an evaluation split of ``size`` images."""
        return EpochSampler.for_evaluation(size, self.largest_eval_batch, rank=self.rank, world_size=self.world_size)

    def state_dict(self) -> dict[str, Any]:
        """Returns the position of the training loader."""
        loader = self._train_loader()
        return {} if loader is None else loader.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Stores the position for the next training loader.

        Lightning itself restores loaders only if they were not created before, but a schedule that needs the number of
        steps has created them.
        """
        self._train_state = dict(state_dict)

    def _for_training(self, loader: _Loader) -> _Loader:
        """Restores the position of a new training loader, and sets its mixing."""
        loader.mix = self.mix
        state, self._train_state = self._train_state, None
        if state:
            loader.load_state_dict(state)
        self._train_loader = weakref.ref(loader)  # weak, so that its workers end with the training loop
        return loader

    @property
    def split_facts(self) -> dict[str, int | float]:
        """The options that determine the held-out images, for the files of a run."""
        return {name: getattr(self, option) for name, option in self.split_options.items()}

    @property
    def eval_resize(self) -> int:
        """Length of an evaluation image's shorter side before the centre crop; here that of the image itself."""
        return self.image_shape[-1]

    @property
    def has_own_validation(self) -> bool:
        """Whether validation runs on other images than the test split's."""
        return self.val_fraction > 0

    @property
    def val_split(self) -> str:
        """The split that validation runs on: ``"val"`` if there is one, else ``"test"``."""
        return "val" if self.has_own_validation else "test"

    @property
    def validated_on(self) -> str:
        """The validation images in words, to complete "validated on"."""
        if self.val_fraction > 0:
            return f"{self.val_size:,} held-out training images (stratified, seed {self.seed})"
        return "the test split" + (", as the literature does" if self.is_benchmark else "")

    def _split_sizes(self) -> tuple[int, ...]:
        if self._sizes is None:
            raise RuntimeError(f"The data set {self.name} is not loaded yet: call prepare_data() and setup() first.")
        return self._sizes
