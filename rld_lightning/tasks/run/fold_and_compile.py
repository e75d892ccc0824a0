"""Folds and compiles networks for speed; for ``auto`` only the job decides, not the machine's load."""

import math

from lightning.pytorch import Trainer

from rld_lightning.console import print_line
from rld_lightning.data.base import ImageDataModule
from rld_lightning.losses.base import DistillationLoss
from rld_lightning.models.compiled import CompiledForward, compile_error
from rld_lightning.models.complexity import count_macs
from rld_lightning.models.teacher.frozen import FrozenTeacher
from rld_lightning.module import DistillationModule
from rld_lightning.tasks.run.plan import Plan

# Multiply-accumulates of the student's steps from which compiling, about a minute, pays off: a compiled step takes 0.7
# (resnet8) to 0.87 (wrn16_2) of the time, and a core does 5e10 to 1.5e11 per second.
_WORTH = 1e14


def fold_teacher(teacher: FrozenTeacher, loss: DistillationLoss, data: ImageDataModule) -> None:
    """Folds the teacher's batch norms into its convolutions, unless its features are used; prints a line."""
    if teacher.fused or loss.teacher_taps or teacher.shard or teacher.batch_statistics:
        return
    if norms := teacher.fold(data.image_shape):
        print_line("teacher", f"{norms} batch norms folded into convolutions, the same logits up to rounding")


def compile_steps(module: DistillationModule, plan: Plan, data: ImageDataModule, trainer: Trainer) -> None:
    """Compiles training steps if requested, and prints a line.

    With ``auto``, compiles the student's steps on a CPU if the run is long enough.

    Raises:
        ValueError: it is requested, and this machine cannot compile.
    """
    device, auto = trainer.strategy.root_device, plan.compile == "auto"
    # hooks, of taps or of a sharded teacher, would make a compiled network run eagerly
    of_student = plan.compile and not module.loss.student_taps
    of_teacher = plan.compile is True and module.teacher is not None and not module.loss.teacher_taps
    if auto and of_student:
        work = 3 * count_macs(module.student, data.image_shape) * images_to_train(data, trainer) / trainer.world_size
        of_student = device.type == "cpu" and work >= _WORTH
    if not (of_student or of_teacher):
        return
    if reason := compile_error(device):
        if not auto:
            raise ValueError(f"model.compile=true: nothing can be compiled here ({reason}); set model.compile=false.")
        print_line("compile", f"off: nothing can be compiled here ({reason})")
        return
    if of_student:
        module.compiled = CompiledForward(module.student, data.batch_size // trainer.world_size)
    if of_teacher and module.teacher is not None and not module.teacher.shard:
        module.teacher.model.compile()
    what = " and ".join(["student"] * bool(of_student) + ["teacher"] * bool(of_teacher))
    print_line("compile", f"the {what} in training steps, which takes about a minute at the first one")


def images_to_train(data: ImageDataModule, trainer: Trainer) -> float:
    """Returns the number of images of the whole run, counted in each epoch; infinite if only the time is limited."""
    epochs = math.inf if trainer.max_epochs in (None, -1) else trainer.max_epochs
    limit = trainer.limit_train_batches
    of_epoch = data.train_size * limit if isinstance(limit, float) else min(data.train_size, limit * data.batch_size)
    steps = math.inf if trainer.max_steps == -1 else trainer.max_steps * trainer.accumulate_grad_batches
    return min(epochs * of_epoch, steps * data.batch_size)
