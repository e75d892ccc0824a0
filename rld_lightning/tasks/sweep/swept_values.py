"""Parses what a command sweeps and what it fixes, and checks each value."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig

from rld_lightning.data.in_memory import InMemoryDataModule
from rld_lightning.errors import UserError, first_line, user_errors
from rld_lightning.hydra.checks.mistakes import check, missing_option, with_value
from rld_lightning.hydra.sweeps.sweepers import own_params
from rld_lightning.models.weights.companion_files import find_weights
from rld_lightning.models.weights.verify import check_fits
from rld_lightning.redact import redact_text
from rld_lightning.runs.checkpoint import checkpoint_exists
from rld_lightning.runs.files import SWEEP, read_yaml, write_yaml
from rld_lightning.runs.settings import affects_training, canonical
from rld_lightning.tasks.run.checks import check_loss, check_mixtures, check_names
from rld_lightning.tasks.run.make import make_data
from rld_lightning.tasks.run.plan import plan_student, plan_teacher, with_values
from rld_lightning.tasks.run.resume import find_checkpoint
from rld_lightning.tasks.sweep.trial_tables import key_of, line_of

WEIGHTS = "model.teacher.weights"


def _parsed(config: DictConfig) -> list[Override]:
    """Returns the sweeper's own parameters, then the command's overrides."""
    return parse([*own_params(config.hydra.sweeper.get("params")), *config.hydra.overrides.task])


def parse(lines: Iterable[str]) -> list[Override]:
    """Parses overrides."""
    return OverridesParser.create().parse_overrides(list(lines))


def overrides_of(config: DictConfig) -> tuple[dict[str, str], dict[str, str]]:
    """Returns swept and fixed values by key, as written, from the sweeper's own parameters and the command."""
    overrides = {key_of(override): override for override in _parsed(config)}  # the last one wins
    swept = {key: line_of(override) for key, override in overrides.items() if override.is_sweep_override()}
    return swept, {key: line_of(override) for key, override in overrides.items() if key not in swept}


def group_of(key: str) -> str:
    """Returns the part of a key by which Hydra excludes keys from directory names: ``loss`` of ``loss@loss.at``."""
    return key.split("@")[0]


def values_of(override: Override) -> list[str]:
    """Returns the overrides for which a swept one stands; for an interval its ends."""
    if isinstance(ends := override.value(), IntervalSweep):
        return [f"{override.get_key_element()}={end}" for end in (ends.start, ends.end)]
    return [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]


def check_swept(config: DictConfig, *, listed: bool) -> None:
    """Composes the configuration with each swept value, before anything is trained for the trials.

    Args:
        listed: whether the sweep goes through lists of values.

    Raises:
        UserError: an option or a key does not exist, a value is invalid, or an interval was given instead of a list.
    """
    overrides = {override.get_key_element(): override for override in _parsed(config)}  # keyed as in Hydra's sweeper
    if listed and (intervals := [o.input_line for o in overrides.values() if o.is_interval_sweep()]):
        raise UserError(
            f"{intervals[0]} has no list of values, as a grid needs: separate values by commas, or let "
            "Optuna choose (hydra/sweeper=optuna)."
        )
    values = {key: values_of(override) for key, override in overrides.items() if override.is_sweep_override()}
    first = {key: listed[:1] for key, listed in values.items()}
    first |= {key: [line_of(override)] for key, override in overrides.items() if key not in values}
    others = [{key: [value]} for key, listed in values.items() if "." not in key for value in listed[1:]]
    loader = GlobalHydra.instance().config_loader()
    for trial in [{}, *others]:
        lines = [line for key in overrides for line in ({**first, **trial})[key]]
        try:
            cfg = loader.load_sweep_config(config, lines)
        except HydraException as error:
            key = re.search(r"Could not override '([^']+)'", str(error))
            choice = " ".join(({**first, **trial})[group][0] for group in values if "." not in group)
            unknown = f"{key[1]} is not known{f' with {choice}' * bool(choice)}" if key else first_line(error)
            raise UserError(missing_option(error) or f"{unknown} (--help lists the options)") from error
        check(cfg)
        _check_trial(cfg)
        if not trial:
            for line in [line for key, listed in values.items() if "." in key for line in listed[1:]]:
                check(with_value(cfg, line))
                if line.startswith(("model.", "data.")):
                    _check_trial(with_value(cfg, line))


def _check_trial(cfg: DictConfig) -> None:
    """Refuses a trial that would fail at its start; downloads nothing, and reads no image.

    Raises:
        UserError: a network is unknown, or a named file or folder does not exist.
    """
    with user_errors():
        loss, teacher = instantiate(cfg.loss), plan_teacher(cfg.model.teacher)
        check_loss(loss, teacher, cfg.model.label)
        student = plan_student(cfg.model.student)
        check_names(student, teacher if loss.needs_teacher else None)
        if (checkpoint := find_checkpoint(cfg.resume)) is not None and not checkpoint_exists(Path(checkpoint)):
            raise FileNotFoundError(f"resume={checkpoint} does not exist; give a run directory, or omit resume.")
        settings = with_values(cfg, {"paths.run": cfg.paths.runs}).data  # trials get their directories later
        data = make_data(settings)
        check_mixtures(loss, data)
        if student.weights not in (None, "pretrained") and isinstance(data, InMemoryDataModule):  # classes are known
            check_fits(student.name, data.num_classes, find_weights(student.weights))
        root = settings.get("root")
        missing = root is not None and "://" not in str(root) and not Path(root).is_dir()
        if missing and not isinstance(data, InMemoryDataModule):  # others report missing data; these may be downloaded
            data.prepare_data()
            data.setup("fit")


def refuse_another_sweep(folder: Path, swept: Mapping[str, str], fixed: Mapping[str, str], *, values_too: bool) -> None:
    """Writes :data:`SWEEP`, and refuses a command that would mix other trials with those of a directory.

    Args:
        values_too: whether the swept values must be the same, as in an Optuna study.
    """
    record = folder / SWEEP
    current = {line for key, line in fixed.items() if affects_training(key)}
    current |= set(swept.values()) if values_too else set(swept)
    current = _canonical(map(redact_text, current))
    if record.exists():
        with user_errors():
            lines = read_yaml(record) or []  # plain text, nothing is resolved
            if not isinstance(lines, list):
                raise ValueError(f"{record} is not a list of overrides. Move it away.")
            saved = _canonical(map(str, lines))
        if differing := sorted(saved ^ current):
            values = (
                "" if values_too else ", in which only the values of what is swept may change (a single one: choice(4))"
            )
            raise UserError(
                f"{folder} holds a sweep of another command: they differ in {', '.join(differing)}. Continue it with "
                f"its own{values}, or choose another folder (hydra.sweep.dir=, for compare.py folder=)."
            )
    write_yaml(record, sorted(current))


def _canonical(lines: Iterable[str]) -> set[str]:
    """Normalises overrides and keys to the same text, however they were written."""
    parts = (line.partition("=") for line in lines)
    # How trials are chosen and started does not matter.
    return {
        f"{key}={canonical(key, value)}" if equals else key
        for key, equals, value in parts
        if key not in ("launcher", "sweep")
    }
