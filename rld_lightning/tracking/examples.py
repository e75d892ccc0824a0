"""A table of example images in W&B, with what teacher and student say about them."""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from lightning.pytorch import Callback, Trainer
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from rld_lightning.losses.base import DistillationLoss
from rld_lightning.module import DistillationModule
from rld_lightning.reporting.style import GREY, STUDENT, TEACHER, TRUE_CLASS, styled
from rld_lightning.tracking.logger import WandbLogger

if TYPE_CHECKING:
    import wandb

CLASSES_SHOWN = 6
IMAGE_SIDE = 96  # images of CIFAR's size are hard to see in a table
LONGEST_NAME = 16
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


def examples_table(
    examples: Examples,
    loss: DistillationLoss,
    class_names: Sequence[str],
    mean: Sequence[float],
    std: Sequence[float],
) -> "wandb.Table":
    """One row an example.

    Args:
        examples: images, labels and logits.
        loss: knows what it makes of the teacher's.
        class_names: C names.
        mean: what images are normalised with.
        std: likewise.
    """
    import wandb

    pixels = examples.images.float() * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    pictures = (pixels.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    views = distributions(examples, loss)
    columns = ["image", "label", "distributions"]
    for name in views:
        judged = () if name == "refined" else ("prediction", "right", "p(label)")  # refined, it predicts nothing
        columns += [f"{name} {value}" for value in (*judged, "top classes")]
    table = wandb.Table(columns=columns)
    for i, label in enumerate(examples.label.tolist()):
        own = {name: view[i] for name, view in views.items()}
        row = [
            wandb.Image(_enlarged(Image.fromarray(pictures[i]))),
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
    """Softmax at temperature 1 of ``teacher``, ``refined`` and ``student``, as far as they are there: ``(N, C)`` each.

    A sample of which a loss passes nothing on has a refined distribution of zeros.
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


@styled
def draw(views: dict[str, Tensor], label: int, class_names: Sequence[str]) -> Image.Image:
    """Bars of the classes that matter most to any of the distributions, the true one in a colour of its own.

    Args:
        views: distributions ``(C,)`` by name.
        label: the true class.
        class_names: C names.
    """
    most = torch.stack(list(views.values())).amax(0)
    most[label] = 2.0  # always shown, and first
    shown = most.topk(min(CLASSES_SHOWN, len(most))).indices.tolist()
    colours = {"teacher": TEACHER, "student": STUDENT, "refined": GREY}
    figure = Figure(figsize=(1.0 + 1.3 * len(views), 1.5), layout="constrained")
    panels = figure.subplots(1, len(views), sharey=True, squeeze=False)[0]
    for axes, (name, view) in zip(panels, views.items(), strict=True):
        values = view[shown].tolist()
        bars = axes.barh(range(len(shown)), values, color=colours[name])
        bars[0].set_color(TRUE_CLASS)
        for place, value in enumerate(values):
            text = f"{value:.2f}" if value > 0 else "masked" if name == "refined" else "0"
            inside = value > 0.6
            axes.text(
                value - 0.03 if inside else value + 0.03,
                place,
                text,
                ha="right" if inside else "left",
                va="center",
                fontsize=7,
                color="white" if inside else "black",
            )
        axes.set(title=name, xlim=(0, 1), xticks=())
        axes.set_yticks(range(len(shown)), [_shortened(class_names[k]) for k in shown])
    panels[0].invert_yaxis()
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120)
    return Image.open(buffer).convert("RGB")


def _shortened(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"


def _enlarged(image: Image.Image) -> Image.Image:
    factor = max(1, -(-IMAGE_SIDE // max(image.size)))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
