"""Stops a run whose loss or weights are not finite, before they are saved, and diagnoses the cause."""

import math
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from rld_lightning.callbacks.checkpoint_files import files_of
from rld_lightning.console import print_line
from rld_lightning.data.base import Batch, as_batch
from rld_lightning.distributed import gathered
from rld_lightning.errors import UserError
from rld_lightning.hydra.quoting import as_argument
from rld_lightning.module import DistillationModule
from rld_lightning.runs.checkpoint import checkpoint_exists
from rld_lightning.runs.files import DIVERGED, LAST
from rld_lightning.trainer_callbacks import measured_in_graph

_LARGE_IMAGES = 100.0  # normalised images reach about 3
_MEMORY = 0.98  # of the mean loss to which a spike is compared: about 50 steps


class Diverged(UserError):
    """The loss or the weights are not finite; the message says what to do."""


class Divergence(Callback):
    """Measures each step on the device, and reads the values every few steps and before anything is saved.

    The run is stopped if the loss or the weights are not finite: on all ranks together, with one sentence that
    distinguishes a broken teacher or wrongly scaled images from too large a learning rate. Neither ``last.ckpt`` nor
    ``best.ckpt`` is overwritten; ``diverged.npz`` names the batch (``index`` in the training split, and ``label``;
    ``index_before`` and ``label_before`` of the previous batch, whose gradient may have been the cause).

    A spike of a finite loss is printed, at most once per epoch: a loss above ``spike`` times both the mean of about the
    last 50 steps and the run's first loss.

    Args:
        dirpath: the run directory.
        every: steps between two readings. Each synchronises with the device and the other ranks.
        spike: ratio to the usual loss from which a spike is printed.
    """

    def __init__(self, dirpath: str | Path, every: int = 20, spike: float = 10.0) -> None:
        self.folder = Path(dirpath)
        self.every = every
        self.spike = spike
        self.step = 0  # batches of this process, to identify its recent ones
        self.checked_step = 0  # the step after which the weights were checked: only steps change them
        self.recent: deque[_Recent] = deque(maxlen=every + 1)
        self.spike_epoch = -1  # the epoch whose spike was printed
        self.rows: list[Tensor] = []  # one per step since the last reading: see `measure_step`
        self.usual: tuple[float, float] | None = None  # mean of the latest losses, and the first

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: DistillationModule, outputs: dict[str, Any], batch: Batch, batch_idx: int
    ) -> None:
        """Measures a step, and reads the measurements every few steps."""
        batch = as_batch(batch)
        measured = measured_in_graph(self, pl_module)
        place = f"epoch {trainer.current_epoch + 1}, batch {batch_idx + 1}"
        terms, rate = tuple(outputs["terms"]), pl_module.rate
        self.recent.append(_Recent(self.step, place, batch.index, batch.label, terms, rate))
        # A copy: a CUDA graph's next replay overwrites its outputs.
        self.rows.append(self.measure_step(pl_module, outputs, batch) if measured is None else measured.clone())
        self.step += 1
        if (batch_idx + 1) % self.every == 0:  # as `Throughput` counts, so that a GPU is waited for once
            self._read(trainer, pl_module)

    def measure_step(self, pl_module: DistillationModule, outputs: Mapping[str, Any], batch: Batch) -> Tensor:
        """Returns a step's row, see :class:`~rld_lightning.trainer_callbacks.Watcher`.

        It has the loss, the number of images that the teacher classifies correctly (-1 without one), the least and the
        largest value of the images and of both networks' logits (NaN if there is one), and the terms.
        """
        terms: list[Tensor] = list(outputs["terms"].values())
        loss = torch.stack(terms).sum()
        teacher = outputs.get("teacher_logits")
        right = loss.new_full((), -1.0) if teacher is None else (teacher.argmax(1) == outputs["label"]).sum()
        extremes: list[Tensor] = []
        for values in (batch.images, outputs["student_logits"], teacher):
            extremes += [loss.new_zeros(())] * 2 if values is None or not values.numel() else values.detach().aminmax()
        return torch.stack([value.float() for value in (loss, right, *extremes, *terms)])

    def on_validation_start(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        """Checks the weights, the best of which are saved after the validation."""
        if trainer.state.stage != "sanity_check" and self.recent:
            self._read(trainer, pl_module, state=True)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        """Checks the weights."""
        self._read(trainer, pl_module, state=True)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: DistillationModule, checkpoint: dict[str, Any]) -> None:
        """Checks the weights and the optimizer's state; they are not saved if they are not finite."""
        self._read(trainer, pl_module, state=True)

    def _worst_rows(self) -> tuple[list[float], list[float]]:
        """Reads the rows since the last reading, which synchronises with the device.

        Returns:
            the number of the first step without a finite loss and its values, -1 first if there is none; and for the
            largest spike the ratio to the usual loss, the step's number, its loss and the usual loss.
        """
        rows: list[list[float]] = torch.stack(self.rows).tolist() if self.rows else []
        bad, spike = [-1.0] * (9 + len(self.recent[-1].terms)), [0.0] * 4
        for step, row in enumerate(rows, self.step - len(rows)):
            loss = row[0]
            if bad[0] < 0 and not math.isfinite(loss):
                bad = [float(step), *row]
            mean, first = self.usual or (abs(loss), abs(loss))
            ratio = loss / max(mean, first, 1e-6)
            if ratio > spike[0]:
                spike = [ratio, float(step), loss, mean]
            # A spike counts as at most the largest loss that is not a spike, so that the mean does not follow at once.
            self.usual = mean + (1 - _MEMORY) * (min(abs(loss), self.spike * mean) - mean), first
        self.rows = []
        return bad, spike

    def _read(self, trainer: Trainer, module: DistillationModule, *, state: bool = False) -> None:
        """Reads the measurements of all ranks, which synchronises with the device.

        Args:
            state: whether to check weights, buffers and the optimizer's state, too.

        Raises:
            Diverged: on all ranks, with the same message.
        """
        if not self.recent:  # no step since the run started or resumed
            return
        state, self.checked_step = state and self.checked_step != self.step, self.step if state else self.checked_step
        finite = _state_is_finite(trainer, module) if state else True
        bad, spike = self._worst_rows()
        ranks = [[*bad, *spike, float(finite)]]
        if trainer.world_size > 1:
            measured = torch.tensor(ranks[0], device=module.device)
            gathered_rows = [torch.empty_like(measured) for _ in range(trainer.world_size)]
            torch.distributed.all_gather(gathered_rows, measured)
            ranks = torch.stack(gathered_rows).tolist()
        latest = self.recent[-1]
        if worst := min((rank[: len(bad)] for rank in ranks if rank[0] >= 0), default=None):
            step, loss, right = worst[:3]
            images, student, teacher = np.abs(worst[3:9]).reshape(3, 2).max(1).tolist()
            values = _Values(loss, images, student, teacher, right, dict(zip(latest.terms, worst[9:], strict=True)))
            self._end(trainer, int(step), values)
        if not all(rank[-1] for rank in ranks):
            self._end(trainer, latest.step, None)
        self._print_spike(trainer, max(rank[-5:-1] for rank in ranks))

    def _print_spike(self, trainer: Trainer, spike: list[float]) -> None:
        ratio, step, loss, mean = spike
        if ratio <= self.spike or self.spike_epoch == trainer.current_epoch:
            return
        self.spike_epoch = trainer.current_epoch
        place = self._recent(int(step)).place
        print_line("loss", f"{place}: {loss:.3g}, up from {mean:.3g}; it is finite, and training continues")

    def _recent(self, step: int) -> "_Recent":
        return next((recent for recent in self.recent if recent.step == step), self.recent[-1])

    def _end(self, trainer: Trainer, step: int, values: "_Values | None") -> None:
        """Writes the batch, and stops the run."""
        self._write_batch(trainer, step)
        found = self._recent(step)
        classes = trainer.lightning_module.hparams["num_classes"]
        cause, remedy = diagnose(values, rate=float(found.rate), classes=classes, images=len(found.label))
        message = f"training diverged in {found.place}: {cause}. "
        if (files := files_of(trainer)) is not None:
            with suppress(UserError):  # a full disk must not hide the diagnosis
                files.wait()
        last = self.folder / LAST
        if remedy is not None:
            message += f"{remedy}, and start over. "
        elif checkpoint_exists(last):
            message += (
                f"Resume from before that with {as_argument('resume', last)} and a smaller recipe.optimizer.lr, or "
                "with trainer.gradient_clip_val=1. "
            )
        else:
            message += "Start over with a smaller recipe.optimizer.lr, or with trainer.gradient_clip_val=1. "
        named = f"; the batch is named in {file}" if (file := self.folder / DIVERGED).exists() else ""
        raise Diverged(f"{message}Nothing of it was saved{named}.")

    def _write_batch(self, trainer: Trainer, step: int) -> None:
        """Writes which images this step and the previous one used, over all ranks."""
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
            with suppress(OSError):  # a full disk must not hide the diagnosis
                np.savez(self.folder / DIVERGED, **arrays)


