"""RLD on one sample as a self-contained HTML page: the picture, three sentences and the numbers."""

from collections.abc import Sequence
from pathlib import Path

from rld_lightning.losses.rld import RLDLoss
from rld_lightning.reporting.figures.refine import Refinement
from rld_lightning.reporting.report import render


def explain_in_words(sample: Refinement, class_names: Sequence[str], loss: RLDLoss) -> list[str]:
    """Three sentences on a sample: what plain distillation would transfer, what SCD does, and what MCD does."""
    names = [f"\u201c{name.replace('_', ' ')}\u201d" for name in class_names]
    true, favourite = names[sample.label], names[sample.favourite]
    probs = [_percent(float(sample.teacher_probs[index])) for index in (sample.label, sample.favourite)]
    if sample.teacher_is_right:
        teacher = (
            f"The teacher is right about this image and gives {true} {probs[0]} at temperature {loss.temperature:g}"
        )
    else:
        teacher = (
            f"The teacher takes this {true} for {favourite}: at temperature {loss.temperature:g} it gives {favourite} "
            f"{probs[1]} and the true class {probs[0]} (place {sample.rank} of {len(names)})"
        )
    kd = f"{teacher}, and plain distillation would pass exactly that on."
    cold = loss.confidence_temperature or loss.temperature
    sure = _percent(sample.teacher_confidence) + (f" (at temperature {cold:g})" if cold != loss.temperature else "")
    direction = "raise" if sample.teacher_confidence > sample.student_confidence else "lower"
    scd = (
        f"SCD passes on only how sure the teacher is of its favourite, {sure}, whichever class that is: the student "
        f"is to {direction} its probability of {true}, now "
        f"{_percent(sample.student_confidence)}, to that."
    )
    return [
        kd,
        scd if loss.alpha else "SCD is switched off (alpha = 0): how sure the teacher is does not count.",
        _masking(sample, names) if loss.beta else "MCD is switched off (beta = 0): the other classes do not count.",
    ]


def _masking(sample: Refinement, names: Sequence[str]) -> str:
    left = len(names) - int(sample.masked.sum())
    masked = [index for index in sample.masked.nonzero().flatten().tolist() if index != sample.label]
    if len(masked) > 3:
        above = f"{len(masked)} others"
    else:
        *first, last = [names[index] for index in masked] or [""]
        above = f"{', '.join(first)} and {last}" if first else last
    level = any(sample.teacher_logits[index] == sample.teacher_logits[sample.label] for index in masked)
    if sample.masked[sample.label]:
        joined = " as well as " if " and " in above else " and "
        what = "the true class" + (f"{joined}{above}, which the teacher put above it" if masked else "")
    else:
        what = f"{above}, which the teacher put above the true class" if masked else "nothing"
    if level:
        what += " or level with it"
    if left == len(names):
        rest = f"the student is to copy the teacher's proportions among all {left} classes"
    elif left > 1:
        rest = f"the student is to copy the teacher's proportions among the other {left} alone"
    else:
        rest = "there is nothing left to compare, so that it adds nothing"
    return f"MCD masks {what}: {rest}."


def _percent(probability: float) -> str:
    return f"{100 * probability:.1f}\u00a0%"


def numbers_of(sample: Refinement, loss: RLDLoss) -> dict[str, str]:
    """The numbers for the sentences: probabilities and this sample's losses, including weights and T\u00b2."""
    terms, warm, cold = sample.terms, loss.temperature, loss.confidence_temperature or loss.temperature
    return {
        f"Teacher's probability of its favourite (temperature {cold:g})": f"{sample.teacher_confidence:.4f}",
        f"Student's probability of the true class (temperature {cold:g})": f"{sample.student_confidence:.4f}",
        "Classes masked": f"{int(sample.masked.sum())} of {len(sample.masked)}",
        "Cross-entropy, nats": f"{terms['ce']:.4f}",
        f"SCD, nats \u00d7 T\u00b2 ({cold**2:g}) \u00d7 alpha ({loss.alpha:g})": f"{terms['scd']:.4f}",
        f"MCD, nats \u00d7 T\u00b2 ({warm**2:g}) \u00d7 beta ({loss.beta:g})": f"{terms['mcd']:.4f}",
        f"For comparison, plain KD, nats \u00d7 T\u00b2 ({warm**2:g})": f"{terms['kd']:.4f}",
    }


def write_page(
    path: Path,
    sample: Refinement,
    class_names: Sequence[str],
    loss: RLDLoss,
    svg: str,
    *,
    title: str,
    origin: str,
) -> Path:
    """Writes the page.

    Args:
        origin: a line on the sample's run.

    Returns:
        the page's path.
    """
    context = {
        "title": title,
        "origin": origin,
        "sentences": explain_in_words(sample, class_names, loss),
        "svg": svg,
        "numbers": numbers_of(sample, loss),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    return render("figures/explain.html.j2", context, path)
