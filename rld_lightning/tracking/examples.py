"""A W&B table of example images with the predictions of teacher and student."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from rld_lightning.data.base import Batch
from rld_lightning.losses.base import DistillationLoss
from rld_lightning.module import DistillationModule
from rld_lightning.tracking.logger import WandbLogger

if TYPE_CHECKING:
    from wandb import Run, Table

MOST_BATCHES = 50  # searched for errors; a perfect teacher makes none


class Examples(NamedTuple):
    """Images and their predictions."""

    images: Tensor  # normalised, `(N, 3, H, W)`
    label: Tensor  # `(N,)`
    student: Tensor  # its logits `(N, C)`
    teacher: Tensor | None  # its logits `(N, C)`; `None` without a teacher

    @property
    def wrong(self) -> Tensor:
        """``(N,)``, true where the teacher is wrong (without a teacher, the student)."""
        return (self.student if self.teacher is None else self.teacher).argmax(1) != self.label

    def take(self, index: Tensor) -> "Examples":
        """Returns the examples at ``index``."""
        teacher = None if self.teacher is None else self.teacher[index]
        return Examples(self.images[index], self.label[index], self.student[index], teacher)


class WandbExamples(Callback):
    """Logs a table ``examples`` to W&B when training ends, once, from rank 0; does nothing without W&B.

    Half of the rows, if there are enough, are the first images of the validation split that the teacher (without a
    teacher, the student) gets wrong, the others the first that it gets right. Each row shows the image, its label, both
    predictions, and the distributions (softmax at temperature 1, the most relevant classes) of teacher, student and the
    loss's refined teacher: for RLD the teacher without the masked classes.

    Args:
        count: number of rows.
    """

    def __init__(self, count: int = 16) -> None:
        self.count = count

    def on_train_end(self, trainer: Trainer, pl_module: DistillationModule) -> None:
        """Selects the images and logs the table."""
        logger = next((logger for logger in trainer.loggers if isinstance(logger, WandbLogger)), None)
        if logger is None or not trainer.is_global_zero:
            return
        if pl_module.teacher is not None and pl_module.teacher.shard:  # a sharded teacher runs on all ranks or none
            return

        def log(run: "Run") -> None:
            data = trainer.datamodule  # type: ignore[attr-defined]  # set by Lightning, but not declared
            examples = choose_examples(trainer, pl_module, data.val_dataloader(), self.count)
            run.log({"examples": examples_table(examples, pl_module.loss, data.class_names, data.mean, data.std)})

        logger.attempt(log, "its table of examples")


@torch.no_grad()
def choose_examples(trainer: Trainer, module: DistillationModule, batches: Iterable[Batch], count: int) -> Examples:
    """Selects the images of :class:`WandbExamples` from this process's part of the split, errors first."""
    errors: list[Examples] = []
    others: list[Examples] = []
    found = [0, 0]
    training = module.student.training
    module.student.eval()
    try:
        for number, batch in enumerate(batches, 1):
            with trainer.precision_plugin.forward_context():  # hooks run outside the step's context
                student = module.student(batch.images)
                teacher = None if module.teacher is None else module.teacher(batch.images)[0]
            examples = Examples(batch.images, batch.label, student, teacher)
            for kept, kind, chosen in ((errors, 0, examples.wrong), (others, 1, ~examples.wrong)):
                index = chosen.nonzero().flatten()[: count - found[kind]]
                kept.append(examples.take(index))
                found[kind] += len(index)
            if (found[0] >= (count + 1) // 2 and sum(found) >= count) or number == MOST_BATCHES:
                break
    finally:
        module.student.train(training)
    wanted = min(found[0], max((count + 1) // 2, count - found[1]))
    first, second = torch.arange(wanted), torch.arange(min(found[1], count - wanted))
    return _join([_join(errors).take(first), _join(others).take(second)])


def _join(parts: list[Examples]) -> Examples:
    images, label, student = (torch.cat(values).cpu() for values in list(zip(*parts, strict=True))[:3])
    teacher = [part.teacher for part in parts if part.teacher is not None]
    return Examples(images, label, student, torch.cat(teacher).cpu() if teacher else None)


def examples_table(
    examples: Examples,
    loss: DistillationLoss,
    class_names: Sequence[str],
    mean: Sequence[float],
    std: Sequence[float],
) -> "Table":
    """Returns the table, one row per example."""
    import wandb

    from rld_lightning.tracking.pictures import draw, enlarged  # needs matplotlib

    pixels = examples.images.float() * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    pictures = (pixels.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)
    views = distributions(examples, loss)
    columns: list[str | int] = ["image", "label", "distributions"]
    for name in views:
        judged = () if name == "refined" else ("prediction", "right", "p(label)")  # it predicts nothing
        columns += [f"{name} {value}" for value in (*judged, "top classes")]
    table = wandb.Table(columns=columns)
    for i, label in enumerate(examples.label.tolist()):
        own = {name: view[i] for name, view in views.items()}
        row = [
            wandb.Image(enlarged(pictures[i])),
            class_names[label],
            wandb.Image(draw(own, label, class_names)),
        ]
        for name, view in own.items():
            if name != "refined":
                best = int(view.argmax())
                row += [class_names[best], best == label, float(view[label])]
            row.append(_top(view, class_names))
        table.add_data(*row)
    return table


def distributions(examples: Examples, loss: DistillationLoss) -> dict[str, Tensor]:
    """Softmax at temperature 1 of ``teacher``, ``refined`` and ``student``, as far as available: ``(N, C)`` each.

    The refined distribution of a sample that a loss drops is zero.
    """
    views = {}
    if examples.teacher is not None:
        views["teacher"] = examples.teacher.float()
        refined = loss.refined(views["teacher"], examples.label)
        if refined is not None:
            views["refined"] = refined
    views["student"] = examples.student.float()
    return {name: logits.softmax(1).nan_to_num(0.0) for name, logits in views.items()}


def _top(view: Tensor, class_names: Sequence[str]) -> str:
    probabilities, classes = view.topk(min(3, len(view)))
    pairs = zip(classes.tolist(), probabilities.tolist(), strict=True)
    return ", ".join(f"{class_names[k]} {probability:.2f}" for k, probability in pairs if probability > 0) or "nothing"
