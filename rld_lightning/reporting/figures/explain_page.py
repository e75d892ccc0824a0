"""RLD on one sample as a page: the picture, three sentences and the numbers, in one HTML file without outside parts."""

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template

from matplotlib.figure import Figure

from rld_lightning.losses.rld import RLDLoss
from rld_lightning.reporting.figures.refine import Refinement
from rld_lightning.reporting.style import styled

PAGE = Template("""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
  body { font: 16px/1.55 system-ui, sans-serif; color: #222; background: #fff; margin: 0 auto; padding: 1.5rem;
         max-width: 72rem; }
  h1 { font-size: 1.4rem; margin: 0 0 .3rem; }
  .origin { color: #5a5a5a; margin: 0 0 1.2rem; overflow-wrap: anywhere; }
  .figure { overflow-x: auto; }
  img { width: 100%; min-width: 46rem; height: auto; display: block; }
  ol { max-width: 46rem; padding-left: 1.2rem; }
  li { margin: .6rem 0; }
  table { border-collapse: collapse; font-size: .92rem; }
  td { padding: .25rem .8rem .25rem 0; border-top: 1px solid #ddd; vertical-align: top; }
  td:last-child { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
</style>
<h1>$title</h1>
<p class="origin">$origin</p>
<div class="figure"><img alt="$alternative" src="data:image/svg+xml;base64,$svg"></div>
<ol>
$sentences
</ol>
<table>
$numbers
</table>
</html>
""")


def explain_in_words(sample: Refinement, class_names: Sequence[str], loss: RLDLoss) -> list[str]:
    """Three sentences: what plain distillation would pass on of a sample, what SCD does, and what MCD does."""

    def quoted(index: int) -> str:
        return f"\u201c{class_names[index].replace('_', ' ')}\u201d"

    def percent(probability: float) -> str:
        return f"{100 * probability:.1f}\u00a0%"

    true, favourite = quoted(sample.label), quoted(sample.favourite)
    probs = [percent(float(sample.teacher_probs[index])) for index in (sample.label, sample.favourite)]
    if sample.teacher_is_right:
        teacher = f"The teacher is right about this image and gives {true} {probs[0]}"
    else:
        teacher = (
            f"The teacher takes this {true} for {favourite}: it gives {favourite} {probs[1]} and the true class "
            f"{probs[0]} (place {sample.rank} of {len(class_names)})"
        )
    kd = f"{teacher}, and plain distillation would pass exactly that on."
    direction = "raise" if sample.teacher_confidence > sample.student_confidence else "lower"
    scd = (
        f"SCD passes on only how sure the teacher is of its favourite, {percent(sample.teacher_confidence)}, whichever "
        f"class that is: the student is to {direction} its probability of {true}, now "
        f"{percent(sample.student_confidence)}, to that."
    )
    left = int((~sample.masked).sum())
    above = [quoted(index) for index in sample.masked.nonzero().flatten().tolist() if index != sample.label]
    named = ", ".join(above) if len(above) <= 3 else f"{len(above)} others"
    own = [] if loss.mask == "g" else ["the true class"]
    what = " and ".join(own + ([f"{named}, which the teacher put above it"] if above else [])) or "nothing"
    if left > 1:
        rest = f"the student is to copy the teacher's proportions among the other {left} alone"
    else:
        rest = "there is nothing left to compare, so that it adds nothing"
    return [kd, scd, f"MCD masks {what}: {rest}."]


def numbers_of(sample: Refinement, loss: RLDLoss) -> dict[str, str]:
    """What stands behind the sentences: probabilities and this sample's losses in nats."""
    terms, cold = sample.terms, loss.confidence_temperature or loss.temperature
    return {
        f"Teacher's probability of its favourite (temperature {cold:g})": f"{sample.teacher_confidence:.4f}",
        f"Student's probability of the true class (temperature {cold:g})": f"{sample.student_confidence:.4f}",
        "Classes masked": f"{int(sample.masked.sum())} of {len(sample.masked)}",
        "Cross-entropy, nats": f"{terms['ce']:.4f}",
        f"SCD, with its weight alpha = {loss.alpha:g}, nats": f"{terms['scd']:.4f}",
        f"MCD, with its weight beta = {loss.beta:g} (temperature {loss.temperature:g}), nats": f"{terms['mcd']:.4f}",
        f"For comparison, plain KD with weight 1 (temperature {loss.temperature:g}), nats": f"{terms['kd']:.4f}",
    }


def write_page(
    path: Path,
    figure: Figure,
    sample: Refinement,
    class_names: Sequence[str],
    loss: RLDLoss,
    *,
    title: str,
    origin: str,
) -> Path:
    """Writes the page.

    Args:
        path: the HTML file.
        figure: the picture of the sample.
        sample: what is on it.
        class_names: the C names.
        loss: holds the hyper-parameters.
        title: heading.
        origin: a line about where the sample comes from.

    Returns:
        the page's path.
    """
    sentences = explain_in_words(sample, class_names, loss)
    rows = (
        f"<tr><td>{escape(key)}</td><td>{escape(value)}</td></tr>" for key, value in numbers_of(sample, loss).items()
    )
    page = PAGE.substitute(
        title=escape(title),
        origin=escape(origin),
        alternative=escape(" ".join(sentences), quote=True),
        svg=base64.b64encode(_svg(figure)).decode(),
        sentences="\n".join(f"<li>{escape(sentence)}</li>" for sentence in sentences),
        numbers="\n".join(rows),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


@styled
def _svg(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()
