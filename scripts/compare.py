r"""Compare losses on a pair, including a report. The same command continues an
interrupted or extended comparison.

  python scripts/compare.py model=wrn40_2_to_wrn16_2 losses=ce,kd,dkd,rld \
      seeds=0,1,2
  python scripts/compare.py model=pair model.teacher.name=resnet20 \
      model.student.name=resnet8 model.teacher.weights=fit losses=ce,rld \
      seeds=0,1,2 recipe=quick recipe.epochs=30 launcher=joblib

A shorthand for scripts/fit.py with sweep=compare (conf/sweep/compare.yaml).
"""

import rld_lightning.interrupt  # noqa: F401, I001  (first, so that Ctrl-C ends the other imports, too)

import argparse
import re
import sys

from omegaconf import DictConfig

from rld_lightning.hydra.quoting import for_hydra
from rld_lightning.hydra.script import exit_on_user_error, run_task
from rld_lightning.package_files import script_command

SWEPT = {"losses": "loss", "seeds": "seed"}
# Options that differ between the runs of a comparison.
NOT_FOR_ALL = r"[+~]*((loss|seed|sweep|resume)=|loss@|hydra\.sweep(?!\.dir=))"


def fit_override(option: str) -> str:
    """Translates ``losses=ce,rld``, ``seeds=0,1`` and ``folder=...`` to overrides of scripts/fit.py; keeps others.

    Raises:
        ValueError: it is not a list, or an option that differs between the runs.
    """
    key, equals, value = option.partition("=")
    if key == "folder":
        return f"hydra.sweep.dir={for_hydra(value)}"
    if key in SWEPT:
        entries = [entry.strip() for entry in value.split(",")]
        if not all(re.fullmatch(r"\w+", entry) for entry in entries) or len(set(entries)) < len(entries):
            raise ValueError(
                f"{option} is not a list: write names or numbers with commas between, each once, such as losses=ce,rld."
            )
        if key == "seeds" and not all(entry.isdecimal() for entry in entries):
            raise ValueError(f"{option} must be whole numbers with commas between, such as seeds=0,1,2.")
        return f"{SWEPT[key]}=choice({','.join(entries)})"
    if not equals or re.match(NOT_FOR_ALL, option):
        raise ValueError(
            f"{option} is not for a comparison: give losses=..., seeds=..., folder=..., and options of scripts/fit.py "
            "that are the same for all runs (key=value)."
        )
    return option


def main(cfg: DictConfig) -> float:
    """Runs a trial and returns the student's top-1 accuracy in percent."""
    from rld_lightning.tasks.trial import run_trial  # imports Lightning: slow, so not for help

    return run_trial(cfg).top1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog=script_command("compare"), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "options",
        nargs="*",
        metavar="key=value",
        help="losses=ce,kd,dkd,rld seeds=0,1,2 folder=runs/compare/<pair>, options of scripts/fit.py for all runs",
    )
    parser.add_argument("-cd", "--config-dir", metavar="FOLDER", help="a folder with your own configuration files")
    with exit_on_user_error():
        # conf/sweep/compare.yaml sets MULTIRUN, but Hydra does not read it if another override is invalid.
        given = parser.parse_intermixed_args()  # flags may be between options
        more = ["--config-dir", given.config_dir] if given.config_dir else []
        sys.argv[1:] = ["--multirun", *more, *map(fit_override, given.options)]
    run_task(main, "fit", "sweep=compare")
