"""From folders of runs to the files of a figure: PNG and PDF, for some also a page or a table."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from rld_lightning.console import console, print_line
from rld_lightning.losses.rld import RLDLoss
from rld_lightning.reporting.figures import toy
from rld_lightning.reporting.figures.ablation import ablation, ablation_markdown, draw_ablation
from rld_lightning.reporting.figures.differences import difference_maps, draw_differences
from rld_lightning.reporting.figures.explain import draw_refinement, telling_sample
from rld_lightning.reporting.figures.explain_page import write_page
from rld_lightning.reporting.figures.gain import REFERENCES, draw_gain, gains
from rld_lightning.reporting.figures.logits import LogitReader
from rld_lightning.reporting.figures.refine import refine, rld_of, usual_rld
from rld_lightning.reporting.figures.sensitivity import draw_sensitivity, swept
from rld_lightning.reporting.style import save_figure
from rld_lightning.reporting.tables import Section, sections
from rld_lightning.runs.finished import Run, read_run


def write_toy(out: Path) -> list[Path]:
    """What methods that correct the teacher make of one wrong prediction, and what RLD passes on.

    Args:
        out: folder for the files.

    Returns:
        the files.
    """
    return save_figure(toy.draw_toy(), out, "toy")


def write_explanation(
    out: Path, *, run: Path | None = None, index: int | None = None, reader: LogitReader | None = None
) -> list[Path]:
    """RLD on one sample: a picture, and a page with three sentences and the numbers.

    Args:
        out: folder for the files.
        run: folder of a distilled run; None takes the toy logits.
        index: of the validation image; None takes one that the teacher gets wrong.
        reader: runs the networks.

    Returns:
        the files.

    Raises:
        ValueError: there is no such image, or an index without a run.
    """
    if run is None:
        if index is not None:
            raise ValueError("--index is of a validation image of a run; add --run FOLDER.")
        loss, names, image = RLDLoss(temperature=toy.TEMPERATURE), list(toy.CLASSES), None
        sample = refine(torch.tensor(toy.STUDENT), torch.tensor(toy.TEACHER), toy.LION, loss)
        title = "RLD on one sample: an image of a lion that the teacher takes for a forest"
        origin = "The logits are made up; --run FOLDER takes those of a finished run."
    else:
        reader, finished = reader or LogitReader(), read_run(run)
        own, logits = rld_of(finished), reader.read(finished)
        loss = own or usual_rld(finished)
        if index is None:
            place, why = telling_sample(logits)
        else:
            found = (logits.index == index).nonzero()
            if not len(found):
                raise ValueError(
                    f"there is no validation image --index {index}; choose 0 to {int(logits.index.max())}."
                )
            place, why = int(found[0]), "chosen by its index"
        number, names = int(logits.index[place]), logits.class_names
        sample = refine(logits.student[place], logits.teacher[place], int(logits.label[place]), loss)
        image, summary = reader.image(finished, number), finished.summary
        true = names[sample.label].replace("_", " ")
        title = f"RLD on validation image {number} of {summary.dataset}: \u201c{true}\u201d"
        if own is None:
            title = f"What RLD would pass on of validation image {number} of {summary.dataset}: \u201c{true}\u201d"
        origin = (
            f"{summary.model} distilled from {summary.teacher} with loss={finished.method}, {summary.epochs} epochs, "
            f"seed {summary.seed}, validated on {summary.validated_on}; {why}. {finished.folder}"
        )
        if own is None:
            origin = f"These networks were trained without RLD: shown is what loss=rld would pass on. {origin}"
    files = save_figure(draw_refinement(sample, names, loss, title, image), out, "explain")
    page = write_page(out / "explain.html", sample, names, loss, image, title=title, origin=origin)
    return [*files, page]


def write_differences(
    out: Path,
    runs: Sequence[Run],
    *,
    pair: str | None = None,
    methods: Sequence[str] = ("dkd", "rld"),
    standardized: bool = False,
    top: float | None = None,
    reader: LogitReader | None = None,
) -> list[Path]:
    """Heat maps of how far students are from their teacher.

    Args:
        out: folder for the files.
        runs: finished runs.
        pair: which to draw, where there are several.
        methods: options of the loss group.
        standardized: z-score each sample's logits first.
        top: upper end of the colour scale, to compare figures; None chooses one.
        reader: runs the networks.

    Returns:
        the files.

    Raises:
        ValueError: the runs are not there.
    """
    section = _choose(runs, pair)
    maps = difference_maps(section, list(methods), reader or LogitReader(), standardized=standardized)
    what = "standardized logits" if standardized else "logits"
    title = f"Student and teacher, mean {what} by class: {section.title}, {section.dataset}, {section.split}"
    return save_figure(draw_differences(maps, title, top=top), out, "differences")


def write_gain(
    out: Path,
    runs: Sequence[Run],
    *,
    method: str = "rld",
    over: Sequence[str] = REFERENCES,
    best: bool = False,
) -> list[Path]:
    """What a method gains, by its teacher's training accuracy.

    Args:
        out: folder for the files.
        runs: finished runs.
        method: an option of the loss group.
        over: those that it is compared to.
        best: compare best epochs.

    Returns:
        the files, the numbers as CSV among them.
    """
    table, left_out = gains(runs, method, over, best=best)
    for reason in left_out:
        print_line("left out", f"gain: {reason}")
    files = save_figure(draw_gain(table, method), out, "gain")
    table.to_csv(out / "gain.csv", index=False, float_format="%.4f")
    return [*files, out / "gain.csv"]


def write_sensitivity(
    out: Path, runs: Sequence[Run], *, method: str | None = None, pair: str | None = None
) -> list[Path]:
    """How accuracy depends on swept hyper-parameters.

    Args:
        out: folder for the files.
        runs: finished runs.
        method: which to draw, where several were swept.
        pair: likewise.

    Returns:
        the files, the numbers as CSV among them.
    """
    sweep = swept(runs, method, pair)
    files = save_figure(draw_sensitivity(sweep), out, "sensitivity")
    sweep.trials.round({"mean": 4, "std": 4, "best": 4}).to_csv(out / "sensitivity.csv", index=False)
    return [*files, out / "sensitivity.csv"]


def write_ablation(out: Path, runs: Sequence[Run], *, pair: str | None = None) -> list[Path]:
    """The ablation table, as a picture and as Markdown.

    Args:
        out: folder for the files.
        runs: finished runs; none give the paper's numbers alone.
        pair: which to show, where there are several.

    Returns:
        the files.
    """
    section = _choose(runs, pair) if runs else None
    rows = ablation(section)
    title = f"Ablation of RLD, {section.title}, {section.dataset}, {section.split}" if section else "Ablation of RLD"
    files = save_figure(draw_ablation(rows, title), out, "ablation")
    (out / "ablation.md").write_text(ablation_markdown(rows, title), encoding="utf-8")
    return [*files, out / "ablation.md"]


def write_all(out: Path, runs: Sequence[Run], *, reader: LogitReader | None = None) -> list[Path]:
    """Every figure that some runs suffice for; says why where they do not.

    Args:
        out: folder for the files.
        runs: finished runs.
        reader: runs the networks.

    Returns:
        the files.
    """
    reader = reader or LogitReader()
    distilled = [run for run in runs if run.summary.teacher]
    explained = next((run for run in distilled if run.method == "rld"), distilled[0] if distilled else None)
    figures: dict[str, Callable[[], list[Path]]] = {
        "toy": lambda: write_toy(out),
        "explain": lambda: write_explanation(out, run=explained.folder if explained else None, reader=reader),
        "differences": lambda: write_differences(out, runs, reader=reader),
        "gain": lambda: write_gain(out, runs),
        "sensitivity": lambda: write_sensitivity(out, runs),
        "ablation": lambda: write_ablation(out, runs),
    }
    files = []
    for name, write in figures.items():
        try:
            files += write()
        except (ValueError, OSError) as error:
            print_line("left out", f"{name}: {error}")
    return files


def print_written(files: Sequence[Path]) -> None:
    """Prints the files, one a line."""
    for file in files:
        console.print(f"  {file}", soft_wrap=True, markup=False)


def _choose(runs: Sequence[Run], pair: str | None) -> Section:
    found = {}
    for section in sections(runs)[0]:
        if section.teacher and any(row.teacher for row in section.rows):
            found.setdefault(f"{section.teacher}_to_{section.student}", []).append(section)
    told = ", ".join(found)
    if not found:
        raise ValueError("there is no finished run with a teacher in these folders; train one first, such as loss=rld.")
    if pair is None and len(found) > 1:
        raise ValueError(f"there are runs of several pairs; choose one with --pair: {told}.")
    if pair is not None and pair not in found:
        raise ValueError(f"there is no finished run of --pair {pair}; there are runs of {told}.")
    candidates = found[pair or told]
    data = {section.dataset for section in candidates}
    if len(data) > 1:
        raise ValueError(f"{told} was trained on {' and '.join(sorted(data))}; give the folders of one of them.")
    return candidates[0]  # the test split's, where it was measured on that and on held-out images
