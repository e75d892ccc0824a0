"""Ends a run whose loss or weights are no numbers any more, before anything of it is saved, and says why."""

import math
from collections import deque
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from rld_lightning.console import print_line
from rld_lightning.data.base import Batch, as_batch
from rld_lightning.distributed import gathered
from rld_lightning.errors import UserError
from rld_lightning.hydra.quoting import as_argument
from rld_lightning.module import DistillationModule
from rld_lightning.runs.checkpoint import is_there
from rld_lightning.runs.files import DIVERGED, LAST
from rld_lightning.watching import measured_in_graph

_LARGE_IMAGES = 100.0  # normalised ones reach 3 or so
_MEMORY = 0.98  # of the mean loss that a spike is compared to: some 50 steps


class Diverged(UserError):
    """The loss or the weights are no numbers any more; what to do about it stands in the message."""


class Divergence(Callback):
    """Looks at each step on the device, and reads what it saw every few steps and before whatever would save it.

    A run ends where the loss, or the weights, are not finite: all ranks together, with one sentence that tells a broken
    teacher or images of a wrong scale from a learning rate that is too large. Neither ``last.ckpt`` nor ``best.ckpt``
    is overwritten; ``diverged.npz`` names the batch (``index`` in the training split, and ``label``; ``index_before``
    and ``label_before`` of the batch before it, whose gradient may have been the cause).

    A finite loss that jumps is said in one line, at most once an epoch: one above ``spike`` times both the mean of the
    last 50 steps or so and the run's first loss.

    Args:
        dirpath: the run's folder.
        every: steps between two readings. Each waits for the device, and for the other ranks.
        spike: how many times the usual loss is worth a line.
    """

    def __init__(self, dirpath: str | Path, every: int = 20, spike: float = 10.0) -> None:
        self.folder = Path(dirpath)
        self.every = every
        self.spike = spike
        self.step = 0  # batches of this process, to tell its recent ones apart
        self.looked = 0  # the step after which the weights were looked at: they change in no other way
        self.recent: deque[_Recent] = deque(maxlen=every + 1)
        self.told = -1  # the epoch whose spike was said
        self.rows: list[Tensor] = []  # of each step since the last reading: its loss, then as in `_Values`
        self.usual: tuple[float, float] | None = None  # mean of the latest losses, and the first

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: DistillationModule, outputs: dict[str, Any], batch: Batch, batch_idx: int
    ) -> None:
        """Looks at a step, and now and then reads what was seen."""
        batch = as_batch(batch)
        seen = measured_in_graph(self, pl_module)
        place = f"epoch {trainer.current_epoch + 1}, batch {batch_idx + 1}"
        self.recent.append(_Recent(self.step, place, batch.index, batch.label, tuple(outputs["terms"])))
        # A copy: what a graph computes is overwritten by its next replay.
        self.rows.append(self.measure_step(pl_module, outputs, batch) if seen is None else seen.clone())
        self.step += 1
        if self.step % self.every == 0:
            self._read(trainer, pl_module)

    def measure_step(self, pl_module: DistillationModule, outputs: Mapping[str, Any], batch: Batch) -> Tensor:
        """A step's row, see :class:`~rld_lightning.watching.Watcher`."""
        terms: list[Tensor] = list(outputs["terms"].values())
        loss = torch.stack(terms).sum().float()
        teacher = outputs.get("teacher_logits")
        seen = [loss, _largest(batch.images), _largest(outputs["student_logits"])]
        seen += [loss.new_zeros(()) if teacher is None else _largest(teacher), _right(teacher, outputs["label"], loss)]
        return torch.stack([*seen, *(term.float() for term in terms)])

    def on_validation_start(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        """Looks at the weights, of which the best are saved after the validation."""
        if trainer.state.stage != "sanity_check" and self.recent:
            self._read(trainer, pl_module, state=True)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        """Looks at the weights."""
        self._read(trainer, pl_module, state=True)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: DistillationModule, checkpoint: dict[str, Any]) -> None:
        """Looks at the weights and the optimizer's state, which are not saved if they are not finite."""
        self._read(trainer, pl_module, state=True)

    def _worst(self) -> tuple[list[float], list[float]]:
        """What the steps since the last reading came to, which waits for the device.

        Returns:
            the number of the first step without a finite loss and its values, -1 before them where there is none; and
            of the largest spike its ratio to the usual loss, the number of the step, its loss and the usual one.
        """
        rows: list[list[float]] = torch.stack(self.rows).tolist() if self.rows else []
        bad, jump = [-1.0] * (6 + len(self.recent[-1].terms)), [0.0] * 4
        for step, row in enumerate(rows, self.step - len(rows)):
            loss = row[0]
            if bad[0] < 0 and not math.isfinite(loss):
                bad = [float(step), *row]
            mean, first = self.usual or (abs(loss), abs(loss))
            ratio = loss / max(mean, first, 1e-6)
            if ratio > jump[0]:
                jump = [ratio, float(step), loss, mean]
            # A spike counts as the largest loss that is none: what is usual must not follow it at once.
            self.usual = mean + (1 - _MEMORY) * (min(abs(loss), self.spike * mean) - mean), first
        self.rows = []
        return bad, jump

    def _read(self, trainer: Trainer, module: DistillationModule, *, state: bool = False) -> None:
        """Reads what all ranks saw, which waits for the device.

        Args:
            state: whether to look at weights, buffers and the optimizer's state as well.

        Raises:
            Diverged: on all ranks, in the same words.
        """
        if not self.recent:  # no step since the run began or went on
            return
        state, self.looked = state and self.looked != self.step, self.step if state else self.looked
        finite = _state_is_finite(trainer, module) if state else True
        bad, jump = self._worst()
        ranks = [[*bad, *jump, float(finite)]]
        if trainer.world_size > 1:
            seen = torch.tensor(ranks[0], device=module.device)
            everyones = [torch.empty_like(seen) for _ in range(trainer.world_size)]
            torch.distributed.all_gather(everyones, seen)
            ranks = torch.stack(everyones).tolist()
        latest = self.recent[-1]
        if worst := min((rank[: len(bad)] for rank in ranks if rank[0] >= 0), default=None):
            step, loss, images, student, teacher, right, *terms = worst
            values = _Values(loss, images, student, teacher, right, dict(zip(latest.terms, terms, strict=True)))
            self._end(trainer, int(step), values)
        if not all(rank[-1] for rank in ranks):
            self._end(trainer, latest.step, None)
        self._say_spike(trainer, max(rank[-5:-1] for rank in ranks))

    def _say_spike(self, trainer: Trainer, jump: list[float]) -> None:
        ratio, step, loss, mean = jump
        if ratio <= self.spike or self.told == trainer.current_epoch:
            return
        self.told = trainer.current_epoch
        place = self._place(int(step))
        print_line("loss", f"{place}: {loss:.3g}, up from {mean:.3g}; it is finite, and training continues")

    def _place(self, step: int) -> str:
        found = next((recent for recent in self.recent if recent.step == step), self.recent[-1])
        return found.place

    def _end(self, trainer: Trainer, step: int, values: "_Values | None") -> None:
        """Leaves the batch, and ends the run."""
        self._leave_batch(trainer, step)
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        classes = trainer.lightning_module.hparams["num_classes"]
        images = len(self.recent[-1].label)
        cause, remedy = why(values, rate=rate, classes=classes, images=images)
        message = f"training diverged in {self._place(step)}: {cause}. "
        last = self.folder / LAST
        if remedy is not None:
            message += f"{remedy}, and start over. "
        elif is_there(last):
            message += (
                f"Resume from before that with {as_argument('resume', last)} and a smaller recipe.optimizer.lr, or "
                "with trainer.gradient_clip_val=1. "
            )
        else:
            message += "Start over with a smaller recipe.optimizer.lr, or with trainer.gradient_clip_val=1. "
        named = f"; the batch is named in {file}" if (file := self.folder / DIVERGED).exists() else ""
        raise Diverged(f"{message}Nothing of it was saved{named}.")

    def _leave_batch(self, trainer: Trainer, step: int) -> None:
        """Writes which images the step saw, on all ranks together, and those of the step before."""
        own: dict[str, Tensor] = {}
        for name, wanted in (("", step), ("_before", step - 1)):
            for recent in self.recent:
                if recent.step == wanted:
                    named = {f"index{name}": recent.index, f"label{name}": recent.label}
                    own |= {key: value for key, value in named.items() if value is not None}
        parts = gathered(own)
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            arrays: dict[str, Any] = {name: torch.cat([part[name] for part in parts]).numpy() for name in own}
            with suppress(OSError):  # a full disk is not to hide why the run ends
                np.savez(self.folder / DIVERGED, **arrays)


