"""Decides whether two runs have the same settings: those that affect the result.

Keys without an effect are listed here; all others count, so that in doubt runs are kept apart. For options of the
trainer and for callbacks, missing and null mean Lightning's default and no callback. These are filled in, so that a run
with ``trainer.plugins=null`` equals one without this key, and one with averaged weights never equals one without.
"""

import re
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from rld_lightning.models.registry import canonical_name
from rld_lightning.models.teacher.teacher_store import SEARCHED, SOURCES
from rld_lightning.redact import redact
from rld_lightning.runs.files import CONFIG, read_config, weights_in
from rld_lightning.runs.naming import class_name

SEEDS = ("seed", "data.seed")  # runs that differ only in these are repetitions

# Keys without an effect on the result, including everything below them.
_NO_EFFECT = (
    # locations
    *("paths", "resume", "data.root", "data.cache", "data.bad_images_file", "trainer.default_root_dir"),
    *("data.split_file", "data.name", "data.url", "data.download"),
    "model.teacher.sha256",  # compared separately, as the checksum of the file that is read
    # descriptions, and where they are shown
    *(
        "method",
        "dataset",
        "recipe_name",
        "tags",
        "notes",
        "logger",
        "print_config",
        "after",
        "trainer.logger",
        "trainer.model_registry",
    ),
    # data loading
    *("data.cache_gb", "data.num_workers", "data.eval_batch_size"),
    # distribution of the work: batches are global, and evaluation is exact on any number of devices
    *(f"trainer.{key}" for key in ("accelerator", "devices", "num_nodes", "strategy")),
    # monitoring
    *(f"trainer.{key}" for key in ("check_val_every_n_epoch", "val_check_interval", "num_sanity_val_steps")),
    *(f"trainer.{key}" for key in ("log_every_n_steps", "profiler", "detect_anomaly", "enable_autolog_hparams")),
    *(f"trainer.{key}" for key in ("enable_checkpointing", "enable_progress_bar", "enable_model_summary")),
    *(f"trainer.{key}" for key in ("limit_test_batches", "limit_predict_batches")),
    # summation order, which changes a result as much as other hardware does
    *(f"trainer.{key}" for key in ("deterministic", "benchmark", "inference_mode")),
    *("model.compile", "model.teacher.fuse"),
    "model.capture",  # how the same step is launched
    # rounding of the teacher's logits, or the batch in which they are computed: as small a change
    *("model.teacher.cache", "model.teacher.cache_dtype"),
)
# Callbacks that only monitor, by package; all others count, with all their options.
_WATCHERS = {
    "rld_lightning": {
        *("ClassAccuracy", "GradientNorm", "TeacherMonitor", "Throughput", "WandbExamples"),
        *("Divergence", "ExactResume", "LastCheckpoint", "OwnCheckpoints", "SameConfiguration"),
        "RunProgress",
        "StepSeed",  # random numbers, like a seed
    },
    "lightning": {
        *("RichProgressBar", "TQDMProgressBar", "ModelSummary", "RichModelSummary"),
        *("LearningRateMonitor", "DeviceStatsMonitor", "ModelCheckpoint", "OnExceptionCheckpoint"),
    },
}
# Their names in conf/callbacks and conf/logger, for overrides, where only the key is known.
_WATCHER_NAMES = (
    *("progress", "random_state", "throughput", "teacher", "class_accuracy", "gradient_norm", "learning_rate"),
    *("divergence", "checkpoint_files", "checkpoint_best", "checkpoint_last", "wandb_examples"),
)
# Options of callbacks without an effect: a sweep's records.
_NOT_COUNTED = {"rld_lightning.callbacks.OptunaPruner": ("storage", "study_name", "overrides")}
_NEVER = 1_000_000  # patience of an EarlyStopping that only ends diverged runs
# Lightning's defaults of the options that count, as `canonical` writes them.
_TRAINER_DEFAULTS = {
    "trainer.precision": "32-true",
    "trainer.gradient_clip_val": "None",
    "trainer.gradient_clip_algorithm": "norm",
    "trainer.accumulate_grad_batches": "1",
    "trainer.sync_batchnorm": "False",
    "trainer.max_epochs": "the recipe's",
    "trainer.min_epochs": "None",
    "trainer.max_steps": "-1",
    "trainer.min_steps": "None",
    "trainer.max_time": "None",
    "trainer.limit_train_batches": "all",
    "trainer.limit_val_batches": "all",  # decides what is evaluated
    "trainer.overfit_batches": "0",
    "trainer.fast_dev_run": "False",
    "trainer.reload_dataloaders_every_n_epochs": "0",
    "trainer.plugins": "None",
}
# Likewise for other options that count and that are missing in some configurations.
_DEFAULTS = {
    "data.mixup": "0",
    "data.cutmix": "0",
    "data.mean": "None",
    "data.std": "None",
    "data.resize": "None",
    "data.scale": "[0.08, 1.0]",
    "loss.label_smoothing": "0",
    "model.teacher.batch_statistics": "False",
    "model.teacher.start": "None",
    "model.teacher.mean_of": "logits",
}
# Spellings of the same value; as a limit, 1.0 is everything and 1 a single batch.
_SYNONYMS = {
    "trainer.precision": {"32": "32-true", "64": "64-true", "16": "16-mixed", "bf16": "bf16-mixed"},
    "trainer.gradient_clip_val": {"0": "None", "0.0": "None"},
    "trainer.limit_train_batches": {"1.0": "all"},
    "trainer.limit_val_batches": {"1.0": "all"},
    "trainer.overfit_batches": {"0.0": "0", "1.0": "all"},
}
_MOST_SHOWN = 300  # characters
_FILES = ("model.teacher.weights", "model.teacher.start", "model.student.weights")
_NETWORKS = ("model.teacher.name", "model.student.name")
_NO_FILES = ("None", *SOURCES)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Flattens nested values to full keys and text: ``{"loss.alpha": "1.0", ...}``."""
    pairs: dict[str, str] = {}
    for key, value in values.items():
        nested = isinstance(value, Mapping)
        pairs |= flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": str(value)}
    return pairs


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Returns the settings, seeds included, in which two resolved configurations differ, with both values.

    Ignores settings without an effect on the result, and settings that only one of the two has.
    """
    before, after = settings(first), settings(second)
    return {key: (before[key], after[key]) for key in before if key in after and before[key] != after[key]}


