"""Configurations: the one that a command line gives, for programs, and what Hydra has no word for."""

import re
from collections.abc import Sequence

import hydra
from omegaconf import DictConfig

import rld_lightning.hydra.resolvers  # noqa: F401  (registers the resolvers that conf/ uses)
from rld_lightning.hydra.options import CONF, register_options

SWEEP = frozenset(("-m", "--multirun"))
SEARCH_PATH, CONFIG_NAME = ("-cd", "--config-dir"), ("-cn", "--config-name")
# Flags whose value is an argument of its own.
WITH_VALUE = (*SEARCH_PATH, *CONFIG_NAME, "-cp", "--config-path", "-p", "--package", "-c", "--cfg", "-i", "--info")


def compose(overrides: Sequence[str], config_name: str = "fit") -> DictConfig:
    """The configuration that a script's command line would give, for programs; interpolations are not resolved.

    Args:
        overrides: as on the command line; a combined loss spelled out, see :func:`expand_combined_loss`.

    Raises:
        HydraException: an override is not one of this configuration.
    """
    register_options()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose(config_name, list(overrides))


def expand_combined_loss(arguments: list[str]) -> list[str]:
    """Spells out ``loss=[rld,at]``, for which Hydra has no word of its own.

    It becomes ``loss=combined``, each loss's options at ``loss.<name>`` and its weight, 1, at ``loss.weights.<name>``.

    Raises:
        ValueError: a list of fewer than two losses, with one twice, or as one of several values of a sweep. Hydra would
            take it for something else.
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
    # In front, so that weights and options given anywhere find their keys.
    return in_front(expanded, ["loss=combined" if argument in lists else argument for argument in arguments])


def with_own_folder(arguments: Sequence[str]) -> list[str]:
    """Has Hydra make the folder that ``paths.run=`` names, and no empty one beside it. A sweep has a folder a run."""
    if SWEEP & {*arguments} or any(argument.startswith("hydra.run.dir=") for argument in arguments):
        return list(arguments)
    return [re.sub("^paths.run=", "hydra.run.dir=", argument) for argument in arguments]


def flags_first(arguments: Sequence[str]) -> list[str]:
    """Puts a command line's flags, with their values, before its overrides: ``model=wrn40_2 -m seed=0,1`` as well.

    Hydra takes overrides in one piece alone. Help is of no values, and so of none that are swept.

    Raises:
        ValueError: several configurations are to be printed as one.
    """
    flags: list[str] = []
    overrides: list[str] = []
    for before, argument in zip(("", *arguments), arguments, strict=False):
        (flags if argument.startswith("-") or before in WITH_VALUE else overrides).append(argument)
    if sweeps := SWEEP & {*flags}:
        if {"--help", "-h", "--hydra-help"} & {*flags}:
            return [flag for flag in flags if flag not in sweeps]
        if shown := [flag for flag in flags if flag.partition("=")[0] in ("--cfg", "-c", "--info", "-i")]:
            raise ValueError(
                f"{shown[0]} shows one configuration, and {min(sweeps)} means several: leave {min(sweeps)} away, and "
                "give each option one value."
            )
    return [*flags, *overrides]


def in_front(overrides: Sequence[str], arguments: Sequence[str]) -> list[str]:
    """Puts overrides before those on a command line, but behind its flags, which must not stand between overrides."""
    is_override = ["=" in argument and not argument.startswith("-") for argument in arguments]
    first = is_override.index(True) if any(is_override) else len(arguments)
    return [*arguments[:first], *overrides, *arguments[first:]]
