"""Style and saving of figures: colours that colour-blind readers can distinguish, and one set of text sizes."""

import io
import re
import textwrap
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor
from pathlib import Path
from typing import Any

import matplotlib
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from rld_lightning.atomic_files import write_whole
from rld_lightning.reporting.fonts import add_fonts

# Okabe and Ito, "Color Universal Design", 2008; without their yellow, which is too light for lines.
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
SKY, PINK, BLACK = "#56B4E9", "#CC79A7", "#222222"
PALETTE = (BLUE, RED, GREEN, PINK, ORANGE, SKY, BLACK)
DARK_GREY, GREY, PALE_LINE, PALE = "#5A5A5A", "#8C8C8C", "#B9BDC2", "#E8E8E8"
INK, FAINT = "#1A1B1C", "#D8D9DA"  # of text, and of grids
TEACHER, STUDENT, TRUE_CLASS = BLUE, ORANGE, GREEN
SEQUENTIAL, DIVERGING = "PuBuGn", "PuOr_r"  # of ColorBrewer, the first as in DKD's public code
# Reference methods have the same colour in every figure; others get the remaining colours.
METHODS = {"ce": GREY, "kd": BLUE, "dkd": GREEN, "rld": RED}
OTHER_METHODS = (PINK, ORANGE, SKY, "#8B6FC6", "#9A6B3F", "#7A9A1F", "#179A9A", "#4F5FB5")
# CSS names of these colours in a page, where they depend on light or dark mode.
_PAGE_COLOURS = {
    INK: "currentColor", FAINT: "var(--line)", PALE_LINE: "var(--pale)", PALE: "var(--masked)", DARK_GREY: "var(--soft)"
}  # fmt: skip

STYLE: dict[Any, Any] = {  # matplotlib's rcParams
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.prop_cycle": cycler(color=PALETTE),
    "figure.titlesize": 11,
    "figure.titleweight": "bold",
    "grid.alpha": 0.3,
    "hatch.linewidth": 0.5,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "text.parse_math": False,  # names may contain $
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "pdf.fonttype": 42,  # embeds fonts: text can be searched and edited
    "svg.fonttype": "path",  # independent of installed fonts
    "svg.hashsalt": "rld-lightning",  # deterministic files
}
_IN_INK: dict[Any, Any] = dict.fromkeys(
    ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK
)
_PANEL_STYLE: dict[Any, Any] = {
    **STYLE,
    **_IN_INK,
    "svg.fonttype": "none",  # the page's own font
    "font.family": "sans-serif",
    "grid.color": FAINT,
    "grid.alpha": 1.0,
    "font.size": 10,
    "axes.labelsize": 10,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
}

_NO_DATE: dict[str, dict[str, Any]] = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}
DPI = 300  # of pictures for papers
PLAIN_NUMBERS = FuncFormatter(lambda value, _: f"{value:g}")  # for logarithmic axes, whose default is powers

# Decorator: the function draws and saves in this style; matplotlib's global settings are unchanged.
styled = matplotlib.rc_context(STYLE)


@styled
def save_figure(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Writes a figure as PNG with 300 dots per inch (:data:`DPI`) and as PDF.

    Returns:
        ``<folder>/<name>.png`` and ``<folder>/<name>.pdf``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.png", folder / f"{name}.pdf"]
    for path in paths:
        write_figure(figure, path, dpi=DPI)
    return paths


def write_figure(figure: Figure, path: Path, *, dpi: float) -> None:
    """Writes a figure atomically, in the format of the file's suffix, and without a date."""
    kind = path.suffix[1:]
    write_whole(path, saved(figure, format=kind, dpi=dpi, metadata=_NO_DATE.get(kind)))


def saved(figure: Figure, **options: Any) -> bytes:
    """A figure as a file's content, without a warning for each character of a name that no font has."""
    add_fonts(figure)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s)Glyph .* missing from font")  # it would print the character as it is
        figure.savefig(buffer := io.BytesIO(), **options)
    return buffer.getvalue()


def page_colour(colour: str) -> str:
    """A colour's CSS name in a page, if it depends on light or dark mode."""
    return _PAGE_COLOURS.get(colour, colour)


@styled
def page_svg(draw: Callable[[], Figure]) -> str:
    """A figure as SVG for a page, with text and lines in the page's colours."""
    with matplotlib.rc_context(_IN_INK):
        return _svg(draw())


