"""One command from nothing to a report: a teacher, and a student for each loss and seed, in one folder."""

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig

from rld_lightning.cli import CONF
from rld_lightning.console import print_files, print_line
from rld_lightning.reporting.report import write_report

FIT = CONF.parent / "scripts" / "fit.py"


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
        SystemExit: the teacher failed, or the comparison was interrupted.
    """
    _refuse(overrides)
    for loss in losses:
        cfg = _compose([*overrides, f"loss={loss}"])
    folder = folder or Path(cfg.paths.runs) / "compare" / cfg.model.label
    fixed = list(overrides)
    if not any(override.startswith("data.val_fraction=") for override in overrides):
        fixed.append("data.val_fraction=0")
    if cfg.model.teacher is not None and cfg.model.teacher.weights == "fit":
        _fit(_for_teacher(fixed, cfg.model.teacher.name), [f"seed={seeds[0]}"], folder / "teacher", ".")
        weights = f"model.teacher.weights={folder / 'teacher' / 'student.safetensors'}"
        fixed = [o for o in fixed if not o.startswith("model.teacher.weights=")] + [weights]
    # The seed in front: after the first few runs there is one of each loss to look at.
    swept = [f"seed={','.join(map(str, seeds))}", f"loss={','.join(losses)}"]
    _fit(fixed, swept, folder, "${hydra:runtime.choices.loss}/seed${seed}")
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
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            return hydra.compose("fit", [o for o in overrides if not o.startswith(("hydra.", "hydra/", "launcher="))])
    except HydraException as error:
        raise ValueError(f"{str(error).splitlines()[0]} (scripts/fit.py --help lists the options)") from error


def _for_teacher(overrides: Sequence[str], name: str) -> list[str]:
    """The overrides of the runs, for a run that trains their teacher with cross-entropy."""
    others = [
        override
        for override in overrides
        if not re.match(r"[+~]*(model|loss|launcher|hydra)\b", override) and not override.startswith("experiment=")
    ]
    return ["model=single", f"model.student.name={name}", "loss=ce", *others]


def _fit(fixed: Sequence[str], swept: Sequence[str], folder: Path, subfolder: str) -> None:
    """Runs ``scripts/fit.py`` as a sweep: its trials are processes of their own that go on where they were."""
    places = [f"hydra.sweep.dir={folder}", f"hydra.sweep.subdir='{subfolder}'"]
    try:
        status = subprocess.run([sys.executable, FIT, "-m", *fixed, *swept, *places], check=False).returncode
    except KeyboardInterrupt:
        status = 130
    if status:
        print_line("stopped", "the same command goes on from here; finished runs are not repeated")
        sys.exit(status)
    if subfolder == "." and not (folder / "summary.json").exists():
        sys.exit(2)  # the trial has said why
