"""The frozen teacher: never trained, never saved with the student, with its own precision and layout."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Self

import torch
from torch import Tensor, nn

from rld_lightning.models.complexity import count_parameters
from rld_lightning.models.normalisation import Renormalise
from rld_lightning.models.taps import forward_with_taps
from rld_lightning.models.teacher.ensemble import Ensemble
from rld_lightning.models.teacher.fold import fold_if_same, fuse_conv_bn
from rld_lightning.models.teacher.full_precision_linear import FullPrecisionLinear, last_linear
from rld_lightning.models.teacher.logits_table import LogitsTable
from rld_lightning.models.teacher.resident_table import resident
from rld_lightning.mps import image_layout

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


class FrozenTeacher(nn.Module):
    """A model that is always in evaluation mode and without gradients, whatever is called on it.

    The model is not copied: it is frozen, and converted if you set a dtype or layout. Its weights under their own keys
    are ``teacher.model.state_dict()``. A training module keeps its teacher with ``hold_outside``.

    Args:
        model: the trained model, which maps images to logits.
        dtype: the dtype (or its name) of the teacher's computation. It is unaffected by ``.half()``, ``.to(dtype)``
            etc. and by autocast. ``None`` leaves the model unchanged and follows autocast, except for the last linear
            layer, which computes the logits in float32: in bfloat16 several classes would often have equal logits, and
            methods that compare them would decide by chance.
        channels_last: keep weights and images in channels-last layout (except on an Apple GPU, see :meth:`place`).
        fuse: fold every BatchNorm that follows a convolution into it; logits are equal up to rounding, and features
            can no longer be tapped. It is faster together with ``channels_last``, but not with ``torch.compile``.
        shard: shard the weights over the processes of each machine (done by :meth:`place`), for a teacher that does not
            fit one device. Weights are then in contiguous layout. Cannot be combined with ``fuse``.
        renormalise: converts images to the preprocessing that the model was trained with; None if they have it.
        batch_statistics: if features are tapped, batch norms normalise by the batch's statistics, as in training mode,
            without updating the running ones. Cannot be combined with ``fuse``.

    Raises:
        ValueError: the dtype is unknown, or ``fuse`` is combined with ``shard`` or ``batch_statistics``.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        dtype: torch.dtype | str | None = None,
        channels_last: bool = False,
        fuse: bool = False,
        shard: bool = False,
        renormalise: Renormalise | None = None,
        batch_statistics: bool = False,
    ) -> None:
        super().__init__()
        if fuse and batch_statistics:
            raise ValueError(
                "a fused teacher has no batch norms; set model.teacher.fuse=false, or "
                "model.teacher.batch_statistics=false."
            )
        if fuse and shard:
            raise ValueError(
                "a fused teacher has no blocks to shard; set model.teacher.fuse=false or model.teacher.shard=false."
            )
        self.shard = shard
        self.batch_statistics = batch_statistics
        self.dtype = _parse_dtype(dtype)
        self.memory_format = torch.channels_last if channels_last else torch.preserve_format
        self.parameter_count = count_parameters(model)
        model.eval()
        lasts = [last_linear(member) for member in (model.members if isinstance(model, Ensemble) else (model,))]
        executed = fuse_conv_bn(model) if fuse else model
        self.fused = executed is not model
        self.model = executed.to(memory_format=self.memory_format)
        if self.dtype is not None:
            self.model = self.model.to(dtype=self.dtype)
        else:
            for last in filter(None, lasts):  # a changed class instead of a wrapper, so that the keys do not change
                last.__class__ = FullPrecisionLinear
        self.exact_logits = self.dtype is None and None not in lasts
        self.renormalise = renormalise
        self.table: LogitsTable | None = None
        self.validation_table: LogitsTable | None = None
        self.train()
        self.requires_grad_()

    def fold(self, image_shape: Sequence[int]) -> int:
        """Folds every BatchNorm that follows a convolution into it, like ``fuse``, if the logits stay the same.

        The original model object is not changed.

        Args:
            image_shape: channels, height and width of the test images.

        Returns:
            how many were folded; 0 if the model cannot be traced, or its logits would change.
        """
        folded, count = fold_if_same(self.model, self.input_shape(image_shape))
        if count:
            self.model, self.fused = folded.to(memory_format=self.memory_format), True
            self.requires_grad_()
        return count

    def input_shape(self, image_shape: Sequence[int]) -> tuple[int, int, int]:
        """Returns channels, height and width of the model's input for images of ``image_shape``."""
        channels, height, width = image_shape
        if self.renormalise is not None and self.renormalise.size is not None:
            height, width = self.renormalise.size
        return channels, height, width

    def use_table(self, table: LogitsTable) -> None:
        """Uses a table as a cache of the logits from now on.

        Args:
            table: of the same teacher, see :func:`~rld_lightning.models.teacher.logits_table.table_key`.
        """
        self.table = table

    def forward(
        self,
        images: Tensor,
        paths: Sequence[str] = (),
        *,
        view: Tensor | None = None,
        label: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the logits, and the outputs of the submodules at ``paths``.

        Args:
            images: ``(B, C, H, W)``, floating-point; converted to the teacher's dtype and layout.
            paths: submodules to tap, see ``forward_with_taps``.
            view: indices of the views, int64 ``(B,)``, to look up cached logits.
            label: the classes, int64 ``(B,)``, to look up cached logits.

        Returns:
            the logits ``(B, K)`` in float32 (float64 if computed in that), and the tapped features by path in the
            dtype that they were computed in.
        """
        if self.table is None or view is None or label is None or paths:
            return self._compute(images, paths)
        if self.table.complete:  # no need to synchronise with the device to check
            return self.table.read_known(view), {}
        return self._look_up(self.table, images, view, label), {}

    def validate(self, images: Tensor, index: Tensor | None, label: Tensor) -> Tensor:
        """Returns the logits ``(B, K)`` of validation images, from the cache if there is one.

        Args:
            images: ``(B, C, H, W)``.
            index: their positions among all validation images, int64 ``(B,)``.
            label: their classes, int64 ``(B,)``.
        """
        if self.validation_table is None or index is None:
            return self(images)[0]
        return self._look_up(self.validation_table, images, index, label)

    def _look_up(self, table: LogitsTable, images: Tensor, rows: Tensor, label: Tensor) -> Tensor:
        logits, known = table.read(rows)
        if not known.all():
            # A compiled network needs whole batches.
            missing = torch.ones_like(known) if self.model._compiled_call_impl else ~known
            computed, _ = self._compute(images[missing], ())
            logits[missing] = table.write(rows[missing], computed, label[missing])
        return logits

    def _compute(self, images: Tensor, paths: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        if self.fused and paths:
            raise ValueError(f"a teacher with fuse=True has no features to tap ({', '.join(paths)}); use fuse=False")
        if self.model.training:  # someone called train() on the inner model
            self.model.eval()
        own_precision = torch.autocast(images.device.type, enabled=False) if self.dtype else nullcontext()
        # Not inference_mode, which forbids saving the teacher's outputs for the backward pass, as losses do.
        norms = batch_statistics(self.model) if self.batch_statistics and paths else nullcontext()
        with torch.no_grad(), own_precision, norms:
            if self.renormalise is not None:
                images = self.renormalise(images)
            images = images.to(dtype=self._input_dtype(images), memory_format=self.memory_format)
            logits, features = forward_with_taps(self.model, images, paths)
            return logits.to(torch.promote_types(logits.dtype, torch.float32)), features

    def _input_dtype(self, images: Tensor) -> torch.dtype:
        return self.dtype or next((p.dtype for p in self.model.parameters() if p.is_floating_point()), images.dtype)

    def place(self, device: torch.device, processes: int = 1) -> None:
        """Moves the teacher to the device; with ``shard``, only this process's shard.

        Args:
            device: this process's device.
            processes: number of processes on this machine, over which the teacher is sharded.

        Raises:
            ValueError: ``shard`` is set, and there is only one process.
        """
        if self.table is not None:
            self.table = resident(self.table, device)
        if not self.shard:
            if image_layout(device) == torch.contiguous_format:
                self.memory_format = torch.contiguous_format
                self.model.to(memory_format=self.memory_format)
            self.to(device)
            return
        if processes < 2:
            raise ValueError(f"shard=True shards the teacher over at least two processes, not {processes}.")
        from rld_lightning.models.teacher.sharding import shard_over_machine  # FSDP takes a second

        if self.renormalise is not None:
            self.renormalise.to(device)
        shard_over_machine(self.model, device, processes)

    def train(self, mode: bool = True) -> Self:
        """Does nothing: a teacher is always in evaluation mode, so that its BatchNorm statistics never change."""
        return super().train(False)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Does nothing: a teacher never has gradients."""
        return super().requires_grad_(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # `.to`, `.half`, `.cuda` etc. all call this: apply changes of the device, but not of the dtype.
        def keep_dtype(tensor: Tensor) -> Tensor:
            applied = fn(tensor)
            return applied if applied.dtype == tensor.dtype else tensor.to(applied.device)

        return super()._apply(keep_dtype if self.dtype else fn, recurse)


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """Context in which a model's batch norms use the batch's statistics, without updating the running ones."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    for norm in norms:
        norm.training, norm.track_running_stats = True, False
    try:
        yield
    finally:
        for norm in norms:
            norm.training, norm.track_running_stats = False, True


def _parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    parsed = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and parsed not in DTYPES.values():
        raise ValueError(f"the teacher's dtype must be one of {', '.join(DTYPES)} or None, not {dtype!r}")
    return parsed
