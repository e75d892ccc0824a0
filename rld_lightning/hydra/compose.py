"""Composes configs in programs, and rewrites command lines for what Hydra does not support."""

import re
from collections.abc import Sequence

import hydra
from omegaconf import DictConfig

import rld_lightning.hydra.resolvers  # noqa: F401  (registers the resolvers that conf/ uses)
from rld_lightning.hydra.options import CONF, register_options

SWEEP = frozenset(("-m", "--multirun"))
SEARCH_PATH, CONFIG_NAME = ("-cd", "--config-dir"), ("-cn", "--config-name")
# Flags whose value is a separate argument.
VALUE_FLAGS = (*SEARCH_PATH, *CONFIG_NAME, "-cp", "--config-path", "-p", "--package", "-c", "--cfg", "-i", "--info")


def compose(overrides: Sequence[str], config_name: str = "fit") -> DictConfig:
    """Composes the config of a script's command line, for programs; interpolations are not resolved.

    Args:
        overrides: as on the command line; a combined loss in its long form, see :func:`expand_combined_loss`.

    Raises:
        HydraException: an override does not match the config.
    """
    register_options()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose(config_name, list(overrides))


def expand_combined_loss(arguments: list[str]) -> list[str]:
    """Rewrites ``loss=[rld,at]``, which Hydra does not support.

    It becomes ``loss=combined``, with each loss's options at ``loss.<name>`` and its weight, 1, at
    ``loss.weights.<name>``.

    Raises:
        ValueError: the list has fewer than two losses or a duplicate, or is one of several values of a sweep. Hydra
            would interpret it differently.
    """
    lists = [argument for argument in arguments if re.match(r"\+*loss=.*\[", argument)]
    if not lists:
        return arguments
    match = re.fullmatch(r"loss=\[([\w\s,]*)\]", lists[0])
    names = [name.strip() for name in match[1].split(",")] if match else []
    if len(lists) > 1 or not all(names) or len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(
            f"{' '.join(lists)} is not a combination of losses: write loss=[rld,at], two or more, each once. To sweep "
            "over combinations, start one command for each."
        )
    expanded = [f"+loss@loss.{name}={name}" for name in names] + [f"+loss.weights.{name}=1.0" for name in names]
    # In front, so that the keys exist for weights and options given anywhere.
    return prepend_overrides(expanded, ["loss=combined" if argument in lists else argument for argument in arguments])


def set_run_folder(arguments: Sequence[str]) -> list[str]:
    """Makes ``paths.run=`` Hydra's run directory, so that it creates no other. A sweep has one for each run."""
    if SWEEP & {*arguments} or any(argument.startswith("hydra.run.dir=") for argument in arguments):
        return list(arguments)
    return [re.sub("^paths.run=", "hydra.run.dir=", argument) for argument in arguments]


def flags_first(arguments: Sequence[str]) -> list[str]:
    """Moves a command line's flags, with their values, before its overrides: for ``model=wrn40_2 -m seed=0,1``.

    Hydra accepts overrides only without flags between them. With ``--help``, ``--multirun`` is removed.

    Raises:
        ValueError: ``--cfg`` or ``--info``, which print one config, together with ``--multirun``.
    """
    flags: list[str] = []
    overrides: list[str] = []
    for before, argument in zip(("", *arguments), arguments, strict=False):
        (flags if argument.startswith("-") or before in VALUE_FLAGS else overrides).append(argument)
    if sweeps := SWEEP & {*flags}:
        if {"--help", "-h", "--hydra-help"} & {*flags}:
            return [flag for flag in flags if flag not in sweeps]
        if shown := [flag for flag in flags if flag.partition("=")[0] in ("--cfg", "-c", "--info", "-i")]:
            raise ValueError(
                f"{shown[0]} shows one configuration, and {min(sweeps)} means several: remove {min(sweeps)}, and "
                "give each option one value."
            )
    return [*flags, *overrides]


def prepend_overrides(overrides: Sequence[str], arguments: Sequence[str]) -> list[str]:
    """Inserts overrides before those on a command line, after its flags, which must not be between overrides."""
    is_override = ["=" in argument and not argument.startswith("-") for argument in arguments]
    first = is_override.index(True) if any(is_override) else len(arguments)
    return [*arguments[:first], *overrides, *arguments[first:]]
