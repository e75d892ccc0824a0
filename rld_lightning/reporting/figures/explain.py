"""RLD on one sample as a picture: the teacher's and the student's logits, the mask, SCD and MCD."""

import argparse
import textwrap
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from rld_lightning.losses.rld import RLDLoss
from rld_lightning.reporting.figures import register_figure, toy
from rld_lightning.reporting.figures.explain_page import write_page
from rld_lightning.reporting.figures.refine import Refinement, default_rld, refine, rld_of
from rld_lightning.reporting.fonts import class_labels
from rld_lightning.reporting.logits import LogitSource, RunLogits
from rld_lightning.reporting.style import (
    DARK_GREY,
    GREY,
    PALE,
    STUDENT,
    TEACHER,
    TRUE_CLASS,
    page_svg,
    save_figure,
    styled,
)
from rld_lightning.runs.finished import Run, read_run

MOST_CLASSES = 12


def _options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--run", type=Path, help="folder of a distilled run; without any run the toy example")
    command.add_argument("--index", type=int, help="of a validation image; without it one that the teacher gets wrong")


@register_figure("explain", "RLD on one sample: a picture and a page", _options)
def write_explanation(
    out: Path,
    runs: pd.DataFrame | None = None,
    *,
    reader: LogitSource,
    run: Path | None = None,
    index: int | None = None,
) -> list[Path]:
    """Writes RLD on one sample as a picture, and as a page with three sentences and the numbers.

    Args:
        runs: the first that was distilled with RLD is used, else the first distilled one, else the toy logits.
        index: of the validation image; None for :func:`choose_sample`.

    Raises:
        ValueError: there is no such image, or an index without a run.
    """
    if run is not None:
        return _write_files(out, *_sample_of(read_run(run), index, reader))
    distilled = [] if runs is None or runs.empty else list(runs.dropna(subset="teacher")["run"])
    if distilled:
        first = next((run for run in distilled if run.method == "rld"), distilled[0])
        return _write_files(out, *_sample_of(first, index, reader))
    if index is not None:
        raise ValueError("--index is of a validation image of a run; add --run FOLDER.")
    loss = RLDLoss(temperature=toy.TEMPERATURE)
    sample = refine(torch.tensor(toy.STUDENT), torch.tensor(toy.TEACHER), toy.LION, loss)
    title = "RLD on one sample: an image of a lion that the teacher takes for a forest"
    origin = "The logits are made up; --run FOLDER takes those of a finished run."
    return _write_files(out, sample, list(toy.CLASSES), loss, None, title, origin)


def _sample_of(
    run: Run, index: int | None, reader: LogitSource
) -> tuple[Refinement, list[str], RLDLoss, Tensor, str, str]:
    """Returns a sample of a run, the class names, the loss, the image, a title and a description of its origin."""
    run_loss, logits, summary = rld_of(run), reader.read(run), run.summary
    loss = run_loss or default_rld(run)
    if index is None:
        place, why = choose_sample(logits)
    else:
        matches = (logits.index == index).nonzero()
        if not len(matches):
            raise ValueError(f"there is no validation image --index {index}; choose 0 to {int(logits.index.max())}.")
        place, why = int(matches[0]), "chosen by its index"
    number = int(logits.index[place])
    sample = refine(logits.student[place], logits.teacher[place], int(logits.label[place]), loss)
    true = logits.class_names[sample.label].replace("_", " ")
    what = f"validation image {number} of {summary.dataset}: \u201c{true}\u201d"
    title = f"RLD on {what}" if run_loss else f"What RLD would pass on of {what}"
    origin = (
        f"{summary.model} distilled from {summary.teacher} with loss={run.method}, {summary.epochs} epochs, "
        f"seed {summary.seed}, validated on {summary.validated_on}; {why}. {run.folder}"
    )
    if run_loss is None:
        origin = f"These networks were trained without RLD: shown is what loss=rld would pass on. {origin}"
    return sample, logits.class_names, loss, reader.image(run, number), title, origin


def _write_files(
    out: Path, sample: Refinement, class_names: list[str], loss: RLDLoss, image: Tensor | None, title: str, origin: str
) -> list[Path]:
    files = save_figure(draw_refinement(sample, class_names, loss, title, image), out, "explain")
    svg = page_svg(lambda: draw_refinement(sample, class_names, loss, image=image))
    return [*files, write_page(out / "explain.html", sample, class_names, loss, svg, title=title, origin=origin)]


def choose_sample(logits: RunLogits) -> tuple[int, str]:
    """Chooses a sample for which RLD differs from plain distillation.

    This is the first sample that the teacher gets wrong and the student right; else the first that the teacher gets
    wrong; else the one with the teacher's lowest probability of the true class.

    Returns:
        its position in the logits, and why it was chosen.
    """
    teacher_wrong = logits.teacher.argmax(-1) != logits.label
    both = teacher_wrong & (logits.student.argmax(-1) == logits.label)
    if both.any():
        return int(both.nonzero()[0]), "the first image that the teacher gets wrong and the student right"
    if teacher_wrong.any():
        return int(teacher_wrong.nonzero()[0]), "the first image that the teacher gets wrong"
    probs = logits.teacher.softmax(-1).gather(-1, logits.label[:, None])
    return int(probs.argmin()), "the image that the teacher is least sure of, as it gets none wrong"


