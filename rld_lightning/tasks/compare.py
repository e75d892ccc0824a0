"""One command from nothing to a report: a teacher, and a student for each loss and seed, in one folder."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from rld_lightning.console import print_files, print_line
from rld_lightning.hydra.compose import compose
from rld_lightning.reporting.report import write_report
from rld_lightning.tasks.start import run_sweep, train_teacher


def compare(losses: Sequence[str], seeds: Sequence[int], overrides: Sequence[str], folder: Path | None = None) -> Path:
    """Trains what is not yet there and writes the report; a run that was interrupted goes on where it was.

    Runs lie in ``<folder>/<loss>/seed<k>``. With ``model.teacher.weights=fit`` the teacher is trained first, in
    ``<folder>/teacher``, with the first seed; the teacher store is left alone. As in the literature, validation is on
    the test split, unless ``data.val_fraction`` says otherwise.

    Args:
        losses: options of the loss group.
        seeds: of each student.
        overrides: for ``scripts/fit.py``, the same for all; ``launcher=joblib`` and the like are for the students.
        folder: of the comparison; ``<paths.runs>/compare/<pair>`` by itself.

    Returns:
        the report's page.

    Raises:
        ValueError: an option is wrong; before anything starts.
        UserError: the teacher could not be trained.
        SystemExit: no student finished, or the comparison was interrupted.
    """
    _refuse(overrides)
    fixed = list(overrides)
    if not any(override.startswith("data.val_fraction=") for override in overrides):
        fixed.append("data.val_fraction=0")
    for loss in losses:
        cfg = _compose([*fixed, f"loss={loss}"])
    folder = folder or Path(cfg.paths.runs) / "compare" / cfg.model.label
    if cfg.model.teacher is not None and cfg.model.teacher.weights == "fit":
        begun = folder / "teacher" / "config.yaml"  # perhaps for other students' seeds
        cfg.seed = OmegaConf.load(begun).seed if begun.exists() else seeds[0]
        weights = train_teacher(cfg, folder / "teacher", f"folder={folder}")
        fixed = [o for o in fixed if not o.startswith("model.teacher.weights=")] + [f"model.teacher.weights={weights}"]
    # Choices, so that a single one is swept as well, and more can follow. The seed in front: after the first few runs
    # there is one of each loss to look at.
    swept = [f"seed=choice({','.join(map(str, seeds))})", f"loss=choice({','.join(losses)})"]
    status = run_sweep([*fixed, *swept], folder, "${hydra:runtime.choices.loss}/seed${seed}")
    if status == 130:
        print_line("stopped", "the same command goes on from here; finished runs are not repeated")
    if status:
        sys.exit(status)
    files = write_report([folder], folder / "report", title=f"{cfg.model.label}: {', '.join(losses)}")
    print_files(folder / "report", {files.html.name: "the results", files.markdown.name: "the same as Markdown"})
    return files.html


def split_list(text: str) -> list[str]:
    """``ce,kd`` as ``["ce", "kd"]``.

    Raises:
        ValueError: an entry is empty, or there twice.
    """
    entries = [entry.strip() for entry in text.split(",")]
    if not all(re.fullmatch(r"\w+", entry) for entry in entries) or len(set(entries)) < len(entries):
        raise ValueError(
            f"{text} is not a list: write names or numbers with commas between, each once, such as ce,rld."
        )
    return entries


def split_seeds(text: str) -> list[int]:
    """``0,1,2`` as ``[0, 1, 2]``.

    Raises:
        ValueError: an entry is no number, or there twice.
    """
    entries = split_list(text)
    if not all(entry.isdecimal() for entry in entries):
        raise ValueError(f"seeds={text} must be whole numbers with commas between, such as seeds=0,1,2.")
    return [int(entry) for entry in entries]


def _refuse(overrides: Sequence[str]) -> None:
    """Raises where an override is not one for all runs."""
    for override in overrides:
        key = override.lstrip("+~").split("=")[0]
        if (
            "=" not in override
            or key in ("loss", "seed", "sweep", "resume")
            or key.startswith(("hydra.sweep", "loss@"))
        ):
            raise ValueError(
                f"{override} is not for a comparison: give losses=..., seeds=..., folder=..., and what is the same for "
                "all runs as scripts/fit.py takes it (key=value)."
            )


def _compose(overrides: Sequence[str]) -> DictConfig:
    try:
        return compose([o for o in overrides if not o.startswith(("hydra.", "hydra/", "launcher="))])
    except HydraException as error:
        raise ValueError(f"{str(error).splitlines()[0]} (scripts/fit.py --help lists the options)") from error
