"""A teacher that stays as it is: never trained, never saved with the student, in a precision and layout of its own."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Self

import torch
from torch import Tensor, nn

from rld_lightning.models.complexity import count_parameters
from rld_lightning.models.normalisation import Relook
from rld_lightning.models.taps import forward_with_taps
from rld_lightning.models.teacher.ensemble import Ensemble
from rld_lightning.models.teacher.fold import fold_if_same, fuse_conv_bn
from rld_lightning.models.teacher.logits_table import LogitsTable
from rld_lightning.models.teacher.resident_table import resident
from rld_lightning.models.teacher.whole_linear import WholeLinear, last_linear

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


class FrozenTeacher(nn.Module):
    """A model that stays in evaluation mode and without gradients, whatever is called on it.

    The model is not copied: it is frozen, and converted if you set a dtype or layout. Its weights
    under their own keys are ``teacher.model.state_dict()``. A training module keeps its teacher with ``hold_outside``.

    Args:
        model: the trained model, which maps images to logits.
        dtype: dtype, or its name, that the teacher computes in. It is then kept through ``.half()``,
            ``.to(dtype)`` and the like, and autocast does not reach the teacher. ``None`` leaves the model as it is and
            follows autocast, up to the last linear layer, which makes the logits in float32: in bfloat16 several
            classes would often have the same one, and methods that compare them would take a side by chance.
        channels_last: keep weights and images in channels-last layout.
        fuse: fold every BatchNorm that follows a convolution into it; logits are the same up to rounding, and features
            can no longer be tapped. It pays together with ``channels_last``, and adds nothing to
            ``torch.compile``.
        shard: share the weights out over the processes of each machine, for a teacher that does not fit one device;
            :meth:`place` does it. Weights are then in contiguous layout. It cannot be fused.
        relook: converts images to the preprocessing that the model was trained with; None if they have it.
        batch_statistics: where features are tapped, batch norms normalise by the batch, as in training mode, and keep
            their running statistics as they are. It cannot be fused.

    Raises:
        ValueError: an unknown dtype, or ``fuse`` with ``shard`` or ``batch_statistics``.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        dtype: torch.dtype | str | None = None,
        channels_last: bool = False,
        fuse: bool = False,
        shard: bool = False,
        relook: Relook | None = None,
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
                "a fused teacher has no blocks to share out; set model.teacher.fuse=false or model.teacher.shard=false."
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
            for last in filter(None, lasts):  # of another class, not wrapped, so that its weights keep their keys
                last.__class__ = WholeLinear
        self.exact_logits = self.dtype is None and None not in lasts
        self.relook = relook
        self.table: LogitsTable | None = None
        self.validation_table: LogitsTable | None = None
        self.train()
        self.requires_grad_()

    def fold(self, image_shape: Sequence[int]) -> int:
        """Folds every BatchNorm that follows a convolution into it, as ``fuse`` does, where that is sure to be safe.

        The model itself stays as it is, for those who hold it.

        Args:
            image_shape: channels, height and width, of images to try whether the logits stay the same.

        Returns:
            how many were folded; 0 where the model cannot be traced, or would give other logits.
        """
        folded, count = fold_if_same(self.model, self.seen(image_shape))
        if count:
            self.model, self.fused = folded.to(memory_format=self.memory_format), True
            self.requires_grad_()
        return count

    def seen(self, image_shape: Sequence[int]) -> tuple[int, int, int]:
        """Channels, height and width of the images that the model gets, made of those of ``image_shape``."""
        channels, height, width = image_shape
        if self.relook is not None and self.relook.size is not None:
            height, width = self.relook.size
        return channels, height, width

    def remember(self, table: LogitsTable) -> None:
        """From now on, looks logits of known views up, and keeps those that it computes.

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
        """Logits, and the outputs of the submodules at ``paths``.

        Args:
            images: ``(B, C, H, W)``, floating-point; converted to the teacher's dtype and layout.
            paths: submodules to tap, as ``forward_with_taps`` names them.
            view: which views of which images they are, int64 ``(B,)``, so that a teacher that remembers need not look.
            label: their classes, int64 ``(B,)``, likewise.

        Returns:
            logits ``(B, K)`` in float32, or float64 if computed in that, and the tapped features by path in the
            dtype they were computed in.
        """
        if self.table is None or view is None or label is None or paths:
            return self._compute(images, paths)
        if self.table.complete:  # without asking the device what it lacks
            return self.table.read_known(view), {}
        return self._look_up(self.table, images, view, label), {}

    def validate(self, images: Tensor, index: Tensor | None, label: Tensor) -> Tensor:
        """Logits ``(B, K)`` of validation images, which it may have seen before.

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
            # A compiled network is compiled for whole batches.
            missing = torch.ones_like(known) if self.model._compiled_call_impl else ~known
            computed, _ = self._compute(images[missing], ())
            logits[missing] = table.write(rows[missing], computed, label[missing])
        return logits

    def _compute(self, images: Tensor, paths: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        if self.fused and paths:
            raise ValueError(f"a teacher with fuse=True has no features to tap ({', '.join(paths)}); use fuse=False")
        if self.model.training:  # someone reached past this class
            self.model.eval()
        own_precision = torch.autocast(images.device.type, enabled=False) if self.dtype else nullcontext()
        # Not inference_mode: the losses save the teacher's outputs for the backward pass, which it forbids.
        norms = batch_statistics(self.model) if self.batch_statistics and paths else nullcontext()
        with torch.no_grad(), own_precision, norms:
            if self.relook is not None:
                images = self.relook(images)
            images = images.to(dtype=self._input_dtype(images), memory_format=self.memory_format)
            logits, features = forward_with_taps(self.model, images, paths)
            return logits.to(torch.promote_types(logits.dtype, torch.float32)), features

    def _input_dtype(self, images: Tensor) -> torch.dtype:
        return self.dtype or next((p.dtype for p in self.model.parameters() if p.is_floating_point()), images.dtype)

    def place(self, device: torch.device, processes: int = 1) -> None:
        """Brings the teacher to where it computes: all of it or, with ``shard``, this process's share.

        Args:
            device: this process's own.
            processes: how many share the teacher out: all of this machine.

        Raises:
            ValueError: there is one process, and the teacher is to be shared out.
        """
        if self.table is not None:
            self.table = resident(self.table, device)
        if not self.shard:
            self.to(device)
            return
        if processes < 2:
            raise ValueError(f"shard=True shares the teacher out over at least two processes, not {processes}.")
        from rld_lightning.models.teacher.sharding import shard_over_machine  # FSDP takes a second

        if self.relook is not None:
            self.relook.to(device)
        shard_over_machine(self.model, device, processes)

    def train(self, mode: bool = True) -> Self:
        """Does nothing: a teacher is always in evaluation mode, so that its BatchNorm statistics never move."""
        return super().train(False)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Does nothing: a teacher never takes gradients."""
        return super().requires_grad_(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # `.to`, `.half`, `.cuda` and the like all end here: follow them to a device, but not to another precision.
        def keep_dtype(tensor: Tensor) -> Tensor:
            applied = fn(tensor)
            return applied if applied.dtype == tensor.dtype else tensor.to(applied.device)

        return super()._apply(keep_dtype if self.dtype else fn, recurse)


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """Has the batch norms of a model in evaluation mode normalise by the batch; running statistics stay as they are."""
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
