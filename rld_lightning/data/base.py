"""What every data set of this package offers to a training loop."""

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
    """What a loader yields, ready for a model on the training device; ``x, y = batch[:2]`` are images and labels.

    Attributes:
        images: normalised float32 images ``(B, 3, H, W)`` in ``channels_last`` memory format.
        label: classes, int64 ``(B,)``.
        index: positions in the split, int64 ``(B,)``; losses with a memory bank need them.
        strong: the same samples strongly augmented, otherwise like ``images``; ``None`` unless it was asked for.
        view: which of the finitely many views of all training images ``images`` are, int64 ``(B,)`` in
            [0, ``train_views``); ``None`` where there is no end of them, and in evaluation.
        other: what images that are mixtures have beside ``label``; ``None`` where they are none.
    """

    images: Tensor
    label: Tensor
    index: Tensor  # type: ignore[assignment]  # which hides a method of tuples
    strong: Tensor | None = None
    view: Tensor | None = None
    other: Other | None = None


def as_batch(batch: Any) -> Batch:
    """What anybody's loader yields, as a :class:`Batch`.

    Args:
        batch: one; or a list or tuple ``(images, label)``, or ``(images, label, index)``, of tensors. ``index`` is
            ``None`` where the loader does not say it: losses with a memory need it.

    Raises:
        ValueError: it is neither.
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
    """The common face of the data sets: splits, batch sizes and a description.

    Args:
        batch_size: training batch over *all* processes; each takes ``batch_size / world_size`` of it.
        eval_batch_size: largest evaluation batch over all processes; by default 256, and 1,024 of images that lie on a
            GPU, which takes as long to be told of a small batch as of a large one.
        val_fraction: share of the training split to hold out for validation, stratified, in [0, 1). With 0 validation
            runs on the test split, as the literature does; tune with more than 0.
        subset: share of the training images to train on, stratified, in (0, 1], for quick trials; validation and test
            images stay as they are.
        seed: seed of the validation split, of the subset, of the order of training samples and of their augmentation.
        augment: whether training images are augmented.
        flip: whether augmentation mirrors images with probability 1/2.
        shuffle: whether training samples are permuted anew in each epoch.
        drop_last: whether the last, smaller training batch of an epoch is left out.
        mixup: training images are mixed in pairs, in proportions of Beta(mixup, mixup); 0 for none. See
            :class:`~rld_lightning.data.mix.Mix`.
        cutmix: boxes of them are, with areas of Beta(cutmix, cutmix); 0 for none.
        strong_view: whether training batches have a second view of their samples, which methods such as MLKD learn
            from: augmented anew like the first and then by
            :class:`~rld_lightning.data.randaugment.RandAugment`. The first view is the same with and without it.

    Attributes:
        name: short name of the data set, such as ``"cifar100"``.
        num_classes: C.
        class_names: the C names, in the order of the labels.
        image_shape: ``(3, H, W)`` of a batch's images.
        mean: mean of each channel that images are normalised with, for values in [0, 1].
        std: standard deviation of each channel, likewise.
        split_options: the options that decide which images are held out, by what files of weights call them.
    """

    is_benchmark: ClassVar[bool] = False  # whether published tables are about it
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
        """Position of this process among all processes of the attached trainer."""
        return 0 if self.trainer is None else self.trainer.global_rank

    @property
    def world_size(self) -> int:
        """Number of processes of the attached trainer, 1 without one."""
        return 1 if self.trainer is None else self.trainer.world_size

    @property
    def device(self) -> torch.device:
        """Where batches are delivered: the attached trainer's device, the CPU without one."""
        return torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """A batch on the device; one that is there already as it is, without a look at each of its parts."""
        if isinstance(batch, Batch) and batch.images.device == device:
            return batch
        moved: Batch = super().transfer_batch_to_device(batch, device, dataloader_idx)
        return moved

    @property
    def train_label(self) -> Tensor:
        """Class of each training image, int64 ``(N,)``, at the position that a batch calls its ``index``.

        Losses with a memory look up in it which images are of one class.
        """
        raise NotImplementedError

    @property
    def train_views(self) -> int | None:
        """How many views augmentation makes of all training images, held out or not; ``None``: there is no end of them.

        One view is the same image, cropped and flipped alike, in every run with equal :meth:`views_facts`.
        """
        return None

    def val_facts(self) -> dict[str, str | list[float]] | None:
        """What decides how the validation images look, in their order, as plain values; None: it is not known."""
        return None

    def views_of(self, images: slice) -> Tensor:
        """Numbers of all views of some of the images that are trained on, int64, in ascending order."""
        raise NotImplementedError(f"{type(self).__name__} has views without number")

    def look_at(self, view: Tensor) -> Batch:
        """The views of these numbers ``(B,)``, of images that are trained on, as training batches have them."""
        raise NotImplementedError(f"{type(self).__name__} has views without number")

    def views_facts(self) -> dict[str, str | int | float | list[float]]:
        """What decides how the views look, as plain values; read where ``train_views`` is a number."""
        raise NotImplementedError(f"{type(self).__name__} has views without number")

    @property
    def train_size(self) -> int:
        """Number of images that are trained on."""
        return self._split_sizes()[0]

    @property
    def val_size(self) -> int:
        """Number of images that are validated on."""
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
        """A caution for the console where a network from elsewhere may well have the classes in another order."""
        names = self.class_names
        if not all(map(str.isdecimal, names)) or names == sorted(names, key=int):
            return ""
        return f"; caution: classes in text order ({some(names)}), a network from elsewhere may have them by number"

    def normalize_with(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        """Has images normalised otherwise from now on, as a network wants that is to learn from them.

        Args:
            mean: mean of each channel, for values in [0, 1].
            std: standard deviation of each channel.
        """
        self.mean, self.std = mean, std

    def val_sample(self, batch_size: int) -> Iterable[Batch]:
        """The validation images in an order that mixes the classes, for who looks at the first of them only.

        All of them are there, in every process, and always in the same order.

        Args:
            batch_size: images in a batch.
        """
        order = torch.randperm(self.val_size, generator=torch.Generator().manual_seed(0))
        return self._eval_loader(self.val_split, EpochSampler(self.val_size, list(order.split(batch_size))))

    def val_dataloader(self) -> Iterable[Batch]:
        """The held-out training images, the data set's own validation split, or else the test split."""
        return self._eval_loader(self.val_split, self.eval_sampler(self.val_size))

    def test_dataloader(self) -> Iterable[Batch]:
        """The test split, each image exactly once over all processes."""
        return self._eval_loader("test", self.eval_sampler(self.test_size))

    def _eval_loader(self, split: str, sampler: EpochSampler) -> Iterable[Batch]:
        """The images of a split that a sampler chooses, as they are."""
        raise NotImplementedError

    def train_sampler(self) -> EpochSampler:
        """Makes the sampler of this process's share of the training split."""
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
    def _usual_eval_batch(self) -> int:
        return 256

    def eval_sampler(self, size: int) -> EpochSampler:
        """Makes the sampler of this process's share of an evaluation split of ``size`` images."""
        batch_size = self.eval_batch_size or self._usual_eval_batch
        return EpochSampler.for_evaluation(size, batch_size, rank=self.rank, world_size=self.world_size)

    def state_dict(self) -> dict[str, Any]:
        """Where the training loader is."""
        loader = self._train_loader()
        return {} if loader is None else loader.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Lets the next training loader go on from there.

        Lightning restores the state of loaders only if nobody has asked for them before, and a schedule that is told
        the number of steps has.
        """
        self._train_state = dict(state_dict)

    def _for_training(self, loader: _Loader) -> _Loader:
        """Brings a new training loader to where it is to go on, and has it mix images."""
        loader.mix = self.mix
        state, self._train_state = self._train_state, None
        if state:
            loader.load_state_dict(state)
        self._train_loader = weakref.ref(loader)  # whose workers are to end with the loop that uses it
        return loader

    @property
    def split_facts(self) -> dict[str, int | float]:
        """What decides which images are held out, for the files that a run leaves."""
        return {name: getattr(self, option) for name, option in self.split_options.items()}

    @property
    def eval_resize(self) -> int:
        """What the shorter side of an evaluation image becomes before its centre is cropped; here: it has that size."""
        return self.image_shape[-1]

    @property
    def has_own_validation(self) -> bool:
        """Whether validation runs on other images than the test split's."""
        return self.val_fraction > 0

    @property
    def val_split(self) -> str:
        """What validation runs on: ``"test"``, or ``"val"`` where these are other images."""
        return "val" if self.has_own_validation else "test"

    @property
    def validated_on(self) -> str:
        """What validation runs on, in words that complete "validated on"."""
        if self.val_fraction > 0:
            return f"{self.val_size:,} held-out training images (stratified, seed {self.seed})"
        return "the test split" + (", as the literature does" if self.is_benchmark else "")

    def _split_sizes(self) -> tuple[int, ...]:
        if self._sizes is None:
            raise RuntimeError(f"The data set {self.name} is not loaded yet: call prepare_data() and setup() first.")
        return self._sizes