def affects_training(key: str) -> bool:
    """Whether a configuration key affects the training, as ``loss.alpha`` does and ``logger`` does not."""
    if key.startswith("callbacks."):
        return key.split(".")[1] not in _WATCHER_NAMES
    return not any(f"{key}.".startswith(f"{name}.") for name in _NO_EFFECT)


def settings(config: Mapping[str, Any]) -> dict[str, str]:
    """Returns the settings of a resolved configuration that affect the training, as ``{"loss.alpha": "1", ...}``.

    Callbacks are one setting, ``callbacks``: ``None``, or such as ``WeightAverage(decay=0.99, start=0)``.
    """
    others = {key: value for key, value in config.items() if key != "callbacks"}
    known = {key: canonical(key, value) for key, value in flat(others).items() if affects_training(key)}
    known = {key: value for key, value in known.items() if not (key.startswith("trainer.") and value == "None")}
    for key in [key for key in known if re.fullmatch(r"loss\.\w+\.label_smoothing", key)]:
        del known[key]  # a sum of losses has its own
    if known.get("trainer.max_epochs") == known.get("recipe.epochs"):
        known.pop("trainer.max_epochs", None)
    return _TRAINER_DEFAULTS | _DEFAULTS | known | {"callbacks": _callbacks(config)}


def canonical(key: str, value: str) -> str:
    """Normalises a value's text: ``1`` for ``1.0``, absolute file paths, one spelling of each network's name."""
    if key in _NETWORKS:
        return canonical_name(value)
    if key in _FILES and value not in _NO_FILES and not value.startswith("["):
        return str(_file(Path(value).absolute()))
    return re.sub(r"^(-?\d+)\.0$", r"\1", _SYNONYMS.get(key, {}).get(value, value))


def _file(weights: Path) -> Path:
    """Returns the weights file in the directory of a run or an export, by which they may be given."""
    with suppress(OSError):  # not a valid file name
        return weights_in(weights) or weights
    return weights