@dataclass(frozen=True)
class _Recent:
    """One of the latest steps: its number, what to call it, which images it saw, and its terms' names."""

    step: int
    place: str
    index: Tensor
    label: Tensor
    terms: tuple[str, ...]


@dataclass(frozen=True)
class _Values:
    """What the first step without a finite loss had: largest absolute values, and the teacher's right answers."""

    loss: float  # the sum of the terms
    images: float  # of the normalised images
    student: float  # of the student's logits
    teacher: float  # of the teacher's, 0 without one
    right: float  # how many images of the batch the teacher gets right; -1 without one
    terms: Mapping[str, float]  # by name


def why(values: _Values | None, *, rate: float, classes: int, images: int) -> tuple[str, str | None]:
    """Why a run diverged, and what to do about it.

    Args:
        values: of the first step without a finite loss; None where only the weights are not finite.

    Returns:
        the cause; and the way out, None where it is a smaller learning rate or clipping.
    """
    if values is None:
        return f"the weights are not finite after it, at a learning rate of {rate:.3g}", None
    terms = ", ".join(f"{name} {value:.3g}" for name, value in values.terms.items() if not np.isfinite(value))
    loss = f"the loss is {values.loss:.3g}" + (f" ({terms})" if terms and len(values.terms) > 1 else "")
    if not values.images < _LARGE_IMAGES:
        found = f"reach {values.images:.3g}" if np.isfinite(values.images) else "are not finite"
        return (
            f"{loss}, and the normalised images {found}, where 3 is usual: the mean and std of the data do not fit",
            "Put these right, or see what is wrong with the images of the batch",
        )
    if not np.isfinite(values.teacher):
        return (
            f"{loss}, and the teacher's logits are not finite",
            "Choose another model.teacher.weights, or a wider model.teacher.dtype",
        )
    chance = 1 / classes
    if values.right >= 0 and values.right / images <= chance + 2 * (chance * (1 - chance) / images) ** 0.5:
        return (
            f"{loss}, and the teacher gets {values.right:.0f} of the batch's {images} images right, which is chance",
            "See whether model.teacher.weights are of these classes, in this order and with this normalisation",
        )
    return f"{loss} at a learning rate of {rate:.3g}", None


def _largest(values: Tensor) -> Tensor:
    """The largest absolute value, NaN where there is one."""
    return values.detach().abs().amax().float() if values.numel() else values.new_zeros((), dtype=torch.float32)


def _right(teacher: Tensor | None, label: Tensor, like: Tensor) -> Tensor:
    return like.new_full((), -1.0) if teacher is None else (teacher.argmax(1) == label).sum().to(like.dtype)


def _state_is_finite(trainer: Trainer, module: DistillationModule) -> bool:
    found = [*module.state_dict().values(), *_optimizer_tensors(trainer)]
    tensors = [value for value in found if value.is_floating_point()]
    # A finite sum has finite summands, and takes a third of the time; large ones may have another.
    sums = torch.stack([value.sum().to(module.device, torch.float32) for value in tensors])
    return bool(sums.isfinite().all()) or all(bool(value.isfinite().all()) for value in tensors)


def _optimizer_tensors(trainer: Trainer) -> Iterable[Tensor]:
    for optimizer in trainer.optimizers:
        for state in optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))
