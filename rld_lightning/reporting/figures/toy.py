"""The toy example: the targets of methods that correct a teacher's wrong prediction, and of RLD."""

from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rld_lightning.losses.rc import correct_logits
from rld_lightning.losses.revision import revise
from rld_lightning.losses.rld import RLDLoss
from rld_lightning.losses.swap import swap_logits
from rld_lightning.reporting.figures import register_figure
from rld_lightning.reporting.figures.refine import refine
from rld_lightning.reporting.style import DARK_GREY, GREY, PALE, SKY, TRUE_CLASS, save_figure, styled
from rld_lightning.reporting.style import STUDENT as STUDENT_COLOUR
from rld_lightning.reporting.style import TEACHER as TEACHER_COLOUR

# The situation of the paper's Figure 1: the teacher classifies an image of a lion as a forest. The logits are ours.
CLASSES = ("lion", "forest", "tiger", "leopard", "grass", "truck")
TEACHER = (3.0, 4.0, 2.6, 1.8, 1.2, -1.0)
STUDENT = (2.0, 2.2, 1.4, 0.6, 1.6, 0.0)
LION, FOREST, TIGER, LEOPARD = 0, 1, 2, 3
TEMPERATURE = 1.0
ETA = 0.8  # label revision's, its default


@register_figure("toy", "one wrong prediction: corrections and RLD")
def write_toy(out: Path) -> list[Path]:
    """Writes the figure of the targets for one wrong prediction."""
    return save_figure(draw_toy(), out, "toy")


def toy_targets() -> dict[str, list[float]]:
    """Each method's targets for the toy logits, as probabilities at temperature 1.

    Returns:
        a distribution over :data:`CLASSES` for ``teacher``, ``student``, ``swap``, ``revision``, ``rc`` (which corrects
        the student's own prediction, not the teacher's) and ``mcd`` (0 where masked); ``scd`` (teacher) and
        ``scd_student`` are over two outcomes: the teacher's favourite or the true class, and all others.
    """
    teacher, student, true = torch.tensor([TEACHER]), torch.tensor([STUDENT]), torch.tensor([LION])
    rld = refine(student[0], teacher[0], LION, RLDLoss(temperature=TEMPERATURE))
    targets = {
        "teacher": rld.teacher_probs,
        "student": rld.student_probs,
        "swap": F.softmax(swap_logits(teacher, true) / TEMPERATURE, -1)[0],
        "revision": revise(F.softmax(teacher, -1), true, ETA)[0],
        "rc": F.softmax(correct_logits(student, true) / TEMPERATURE, -1)[0],
        "mcd": rld.teacher_correlation,
    }
    b, q = rld.teacher_confidence, rld.student_confidence
    return {name: values.tolist() for name, values in targets.items()} | {"scd": [b, 1 - b], "scd_student": [q, 1 - q]}


@styled
def draw_toy() -> Figure:
    """Draws :func:`toy_targets` as bars, one panel per method; outlines show the prediction before correction."""
    targets = toy_targets()
    figure = Figure(figsize=(9, 5.2), layout="constrained")
    figure.suptitle("An image of a lion that the teacher takes for a forest: what the student is told")
    *corrections, confidence, correlation = figure.subplots(2, 3, sharey=True).flat
    teacher, student = targets["teacher"], targets["student"]
    titles = {
        "teacher": ("KD: the teacher as it is", TEACHER_COLOUR, None),
        "swap": ("LA: two logits swapped", SKY, teacher),
        "revision": ("LR: mixed with the label", SKY, teacher),
        "rc": ("RC: the student's own, corrected", STUDENT_COLOUR, student),
    }
    for axes, (name, (title, colour, before)) in zip(corrections, titles.items(), strict=True):
        _bars(axes, targets[name], colour, before)
        axes.set_title(title)
        _annotate(axes, _ratio_lines(targets[name], None if name in ("teacher", "rc") else teacher))
    _confidence(confidence, targets["scd"], targets["scd_student"])
    _bars(correlation, targets["mcd"], TEACHER_COLOUR, None)
    correlation.set_title("RLD, masked correlation (MCD)")
    for index, value in enumerate(targets["mcd"]):
        if value == 0:
            correlation.bar(index, 0.78, 1, color=PALE, zorder=0)
            correlation.text(index, 0.39, "masked", rotation=90, ha="center", va="center", color=DARK_GREY)
    teacher_ratio, mcd_ratio = (_ratio(values, TIGER, LEOPARD) for values in (teacher, targets["mcd"]))
    _annotate(
        correlation,
        f"tiger : leopard = {mcd_ratio:.1f}, the teacher's {teacher_ratio:.1f}\nnothing about lion and forest",
    )
    figure.supxlabel(
        "Dotted: before the correction. RC corrects the student's own prediction, beside KD. Green: the true class.",
        fontsize=8,
    )
    for axes in (corrections[0], corrections[3]):
        axes.set_ylabel("probability")
    return figure


def _bars(axes: Axes, values: list[float], colour: str, before: list[float] | None) -> None:
    places = range(len(CLASSES))
    bars = axes.bar(places, values, 0.7, color=colour)
    axes.bar_label(bars, [f"{value:.2f}" if value else "" for value in values], fontsize=7, padding=1)
    if before:
        axes.bar(places, before, 0.86, fill=False, edgecolor=GREY, linestyle=":", linewidth=1.2)
    axes.set_xticks(places, CLASSES, fontsize=7.5)
    axes.get_xticklabels()[LION].set(color=TRUE_CLASS, fontweight="bold")
    axes.set_ylim(0, 1)


def _confidence(axes: Axes, teacher: list[float], student: list[float]) -> None:
    sides = {"teacher": (-0.18, teacher, TEACHER_COLOUR), "student": (0.18, student, STUDENT_COLOUR)}
    for name, (shift, values, colour) in sides.items():
        bars = axes.bar([shift, 1 + shift], values, 0.34, color=colour, label=name)
        axes.bar_label(bars, fmt="%.2f", fontsize=7, padding=1)
    axes.set_xticks([0, 1], ["teacher's favourite /\nstudent's true class", "all others"])
    axes.set_title("RLD, sample confidence (SCD)")
    axes.legend(loc="upper center", ncols=2)


def _ratio_lines(values: list[float], teacher: list[float] | None) -> str:
    lines = []
    for name, pair in (("lion : tiger", (LION, TIGER)), ("forest : tiger", (FOREST, TIGER))):
        text = f"{name} = {_ratio(values, *pair):.1f}"
        lines.append(text if teacher is None else f"{text}, the teacher's {_ratio(teacher, *pair):.1f}")
    return "\n".join(lines)


def _ratio(values: list[float], one: int, other: int) -> float:
    return values[one] / values[other]


def _annotate(axes: Axes, text: str) -> None:
    axes.text(0.98, 0.97, text, transform=axes.transAxes, ha="right", va="top", fontsize=8)
