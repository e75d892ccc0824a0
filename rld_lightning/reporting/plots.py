"""The panels of a report: each small enough for a phone, in the page's own text and colours."""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from rld_lightning.reporting.cost import Cost
from rld_lightning.reporting.labels import short_key, short_value
from rld_lightning.reporting.style import BLUE, GREEN, GREY, ORANGE, PINK, RED, SEQUENTIAL, SKY, STYLE
from rld_lightning.reporting.sweeps import FinishedSweep, HeatMap
from rld_lightning.reporting.tables import Row, Section

# Stand for the text's colour and for that of faint lines; in the page, light and dark mode choose.
INK, FAINT = "#1a1b1c", "#d8d9da"
# The methods that everything is compared to look the same in every figure.
_OWN_COLOURS = {"ce": GREY, "kd": BLUE, "dkd": GREEN, "rld": RED}
_COLOURS = (PINK, ORANGE, SKY, "#8B6FC6", "#9A6B3F", "#7A9A1F", "#179A9A", "#4F5FB5")  # as many as are ever coloured
MAX_COLOURED = len(_COLOURS)
MAX_NAMED = 4  # networks whose names have room beside their points
PALE_LINE = "#b9bdc2"
_PAGE_STYLE = STYLE | {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": FAINT,
    "grid.alpha": 1.0,
    "font.size": 10,
    "axes.labelsize": 10,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
}


def page_colour(colour: str) -> str:
    """What a page calls a colour, where light and dark mode choose it."""
    return {INK: "currentColor", FAINT: "var(--line)", PALE_LINE: "var(--pale)"}.get(colour, colour)


