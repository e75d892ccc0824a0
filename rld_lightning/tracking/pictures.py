"""Pictures for W&B's table of examples: an image, and bar charts of the class distributions."""

import io
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

try:
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError("pictures need matplotlib: pip install 'rld-lightning[report]'.") from error

from rld_lightning.reporting.fonts import class_labels
from rld_lightning.reporting.labels import shortened
from rld_lightning.reporting.style import GREY, STUDENT, TEACHER, TRUE_CLASS, saved, styled

CLASSES_SHOWN = 6
IMAGE_SIDE = 96  # CIFAR-sized images are hard to see in a table
LONGEST_NAME = 16


@styled
def draw(views: dict[str, Tensor], label: int, class_names: Sequence[str]) -> Image.Image:
    """Draws bars of the classes that are most relevant to any distribution, the true class in its own colour.

    Args:
        views: distributions ``(C,)`` by name.
    """
    most = torch.stack(list(views.values())).amax(0)
    most[label] = 2.0  # always shown, and first
    shown = most.topk(min(CLASSES_SHOWN, len(most))).indices.tolist()
    colours = {"teacher": TEACHER, "student": STUDENT, "refined": GREY}
    labels = class_labels(class_names)
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
        axes.set_yticks(range(len(shown)), [shortened(labels[k], LONGEST_NAME) for k in shown])
    panels[0].invert_yaxis()
    return Image.open(io.BytesIO(saved(figure, dpi=120))).convert("RGB")


def enlarged(pixels: Tensor) -> Image.Image:
    """Enlarges uint8 pixels ``(H, W, 3)`` by a whole factor, to be visible."""
    image = Image.fromarray(pixels.numpy())
    factor = max(1, -(-IMAGE_SIDE // max(image.size)))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
