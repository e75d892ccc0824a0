"""How figures look: one set of colours that colour-blind readers tell apart, one size of text, one way to save."""

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

# Okabe and Ito, "Color Universal Design", 2008; without their yellow, which is too light for lines.
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
SKY, PINK, BLACK = "#56B4E9", "#CC79A7", "#222222"
PALETTE = (BLUE, RED, GREEN, PINK, ORANGE, SKY, BLACK)
DARK_GREY, GREY, PALE = "#5A5A5A", "#8C8C8C", "#E8E8E8"
TEACHER, STUDENT, TRUE_CLASS = BLUE, ORANGE, GREEN
SEQUENTIAL, DIVERGING = "PuBuGn", "PuOr_r"  # of ColorBrewer, the first as in DKD's public code

STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.prop_cycle": matplotlib.cycler(color=PALETTE),
    "figure.titlesize": 11,
    "figure.titleweight": "bold",
    "grid.alpha": 0.3,
    "hatch.linewidth": 0.5,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "pdf.fonttype": 42,  # text stays text: it can be searched and edited
    "svg.fonttype": "path",  # and looks the same where the font is missing
    "svg.hashsalt": "rld-lightning",  # the same figure is the same file
}


DPI = 300  # of pictures for papers

# A decorator: what the function draws or saves is in this style, and matplotlib's own settings stay as they are.
styled = matplotlib.rc_context(STYLE)


@styled
def save_figure(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Writes a figure as a picture of 300 dots an inch (:data:`DPI`) and as a vector graphic for papers.

    Returns:
        ``<folder>/<name>.png`` and ``<folder>/<name>.pdf``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.png", folder / f"{name}.pdf"]
    figure.savefig(paths[0], dpi=DPI)
    figure.savefig(paths[1], metadata={"CreationDate": None})
    return paths
