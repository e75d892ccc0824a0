"""An Optuna study for a sweep: its search space, resuming it, and reporting results to it."""

import logging
import math
import os
import sqlite3
import warnings
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, Transformer
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from rld_lightning.errors import first_line

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution

_MOST_QUOTED = 50  # characters of a stranger's value
INSTEAD_OF = "instead_of"  # attribute of a trial: the number of the interrupted trial that it repeats


def search_space(
    lines: Sequence[str], loader: ConfigLoader | None = None
) -> "tuple[dict[str, BaseDistribution], tuple[str, ...]]":
    """Returns Optuna's distributions by key, and the overrides that are the same for all trials.

    Args:
        lines: overrides; the last one for a key counts.

    Raises:
        ValueError: an interval is invalid, such as one on a logarithmic scale that starts at 0.
    """
    overrides = OverridesParser.create(loader).parse_overrides(list(lines))
    last = {override.get_key_element(): override for override in overrides}
    space = {key: _distribution(override) for key, override in last.items() if override.is_sweep_override()}
    fixed = (
        f"{k}={o.get_value_element_as_str()}" if not o.is_delete() else k for k, o in last.items() if k not in space
    )
    return space, tuple(fixed)


def _distribution(override: Override) -> "BaseDistribution":
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    sweep: Any = override.value()
    if isinstance(sweep, IntervalSweep):
        ends = (sweep.start, sweep.end)
        kind: Any = IntDistribution if all(isinstance(end, int) for end in ends) else FloatDistribution
        try:
            return kind(*ends, log="log" in sweep.tags)
        except ValueError as error:
            raise ValueError(f"{override.input_line} is not an interval: {error}") from error
    values: list[Any] = list(override.sweep_iterator(_category))
    if override.is_range_sweep() and not sweep.shuffle and len(values) > 1:
        low, high, step = min(values[0], values[-1]), max(values[0], values[-1]), abs(sweep.step)
        kind = IntDistribution if all(isinstance(value, int) for value in values) else FloatDistribution
        return kind(low, high, step=step)
    return CategoricalDistribution(values)


def _category(value: Any) -> Any:
    """Returns a value that Optuna can store and that prints as an override."""
    return value if isinstance(value, bool | int | float) else Transformer.str(value)


def open_study(options: DictConfig, space: "dict[str, BaseDistribution]") -> "tuple[optuna.Study, int]":
    """Creates or loads the study of a sweep, and returns it with the number of remaining trials.

    Raises:
        ValueError: no key has several values, a grid has an interval, the storage cannot be read, or is not this
            sweep's.
    """
    import optuna
    from optuna.trial import TrialState

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    if not space:
        raise ValueError("Optuna has nothing to choose: give a key several values, such as loss.alpha=choice(1,2).")
    try:
        check_storage(options.storage)
        study = optuna.create_study(
            study_name=options.study_name,
            storage=options.storage,
            direction=options.direction,
            load_if_exists=True,
        )
        trials = study.get_trials(deepcopy=False)
        _check_study(study, options.direction, trials, space)
    except Exception as error:  # databases raise their own types
        raise ValueError(
            f"{options.storage} cannot be opened by Optuna {optuna.__version__} ({first_line(error)}): move it away, "
            "or sweep in another folder with hydra.sweep.dir=."
        ) from error
    study.sampler, total = _sampler(options, space, len(trials))
    for trial in trials:
        if trial.state == TrialState.RUNNING:
            study.tell(trial.number, state=TrialState.FAIL)
            study.enqueue_trial(trial.params, user_attrs={INSTEAD_OF: trial.number})  # same values: same folder
    trials = study.get_trials(deepcopy=False)
    numbers = [trial.user_attrs.get(INSTEAD_OF) for trial in trials]
    repeated = {number for number in numbers if isinstance(number, int)}
    done = sum(trial.state.is_finished() and trial.number not in repeated for trial in trials)
    return study, max(0, total - done)


def _check_study(
    study: "optuna.Study",
    direction: str,
    trials: "Sequence[optuna.trial.FrozenTrial]",
    space: "dict[str, BaseDistribution]",
) -> None:
    """Checks what is in a study, possibly a stranger's: Optuna would try any values that are noted for a trial to come.

    Raises:
        ValueError: it has other directions, results that are not numbers, or trials outside the search space.
    """
    from optuna.trial import TrialState

    if (found := [own.name.lower() for own in study.directions]) != [direction]:
        raise ValueError(f"its direction is {', '.join(found) or 'none'}, not hydra.sweeper.direction={direction}")
    for trial in trials:
        if trial.state == TrialState.COMPLETE and [type(value) for value in trial.values or ()] != [float]:
            raise ValueError(f"the result of its trial {trial.number} is not a number")
        waits = trial.system_attrs.get("fixed_params", {}) if trial.state == TrialState.WAITING else {}
        for key, value in (trial.params if trial.state == TrialState.RUNNING else dict(waits)).items():
            if key not in space or not _is_in(space[key], value):
                value = str(value)[:_MOST_QUOTED]
                raise ValueError(f"its trial {trial.number} has {key}={value}, which this sweep does not search")


