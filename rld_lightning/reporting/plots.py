"""The figures of a report: learning curves, accuracy over cost, and sweeps."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial

import matplotlib
import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from rld_lightning.reporting.frame import LAST
from rld_lightning.reporting.known_cost import Cost
from rld_lightning.reporting.labels import short_key, short_value
from rld_lightning.reporting.style import (
    BLUE,
    GREY,
    INK,
    METHODS,
    OTHER_METHODS,
    PALE_LINE,
    PLAIN_NUMBERS,
    RED,
    SEQUENTIAL,
    FigureOfPanels,
    Panel,
    ink_on,
    tick_whole_epochs,
)
from rld_lightning.reporting.sweeps import HeatMap, Sweep, best_setting
from rld_lightning.reporting.tables import Section
from rld_lightning.runs.files import METRICS
from rld_lightning.runs.finished import Run

MAX_COLOURED = len(OTHER_METHODS)
MAX_NAMED = 4  # networks labelled with their names; more are numbered
MEAN = f"{LAST}_mean"


def row_colours(rows: pd.DataFrame) -> dict[str, str]:
    """Colours by row: the reference methods' first, then the best rows'; the others get none and are drawn grey.

    Args:
        rows: named rows with ``method`` and ``top1_last_mean``.
    """
    is_reference = rows["method"].isin(METHODS)
    others = rows[~is_reference].sort_values(MEAN, ascending=False, kind="stable")
    colours: dict[str, str] = {}
    free = iter(OTHER_METHODS)
    for label, method in [*rows[is_reference]["method"].items(), *others["method"].items()][:MAX_COLOURED]:
        colour = METHODS.get(method)
        colours[label] = next(free) if colour is None or colour in colours.values() else colour
    return colours


def curves(section: Section, name: str) -> FigureOfPanels | None:
    """Plots validation accuracy over epochs: the mean over seeds, and a band from the lowest to the highest seed.

    Returns:
        None if no run has logged it.
    """
    frames = {row: _accuracy(runs) for row, runs in section.rows["runs"].items()}
    logged = {row: frame for row, frame in frames.items() if not frame.empty}
    if not logged:
        return None
    colours = row_colours(section.rows.loc[list(logged)])
    shortest = min(frame.index.max() for frame in logged.values())
    zoom = 1 + int(shortest * 2 / 3)  # includes the end of the shortest run
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
        tick_whole_epochs(axes, [epoch for frame in logged.values() for epoch in frame.index if epoch >= first])
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
        values = ", ".join(f"{top1:.1f} %" for top1 in sorted(teachers))
        legend.append((f"teacher{'s' if len(teachers) > 1 else ''} ({values})", INK, "--"))
    caption = "Top-1 on " + section.split + "; line: mean over seeds, band: lowest to highest seed."
    return FigureOfPanels(name, caption, tuple(panels), tuple(legend))


def _accuracy(runs: Sequence[Run]) -> pd.DataFrame:
    """``val/top1`` by epoch, with one column for each run that has logged it."""
    columns = {}
    for run in runs:
        if (run.folder / METRICS).is_file():
            with suppress(ValueError, KeyError):  # damaged, or without validation
                columns[run.summary.seed] = run.metrics["val/top1"].astype(float)
    return pd.DataFrame(columns).dropna(how="all")


def cost_scatter(sections: Sequence[Section], costs: Mapping[str, Cost], name: str) -> FigureOfPanels:
    """Plots accuracy over parameters, multiply-accumulates and latency, for one data set's teachers and students."""
    rows = pd.concat([section.rows.assign(marker="o" if section.teacher else "D") for section in sections])
    rows = rows.sort_values(MEAN, kind="stable")
    colours = row_colours(rows.drop_duplicates("method", keep="last").set_index("method", drop=False))
    students = [
        (row.network, row.top1_last_mean, colours.get(row.method, PALE_LINE), row.marker) for row in rows.itertuples()
    ]
    teachers = [(section.teacher, top1, INK, "s") for section in sections for top1 in section.teacher_top1.values()]
    points = pd.DataFrame(
        [*teachers, *students[::-1]], columns=["network", "top1", "colour", "marker"]
    ).drop_duplicates()
    points = points[points["network"].isin(costs)]
    by_size = sorted(set(points["network"]), key=lambda network: (costs[network].parameters, network))
    numbers = {network: str(number) for number, network in enumerate(by_size, 1)}
    many = len(by_size) > MAX_NAMED
    networks = "; ".join(
        f"{network}: {_in_units(cost.parameters)} parameters, {_in_units(cost.macs)} MACs"
        for network, cost in costs.items()
    )

    def panel(title: str, quantity: str, label: str) -> Panel:
        def draw(axes: Axes) -> None:
            shown = points.assign(x=[getattr(costs[network], quantity) for network in points["network"]])
            shown = shown.dropna(subset="x").sort_values(
                "colour", key=lambda colour: colour != PALE_LINE, kind="stable"
            )
            for point in shown.itertuples():
                axes.plot(point.x, point.top1, point.marker, color=point.colour, markersize=7, alpha=0.85, mew=0)
            axes.set(xlabel=f"{label}, log scale", ylabel="top-1 (%)", xscale="log")
            axes.margins(0.25, 0.22)
            _label_points(axes, shown, numbers if many else None)
            low, high = axes.get_xlim()
            subs = (1, 2, 5) if high < 100 * low else (1, 3) if high < 1000 * low else (1,)  # as many ticks as fit
            axes.xaxis.set_major_locator(LogLocator(10, subs=subs))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _in_units(value)))
            axes.grid()

        return Panel(title, f"Last-epoch accuracy over {label}. {networks}.", draw, (3.5, 2.9))

    panels = [panel("Parameters", "parameters", "parameters"), panel("Multiply-accumulates", "macs", "MACs per image")]
    splits = " and ".join(dict.fromkeys(section.split for section in sections))
    caption = f"Mean last-epoch top-1 over seeds, on {splits}."
    if many:
        caption += f" Networks: {', '.join(f'{number} {network}' for network, number in numbers.items())}."
    if machines := sorted({cost.machine for cost in costs.values() if cost.milliseconds}):
        panels.append(panel("Latency", "milliseconds", "milliseconds per image"))
        caption += f" Latency: the fastest of one image at a time, measured for this report on {', '.join(machines)}."
    legend = [(label, colour, "o") for label, colour in colours.items()]
    if others := set(rows["method"]) - colours.keys():
        legend.append((f"{len(others)} more", PALE_LINE, "o"))
    if any(section.teacher for section in sections):
        legend.append(("teacher", INK, "s"))
    return FigureOfPanels(name, caption, tuple(panels), tuple(legend))


