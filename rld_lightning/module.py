"""The training step: student, optional teacher, loss and optimiser as one LightningModule."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import LRSchedulerConfigType, OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from rld_lightning.data.base import Batch, as_batch
from rld_lightning.distributed import gathered, own_share
from rld_lightning.losses.base import DistillationLoss, ModelOutput, StepContext, cross_entropy
from rld_lightning.metrics import EpochMeans
from rld_lightning.models.compiled import CompiledForward
from rld_lightning.models.taps import forward_with_taps
from rld_lightning.models.teacher import FrozenTeacher, hold_outside
from rld_lightning.schedule import remember_first_rates, rescale
from rld_lightning.watching import callbacks_of


class DistillationModule(LightningModule):
    """Trains a student with a distillation loss, from a frozen teacher where the loss needs one.

    Only the student and the learnable parts of the loss are submodules: they alone are optimised, checkpointed and
    synchronised. The teacher is held outside and follows the student to its device.

    Logged, accuracy in percent: ``train/loss`` and one ``train/<term>`` for each term of the loss, ``train/top1``,
    ``train/top5``, ``stats/<name>`` for the statistics of the loss and, for a loss of several terms,
    ``stats/<term>_share``, a term's part of the epoch's loss; ``val/ce``, ``val/top1`` and ``val/top5`` of
    each epoch, and ``val/top1_best``, the largest ``val/top1`` so far. (With fewer than six classes there is no top-5.)

    Args:
        student: maps images ``(B, 3, H, W)`` to logits ``(B, C)``.
        loss: what is minimised; one that looks inside the networks has been connected to them
            (:meth:`~rld_lightning.losses.base.DistillationLoss.connect`).
        optimizer: called with the parameters to train.
        scheduler: called with the optimizer; if it takes ``total_steps`` and has none, it is given the run's.
        teacher: required when ``loss.needs_teacher``, unused otherwise.
        num_classes: C.
        scheduler_interval: ``"epoch"`` or ``"step"``, when the scheduler steps.
        scheduler_monitor: the logged value that ``ReduceLROnPlateau`` looks at; by default ``val/ce``, or ``val/top1``
            where it waits for a maximum.
        info: plain facts (strings, numbers, lists of numbers) saved in each checkpoint, such as the student's name.

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
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        *,
        teacher: FrozenTeacher | None = None,
        num_classes: int,
        scheduler_interval: str = "epoch",
        scheduler_monitor: str | None = None,
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
        self.compiled: CompiledForward | None = None  # the student's training steps
        self.loss = loss
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
            self, [f"loss.{name}" for name in loss.own_buffers]
        )
        hold_outside(self, "teacher", teacher if loss.needs_teacher else None)
        self.make_optimizer = optimizer
        self.make_scheduler = scheduler
        self.scheduler_interval = scheduler_interval
        self.scheduler_monitor = scheduler_monitor
        self.own_rates: list[float | None] = []
        self.best_top1 = float("-inf")
        self.validated: Tensor | None = None
        self.rate: float | Tensor = 0.0  # of the latest step
        self.means = {split: EpochMeans() for split in ("train", "val", "test")}
        top_k = (1, 5) if num_classes > 5 else (1,)
        self.accuracies = MetricCollection(
            {
                f"{split}/top{k}": MulticlassAccuracy(num_classes, top_k=k, average="micro", validate_args=False)
                for split in self.means
                for k in top_k
            },
            compute_groups=False,  # which it would find by comparing states, and that waits for the device
        )

    def setup(self, stage: str) -> None:
        """Brings the teacher to the student's device, or its shares to the devices of this machine."""
        if self.teacher is not None:
            processes = self.trainer.world_size // self.trainer.num_nodes
            self.teacher.place(self.trainer.strategy.root_device, processes)

    def forward(self, images: Tensor) -> Tensor:
        """The student's logits ``(B, C)``."""
        return self.student(images)

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """One step: both forward passes and the loss.

        Args:
            batch: or what anybody's loader yields, see :func:`~rld_lightning.data.base.as_batch`; likewise below.
            batch_idx: its number in the epoch.

        Returns:
            ``loss``, and without gradient its ``terms`` by name, ``student_logits``, ``label`` and, where there is a
            teacher, ``teacher_logits``, for callbacks that watch.
        """
        batch = as_batch(batch)
        for optimizer in self.trainer.optimizers[:1]:
            self.rate = optimizer.param_groups[0]["lr"]  # at an epoch's end it is the next one's already
        student, teacher = self._outputs(batch.images, batch.view, batch.label)
        second_view = batch.strong if self.loss.needs_strong_view else None
        strong = (None, None) if second_view is None else self._outputs(second_view)
        step = StepContext(student, teacher, batch.label, batch.index, self.current_epoch + 1, *strong)
        terms, label = self.loss(step), batch.label
        if batch.other is not None:
            other = replace(step, label=batch.other.label)
            terms = mixed_terms(terms, self.loss(other), batch.other.share)
            step = step if batch.other.share >= 0.5 else other
            label = step.label  # the class of most of each image, for all that counts and watches
        total = torch.stack(list(terms.values())).sum()

        with torch.no_grad():
            statistics = {f"stats/{name}": value for name, value in self.loss.statistics(step).items()}
        train = {f"train/{name}": value for name, value in {"loss": total, **terms}.items()}
        self.means["train"].update(train | statistics, len(label))
        self.log("loss", total, prog_bar=True, batch_size=len(label))
        self._update("train", student.logits.detach(), label)
        share = self._share_of_step(batch_idx)
        outputs: dict[str, Any] = {"loss": total if share == 1 else share * total, "label": label}
        outputs["student_logits"] = student.logits.detach()
        outputs["terms"] = {name: term.detach() for name, term in terms.items()}
        return outputs if teacher is None else outputs | {"teacher_logits": teacher.logits}

    def _share_of_step(self, batch_idx: int) -> float:
        """See :func:`share_of_step`; 1 where gradients are not accumulated, or nobody knows how many batches come."""
        every, batches = self.trainer.accumulate_grad_batches, self.trainer.num_training_batches
        if every == 1 or batches == float("inf"):
            return 1.0
        steps = getattr(getattr(self.trainer.train_dataloader, "sampler", None), "steps", None)
        first = batch_idx - batch_idx % every
        last = min(first + every, int(batches))  # of the batches that make this step of the optimizer
        sizes = [1] * (last - first) if steps is None else [step.stop - step.start for step in steps[first:last]]
        return share_of_step(sizes, batch_idx - first, every)

    def _outputs(
        self, images: Tensor, view: Tensor | None = None, label: Tensor | None = None
    ) -> tuple[ModelOutput, ModelOutput | None]:
        """Both forward passes, with the features that the loss looks at."""
        teacher = None
        if self.teacher is not None:
            teacher = ModelOutput(*self.teacher(images, self.loss.teacher_taps, view=view, label=label))
        if self.compiled is not None:  # for a loss without taps
            return ModelOutput(self.compiled(images)), teacher
        return ModelOutput(*forward_with_taps(self.student, images, self.loss.student_taps)), teacher

    def on_train_epoch_start(self) -> None:
        """Begins to count; not where a run goes on within an epoch, which has counted before."""
        self._begin("train")

    def on_train_epoch_end(self) -> None:
        """Logs the epoch's means and training accuracy, and the learning rate (of the first group)."""
        self._log_epoch("train")
        self.log("lr", float(self.rate))

    def on_validation_epoch_start(self) -> None:
        """Begins to count, and marks the weights that are validated, which callbacks may have put in others' place."""
        self._begin("val")
        self.being_validated = self._mark()

    def validated_as_it_is(self) -> bool:
        """Whether the last validation was of the student as it is now; the same answer on all ranks."""
        same = self.validated is not None and torch.equal(self.validated, self._mark())
        return bool(self.trainer.strategy.broadcast(same))

    def _mark(self) -> Tensor:
        """Sums of the student's weights and statistics, one number a tensor, the same for the same ones."""
        return torch.stack([value.float().sum() for value in self.student.state_dict().values()])

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Student only; the teacher's share of the evaluation is a callback's."""
        return self._evaluation_step("val", batch)

    def on_validation_epoch_end(self) -> None:
        """Logs the epoch's validation accuracy and the best so far."""
        top1 = self._log_epoch("val")
        self.validated = self.being_validated
        if self.trainer.sanity_checking or self.trainer.state.fn != TrainerFn.FITTING:
            return
        self.best_top1 = max(self.best_top1, top1)
        self.log("val/top1_best", self.best_top1)

    def on_test_epoch_start(self) -> None:
        """Begins to count."""
        self._begin("test")

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """As :meth:`validation_step`, on the test split."""
        return self._evaluation_step("test", batch)

    def on_test_epoch_end(self) -> None:
        """Logs the test accuracy."""
        self._log_epoch("test")

    def _evaluation_step(self, split: str, batch: Batch) -> dict[str, Tensor]:
        batch = as_batch(batch)
        if len(batch.label):
            # A measurement, not a race: bfloat16's ties move accuracy by up to a tenth of a percent.
            with torch.autocast(batch.images.device.type, enabled=False):
                logits = self.student(batch.images)
            self._update(split, logits, batch.label)
        else:  # no image of the batch could be read; the other ranks wait for this one all the same
            logits = batch.images.new_zeros(0, self.hparams["num_classes"])
        self.means[split].update({f"{split}/ce": cross_entropy(logits, batch.label)}, len(batch.label))
        return {"student_logits": logits, "label": batch.label}

    def _update(self, split: str, logits: Tensor, label: Tensor) -> None:
        for accuracy in self._accuracies(split).values():
            accuracy.update(logits, label)

    def _accuracies(self, split: str) -> dict[str, Metric]:
        return {name: metric for name, metric in self.accuracies.items() if name.startswith(f"{split}/")}

    def _begin(self, split: str) -> None:
        self.means[split].reset()
        for accuracy in self._accuracies(split).values():
            accuracy.reset()

    def _log_epoch(self, split: str) -> float:
        # Metrics and means synchronise themselves over the ranks, in this order on all, so their values are the same.
        # What was counted stays until the next epoch begins: a run that has to end here may go on within this one.
        values = {name: 100 * accuracy.compute() for name, accuracy in self._accuracies(split).items()}
        self.log_dict(values, prog_bar=split == "val")
        means = self.means[split].compute(self.trainer.strategy.reduce)
        self.log_dict(means | term_shares(means))
        return float(values[f"{split}/top1"])

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Optimises everything that takes a gradient: the student and the learnable parts of the loss."""
        optimizer = self.make_optimizer([p for p in self.parameters() if p.requires_grad])
        self.own_rates = remember_first_rates(optimizer)
        if self.make_scheduler is None:
            return {"optimizer": optimizer}
        scheduler = make_schedule(self.make_scheduler, optimizer, lambda: int(self.trainer.estimated_stepping_batches))
        self.own_rates = remember_first_rates(optimizer)  # where the schedule begins, which may be lower
        settings: dict[str, Any] = {"scheduler": scheduler, "interval": self.scheduler_interval}
        if isinstance(scheduler, ReduceLROnPlateau):
            monitor = self.scheduler_monitor or ("val/ce" if scheduler.mode == "min" else "val/top1")
            # As often as what it looks at is measured.
            every = self.trainer.check_val_every_n_epoch if monitor.startswith("val/") else 1
            settings |= {"monitor": monitor, "interval": "epoch", "frequency": every or 1}
        return {"optimizer": optimizer, "lr_scheduler": cast(LRSchedulerConfigType, settings)}

    def on_train_start(self) -> None:
        """Where a run goes on from a checkpoint with another learning rate: its own, at that place of the schedule."""
        schedulers = [config.scheduler for config in self.trainer.lr_scheduler_configs]
        for optimizer in self.trainer.optimizers:
            rescale(optimizer, schedulers, self.own_rates)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps over a resume the best accuracy, and what the epoch has counted so far.

        Files of weights alone hold those that were validated.
        """
        checkpoint["best_top1"] = self.best_top1
        counts = {
            f"{name} {state}": value
            for name, accuracy in self._accuracies("train").items()
            for state, value in accuracy.metric_state.items()
            if isinstance(value, Tensor)
        }
        means = self.means["train"].state_dict()
        checkpoint["epoch_so_far"] = {"means": means, "accuracies": gathered(counts), "rate": float(self.rate)}
        if "callbacks" not in checkpoint:
            self._save_average(checkpoint)

    def _save_average(self, checkpoint: dict[str, Any]) -> None:
        for average in callbacks_of(self.trainer, WeightAveraging):  # which Lightning asks for whole checkpoints only
            average.on_save_checkpoint(self.trainer, self, checkpoint)
        for beside in ("current_model_state", "averaging_state"):
            checkpoint.pop(beside, None)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores them."""
        self.best_top1 = checkpoint["best_top1"]
        if (so_far := checkpoint.get("epoch_so_far")) is None:  # of an earlier version
            return
        self.rate = so_far["rate"]
        self.means["train"].load_state_dict(so_far["means"])
        for key, value in own_share(so_far["accuracies"]).items():
            name, state = key.split(" ")
            setattr(self.accuracies[name], state, value)


def mixed_terms(terms: Mapping[str, Tensor], other: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """The terms of images of two classes each: ``share * terms + (1 - share) * other``, by name.

    Of cross-entropy that is the cross-entropy with both labels in their proportion, as in Mixup; of terms that do not
    look at the label, the terms themselves; of any other one, the mean over a label drawn in this proportion.
    """
    return {name: share * term + (1 - share) * other[name] for name, term in terms.items()}


def make_schedule(make: Callable[..., LRScheduler], optimizer: Optimizer, steps: Callable[[], int]) -> LRScheduler:
    """A schedule for an optimizer; one that takes ``total_steps`` and has none is given the run's.

    Args:
        make: called with the optimizer.
        optimizer: whose rates it changes.
        steps: of the whole run; asked where it is needed, because counting them sets up the data.
    """
    parameters = inspect.signature(make).parameters
    wants_steps = "total_steps" in parameters and parameters["total_steps"].default is None
    return make(optimizer, **({"total_steps": steps()} if wants_steps else {}))


def share_of_step(sizes: Sequence[int], batch_idx: int, every: int) -> float:
    """Factor on a batch's mean loss that makes an optimizer step one on the mean over all images of its batches.

    Lightning divides each by ``every``, also in the last step of an epoch, which may have fewer and smaller batches.

    Args:
        sizes: of the epoch's batches, or of those of one step of the optimizer.
        batch_idx: the batch among them.
        every: batches to a step of the optimizer.
    """
    first = batch_idx - batch_idx % every
    return every * sizes[batch_idx] / sum(sizes[first : first + every])


def term_shares(means: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``stats/<term>_share`` of each ``train/<term>``, in percent of ``train/loss``.

    Args:
        means: the means over an epoch.

    Returns:
        nothing where the loss has a single term, or is 0.
    """
    terms = {name.removeprefix("train/"): mean for name, mean in means.items() if name.startswith("train/")}
    total = terms.pop("loss", None)
    if len(terms) < 2 or not total:
        return {}
    return {f"stats/{name}_share": 100 * mean / total for name, mean in terms.items()}
