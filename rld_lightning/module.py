"""The training step: student, optional teacher, loss and optimiser as one LightningModule."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from inspect import signature
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import LRSchedulerConfigType, OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from rld_lightning.capture import CapturedStep, why_not_captured
from rld_lightning.console import print_line
from rld_lightning.data.base import Batch, as_batch
from rld_lightning.losses.base import DistillationLoss, ModelOutput, StepContext, cross_entropy
from rld_lightning.losses.graph import last_warmup, why_no_graph
from rld_lightning.metrics import EpochMeans, counts, term_shares, top_k_percent
from rld_lightning.models.compiled import CompiledCall
from rld_lightning.models.fingerprint import fingerprint
from rld_lightning.models.hold_outside import hold_outside
from rld_lightning.models.taps import forward_with_taps
from rld_lightning.models.teacher.frozen import FrozenTeacher
from rld_lightning.mps import image_layout
from rld_lightning.optimizer_step import accumulation_factor, fused
from rld_lightning.runs.checkpoint_form import refuse_other_contents
from rld_lightning.schedule import make_schedule, remember_first_rates, rescale
from rld_lightning.trainer_callbacks import Watcher, callbacks_of, shown_by_lightning

_SET_IN_EACH_STEP = ("_current_fx_name", "rate", "has_gradient", "measurements")  # the first by Lightning, at each hook


class DistillationModule(LightningModule):
    """Trains a student with a distillation loss, from a frozen teacher if the loss needs one.

    Only the student and the loss's learnable parts are submodules: only they are optimised, checkpointed and
    synchronised. The teacher is kept outside (no submodule) and follows the student to its device.

    Logged, accuracy in percent: ``train/loss`` and one ``train/<term>`` for each term of the loss, ``train/top1``,
    ``train/top5``, ``stats/<name>`` for the loss's statistics and, for a loss of several terms,
    ``stats/<term>_share``, the term's share of the epoch's loss; ``val/ce``, ``val/top1`` and ``val/top5`` of
    each epoch, and ``val/top1_best``, the highest ``val/top1`` so far. (No top-5 with fewer than six classes.)

    Args:
        student: maps images ``(B, 3, H, W)`` to logits ``(B, C)``.
        loss: the loss to minimise; connect a feature loss to the networks first
            (:meth:`~rld_lightning.losses.base.DistillationLoss.connect`).
        optimizer: called with the parameters to train; on a GPU also with ``fused=True``, if it accepts that.
        scheduler: called with the optimizer; if it accepts ``total_steps`` and has none, with the run's.
        teacher: required if ``loss.needs_teacher``, otherwise unused.
        num_classes: C.
        scheduler_interval: ``"epoch"`` or ``"step"``, when the scheduler steps.
        scheduler_monitor: the logged value that ``ReduceLROnPlateau`` monitors; by default ``val/ce``, or ``val/top1``
            with ``mode="max"``.
        capture: whether to capture both forward passes, the loss and the backward pass as a CUDA graph and replay it;
            ``"auto"``: on a GPU. A run that cannot be captured prints the reason.
        info: plain metadata (strings, numbers, lists of numbers) saved in each checkpoint, such as the student's name.

    Raises:
        ValueError: the loss needs a teacher and there is none, or ``scheduler_interval`` is unknown.
    """

    student: nn.Module
    loss: DistillationLoss
    teacher: FrozenTeacher | None

    def __init__(
        self,
        student: nn.Module,
        loss: DistillationLoss,
        optimizer: Callable[..., Optimizer],
        scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        *,
        teacher: FrozenTeacher | None = None,
        num_classes: int,
        scheduler_interval: str = "epoch",
        scheduler_monitor: str | None = None,
        capture: bool | str = False,
        info: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__()
        if loss.needs_teacher and teacher is None:
            raise ValueError(f"{type(loss).__name__} needs a teacher; name one (model.teacher.name), or use loss=ce.")
        if scheduler_interval not in ("epoch", "step"):
            raise ValueError(f"scheduler_interval={scheduler_interval!r} is unknown; choose 'epoch' or 'step'.")
        if teacher is not None and teacher.fused and loss.teacher_taps:
            raise ValueError(f"{type(loss).__name__} looks at features of the teacher; set model.teacher.fuse=false.")
        # Loggers get these with the rest of the run's configuration.
        self.save_hyperparameters({"num_classes": num_classes, **(info or {})}, logger=False)
        self.student = student
        self.compiled: CompiledCall | None = None  # replaces the student in training steps
        self.compiled_scores: CompiledCall | None = None  # replaces `scores_of_logits` after the loss's warm-up
        self.loss = loss
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
            self, [f"loss.{name}" for name in loss.own_buffers]
        )
        hold_outside(self, "teacher", teacher if loss.needs_teacher else None)
        self.make_optimizer = optimizer
        self.make_scheduler = scheduler
        self.scheduler_interval = scheduler_interval
        self.scheduler_monitor = scheduler_monitor
        self.capture = capture
        self.captured: CapturedStep | None = None
        self.has_gradient = False  # whether the training step has already run the backward pass
        self.watchers: list[Watcher] = []  # callbacks whose measurements are captured with the step
        self.measurements: dict[Any, Tensor] = {}  # the watchers' measurements of the latest captured step
        self.initial_rates: list[float | None] = []
        self.best_top1 = float("-inf")
        self.validated: Tensor | None = None  # fingerprint of the last validated weights
        self.rate: float | Tensor = 0.0  # of the latest step
        self.means = {split: EpochMeans() for split in ("train", "val", "test")}
        self.top_k = (1, 5) if num_classes > 5 else (1,)

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets an attribute; for those set in each step, without ``nn.Module``'s slow search."""
        if name in _SET_IN_EACH_STEP:
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    def setup(self, stage: str) -> None:
        """Sets the device's layout; moves the teacher to the student's device, or its shards to this machine's."""
        device = self.trainer.strategy.root_device
        if image_layout(device) == torch.contiguous_format:
            for trained in (self.student, self.loss):
                trained.to(memory_format=torch.contiguous_format)
        if self.teacher is not None:
            processes = self.trainer.world_size // self.trainer.num_nodes
            self.teacher.place(device, processes)

    def forward(self, images: Tensor) -> Tensor:
        """Returns the student's logits ``(B, C)``."""
        return self.student(images)

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Runs both forward passes and the loss; if the step is captured, also the backward pass.

        Args:
            batch: a ``Batch``, or what any loader yields (:func:`~rld_lightning.data.base.as_batch`); also below.

        Returns:
            ``loss`` and, detached, for callbacks: its ``terms`` by name, ``student_logits``, ``label`` and, if there is
            a teacher, ``teacher_logits``. If the step is captured, the next step overwrites them.
        """
        batch = as_batch(batch)
        for optimizer in self.trainer.optimizers[:1]:
            rate = optimizer.param_groups[0]["lr"]  # read here: at the epoch's end it is already the next epoch's
            self.rate = rate.clone() if isinstance(rate, Tensor) else rate  # a schedule changes a tensor in place
        self.has_gradient, self.measurements = self.captured is not None and batch.other is None, {}
        values = self._captured_values(batch) if self.has_gradient else self._step_values(batch, self.current_epoch + 1)
        total = values["train/loss"]
        self.means["train"].add(_averaged_names(values), values["counted"])
        # Only when it is displayed or logged: this call takes as long as launching a step.
        if batch_idx % 10 == 0 or self.trainer._logger_connector.should_update_logs:
            self.log("loss", total, prog_bar=shown_by_lightning(self.trainer), batch_size=len(values["label"]))
        factor = accumulation_factor(self.trainer, batch_idx)
        return {"loss": total if factor == 1 else factor * total, **self._callback_outputs(values)}

    def _callback_outputs(self, values: Mapping[str, Tensor]) -> dict[str, Any]:
        """Returns the detached outputs that callbacks receive."""
        terms = {
            name.removeprefix("train/"): term.detach()
            for name, term in values.items()
            if name.startswith("train/") and name not in ("train/loss", *self._accuracy_names("train"))
        }
        outputs = {"label": values["label"], "student_logits": values["student_logits"].detach(), "terms": terms}
        return outputs if "teacher_logits" not in values else outputs | {"teacher_logits": values["teacher_logits"]}

    def _step_values(self, batch: Batch, epoch: int, teacher_logits: Tensor | None = None) -> dict[str, Tensor]:
        """Computes the loss terms, statistics and accuracies by name, without synchronising with the device.

        Args:
            epoch: counted from 1.
            teacher_logits: the teacher's logits, if already computed.
        """
        student, teacher = self._outputs(batch.images, batch.view, batch.label, teacher_logits)
        second_view = batch.strong if self.loss.needs_strong_view else None
        strong = (None, None) if second_view is None else self._outputs(second_view)
        step = StepContext(student, teacher, batch.label, batch.index, epoch, *strong)
        if self.compiled_scores is not None and batch.other is None and epoch >= last_warmup(self.loss):
            values = self.compiled_scores(student.logits, None if teacher is None else teacher.logits, batch.label)
        else:
            terms = self.loss(step)
            if batch.other is not None:
                other = replace(step, label=batch.other.label)
                terms = mixed_terms(terms, self.loss(other), batch.other.share)
                # Accuracy, statistics and callbacks use the class that covers most of each image.
                step = step if batch.other.share >= 0.5 else other
            values = self._scores(step, terms)
        values = values | {"student_logits": student.logits, "label": step.label}
        return values if teacher is None else values | {"teacher_logits": teacher.logits}

    def _scores(self, step: StepContext, terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the total loss, its terms, the loss's statistics and the accuracies by name, and their ``counts``."""
        with torch.no_grad():
            statistics = {f"stats/{name}": value for name, value in self.loss.statistics(step).items()}
            accuracy = self._accuracy("train", step.student.logits, step.label)
        total = torch.stack(list(terms.values())).sum()
        values = {f"train/{name}": value for name, value in {"loss": total, **terms}.items()} | statistics | accuracy
        return values | {"counted": counts([values[name] for name in _averaged_names(values)], len(step.label))}

    def scores_of_logits(self, student: Tensor, teacher: Tensor | None, label: Tensor) -> dict[str, Tensor]:
        """Computes the scores of a batch after the loss's warm-up, for compiling; only for a loss of logits and labels.

        Args:
            student: logits ``(B, C)``.
            teacher: the teacher's, if the loss needs them.
            label: ``(B,)``.
        """
        step = StepContext(ModelOutput(student), None if teacher is None else ModelOutput(teacher), label)
        return self._scores(step, self.loss(step))

    def _captured_values(self, batch: Batch) -> dict[str, Tensor]:
        """Runs the captured step: :meth:`_step_values` and the backward pass."""
        assert self.captured is not None
        teacher_logits = view = None
        if self.teacher is not None and self.teacher.table is not None:
            if self.teacher.table.complete:
                view = batch.view
            else:  # looking up which views are cached synchronises with the device
                teacher_logits, _ = self.teacher(batch.images, view=batch.view, label=batch.label)
        epoch = min(self.current_epoch + 1, last_warmup(self.loss))  # the loss depends on the epoch up to there only
        failed = self.captured.failed
        values = self.captured(epoch, batch.images, batch.label, batch.index, view, teacher_logits)
        if self.captured.failed != failed:
            print_line("capture", f"off: the step cannot be captured: {self.captured.failed}")
        self.measurements = {
            w: values[f"measured/{n}"] for n, w in enumerate(self.watchers) if f"measured/{n}" in values
        }
        return values

    def _step_with_gradient(
        self,
        epoch: int,
        images: Tensor,
        label: Tensor,
        index: Tensor,
        view: Tensor | None,
        teacher_logits: Tensor | None,
    ) -> dict[str, Tensor]:
        batch = Batch(images, label, index, view=view)
        values = self._step_values(batch, epoch, teacher_logits)
        with torch.autocast(images.device.type, enabled=False):  # autocast is for the forward pass only
            values["train/loss"].backward()
            outputs = self._callback_outputs(values)
            with torch.no_grad():
                measured = {
                    f"measured/{n}": watcher.measure_step(self, outputs, batch)
                    for n, watcher in enumerate(self.watchers)
                }
        return values | {name: value for name, value in measured.items() if value is not None}

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Runs the backward pass, unless the captured step has done it."""
        if not self.has_gradient:
            super().backward(loss, *args, **kwargs)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Clears the gradients, unless the captured step has already computed this step's."""
        if not self.has_gradient:
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)

    def _outputs(
        self,
        images: Tensor,
        view: Tensor | None = None,
        label: Tensor | None = None,
        teacher_logits: Tensor | None = None,
    ) -> tuple[ModelOutput, ModelOutput | None]:
        """Runs both networks; returns their logits and the features that the loss uses."""
        teacher = None if teacher_logits is None else ModelOutput(teacher_logits)
        if self.teacher is not None and teacher_logits is None:
            teacher = ModelOutput(*self.teacher(images, self.loss.teacher_taps, view=view, label=label))
        if self.compiled is not None:  # for a loss without taps
            return ModelOutput(self.compiled(images)), teacher
        return ModelOutput(*forward_with_taps(self.student, images, self.loss.student_taps)), teacher

    def on_train_epoch_start(self) -> None:
        """Resets the epoch's means. (Not called when a run resumes within an epoch; its means are restored.)"""
        self.means["train"].reset()

    def on_train_epoch_end(self) -> None:
        """Logs the epoch's means and training accuracy, and the learning rate (of the first group)."""
        self._log_epoch("train")
        self.log("lr", float(self.rate))

    def on_validation_epoch_start(self) -> None:
        """Resets the means and fingerprints the weights to validate, which a callback may have swapped in."""
        self.means["val"].reset()
        self.validating = fingerprint(self.student)

    def is_validated(self) -> bool:
        """Whether the last validation used the student's current weights; the same on all ranks."""
        same = self.validated is not None and torch.equal(self.validated.cpu(), fingerprint(self.student).cpu())
        return bool(self.trainer.strategy.broadcast(same))

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Evaluates the student only; callbacks evaluate the teacher."""
        return self._evaluation_step("val", batch)

    def on_validation_epoch_end(self) -> None:
        """Logs the epoch's validation accuracy and the best so far."""
        top1 = float(self._log_epoch("val")["val/top1"])
        self.validated = self.validating
        if self.trainer.sanity_checking or self.trainer.state.fn != TrainerFn.FITTING:
            return
        self.best_top1 = max(self.best_top1, top1)
        self.log("val/top1_best", self.best_top1)

    def on_test_epoch_start(self) -> None:
        """Resets the means."""
        self.means["test"].reset()

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Evaluates the student on the test split."""
        return self._evaluation_step("test", batch)

    def on_test_epoch_end(self) -> None:
        """Logs the test accuracy."""
        self._log_epoch("test")

    def _evaluation_step(self, split: str, batch: Batch) -> dict[str, Tensor]:
        batch = as_batch(batch)
        if len(batch.label):
            # In float32: ties in bfloat16 move the accuracy by up to 0.1 points.
            with torch.autocast(batch.images.device.type, enabled=False):
                logits = self.student(batch.images)
        else:  # no image of the batch could be read, but the other ranks wait for this batch
            logits = batch.images.new_zeros(0, self.hparams["num_classes"])
        values = {f"{split}/ce": cross_entropy(logits, batch.label)} | self._accuracy(split, logits, batch.label)
        self.means[split].update(values, len(batch.label))
        return {"student_logits": logits, "label": batch.label}

    def _accuracy_names(self, split: str) -> dict[str, int]:
        return {f"{split}/top{k}": k for k in self.top_k}

    def _accuracy(self, split: str, logits: Tensor, label: Tensor) -> dict[str, Tensor]:
        return {name: top_k_percent(logits, label, k) for name, k in self._accuracy_names(split).items()}

    def _log_epoch(self, split: str) -> dict[str, Tensor]:
        # The means are kept until the next epoch starts: a run stopped here may resume within this epoch.
        means = self.means[split].compute(self.trainer.strategy.reduce)
        accuracies = {name: means[name] for name in self._accuracy_names(split) if name in means}
        self.log_dict(accuracies, prog_bar=split == "val")
        others = {name: mean for name, mean in means.items() if name not in accuracies}
        self.log_dict(others | term_shares(others))
        return means

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Optimises all parameters that require a gradient: the student's and the loss's."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        optimizer = self.make_optimizer(parameters, **fused(self.make_optimizer, self.trainer, self.device))
        self.initial_rates = remember_first_rates(optimizer)
        if self.make_scheduler is None:
            return {"optimizer": optimizer}
        scheduler = make_schedule(self.make_scheduler, optimizer, lambda: int(self.trainer.estimated_stepping_batches))
        self.initial_rates = remember_first_rates(optimizer)  # the schedule's first rates, which may be lower
        settings: dict[str, Any] = {"scheduler": scheduler, "interval": self.scheduler_interval}
        if isinstance(scheduler, ReduceLROnPlateau):
            monitor = self.scheduler_monitor or ("val/ce" if scheduler.mode == "min" else "val/top1")
            # As often as the monitored value is computed.
            every = self.trainer.check_val_every_n_epoch if monitor.startswith("val/") else 1
            settings |= {"monitor": monitor, "interval": "epoch", "frequency": every or 1}
        return {"optimizer": optimizer, "lr_scheduler": cast(LRSchedulerConfigType, settings)}

    def on_train_start(self) -> None:
        """Applies this run's learning rate at the schedule's position, if the checkpoint was trained with another."""
        schedulers = [config.scheduler for config in self.trainer.lr_scheduler_configs]
        for optimizer in self.trainer.optimizers:
            rescale(optimizer, schedulers, self.initial_rates)
        self.captured = self._make_captured_step()

    def on_train_end(self) -> None:
        """Frees the captured step's memory."""
        self.captured, self.watchers, self.measurements = None, [], {}

    def _make_captured_step(self) -> CapturedStep | None:
        """Returns the step to capture; None if steps run uncaptured."""
        cuda = self.device.type == "cuda"
        if not (cuda if self.capture == "auto" else self.capture):
            return None
        if reason := why_no_graph(self.loss) or why_not_captured(self.trainer, self.student):
            print_line("capture", f"off: {reason}")
            return None
        parameters = [p for p in self.parameters() if p.requires_grad]
        watched = [*self.parameters(), *self.buffers()]
        if self.teacher is not None and not (self.teacher.table is not None and self.teacher.table.complete):
            watched += [*self.teacher.parameters(), *self.teacher.buffers()]
        if cuda:
            print_line("capture", "each step runs as one CUDA graph; model.capture=false turns this off")
        self.watchers = [callback for callback in callbacks_of(self.trainer, Callback) if isinstance(callback, Watcher)]
        return CapturedStep(self._step_with_gradient, parameters, watched, record=cuda)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Saves the best accuracy and the epoch's means so far, for an exact resume."""
        checkpoint["best_top1"] = self.best_top1
        checkpoint["epoch_so_far"] = {"means": self.means["train"].state_dict(), "rate": float(self.rate)}
        if "callbacks" not in checkpoint:  # a weights-only checkpoint contains the validated weights
            for average in callbacks_of(self.trainer, WeightAveraging):  # Lightning does not call them in this case
                average.on_save_checkpoint(self.trainer, self, checkpoint)
            for key in ("current_model_state", "averaging_state"):
                checkpoint.pop(key, None)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores what :meth:`on_save_checkpoint` saved."""
        if self._trainer is not None:
            refuse_other_contents(checkpoint, self._trainer, self)
        self.best_top1 = checkpoint["best_top1"]
        self.rate = checkpoint["epoch_so_far"]["rate"]
        self.means["train"].load_state_dict(checkpoint["epoch_so_far"]["means"])


# Lightning asks for it in each step, and Python finds it slowly.
DistillationModule.training_step.__signature__ = signature(DistillationModule.training_step)  # type: ignore[attr-defined]


def _averaged_names(values: Mapping[str, Tensor]) -> list[str]:
    """Names of the values that are averaged over the epoch."""
    return [name for name in values if name.startswith(("train/", "stats/"))]


def mixed_terms(terms: Mapping[str, Tensor], other: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Mixes the terms of images with two classes each: ``share * terms + (1 - share) * other``, by name.

    For cross-entropy this is the cross-entropy with both labels in their proportion, as in Mixup; for terms that do not
    depend on the label, the terms themselves; for any other, the mean over a label drawn in this proportion.
    """
    return {name: share * term + (1 - share) * other[name] for name, term in terms.items()}
