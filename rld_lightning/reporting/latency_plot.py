"""Accuracy over latency, with one point per network and backend."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from rld_lightning.reporting.style import DPI, GREEN, PINK, STUDENT, TEACHER, styled, write_figure

_MARKERS = {"eager": "o", "compiled": "^", "onnx": "s", "onnx_int8": "D"}
_COLOURS = {"teacher": TEACHER, "student": STUDENT}


class Point(NamedTuple):
    """A network in one backend."""

    role: str  # such as `"student"`
    backend: str  # such as `"onnx"`
    milliseconds: float  # median for one batch
    top1: float  # in percent


@styled
def draw_latency(points: Sequence[Point], batch_size: int, title: str, path: Path) -> None:
    """Draws the points, at least one, and writes the picture."""
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    spare = [GREEN, PINK]
    for role in dict.fromkeys(point.role for point in points):
        colour = _COLOURS.get(role) or spare.pop()
        group = sorted((point for point in points if point.role == role), key=lambda point: point.milliseconds)
        axes.plot([p.milliseconds for p in group], [p.top1 for p in group], color=colour, linewidth=0.8, alpha=0.5)
        for point in group:
            axes.plot(point.milliseconds, point.top1, marker=_MARKERS[point.backend], color=colour, linestyle="")
        axes.plot([], [], color=colour, label=role, linewidth=4)
    for backend in dict.fromkeys(point.backend for point in points):
        axes.plot([], [], color="grey", marker=_MARKERS[backend], linestyle="", label=backend.replace("_", " "))
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(0.12, 0.2)
    axes.grid()
    images = "one image" if batch_size == 1 else f"{batch_size} images"
    axes.set(xlabel=f"median latency for {images} (ms)", ylabel="top-1 (%)")
    axes.set_title(title, fontsize=8, fontweight="normal")
    figure.legend(loc="outside right center")
    write_figure(figure, path, dpi=DPI)