def _callbacks(config: Mapping[str, Any]) -> str:
    """Describes the callbacks that affect the training, ordered by name."""
    callbacks, paths = config.get("callbacks"), config.get("paths")
    found = ", ".join(
        sorted(filter(None, map(_callback, callbacks.values() if isinstance(callbacks, Mapping) else [callbacks])))
    )
    run = paths.get("run") if isinstance(paths, Mapping) else None
    # The run's own directory has no effect on the training.
    return found.replace(str(run), "<run>") if found and run else found or "None"


def _callback(options: Any) -> str:
    """``WeightAverage(decay=0.99, start=0)``; empty if it is switched off, or has no effect on the result."""
    if not isinstance(options, Mapping):
        return str(options or "")
    values = flat(options)
    target = values.pop("_target_", "")
    package, name = target.split(".")[0].removeprefix("pytorch_"), class_name(target)
    if name in _WATCHERS.get(package, ()) or (package == "lightning" and _only_ends_what_diverged(name, values)):
        return ""
    ignored = ("seed", *_NOT_COUNTED.get(target, ()))
    counted = ", ".join(f"{key}={canonical(key, values[key])}" for key in sorted(values) if key not in ignored)
    return f"{name if package in _WATCHERS else target}({counted})"


def only_monitors(callback: type) -> bool:
    """Whether callbacks of this class have no effect on the training."""
    package = callback.__module__.split(".")[0].removeprefix("pytorch_")
    return callback.__name__ in _WATCHERS.get(package, ())


def _only_ends_what_diverged(name: str, options: Mapping[str, str]) -> bool:
    """Whether this is an EarlyStopping that ends only runs with a non-finite loss, which have no result."""
    thresholds = {options.get(key, "None") for key in ("stopping_threshold", "divergence_threshold")}
    patience = options.get("patience", "")
    return name == "EarlyStopping" and patience.isdecimal() and int(patience) >= _NEVER and thresholds == {"None"}


def refuse_other_settings(run: Path, cfg: DictConfig) -> None:
    """Checks that the run in a directory has the same settings as this one.

    Args:
        run: the directory; without a run in it, nothing is checked.

    Raises:
        ValueError: a setting differs, or the directory's configuration cannot be read.
    """
    if not (run / CONFIG).exists():
        return
    saved = read_config(run)
    if not isinstance(saved, dict) or not isinstance(saved.get("model"), dict):
        raise ValueError(f"{run / CONFIG} is not the configuration of a run: it has no model; move it away.")
    refuse_changes(f"{run} holds", changes(settings(redact(saved)), cfg))


def refuse_changes(held: str, changed: Mapping[str, tuple[str, str]], may_differ: Collection[str] = ()) -> None:
    """Raises an error for the first setting that differs from an earlier run's.

    Args:
        held: the beginning of the message, before "a run with".
        changed: the differing settings, with the earlier value and this run's.

    Raises:
        ValueError: a setting differs.
    """
    for key, (before, now) in changed.items():
        if key not in may_differ:
            raise ValueError(
                f"{held} a run with {key}={_shown(before)}, and this one has {key}={now}: continue it with the command "
                "that started it, or start another run in another folder."
            )


def _shown(value: str) -> str:
    """Formats a value, possibly from an untrusted file, for a message."""
    return value if len(value) <= _MOST_SHOWN and value.isprintable() else repr(value[:_MOST_SHOWN])


def changes(before: Mapping[str, str], cfg: DictConfig) -> dict[str, tuple[str, str]]:
    """Returns the settings in which this run differs from an earlier one, with the earlier value and this run's.

    Args:
        before: the result of :func:`settings` for the earlier run.
    """
    now = settings(redact(OmegaConf.to_container(cfg, resolve=True)))  # as in written files
    if now.get("model.teacher.weights") in SEARCHED:  # any file may have been chosen
        now.pop("model.teacher.weights")
    for key in [key for key in ("data.batch_size", "recipe.batch_size") if now.get(key) == "auto"]:  # any size
        now.pop(key)
    then = {key: canonical(key, value) for key, value in before.items()}  # possibly written by another version
    return {key: (value, now[key]) for key, value in then.items() if key in now and now[key] != value}