def _is_in(distribution: "BaseDistribution", value: object) -> bool:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(distribution, CategoricalDistribution):
        return value in distribution.choices
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    return isinstance(value, int | float) and distribution.low <= value <= distribution.high


def check_storage(storage: str | None) -> None:
    """Checks that a database file, possibly a stranger's, contains only tables.

    Args:
        storage: its URL; anything but an SQLite file is not checked.

    Raises:
        ValueError: it has triggers, or views, which could take forever in the place of a table.
        sqlite3.Error: it is not a database.
    """
    file = Path(str(storage).removeprefix("sqlite:///"))
    if not str(storage).startswith("sqlite:///") or not file.is_file():
        return
    with closing(sqlite3.connect(file)) as database:
        if row := database.execute("SELECT name FROM sqlite_master WHERE type IN ('view', 'trigger')").fetchone():
            raise ValueError(f"it has {row[0]!r}, but Optuna creates only tables")


def _sampler(
    options: DictConfig, space: "dict[str, BaseDistribution]", started: int
) -> "tuple[optuna.samplers.BaseSampler, int]":
    """Returns the sampler and the total number of trials, for a grid at most its points."""
    settings: Any = OmegaConf.to_container(options.sampler)
    if settings["_target_"].endswith(".GridSampler"):
        points = {key: _points(key, distribution) for key, distribution in space.items()}
        size = math.prod(len(values) for values in points.values())
        return instantiate({**settings, "search_space": points, "_convert_": "all"}), min(options.n_trials, size)
    if settings.get("seed") is not None:
        settings["seed"] += started  # otherwise it would propose the first trials again
    return instantiate(settings), options.n_trials


def _points(key: str, distribution: "BaseDistribution") -> list[Any]:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    if isinstance(distribution, IntDistribution):
        return list(range(distribution.low, distribution.high + 1, distribution.step))
    if isinstance(distribution, FloatDistribution) and distribution.step is not None:
        count = round((distribution.high - distribution.low) / distribution.step) + 1
        return [distribution.low + i * distribution.step for i in range(count)]
    raise ValueError(f"a grid needs values and {key} has an interval; write choice() or range(), or another sampler.")


def tell(study: "optuna.Study", trial: "optuna.Trial", value: float | None) -> None:
    """Reports a trial's result to the study.

    Args:
        value: the result; None or a number that is not finite is a failure.
    """
    from optuna.samplers import GridSampler
    from optuna.trial import TrialState

    try:
        if value is None or not math.isfinite(value):
            study.tell(trial, state=TrialState.FAIL)
        else:
            study.tell(trial, float(value))
    except (RuntimeError, KeyError):  # after its last point, a grid stops Optuna's loop; the result is stored already
        if not isinstance(study.sampler, GridSampler):
            raise


def write_best(study: "optuna.Study", folder: Path) -> None:
    """Writes ``optimization_results.yaml``, if a trial has completed."""
    from optuna.trial import TrialState

    if study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        best = {"name": "optuna", "best_params": study.best_params, "best_value": study.best_value}
        OmegaConf.save(OmegaConf.create(best), folder / "optimization_results.yaml")


def check_options(options: DictConfig) -> None:
    """Checks the options of an Optuna sweep before anything is trained.

    Raises:
        ValueError: an option is invalid.
        ImportError: Optuna is not installed.
    """
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise ImportError(f'a sweep with Optuna needs pip install "rld-lightning[sweep]" ({error}).') from error
    if not isinstance(options.n_trials, int) or options.n_trials < 1:
        raise ValueError(f"hydra.sweeper.n_trials={options.n_trials} must be a whole number from 1 on.")
    if options.direction not in ("maximize", "minimize"):
        raise ValueError(f"hydra.sweeper.direction={options.direction} must be maximize or minimize.")
    check_n_jobs(options.n_jobs)


def check_n_jobs(n_jobs: Any) -> int:
    """Returns how many trials are proposed at a time.

    Raises:
        ValueError: the number is invalid.
    """
    if n_jobs == -1:  # as joblib counts
        return os.cpu_count() or 1
    if not isinstance(n_jobs, int) or n_jobs < 1:
        raise ValueError(f"hydra.sweeper.n_jobs={n_jobs} must be a whole number from 1 on, or -1 for one a core.")
    return n_jobs
