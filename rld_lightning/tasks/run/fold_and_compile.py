"""What a run folds and compiles to be done sooner: switches which the job alone decides where they are ``auto``."""

import math

from lightning.pytorch import Trainer

from rld_lightning.console import print_line
from rld_lightning.data.base import ImageDataModule
from rld_lightning.losses.base import DistillationLoss
from rld_lightning.models.compiled import CompiledForward, why_not_compiled
from rld_lightning.models.complexity import count_macs
from rld_lightning.models.teacher.frozen import FrozenTeacher
from rld_lightning.module import DistillationModule
from rld_lightning.tasks.run.plan import Plan

# Multiply-accumulates of the student's steps from which on compiling, about a minute, is won back: a compiled step
# takes 0.7 (resnet8) to 0.87 (wrn16_2) of the time, and a core does 5e10 to 1.5e11 a second.
_WORTH = 1e14


def fold_teacher(teacher: FrozenTeacher, loss: DistillationLoss, data: ImageDataModule) -> None:
    """Folds the teacher's batch norms into its convolutions, where nobody looks at its features; prints a line."""
    if teacher.fused or loss.teacher_taps or teacher.shard or teacher.batch_statistics:
        return
    if norms := teacher.fold(data.image_shape):
        print_line("teacher", f"{norms} batch norms folded into convolutions, the same logits up to rounding")


def compile_steps(module: DistillationModule, plan: Plan, data: ImageDataModule, trainer: Trainer) -> None:
    """Has training steps compiled where that is wanted, and prints a line.

    With ``auto`` the student's are, on a CPU, in a run that is long enough.

    Raises:
        ValueError: it is asked for, and this machine cannot compile.
    """
    device, auto = trainer.strategy.root_device, plan.compile == "auto"
    # Hooks, of taps or of a teacher that is shared out, would send a network back to eager.
    of_student = plan.compile and not module.loss.student_taps
    of_teacher = plan.compile is True and module.teacher is not None and not module.loss.teacher_taps
    if auto and of_student:
        work = 3 * count_macs(module.student, data.image_shape) * images_to_come(data, trainer) / trainer.world_size
        of_student = device.type == "cpu" and work >= _WORTH
    if not (of_student or of_teacher):
        return
    if reason := why_not_compiled(device):
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


def images_to_come(data: ImageDataModule, trainer: Trainer) -> float:
    """How many images the whole run trains on, counted again in each epoch; infinite where only time ends it."""
    epochs = math.inf if trainer.max_epochs in (None, -1) else trainer.max_epochs
    limit = trainer.limit_train_batches
    of_epoch = data.train_size * limit if isinstance(limit, float) else min(data.train_size, limit * data.batch_size)
    steps = math.inf if trainer.max_steps == -1 else trainer.max_steps * trainer.accumulate_grad_batches
    return min(epochs * of_epoch, steps * data.batch_size)
