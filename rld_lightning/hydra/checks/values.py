"""Checks a composed configuration against the table in :mod:`rld_lightning.hydra.checks.schema`."""

from collections.abc import Iterator, Mapping
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rld_lightning.errors import UserError, first_line
from rld_lightning.hydra.checks.schema import VALUES
from rld_lightning.hydra.checks.unknown_keys import ABSENT, find, unknown_keys
from rld_lightning.hydra.checks.value_kinds import shown

# Keys that must not be removed with ~key.
_OF_FIT = (
    *("seed", "method", "resume", "print_config", "model.label", "model.compile", "model.capture", "model.teacher"),
    *("model.student.name", "model.student.weights", "model.student.channels_last", "data.batch_size"),
    *("recipe.epochs", "recipe.optimizer", "recipe.optimizer._target_", "recipe.optimizer.lr"),
    *("recipe.scheduler_interval", "callbacks", "logger", "logger.csv"),
)
_OF_ALL = ("paths.run",)
_OF_DATA = ("data",)  # for scripts that read images
_OF_NETWORKS = ("trainer",)  # for scripts that also run a network
# In scripts that do not train, null stands for the value in the evaluated file.
_FROM_FILE = ("seed", "data.seed", "data.val_fraction")
_FAST_PRECISION = "${fast_precision:"  # always valid, but resolving it imports PyTorch
_MISSING = "???"


def check_values(cfg: DictConfig) -> None:
    """Checks the values of a composed configuration.

    Args:
        cfg: the configuration of any script; interpolations that need a running Hydra are skipped without one.

    Raises:
        UserError: one sentence per mistake.
    """
    values = cast(dict[str, Any], OmegaConf.to_container(cfg))
    wrong, empty = _wrong_values(cfg, values)
    if faults := [*wrong, *_missing(values), *unknown_keys(values)] or empty:
        raise UserError("\n".join(dict.fromkeys(faults)))


def _wrong_values(cfg: DictConfig, values: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Returns sentences about values that are not allowed, and about missing ones, which the former may have caused."""
    wrong, empty, reported = [], [], []
    for key, kind in VALUES.items():
        raw = find(values, key)
        if isinstance(raw, str) and raw.startswith(_FAST_PRECISION):
            continue
        try:
            value = _resolved(cfg, key) if _refers(raw) else raw
        except OmegaConfBaseException as error:
            if "HydraConfig was not set" not in str(error):
                empty.append(f"{key} has no value: {first_line(error)}.")
            continue
        if value == _MISSING and not (key.startswith("data.") and _indexes(values)):
            empty.append(f"{key} has no value; add {key}=... to the command.")
        elif not (value in (ABSENT, _MISSING) or kind.allows(value) or (value is None and _may_be_null(key, values))):
            if not isinstance(raw, str) or not _refers(raw) or value not in reported:  # else the cause is reported
                wrong.append(f"{key}={shown(value)} is not allowed; it must be {kind.must_be}.")
            reported.append(value)
    return wrong, empty


def _indexes(values: Mapping[str, Any]) -> bool:
    """Whether the script indexes existing shards, which reads no data."""
    return any(find(values, f"index.{split}") not in (None, ABSENT) for split in ("train", "test"))


def _may_be_null(key: str, values: Mapping[str, Any]) -> bool:
    """Whether null leaves the value to Lightning or to the evaluated file."""
    if key.startswith("trainer."):
        return key not in ("trainer.max_epochs", "trainer.max_steps", "trainer.accelerator", "trainer.devices")
    return key in (_FROM_FILE if "recipe" not in values else ()) or (key == "out" and "index" not in values)


def _missing(values: Mapping[str, Any]) -> Iterator[str]:
    networks = "model" in values or "split" in values
    others = (*(_OF_DATA if networks or "index" in values else ()), *(_OF_NETWORKS if networks else ()))
    for key in (*_OF_ALL, *others, *(_OF_FIT if "model" in values else ())):
        group, _, name = key.rpartition(".")
        above = find(values, group) if group else values
        if isinstance(above, Mapping) and name not in above:
            kind = VALUES.get(key)
            must_be = f"; it must be {kind.must_be}" if kind else ""
            yield f"{key} is required; omit ~{key}{must_be}."


def _refers(raw: Any) -> bool:
    """Whether a value contains an interpolation."""
    if isinstance(raw, list):
        return any(map(_refers, raw))
    return isinstance(raw, str) and "${" in raw


def _resolved(cfg: DictConfig, key: str) -> Any:
    value = OmegaConf.select(cfg, key, throw_on_resolution_failure=True)
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