def shown_classes(sample: Refinement) -> list[int]:
    """The classes to show, by descending teacher logit: all, or as many as fit.

    If not all fit, the true class and both predictions are among them, half of the others are the top ones, and half
    are those after the true class, which MCD compares.
    """
    order = sample.teacher_logits.argsort(descending=True, stable=True).tolist()
    if len(order) <= MOST_CLASSES:
        return order
    chosen = {sample.label, sample.favourite, int(sample.student_logits.argmax())}
    below = order[order.index(sample.label) + 1 :]
    half = (MOST_CLASSES - len(chosen)) // 2
    candidates = order[: half + 1] + below[:half] + order
    for index in candidates:
        if len(chosen) < MOST_CLASSES:
            chosen.add(index)
    return [index for index in order if index in chosen]


@styled
def draw_refinement(
    sample: Refinement, class_names: Sequence[str], loss: RLDLoss, title: str = "", image: Tensor | None = None
) -> Figure:
    """Draws one sample as RLD sees it.

    Panels: logits of both networks; their probabilities, which plain distillation compares; SCD's two outcomes; MCD's
    distributions. Rows are classes by descending teacher logit; those masked by MCD are grey.

    Args:
        loss: its parts with weight 0 are drawn as switched off.
        image: ``(H, W, 3)`` in [0, 1], if there is one.
    """
    rows = shown_classes(sample)
    rest = len(class_names) - len(rows)
    figure = Figure(figsize=(11.5, 1.6 + 0.24 * max(len(rows) + bool(rest), 9)), layout="constrained")
    if title:
        figure.suptitle(title)
    widths = {"picture": 1.3, "logits": 3, "probs": 3, "confidence": 1.9, "correlation": 3}
    if image is None:
        del widths["picture"]
    panels = figure.subplot_mosaic([list(widths)], width_ratios=list(widths.values()))
    if image is not None:
        panels["picture"].imshow(image.numpy(), interpolation="nearest")
        panels["picture"].set_axis_off()
    logits, correlation = panels["logits"], panels["correlation"]
    _paired_bars(logits, sample.teacher_logits, sample.student_logits, rows)
    logits.axvline(0, color=GREY, linewidth=0.8)
    logits.set_title("Logits")
    _paired_bars(panels["probs"], sample.teacher_probs, sample.student_probs, rows)
    panels["probs"].set_title("KD compares all classes")
    _paired_bars(correlation, sample.teacher_correlation, sample.student_correlation, rows)
    correlation.set_title("RLD, MCD: what is left" if loss.beta else "MCD: switched off")
    _confidence(panels["confidence"], sample)
    panels["confidence"].set_ylabel(_probability(loss.confidence_temperature or loss.temperature))
    panels["confidence"].set_title("RLD, SCD: how sure" if loss.alpha else "SCD: switched off")
    for axes in (panels["probs"], correlation):
        axes.set(xlabel=_probability(loss.temperature), xlim=(0, None))
    labels = class_labels(class_names)
    for axes in (logits, panels["probs"], correlation):
        axes.set_yticks(range(len(rows)), [_name(labels[index], index, sample) for index in rows])
        axes.tick_params(left=False, labelleft=axes is logits)
        axes.set_ylim(len(rows) + (0.6 if rest else -0.4), -0.6)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.grid(axis="x")
        for place, index in enumerate(rows):
            if sample.masked[index]:
                axes.axhspan(place - 0.5, place + 0.5, color=PALE, zorder=0)
                if axes is correlation:
                    _write_in_row(axes, place, "masked")
    if rest:
        _write_in_row(logits, len(rows), f"and {rest} others")
        sides = {
            panels["probs"]: (sample.teacher_probs, sample.student_probs),
            correlation: (sample.teacher_correlation, sample.student_correlation),
        }
        for axes, values in sides.items():
            teacher, student = (float(side.sum() - side[rows].sum()) for side in values)
            text = f"others: teacher {teacher:.2f}, student {student:.2f}" if values[0].any() else "others: masked, too"
            _write_in_row(axes, len(rows), text)
    logits.get_yticklabels()[rows.index(sample.label)].set(color=TRUE_CLASS, fontweight="bold")
    figure.legend(*logits.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def _name(name: str, index: int, sample: Refinement) -> str:
    roles = {"true": sample.label, "teacher": sample.favourite, "student": int(sample.student_logits.argmax())}
    marks = ", ".join(role for role, who in roles.items() if who == index)
    name = textwrap.shorten(name.replace("_", " "), 24, placeholder="...")
    return f"{name} ({marks})" if marks else name


def _paired_bars(axes: Axes, teacher: Tensor, student: Tensor, rows: list[int]) -> None:
    for shift, values, colour, name in ((-0.19, teacher, TEACHER, "teacher"), (0.19, student, STUDENT, "student")):
        places = [place + shift for place in range(len(rows))]
        axes.barh(places, values[rows].tolist(), 0.36, color=colour, label=name)


def _write_in_row(axes: Axes, place: int, text: str) -> None:
    axes.text(0.02, place, text, transform=axes.get_yaxis_transform(), va="center", fontsize=8, color=DARK_GREY)


def _confidence(axes: Axes, sample: Refinement) -> None:
    sides = ((-0.18, sample.teacher_confidence, TEACHER), (0.18, sample.student_confidence, STUDENT))
    for shift, sure, colour in sides:
        bars = axes.bar([shift, 1 + shift], [sure, 1 - sure], 0.34, color=colour)
        axes.bar_label(bars, fmt="%.3f", fontsize=6.5, padding=1)  # with many classes both may be small
    favourite = "true class" if sample.teacher_is_right else "favourite /\ntrue class"
    axes.set_xticks([0, 1], [favourite, "all others"])
    axes.set_ylim(0, 1.1)


def _probability(temperature: float) -> str:
    return "probability" + (f" at temperature {temperature:g}" if temperature != 1 else "")
