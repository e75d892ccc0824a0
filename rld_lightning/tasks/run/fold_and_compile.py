"""Folds and compiles networks for speed; for ``auto`` only the job decides, not the machine's load."""

import math

from lightning.pytorch import Trainer

from rld_lightning.console import print_line
from rld_lightning.data.base import ImageDataModule
from rld_lightning.losses.base import DistillationLoss
from rld_lightning.losses.graph import why_no_graph
from rld_lightning.models.compiled import CompiledCall, compile_error
from rld_lightning.models.complexity import count_macs
from rld_lightning.models.teacher.frozen import FrozenTeacher
from rld_lightning.module import DistillationModule
from rld_lightning.tasks.run.plan import Plan

# Multiply-accumulates of the student's steps from which compiling, about a minute, pays off on a CPU: a compiled step
# takes 0.7 (resnet8) to 0.87 (wrn16_2) of the time, and a core does 5e10 to 1.5e11 per second.
_MACS_ON_CPU = 1e14
# Steps from which it does on a GPU: on an H200 it takes 20 s and saves 0.26 ms of a step of wrn16_2, a short one.
_STEPS_ON_GPU = 150_000
_LOGITS_ON_CPU = 2**15  # of a batch, up to which compiled losses are faster on a CPU


def fold_teacher(teacher: FrozenTeacher, loss: DistillationLoss, data: ImageDataModule) -> None:
    """Folds the teacher's batch norms into its convolutions, unless its features are used; prints a line."""
    if teacher.fused or loss.teacher_taps or teacher.shard or teacher.batch_statistics:
        return
    if norms := teacher.fold(data.image_shape):
        print_line("teacher", f"{norms} batch norms folded into convolutions, the same logits up to rounding")


def compile_steps(module: DistillationModule, plan: Plan, data: ImageDataModule, trainer: Trainer) -> None:
    """Compiles the student, the teacher and the loss in training steps if requested, and prints a line.

    With ``auto``, compiles the student and the loss, if the run is long enough.

    Raises:
        ValueError: it is requested, and this machine cannot compile.
    """
    if not plan.compile:
        return
    device, auto, loss = trainer.strategy.root_device, plan.compile == "auto", module.loss
    # hooks, of taps or of a sharded teacher, would make a compiled network run eagerly
    of_student = not loss.student_taps and (not auto or _is_long(module, data, trainer))
    of_teacher = module.teacher is not None and not (auto or loss.teacher_taps or module.teacher.shard)
    if not (of_student or of_teacher):
        return
    if reason := compile_error(device):
        if not auto:
            raise ValueError(f"model.compile=true: nothing can be compiled here ({reason}); set model.compile=false.")
        print_line("compile", f"off: nothing can be compiled here ({reason})")
        return
    size, parts = data.batch_size // trainer.world_size, []
    if of_student:
        parts.append("student")
        module.compiled = CompiledCall(module.student, size, type(module.student).__name__, device)
    if of_teacher and module.teacher is not None:
        parts.append("teacher")
        module.teacher.model.compile()
    # A loss that can be captured is a function of logits and labels.
    small = device.type != "cpu" or size * data.num_classes <= _LOGITS_ON_CPU
    if of_student and small and not why_no_graph(loss):
        parts.append("loss")
        scores, name = module.scores_of_logits, type(loss).__name__
        module.compiled_scores = CompiledCall(scores, size, name, device, of_logits=True)
    print_line("compile", f"{', '.join(parts)} in training steps, which takes up to a minute in the first ones")


def _is_long(module: DistillationModule, data: ImageDataModule, trainer: Trainer) -> bool:
    """Returns whether compiling the student's steps takes less time than it saves."""
    device, images = trainer.strategy.root_device, images_to_train(data, trainer)
    if device.type == "cuda":
        return images / data.batch_size >= _STEPS_ON_GPU
    macs = 3 * count_macs(module.student, data.image_shape) * images / trainer.world_size
    return device.type == "cpu" and macs >= _MACS_ON_CPU


def images_to_train(data: ImageDataModule, trainer: Trainer) -> float:
    """Returns the number of images of the whole run, counted in each epoch; infinite if only the time is limited."""
    epochs = math.inf if trainer.max_epochs in (None, -1) else trainer.max_epochs
    limit = trainer.limit_train_batches
    of_epoch = data.train_size * limit if isinstance(limit, float) else min(data.train_size, limit * data.batch_size)
    steps = math.inf if trainer.max_steps == -1 else trainer.max_steps * trainer.accumulate_grad_batches
    return min(epochs * of_epoch, steps * data.batch_size)