def _label_points(axes: Axes, points: pd.DataFrame, numbers: Mapping[str, str] | None) -> None:
    """Labels points with their networks' names, or with numbers, which close points share in one label."""
    (low, high), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    by_network = points.groupby("network").agg(x=("x", "first"), high=("top1", "max"), low=("top1", "min"))
    groups: list[list[str]] = []
    for network in sorted(by_network.index, key=lambda network: (by_network.at[network, "x"], network)):
        own = by_network.loc[network]
        for group in groups if numbers else ():
            first = by_network.loc[group[0]]
            if own["x"] <= first["x"] * (high / low) ** 0.06 and abs(own["high"] - first["high"]) < 0.07 * (
                top - bottom
            ):
                group.append(network)
                break
        else:
            groups.append([network])
    place_of = (axes.transScale + axes.transLimits).transform  # of a point, in fractions of the panel
    taken = [(*place_of((point.x, point.top1)), 0.02) for point in points.itertuples()]  # and half the width
    for networks in groups:
        own = by_network.loc[networks]
        text = ", ".join(sorted((numbers[network] for network in networks), key=int)) if numbers else networks[0]
        x, width = own["x"].iloc[0], 0.0125 * len(text)
        sides = []
        for y, side in ((own["high"].max(), 1), (own["low"].min(), -1)):  # above the network's points, or below
            across, up = place_of((x, y))
            up += 0.07 * side
            overlaps = sum(abs(across - a) < width + w and abs(up - u) < 0.06 for a, u, w in taken)
            sides.append((overlaps, -side, y, (across, up, width)))
        _, side, y, place = min(sides)
        taken.append(place)
        axes.annotate(
            text, (x, y), xytext=(0, -8 * side), textcoords="offset points", fontsize=8.5,
            ha="center", va="bottom" if side < 0 else "top",
        )  # fmt: skip


