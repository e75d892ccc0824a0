"""Accuracy over the hyper-parameters of a sweep, one panel each."""

import argparse
import math
import textwrap
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rld_lightning.package_files import script_command
from rld_lightning.reporting.figures import register_figure
from rld_lightning.reporting.frame import write_csv
from rld_lightning.reporting.labels import describe, short_key
from rld_lightning.reporting.style import DARK_GREY, GREY, PALETTE, PLAIN_NUMBERS, RED, save_figure, styled
from rld_lightning.reporting.sweeps import Sweep, best_setting
from rld_lightning.reporting.tables import sections

MOST_LINES = 4  # with more, all but the best are grey
MOST_TICKS = 10
LONGEST_TICK = 5  # characters
WIDTH = 52  # characters of a legend below a panel


def _options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--method", help="where several were swept")


@register_figure("sensitivity", "accuracy by swept alpha, beta ...", _options)
def write_sensitivity(
    out: Path, runs: pd.DataFrame, *, method: str | None = None, pair: str | None = None
) -> list[Path]:
    """Writes the figure of accuracy over swept hyper-parameters, and the numbers as CSV."""
    sweep = find_sweep(runs, method, pair)
    files = save_figure(draw_sensitivity(sweep), out, "sensitivity")
    table = sweep.trials.drop(columns=["epochs", "run"]).round({"mean": 4, "std": 4, "best": 4})
    return [*files, write_csv(table, out / "sensitivity.csv")]


def find_sweep(runs: pd.DataFrame, method: str | None = None, pair: str | None = None) -> Sweep:
    """The runs that differ in hyper-parameters, as one sweep.

    Args:
        method: an option of the loss group; None if only one was swept.
        pair: such as ``resnet20_to_resnet8``; None if only one was swept.

    Raises:
        ValueError: nothing was swept, or several methods or pairs were and none was chosen.
    """
    counted = pd.concat([pd.DataFrame(), *(section.runs for section in sections(runs)[0])])
    sweeps = {}
    if not counted.empty:
        counted = counted[counted["teacher"].notna()]
        groups = counted.groupby(["method", "pair", "dataset", "split"], sort=False)
        sweeps = {key: Sweep(Path(group["folder"].iloc[0]).parent, group) for key, group in groups}
    sweeps = {
        key: sweep
        for key, sweep in sweeps.items()
        if method in (None, key[0]) and pair in (None, key[1]) and _numeric(sweep)
    }
    if not sweeps:
        raise ValueError(
            "no hyper-parameter has several values in the finished runs of these folders; sweep one first, such as "
            f"{script_command('fit')} -m loss.alpha=1,2,4."
        )
    if len(sweeps) > 1:
        names = "; ".join(", ".join(key) for key in sweeps)
        raise ValueError(
            f"several things were swept: {names}. Choose with --method and --pair, or give one sweep's folder."
        )
    return next(iter(sweeps.values()))


def _numeric(sweep: Sweep) -> list[str]:
    """The swept keys with numeric values, which get a panel."""
    return [key for key in sweep.keys if pd.api.types.is_numeric_dtype(sweep.trials[key])]


@styled
def draw_sensitivity(sweep: Sweep) -> Figure:
    """Draws accuracy over each swept number, with a line for each setting of the others: means and deviations.

    With more than :data:`MOST_LINES` lines, all but the best are grey. Accuracy is the last epoch's, on the split that
    the sweep was measured on.
    """
    keys = _numeric(sweep)
    trials = sweep.trials
    figure = Figure(figsize=(max(4.6 * len(keys), 5.5), 4.2), layout="constrained")
    panels = figure.subplots(1, len(keys), sharey=True, squeeze=False)[0]
    for axes, key in zip(panels, keys, strict=True):
        others = [other for other in sweep.keys if other != key]
        lines = trials.groupby(others, sort=True, dropna=False) if others else [((), trials)]
        named = {describe(dict(zip(others, values, strict=True)), others): line for values, line in lines}
        best = next(name for name, line in named.items() if best_setting(trials) in line.index)
        _panel(axes, key, others, {name: line.sort_values(key) for name, line in named.items()}, best)
    panels[0].set_ylabel("top-1 of the last epoch, %")
    counts = ", ".join(str(n) for n in sorted(set(trials["n"])))
    figure.suptitle(", ".join(sweep.runs.iloc[0][["method", "pair", "dataset"]]))
    bars = "bars: standard deviation over seeds" if trials["n"].max() > 1 else "single seeds"
    figure.supxlabel(f"Measured on {sweep.split}; {bars} (n = {counts}).", fontsize=8)
    return figure


def _panel(axes: Axes, key: str, others: list[str], lines: dict[str, pd.DataFrame], best: str) -> None:
    many = len(lines) > MOST_LINES
    for place, (name, line) in enumerate(lines.items()):
        plain = many and name != best
        axes.errorbar(
            line[key],
            line["mean"],
            yerr=None if plain or line["std"].isna().all() else line["std"],
            marker="o" if many else "os^D"[place],
            capsize=3,
            color=GREY if plain else RED if many else PALETTE[place],
            alpha=0.45 if plain else 1.0,
            linewidth=1 if plain else 1.8,
            zorder=2 if plain else 3,
            label="_" if plain or not others else _wrapped(f"best: {name}" if many else name, 1 if many else 2),
        )
    values = sorted({value for line in lines.values() for value in line[key]})
    if min(values) > 0 and (max(values) / min(values) >= 8 or all(math.frexp(value)[0] == 0.5 for value in values)):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(PLAIN_NUMBERS)
    named = [f"{value:g}" for value in values]
    if len(values) <= MOST_TICKS and max(map(len, named)) <= LONGEST_TICK:  # a grid's values, not a sampler's
        axes.set_xticks(values, named)
        axes.minorticks_off()
    axes.set(xlabel=short_key(key))
    axes.grid()
    if others:
        axes.legend(labelcolor=DARK_GREY, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=1 if many else 2)


def _wrapped(name: str, columns: int) -> str:
    """Wraps a line's name so that the legend is not wider than its panel."""
    return textwrap.fill(name, WIDTH // columns, max_lines=3, placeholder=" ...", break_on_hyphens=False)