@dataclass(frozen=True)
class Panel:
    """One small figure.

    Args:
        title: its heading.
        alt: what it shows, in a sentence, for those who cannot see it.
        draw: draws it.
        size: width and height in inches.
    """

    title: str
    alt: str
    draw: Callable[[Axes], None]
    size: tuple[float, float] = (4.4, 3.1)

    def svg(self) -> str:
        """The panel for a page: scalable, its text in the page's font, its lines in the page's colours."""
        with matplotlib.rc_context(_PAGE_STYLE | {"svg.hashsalt": self.alt}):
            figure = Figure(figsize=self.size, layout="constrained")
            self.draw(figure.subplots())
            buffer = io.StringIO()
            figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        text = re.sub(r"<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.DOTALL)
        text = text[text.index("<svg") :]
        for colour in (INK, FAINT, PALE_LINE):
            text = text.replace(colour, page_colour(colour))
        return text.replace("<svg", f'<svg role="img" aria-label="{escape(self.alt)}"', 1)


@dataclass(frozen=True)
class FigureOfPanels:
    """Panels side by side that share a legend.

    Args:
        name: of its file.
        caption: what to know to read it.
        panels: from left to right.
        legend: label, colour and style of each: ``-`` and ``--`` are lines, ``o`` and ``s`` points.
    """

    name: str
    caption: str
    panels: tuple[Panel, ...]
    legend: tuple[tuple[str, str, str], ...] = ()

    def write_png(self, folder: Path) -> Path:
        """Writes it as one picture, for Markdown and slides."""
        columns = min(3, len(self.panels))
        rows = -(-len(self.panels) // columns)
        width = sum(panel.size[0] for panel in self.panels[:columns])
        across = min(6 if width > 8 else 4, len(self.legend))  # entries of the legend in a row
        height = rows * max(panel.size[1] for panel in self.panels) + 0.25 * -(-len(self.legend) // max(1, across))
        with matplotlib.rc_context(_PAGE_STYLE):
            figure = Figure(figsize=(max(width, 4.4), height), layout="constrained")
            axes = figure.subplots(rows, columns, squeeze=False).flat
            for place, panel in zip(axes, self.panels, strict=False):
                panel.draw(place)
                place.set_title(panel.title)
            for place in list(axes)[len(self.panels) :]:
                place.set_axis_off()
            if self.legend:
                handles = [_handle(*entry) for entry in self.legend]
                figure.legend(handles=handles, loc="outside lower center", ncols=across)
            path = folder / f"{self.name}.png"
            figure.savefig(path, dpi=200)
        return path


def coloured(methods: Mapping[str, Row]) -> dict[str, str]:
    """A colour for each of some lines: those that others are compared to, then the best; the rest stays grey.

    Args:
        methods: a row for each label.
    """
    own = [label for label, row in methods.items() if row.method in _OWN_COLOURS]
    others = sorted((label for label in methods if label not in own), key=lambda label: -methods[label].mean())
    colours, free = {}, iter(_COLOURS)
    for label in [*own, *others][:MAX_COLOURED]:
        colour = _OWN_COLOURS.get(methods[label].method)
        colours[label] = next(free) if colour is None or colour in colours.values() else colour
    return colours


def curves(section: Section, name: str) -> FigureOfPanels | None:
    """Validation accuracy over the epochs: the mean over the seeds, and from the lowest to the highest of them.

    Returns:
        None if no run has logged any.
    """
    logged = {row.name: frame for row in section.rows if (frame := _accuracy(row)) is not None}
    if not logged:
        return None
    colours = coloured({row.name: row for row in section.rows if row.name in logged})
    shortest = min(frame.index.max() for frame in logged.values())
    zoom = 1 + int(shortest * 2 / 3)  # nobody's end is left out
    teachers = list(section.teacher_top1.values())

    def draw(axes: Axes, first: int) -> None:
        for label in sorted(logged, key=lambda label: label in colours):
            frame = logged[label]
            frame = frame[frame.index >= first]
            mean, colour = frame.mean(axis=1), colours.get(label, PALE_LINE)
            few = len(frame) < 8
            axes.plot(frame.index, mean, color=colour, lw=1.6 if label in colours else 0.8, marker="." if few else None)
            if label in colours and frame.shape[1] > 1:
                axes.fill_between(frame.index, frame.min(axis=1), frame.max(axis=1), color=colour, alpha=0.18, lw=0)
        for top1 in teachers if first == 1 else ():
            axes.axhline(top1, color=INK, ls="--", lw=1)
        axes.set(xlabel="epoch", ylabel="top-1 (%)")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(axis="y")

    ends = ", ".join(f"{label} {frame.mean(axis=1).iloc[-1]:.1f} %" for label, frame in list(logged.items())[:12])
    alt = f"Learning curves of {section.title} on {section.dataset}. Last epoch: {ends}."
    panels = [Panel("All epochs", alt, lambda axes: draw(axes, 1))]
    if shortest >= 6:
        panels.append(Panel(f"From epoch {zoom}", f"{alt} From epoch {zoom}.", lambda axes: draw(axes, zoom)))
    legend = [(label, colour, "-") for label, colour in colours.items()]
    if len(logged) > len(colours):
        legend.append((f"{len(logged) - len(colours)} more", PALE_LINE, "-"))
    if teachers:
        told = ", ".join(f"{top1:.1f} %" for top1 in sorted(teachers))
        legend.append((f"teacher{'s' if len(teachers) > 1 else ''} ({told})", INK, "--"))
    caption = "Top-1 on " + section.split + "; line: mean over seeds, band: lowest to highest seed."
    return FigureOfPanels(name, caption, tuple(panels), tuple(legend))


def cost_scatter(sections: Sequence[Section], costs: Mapping[str, Cost], name: str, machine: str) -> FigureOfPanels:
    """Accuracy of teachers and students of one data set over parameters, multiply-accumulates and latency."""
    rows = sorted((row for section in sections for row in section.rows), key=Row.mean)
    colours = coloured({row.method: row for row in rows})
    points: list[tuple[str, float, str, str]] = []  # network, accuracy, colour, marker
    for section in sections:
        for row in section.rows:
            marker = "o" if section.teacher else "D"
            points.append((row.exported, row.mean(), colours.get(row.method, PALE_LINE), marker))
        points += [(section.teacher, value, INK, "s") for value in section.teacher_top1.values()]
    points = [point for point in dict.fromkeys(points) if point[0] in costs]
    by_size = sorted({point[0] for point in points}, key=lambda network: (costs[network].parameters, network))
    numbers = {network: number for number, network in enumerate(by_size, 1)}
    many = len(by_size) > MAX_NAMED
    quantities = [("Parameters", "parameters", lambda cost: cost.parameters)]
    quantities.append(("Multiply-accumulates", "MACs per image", lambda cost: cost.macs))
    if any(cost.milliseconds for cost in costs.values()):
        quantities.append(("Latency", "milliseconds per image", lambda cost: cost.milliseconds))

    def draw(axes: Axes, label: str, of: Callable[[Cost], float | None]) -> None:
        shown = [(network, of(costs[network]), *rest) for network, *rest in points if of(costs[network])]
        for _, x, y, colour, marker in sorted(shown, key=lambda point: point[3] != PALE_LINE):
            axes.plot(x, y, marker, color=colour, markersize=7, alpha=0.85, mew=0)
        axes.set(xlabel=label, ylabel="top-1 (%)", xscale="log")
        axes.margins(0.25, 0.22)
        (low, high), (bottom, top) = axes.get_xlim(), axes.get_ylim()
        xs = {network: x for network, x, *_ in shown}
        highest = {network: max(y for name, _, y, *_ in shown if name == network) for network in xs}
        groups: list[list[str]] = []  # labels that would lie on each other are one
        for network in sorted(xs, key=lambda network: (xs[network], numbers[network])):
            near = [
                group
                for group in groups
                if xs[network] <= xs[group[0]] * (high / low) ** 0.06
                and abs(highest[network] - highest[group[0]]) < 0.07 * (top - bottom)
            ]
            if many and near:
                near[0].append(network)
            else:
                groups.append([network])
        for place, networks in enumerate(groups):
            own = [point[2] for point in shown if point[0] in networks]
            above = many or place % 2 == 0  # neighbours' names would run into each other
            told = ", ".join(map(str, sorted(numbers[network] for network in networks))) if many else networks[0]
            axes.annotate(
                told, (xs[networks[0]], max(own) if above else min(own)),
                xytext=(0, 8 if above else -8), textcoords="offset points", fontsize=8.5,
                ha="center", va="bottom" if above else "top",
            )  # fmt: skip
        subs = (1, 2, 5) if high < 100 * low else (1, 3) if high < 1000 * low else (1,)  # as many as have room
        axes.xaxis.set_major_locator(LogLocator(10, subs=subs))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _in_units(value)))
        axes.grid()

    size = "{}: {} parameters, {} MACs"
    networks = "; ".join(size.format(n, _in_units(c.parameters), _in_units(c.macs)) for n, c in costs.items())
    panels = tuple(
        Panel(
            title,
            f"Last-epoch accuracy over {label}. {networks}.",
            lambda axes, u=label, q=of: draw(axes, u, q),
            (3.5, 2.9),
        )
        for title, label, of in quantities
    )
    legend = [(label, colour, "o") for label, colour in colours.items()]
    if others := {row.method for row in rows} - colours.keys():
        legend.append((f"{len(others)} more", PALE_LINE, "o"))
    if any(section.teacher for section in sections):
        legend.append(("teacher", INK, "s"))
    caption = "Mean last-epoch top-1 over seeds."
    if many:
        caption += f" Networks: {', '.join(f'{number} {network}' for network, number in numbers.items())}."
    if len(quantities) == 3:
        caption += f" Latency: one image at a time, measured for this report on {machine}."
    return FigureOfPanels(name, caption, panels, tuple(legend))


def heat_map_figure(maps: Sequence[HeatMap], sweep: FinishedSweep, name: str) -> FigureOfPanels:
    """A sweep's grid: one panel a value of the third key, one colour scale for all, the value in each cell."""
    cells = np.stack([grid.cells for grid in maps])
    low, high = float(np.nanmin(cells)), float(np.nanmax(cells))

    def draw(axes: Axes, grid: HeatMap) -> None:
        colours = colormaps[SEQUENTIAL]
        axes.set_facecolor("none")
        axes.pcolormesh(np.ma.masked_invalid(grid.cells), cmap=colours, vmin=low, vmax=max(high, low + 1e-6))
        for (row, column), value in np.ndenumerate(grid.cells):
            if np.isnan(value):
                axes.text(column + 0.5, row + 0.5, "-", ha="center", va="center", color=GREY)
                continue
            best = value == high
            red, green, blue, _ = colours((value - low) / max(high - low, 1e-6))
            dark = 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.5  # luminance, as the eye weighs the channels
            style = {"color": "white" if dark else "black", "fontsize": 10 if len(grid.x) < 8 else 8}
            weight = "bold" if best else "normal"
            axes.text(column + 0.5, row + 0.5, f"{value:.2f}", ha="center", va="center", weight=weight, **style)
            if best:
                axes.add_patch(matplotlib.patches.Rectangle((column, row), 1, 1, fill=False, ec=RED, lw=3, zorder=5))
        axes.set_xticks(np.arange(len(grid.x)) + 0.5, [short_value(value) for value in grid.x])
        axes.set_yticks(np.arange(len(grid.y)) + 0.5, ["" if value is None else short_value(value) for value in grid.y])
        axes.set(xlabel=short_key(grid.x_key), ylabel=short_key(grid.y_key) if grid.y_key else "")
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)

    panels = []
    for grid in maps:
        size = (max(2.6, 1.0 + 0.62 * len(grid.x)), max(1.5, 0.75 + 0.5 * len(grid.y)))
        if np.isnan(grid.cells).all():
            continue
        row, column = np.unravel_index(np.nanargmax(grid.cells), grid.cells.shape)
        place = f"{short_key(grid.x_key)} {short_value(grid.x[column])}"
        place += f", {short_key(grid.y_key)} {short_value(grid.y[row])}" if grid.y_key else ""
        alt = f"Heat map{' at ' + grid.title if grid.title else ''}: best {np.nanmax(grid.cells):.2f} % at {place}."
        panels.append(Panel(grid.title, alt, lambda axes, g=grid: draw(axes, g), size))
    caption = (
        f"Last-epoch top-1 (%) on {sweep.split}, mean over seeds; one colour scale for all panels, from {low:.2f} "
        f"to {high:.2f}. The best cell is outlined; - was not run or failed."
    )
    if len(sweep.keys) > 3:
        caption += f" Each cell is the best over {', '.join(short_key(key) for key in _hidden(sweep, maps))}."
    return FigureOfPanels(name, caption, tuple(panels))


