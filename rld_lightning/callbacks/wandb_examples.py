"""Images of the validation split in W&B, with what teacher and student say about them."""

from typing import NamedTuple

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from rld_lightning.loggers import WandbLogger
from rld_lightning.module import DistillationModule

MOST_BATCHES = 50  # to look for errors in; a perfect teacher makes none


class Examples(NamedTuple):
    """Some images and what is said about them.

    Attributes:
        images: normalised, ``(N, 3, H, W)``.
        label: ``(N,)``.
        student: its logits ``(N, C)``.
        teacher: its logits ``(N, C)``; ``None`` without a teacher.
    """

    images: Tensor
    label: Tensor
    student: Tensor
    teacher: Tensor | None

    @property
    def wrong(self) -> Tensor:
        """``(N,)``, where the teacher is wrong; where the student is, without a teacher."""
        return (self.student if self.teacher is None else self.teacher).argmax(1) != self.label

    def take(self, index: Tensor) -> "Examples":
        """The examples at ``index``."""
        return Examples(*(None if values is None else values[index] for values in self))


class WandbExamples(Callback):
    """When training ends, logs a table ``examples`` to W&B, once, from rank 0; does nothing without W&B.

    Half of the rows, as far as there are so many, are the first images of the validation split that the teacher gets
    wrong (the student, without a teacher), the others the first that it gets right. Each shows the image, its label,
    both predictions, and the distributions (softmax at temperature 1, the classes that matter) of teacher and student
    and of what the loss makes of the teacher: for RLD the teacher without the masked classes.

    Args:
        count: rows.
    """

    def __init__(self, count: int = 16) -> None:
        self.count = count

    def on_train_end(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        """Chooses the images and logs them."""
        logger = next((logger for logger in trainer.loggers if isinstance(logger, WandbLogger)), None)
        if logger is None or not trainer.is_global_zero:
            return
        if pl_module.teacher is not None and pl_module.teacher.shard:  # which runs in all processes or none
            return
        from rld_lightning.loggers.wandb_examples import examples_table

        def log(run: object) -> None:
            data = trainer.datamodule
            examples = choose_examples(trainer, pl_module, self.count)
            run.log({"examples": examples_table(examples, pl_module.loss, data.class_names, data.mean, data.std)})

        logger.attempt(log, "its table of examples")


@torch.no_grad()
def choose_examples(trainer: Trainer, module: DistillationModule, count: int) -> Examples:
    """The images that :class:`WandbExamples` describes, from this process's share of the split, errors first."""
    errors, others, found = [], [], [0, 0]
    training = module.student.training
    module.student.eval()
    try:
        for number, batch in enumerate(trainer.datamodule.val_dataloader()):
            with trainer.precision_plugin.forward_context():  # hooks run outside the step's own
                student = module.student(batch.images)
                teacher = None if module.teacher is None else module.teacher(batch.images)[0]
            examples = Examples(batch.images, batch.label, student, teacher)
            for kept, kind, chosen in ((errors, 0, examples.wrong), (others, 1, ~examples.wrong)):
                index = chosen.nonzero().flatten()[: count - found[kind]]
                kept.append(examples.take(index))
                found[kind] += len(index)
            if (found[0] >= (count + 1) // 2 and sum(found) >= count) or number + 1 == MOST_BATCHES:
                break
    finally:
        module.student.train(training)
    wanted = max((count + 1) // 2, count - found[1])
    wanted = min(found[0], wanted)
    chosen = [_join(errors).take(torch.arange(wanted)), _join(others).take(torch.arange(min(found[1], count - wanted)))]
    return _join(chosen)


def _join(parts: list[Examples]) -> Examples:
    return Examples(*(None if values[0] is None else torch.cat(values).cpu() for values in zip(*parts, strict=True)))
