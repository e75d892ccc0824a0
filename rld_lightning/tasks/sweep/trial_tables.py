"""Results of a finished sweep: a table of settings, and the command that trains with the best."""

import math
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from pathlib import Path

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig

from rld_lightning.console import console, print_files, print_line, print_table
from rld_lightning.errors import UserError, printable
from rld_lightning.hydra.compose import expand_combined_loss
from rld_lightning.hydra.quoting import as_command
from rld_lightning.metrics import sampling_error
from rld_lightning.models.complexity import count_macs, count_parameters, images_per_second
from rld_lightning.models.factory import create_model
from rld_lightning.models.weights.facts import read_facts
from rld_lightning.models.weights.read import read_metadata
from rld_lightning.package_files import invocation, script_command
from rld_lightning.redact import redact_text
from rld_lightning.reporting.labels import mean_and_std, short_key, short_value
from rld_lightning.runs.files import ALONE, CURVES, ERROR, STUDENT, SUMMARY, SWEEP, TEACHER, read_text
from rld_lightning.runs.finished import Run, find_runs, read_run
from rld_lightning.runs.summary import Summary
from rld_lightning.tasks.teacher.recorded import input_shape_as_teacher

HELD_OUT = "data.val_fraction"
MOST_SHOWN = 20  # settings


def _trials(folder: Path) -> list[Run]:
    """Returns the finished trials of a sweep, without those of nested sweeps and the networks trained first."""

    def is_trial(run: Run) -> bool:
        above = [path for path in (run.folder, *run.folder.parents) if path.is_relative_to(folder) and path != folder]
        within = any((path / SWEEP).exists() for path in above)
        return not within and folder / TEACHER not in above and run.folder != folder / ALONE

    return [run for run in find_runs([folder]) if is_trial(run)]


def key_of(override: Override) -> str:
    """Returns an override's key: ``loss.alpha``, ``loss``, or ``loss@loss.at`` with a package."""
    return override.get_key_element().lstrip("+~")


def line_of(override: Override) -> str:
    """Returns an override as it was written."""
    return override.input_line or ""


def print_failed(folder: Path) -> int:
    """Prints why trials of a sweep failed, one line each, and returns their number."""
    failed = sorted(path.parent for path in folder.rglob(ERROR) if not (path.parent / SUMMARY).exists())
    for path in failed:
        print_line("failed", f"{path}: {read_text(path / ERROR).strip()}")
    return len(failed)


def print_settings(config: DictConfig, swept: Collection[str], fixed: Mapping[str, str]) -> None:
    """Prints the settings of a sweep, best first, and how to train with the best.

    Raises:
        UserError: no trial has finished.
    """
    from rld_lightning.reporting.sweeps import best_setting, sweep_settings  # pandas takes a second to import

    folder = Path(config.hydra.sweep.dir)
    settings = sweep_settings(_trials(folder), swept)
    if settings.empty:
        raise UserError(f"no trial has finished in {folder}; what went wrong is in its {ERROR} files.")
    keys = [key for key in swept if key != "seed"]
    rows = [
        (
            *(short_value(line.split("=", 1)[1]) for line in setting.overrides),
            mean_and_std(setting.mean, setting.std),
            setting.n,
            setting.best,
            setting.epochs,
        )
        for setting in settings.itertuples(index=False)
    ]
    place = best_setting(settings)
    best = settings.loc[place]
    validated_on = best["run"].summary.validated_on
    columns = [*headings(keys), "top-1 %, last epoch", "n", "top-1 %, best epoch", "epochs"]
    measured = [_measured_on(run.summary) for run in settings["run"]]
    if differ := len({*measured}) > 1:
        validated_on = "different images, which do not compare"
        columns.append("measured on")
        rows = [(*row, images) for row, images in zip(rows, measured, strict=True)]
    spread = "; mean ± standard deviation over n seeds" if settings["n"].max() > 1 else ""
    first = "the highest" if differ else "the best"
    print_table(f"{len(settings)} settings on {validated_on}, {first} first{spread}", columns, rows[:MOST_SHOWN])
    if len(rows) > MOST_SHOWN:
        print_line("", f"and {len(rows) - MOST_SHOWN} more in {folder}")
    if not keys or differ or not best["run"].config["data"]["val_fraction"]:  # repetitions, or a comparison on the test
        return
    score = f"{rows[place][len(keys)]} % on {validated_on}, n = {best['n']}"
    command = retrain_command(config, best["overrides"], best["run"], fixed)
    print_line("best", f"{' '.join(best['overrides'])}: {score}")
    print_line("next", "train with it on the held-out images as well, and test once:")
    console.print(printable(command), soft_wrap=True, markup=False)


def _measured_on(summary: Summary) -> str:
    return f"{summary.dataset}, {summary.validated_on}"


def headings(keys: Sequence[str]) -> list[str]:
    """Shortens swept keys for the terminal, as far as they stay distinct."""
    short = [short_key(key) for key in keys]
    return short if len({*short}) == len(keys) else [*keys]


