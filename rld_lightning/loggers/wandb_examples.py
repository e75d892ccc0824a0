"""The table of example images that W&B shows: predictions as columns, distributions as a picture."""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from rld_lightning.losses.base import DistillationLoss
from rld_lightning.reporting.style import GREY, STUDENT, TEACHER, TRUE_CLASS, styled

if TYPE_CHECKING:
    import wandb

    from rld_lightning.callbacks.wandb_examples import Examples

CLASSES_SHOWN = 6
IMAGE_SIDE = 96  # images of CIFAR's size are hard to see in a table
LONGEST_NAME = 16


def examples_table(
    examples: "Examples",
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


def distributions(examples: "Examples", loss: DistillationLoss) -> dict[str, Tensor]:
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