def heat_map_figure(maps: Sequence[HeatMap], sweep: Sweep, name: str) -> FigureOfPanels:
    """Plots a sweep's grid: one panel per value of the third key, one colour scale, the value in each cell.

    The best cell is one of those with the most seeds; the others show their number.
    """
    low, high = (float(end([grid.cells for grid in maps])) for end in (np.nanmin, np.nanmax))
    setting = best_setting(sweep.trials)
    most, best = int(sweep.trials.at[setting, "n"]), sweep.trials.at[setting, "mean"]

    def draw(grid: HeatMap, axes: Axes) -> None:
        colours, cells = colormaps[SEQUENTIAL], grid.cells
        axes.set_facecolor("none")
        axes.pcolormesh(np.ma.masked_invalid(cells.to_numpy()), cmap=colours, vmin=low, vmax=max(high, low + 1e-6))
        for (row, column), value in np.ndenumerate(cells.to_numpy()):
            if np.isnan(value):
                axes.text(column + 0.5, row + 0.5, "-", ha="center", va="center", color=GREY)
                continue
            n = int(grid.seeds.iat[row, column])
            is_best = value == best and n == most
            axes.text(
                column + 0.5, row + 0.5, f"{value:.2f}" + f"\nn = {n}" * (n < most), ha="center", va="center",
                color=ink_on(colours((value - low) / max(high - low, 1e-6))),
                fontsize=10 if cells.shape[1] < 8 and n == most else 8, weight="bold" if is_best else "normal",
            )  # fmt: skip
            if is_best:
                axes.add_patch(
                    matplotlib.patches.Rectangle((column, row), 1, 1, fill=False, ec=RED, lw=3, zorder=5, clip_on=False)
                )
        axes.set_xticks(np.arange(cells.shape[1]) + 0.5, [short_value(value) for value in cells.columns])
        axes.set_yticks(np.arange(cells.shape[0]) + 0.5, [short_value(value) for value in cells.index])
        axes.set(xlabel=short_key(maps[0].x_key), ylabel=short_key(maps[0].y_key))
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)

    panels = []
    for grid in maps:
        rows, columns = grid.cells.shape
        if grid.cells.isna().all(axis=None):
            continue
        repeated = grid.cells[grid.seeds == grid.seeds.max(axis=None)]
        y, x = repeated.stack().idxmax()
        place = f"{short_key(grid.x_key)} {short_value(x)}"
        place += f", {short_key(grid.y_key)} {short_value(y)}" if grid.y_key else ""
        alt = f"Heat map{' at ' + grid.title if grid.title else ''}: best {repeated.max(axis=None):.2f} % at {place}."
        size = (max(2.6, 1.0 + 0.62 * columns), max(1.5, 0.75 + 0.5 * rows))
        panels.append(Panel(grid.title, alt, partial(draw, grid), size))
    fewer = most > min(grid.seeds.min(axis=None) for grid in maps)
    caption = (
        f"Last-epoch top-1 (%) on {sweep.split}, {_over_seeds(most)}{' if no other n is given' if fewer else ''}; one "
        f"colour scale for all panels, from {low:.2f} to {high:.2f}. The best cell{' of these' if fewer else ''} is "
        "outlined; - was not run or failed."
    )
    if hidden := [key for key in sweep.keys if key not in maps[0].keys]:
        caption += f" Each cell is the best over {', '.join(short_key(key) for key in hidden)}."
    return FigureOfPanels(name, caption, tuple(panels))


def _over_seeds(n: int) -> str:
    return f"mean over n = {n} seeds" if n > 1 else "of one seed"


def value_scatter(sweep: Sweep, name: str) -> FigureOfPanels:
    """Plots accuracy over each key, one point per setting, for a sweep whose values form no grid."""
    trials = sweep.trials
    best = trials.loc[[best_setting(trials)]]

    def draw(axes: Axes, key: str) -> None:
        numeric = pd.api.types.is_numeric_dtype(trials[key])
        values = trials[key] if numeric else trials[key].map(short_value)
        axes.plot(values, trials["mean"], "o", color=BLUE, alpha=0.6, mew=0)
        axes.plot(values[best.index], best["mean"], "o", color=RED, markersize=9, mew=0)
        axes.set(xlabel=short_key(key), ylabel="top-1 (%)")
        if numeric and values.min() > 0 and values.max() / values.min() > 20:
            axes.set(xscale="log", xlabel=f"{short_key(key)}, log scale")
            axes.xaxis.set_major_formatter(PLAIN_NUMBERS)
        axes.grid()

    def panel(key: str) -> Panel:
        alt = f"Accuracy over {short_key(key)}; the best setting has {short_value(best[key].iloc[0])}."
        return Panel(short_key(key), alt, lambda axes: draw(axes, key), (3.5, 2.7))

    counts = sorted(set(trials["n"]))
    over = _over_seeds(counts[-1]) if len(counts) == 1 else f"mean over n = {' or '.join(map(str, counts))} seeds"
    caption = f"Last-epoch top-1 (%) on {sweep.split}, one point per setting, {over}; the best one in red"
    caption += f", of those with n = {counts[-1]}." if len(counts) > 1 else "."
    return FigureOfPanels(name, caption, tuple(panel(key) for key in sweep.keys))


def importance_bars(importances: Mapping[str, float], how: str, name: str) -> FigureOfPanels:
    """Plots the share of the trials' variance that each parameter explains."""

    def draw(axes: Axes) -> None:
        keys = list(importances)[::-1]
        bars = axes.barh([short_key(key) for key in keys], [importances[key] for key in keys], color=BLUE, height=0.6)
        axes.bar_label(bars, fmt="%.2f", padding=3)
        axes.set(xlabel="share of the spread explained", xlim=(0, 1.12 * max(importances.values())))
        axes.grid(axis="x")

    alt = "Importance: " + ", ".join(f"{short_key(key)} {value:.2f}" for key, value in importances.items())
    panel = Panel("Importance", alt, draw, (4.4, 0.9 + 0.36 * len(importances)))
    return FigureOfPanels(name, f"Importance of the swept parameters: {how}.", (panel,))


def _in_units(value: float) -> str:
    """``1.2 M``."""
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= 0.9995 * size:  # below, it would be rounded to "1e+03" of the smaller unit
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"