def retrain_command(config: DictConfig, best: Sequence[str], trial: Run, fixed: Mapping[str, str]) -> str:
    """Returns the command that trains a sweep's best setting on the whole training split, and tests once, at the end.

    Args:
        best: the overrides of the setting, without the seed.
    """
    gone = ("sweep", "launcher", "seed", HELD_OUT)
    settled = {key: line for key, line in fixed.items() if key not in gone and not key.startswith("callbacks.pruner")}
    settled = _as_a_list(settled)
    if "model.teacher.weights" in settled and f"{config.hydra.sweep.dir}/" in settled["model.teacher.weights"]:
        settled["model.teacher.weights"] = "model.teacher.weights=fit"  # the sweep's own has not seen all images
    if not any(re.match(r"\+?loss[=@]", line) for line in (*settled.values(), *best)):
        settled["loss"] = f"loss={config.hydra.runtime.choices.loss}"  # which sweep=... may have chosen
    epochs = trial.config["recipe"]["epochs"]
    last = [f"{HELD_OUT}=0", f"trainer.check_val_every_n_epoch={epochs}"]
    return f"{' '.join(invocation(sys.argv[0]))} {as_command(map(redact_text, [*settled.values(), *best, *last]))}"


def _as_a_list(fixed: Mapping[str, str]) -> dict[str, str]:
    """Reverts :func:`expand_combined_loss`: ``loss=[rld,at]`` as the user has written it."""
    names = [match[1] for line in fixed.values() if (match := re.fullmatch(r"\+loss@loss\.(\w+)=\1", line))]
    if fixed.get("loss") != "loss=combined" or len(names) < 2:
        return dict(fixed)
    combination = f"loss=[{','.join(names)}]"
    expanded = expand_combined_loss([combination])
    return {key: line for key, line in fixed.items() if line not in expanded} | {"loss": combination}


def print_networks(folder: Path) -> None:
    """Prints teacher, student alone and distilled students of a sweep side by side, and what to try next.

    Raises:
        UserError: no trial has finished.
    """
    trials = _trials(folder)
    if not trials:
        raise UserError(f"no trial has finished in {folder}; what went wrong is in its {ERROR} files.")
    alone, first = read_run(folder / ALONE), trials[0].summary
    rows = []
    if first.teacher is not None:
        rows.append(("teacher", *_measured(first.teacher, first.teacher_top1, trials[0])))
    rows.append(("student, cross-entropy", *_measured(alone.summary.model, alone.summary.top1, alone)))
    for run in trials:
        seed = f", seed {run.summary.seed}" if len({other.summary.seed for other in trials}) > 1 else ""
        rows.append((f"student, {run.summary.loss}{seed}", *_measured(run.summary.model, run.summary.top1, run)))
    columns = ("", "model", "top-1 %", "parameters", "M MACs", "images/s")
    title = f"{first.dataset}, last of {first.epochs} epochs, top-1 on {first.validation_images}"
    print_table(title, columns, rows)
    console.print("images/s: the fastest forward pass of 64 images on this machine", style="dim")
    if caution := _may_be_chance(alone.summary, [run.summary for run in trials]):
        print_line("caution", caution)
    for run in (*trials, alone):
        print_files(run.folder, {CURVES: f"learning curves, {run.summary.loss}"})
    suggested = {
        f"{script_command('quickstart')} loss=dkd": f"another loss ({script_command('fit')} --help lists all)",
        f"{script_command('compare')} experiment=quickstart losses=ce,kd,rld seeds=0,1,2": (
            "several, with spread and a report"
        ),
        f"{script_command('fit')} model=wrn40_2_to_wrn16_2 loss=rld": "a pair of the papers, on CIFAR-100",
    }
    for command, what in suggested.items():
        print_line("next", f"{command}  {what}", pasted=True)


def _may_be_chance(alone: Summary, distilled: Sequence[Summary]) -> str:
    """Returns a warning if all differences to the student alone are within the sampling error; else empty."""
    most = max(abs(summary.top1 - alone.top1) for summary in distilled)
    threshold = max(
        math.hypot(sampling_error(alone.top1, alone.images), sampling_error(s.top1, s.images)) for s in distilled
    )
    if most > threshold:
        return ""
    return f"{alone.images:,} images tell students apart by {threshold:.1f} points or more; several seeds tell more"


def _measured(name: str, top1: float | None, run: Run) -> Sequence[object]:
    """Returns name, accuracy and cost of a run's student or teacher."""
    file = run.folder / STUDENT
    facts = read_facts(read_metadata(file), file)
    if facts.num_classes is None or facts.image_shape is None:
        raise ValueError(f"{file} does not say what images it is for; give a folder that this package has written.")
    return name, top1, *_cost(name, facts.num_classes, input_shape_as_teacher(name, [run], facts.image_shape))


@cache
def _cost(name: str, num_classes: int, image_shape: tuple[int, int, int]) -> tuple[int, float, float]:
    """Returns parameters, MACs in millions and images/s of a network; measured once, as weights do not matter."""
    model = create_model(name, num_classes)
    return count_parameters(model), count_macs(model, image_shape) / 1e6, images_per_second(model, image_shape)