def value_scatter(sweep: FinishedSweep, name: str) -> FigureOfPanels:
    """A sweep whose values are no grid: accuracy over each key, one point a setting."""
    trials = sweep.trials

    def draw(axes: Axes, key: str) -> None:
        values = trials[key] if _numeric(trials[key]) else trials[key].map(short_value)
        axes.plot(values, trials["mean"], "o", color=BLUE, alpha=0.6, mew=0)
        axes.plot(values.iloc[:1], trials["mean"].iloc[:1], "o", color=RED, markersize=9, mew=0)
        axes.set(xlabel=short_key(key), ylabel="top-1 (%)")
        if _numeric(values) and values.min() > 0 and values.max() / values.min() > 20:
            axes.set_xscale("log")
        axes.grid()

    def panel(key: str) -> Panel:
        alt = f"Accuracy over {short_key(key)}; the best setting has {short_value(trials[key].iloc[0])}."
        return Panel(short_key(key), alt, lambda axes: draw(axes, key), (3.5, 2.7))

    caption = f"Last-epoch top-1 (%) on {sweep.split}, one point a setting, mean over seeds; the best one in red."
    return FigureOfPanels(name, caption, tuple(panel(key) for key in sweep.keys))


def importance_bars(importances: Mapping[str, float], how: str, name: str) -> FigureOfPanels:
    """How much of the spread of the trials each parameter explains."""

    def draw(axes: Axes) -> None:
        keys = list(importances)[::-1]
        bars = axes.barh([short_key(key) for key in keys], [importances[key] for key in keys], color=BLUE, height=0.6)
        axes.bar_label(bars, fmt="%.2f", padding=3)
        axes.set(xlabel="share of the spread explained", xlim=(0, 1.12 * max(importances.values())))
        axes.grid(axis="x")

    alt = "Importance: " + ", ".join(f"{short_key(key)} {value:.2f}" for key, value in importances.items())
    panel = Panel("Importance", alt, draw, (4.4, 0.9 + 0.36 * len(importances)))
    return FigureOfPanels(name, f"Importance of the swept parameters: {how}.", (panel,))


def _handle(label: str, colour: str, style: str) -> Line2D:
    if style in ("o", "s"):
        return Line2D([], [], color=colour, marker=style, ls="", mew=0, markersize=7, label=label)
    return Line2D([], [], color=colour, ls=style, label=label)


def _accuracy(row: Row) -> pd.DataFrame | None:
    """``val/top1`` of each run by epoch, one column a run; None if there is none."""
    columns = []
    for run in row.runs:
        if (run.folder / "metrics.csv").exists() and "val/top1" in run.metrics:
            columns.append(run.metrics["val/top1"].rename(run.summary.seed))
    return pd.concat(columns, axis=1).dropna(how="all") if columns else None


def _hidden(sweep: FinishedSweep, maps: Sequence[HeatMap]) -> list[str]:
    shown = {maps[0].x_key, maps[0].y_key}
    return [key for key in sweep.keys if key not in shown and not maps[0].title.startswith(f"{short_key(key)} =")]


def _numeric(values: pd.Series) -> bool:
    return pd.api.types.is_numeric_dtype(values)


def _in_units(value: float) -> str:
    """``1.2 M``."""
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= 0.9995 * size:  # or it would round to "1e+03 k"
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"