def _svg(figure: Figure) -> str:
    text = saved(figure, format="svg", transparent=True, metadata=_NO_DATE["svg"]).decode()
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = text[text.index("<svg") :]
    for colour, name in _PAGE_COLOURS.items():
        text = text.replace(colour.lower(), name)
    return text


def ink_on(colour: Sequence[float]) -> str:
    """A text colour that is readable on a background, given as red, green and blue in [0, 1]."""
    red, green, blue = colour[:3]
    return "white" if 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.5 else "black"  # luminance (Rec. 709)


@dataclass(frozen=True)
class Panel:
    """One small figure of a report, narrow enough for a phone."""

    title: str  # its heading
    alt: str  # alternative text, a sentence
    draw: Callable[[Axes], None]  # draws the panel
    size: tuple[float, float] = (4.4, 3.1)  # width and height in inches

    def svg(self) -> str:
        """The panel as SVG for a page, with the page's font and colours."""
        with matplotlib.rc_context(_PANEL_STYLE | {"svg.hashsalt": self.alt}):
            figure = Figure(figsize=self.size, layout="constrained")
            self.draw(figure.subplots())
            return _svg(figure).replace("<svg", f'<svg role="img" aria-label="{escape(self.alt)}"', 1)


@dataclass(frozen=True)
class FigureOfPanels:
    """Panels side by side that share a legend."""

    name: str  # of its file
    caption: str  # explains the figure
    panels: tuple[Panel, ...]  # from left to right
    # Label, colour and style of each entry: `-` and `--` are lines, `o` and `s` points
    legend: tuple[tuple[str, str, str], ...] = ()

    def write(self, folder: Path, kinds: Sequence[str] = ("png",)) -> list[Path]:
        """Writes the figure in each format: ``png`` for Markdown and slides, ``pdf`` and ``svg`` for papers."""
        columns = min(3, len(self.panels))
        rows = -(-len(self.panels) // columns)
        width = sum(panel.size[0] for panel in self.panels[:columns])
        height = rows * max(panel.size[1] for panel in self.panels)
        with matplotlib.rc_context(_PANEL_STYLE | {"svg.fonttype": "path"}):
            figure = Figure(figsize=(max(width, 4.4), height), layout="constrained")
            places = list(figure.subplots(rows, columns, squeeze=False).flat)
            for place, panel in zip(places, self.panels, strict=False):
                panel.draw(place)
                place.set_title(panel.title)
            for place in places[len(self.panels) :]:
                place.set_axis_off()
            if self.legend:
                _add_legend(figure, self.legend, 6 if width > 8 else 4)
            paths = [folder / f"{self.name}.{kind}" for kind in kinds]
            for path in paths:
                write_figure(figure, path, dpi=200)
        return paths


def _add_legend(figure: Figure, entries: Sequence[tuple[str, str, str]], most: int) -> None:
    """Adds a legend below the panels, which makes the figure higher.

    Args:
        most: entries in a row; fewer if their labels are long. A label longer than a row is wrapped.
    """
    width, height = figure.get_size_inches()
    letters = int((width - 0.7) / 0.07)  # in a row
    handles = [_handle(textwrap.fill(label, letters), colour, style) for label, colour, style in entries]
    for across in range(min(most, len(handles)), 0, -1):
        legend = figure.legend(handles=handles, loc="outside lower center", ncols=across)
        extent = legend.get_window_extent()
        if across == 1 or extent.width <= figure.bbox.width:
            break
        legend.remove()
    figure.set_size_inches(width, height + extent.height / figure.dpi)


def _handle(label: str, colour: str, style: str) -> Line2D:
    if style in ("o", "s"):
        return Line2D([], [], color=colour, marker=style, ls="", mew=0, markersize=7, label=label)
    return Line2D([], [], color=colour, ls=style, label=label)


def tick_whole_epochs(axes: Axes, epochs: Iterable[float]) -> None:
    """Places the x axis's ticks at whole epochs, at least two, even after less than one epoch."""
    places = list(epochs)
    if not places:
        return
    first, last = floor(min(places)), ceil(max(places))
    if first == last:
        first = max(0, last - 1)
    margin = 0.05 * max(last - first, 1)
    axes.set_xlim(first - margin, last + margin)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 2.5, 5, 10]))