@dataclass(frozen=True)
class _Recent:
    """A recent step: its number, its name, its images, the names of its loss terms and its learning rate."""

    step: int
    place: str
    index: Tensor
    label: Tensor
    terms: tuple[str, ...]
    rate: float | Tensor


@dataclass(frozen=True)
class _Values:
    """Measurements of the first step without a finite loss: absolute maxima, and the teacher's correct answers."""

    loss: float  # the sum of the terms
    images: float  # of the normalised images
    student: float  # of the student's logits
    teacher: float  # of the teacher's, 0 without one
    right: float  # images of the batch that the teacher classifies correctly; -1 without a teacher
    terms: Mapping[str, float]  # by name


def diagnose(values: _Values | None, *, rate: float, classes: int, images: int) -> tuple[str, str | None]:
    """Diagnoses why a run diverged, and suggests what to do.

    Args:
        values: of the first step without a finite loss; None if only the weights are not finite.

    Returns:
        the cause, and the remedy; None for a smaller learning rate or clipping.
    """
    if values is None:
        return f"the weights are not finite after it, at a learning rate of {rate:.3g}", None
    terms = ", ".join(f"{name} {value:.3g}" for name, value in values.terms.items() if not np.isfinite(value))
    loss = f"the loss is {values.loss:.3g}" + (f" ({terms})" if terms and len(values.terms) > 1 else "")
    if not values.images < _LARGE_IMAGES:
        found = f"reach {values.images:.3g}" if np.isfinite(values.images) else "are not finite"
        return (
            f"{loss}, and the normalised images {found}, where 3 is usual: the mean and std of the data do not fit",
            "Correct these, or check the images of the batch",
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
            "Check whether model.teacher.weights are of these classes, in this order and with this normalisation",
        )
    return f"{loss} at a learning rate of {rate:.3g}", None


def _state_is_finite(trainer: Trainer, module: DistillationModule) -> bool:
    states = [state for optimizer in trainer.optimizers for state in optimizer.state.values()]
    found = [value for state in (module.state_dict(), *states) for value in state.values()]
    tensors = [value for value in found if isinstance(value, Tensor) and value.is_floating_point()]
    # A finite norm implies finite values and takes a third of the time; large ones may overflow it.
    norm = torch.nn.utils.get_total_norm(tensors)
    return bool(norm.isfinite()) or all(bool(value.isfinite().all()) for value in tensors)
