"""Checks of command lines: explains Hydra's errors and finds wrong values that Hydra accepts."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rld_lightning.errors import UserError, did_you_mean, first_line, user_errors
from rld_lightning.hydra.checks.callbacks import check_watchers
from rld_lightning.hydra.checks.machine import check_machine
from rld_lightning.hydra.checks.unknown_keys import full_keys, unknown_key
from rld_lightning.hydra.checks.values import check_values
from rld_lightning.hydra.compose import CONFIG_NAME, SEARCH_PATH, SWEEP, VALUE_FLAGS, compose
from rld_lightning.hydra.options import list_options
from rld_lightning.hydra.quoting import as_argument

_NOT_FOUND = r"Could not (?:find|load) '([^']+)/([^'/]*)'"  # Hydra's message for an option, alone or in a list


@dataclass(frozen=True)
class Command:
    """A parsed command line."""

    config_name: str  # file in `conf/`
    overrides: tuple[str, ...]  # `key=value`, as written
    folders: tuple[str, ...]  # further configuration folders
    sweeps: bool  # whether it has `-m`

    @classmethod
    def of(cls, arguments: Sequence[str], config_name: str) -> "Command":
        """Parses a script's arguments."""
        overrides, flags, folders = [], set(), []
        rest = iter(arguments)
        for argument in rest:
            flag, equals, value = argument.partition("=")
            if not argument.startswith("-"):
                overrides.append(argument)
                continue
            flags.add(flag)
            if flag in VALUE_FLAGS:
                value = value if equals else next(rest, "")
                folders += [value] if flag in SEARCH_PATH else []
                config_name = value if flag in CONFIG_NAME else config_name
        return cls(config_name, tuple(overrides), tuple(folders), bool(flags & SWEEP))

    def compose(self, overrides: Sequence[str]) -> DictConfig:
        """Composes the configuration from other overrides and the same files."""
        folders = ",".join(f"file://{folder}" for folder in self.folders)
        return compose([*overrides, *([f"hydra.searchpath=[{folders}]"] if folders else ())], self.config_name)


def check(cfg: DictConfig) -> None:
    """Checks a composed configuration before the script's slow imports.

    Raises:
        UserError: a sentence for each mistake.
    """
    check_values(cfg)
    check_watchers(cfg)
    check_machine(cfg)
    # Importing PyTorch takes seconds; other mistakes are reported first.
    from rld_lightning.hydra.checks.networks_and_files import check_named
    from rld_lightning.hydra.checks.targets import check_recipe_and_loss

    with user_errors():
        check_recipe_and_loss(cfg)
        check_named(cfg)


def with_value(cfg: DictConfig, line: str) -> DictConfig:
    """Returns a copy of a configuration with one override, ``key=value``; not for config groups."""
    override = OverridesParser.create().parse_override(line)
    other = deepcopy(cfg)
    OmegaConf.set_struct(other, False)
    OmegaConf.set_readonly(other, False)
    OmegaConf.update(other, override.get_key_element().lstrip("+"), override.value(), merge=False)
    return other


def checked(arguments: Sequence[str], config_name: str = "fit") -> DictConfig:
    """Composes and checks the configuration of a command line.

    Args:
        arguments: the script's arguments. Of swept values, only the first is checked.

    Raises:
        UserError: a sentence for each mistake.
    """
    command = Command.of(arguments, config_name)
    faults = [f"--config-dir={folder} is not a folder." for folder in command.folders if not Path(folder).is_dir()]
    if words := [line for line in command.overrides if not re.match(r"[^=]+=|~", line)]:
        faults.append(_no_assignment(" ".join(words)))
    lines = []
    for line in (line for line in command.overrides if line not in words):
        try:
            lines.append(_first(OverridesParser.create().parse_override(line), command))
        except HydraException:
            faults.append(_unreadable(line))
        except UserError as error:
            faults.append(str(error))
    while True:
        try:
            cfg = command.compose(lines)
            (check_values if faults else check)(cfg)  # reported without waiting for PyTorch
            break
        except UserError as error:
            faults.append(str(error))
            break
        except yaml.MarkedYAMLError as error:
            faults.append(_bad_yaml(error))
            break
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            bad = _culprits(error, lines)
            faults += list(_explained(error, bad, lines, command)) or [f"{first_line(error)}."]
            if not bad:
                break
            lines = [line for line in lines if line not in bad]
    if faults:
        raise UserError("\n".join(dict.fromkeys(faults)))
    return cfg


def _first(override: Override, command: Command) -> str:
    """Returns an override with the first of its values, if it has several."""
    line = override.input_line or ""
    if not override.is_sweep_override():
        return line
    if not command.sweeps and not any(re.match(r"\+*(sweep|hydra\.mode)=", other) for other in command.overrides):
        key = override.get_key_element()
        raise UserError(
            f"{line} gives several values; add -m to train with each of them, or write {as_argument(key, '...')} with "
            "one: a list in brackets, a text with commas in quotes."
        )
    if isinstance(interval := override.value(), IntervalSweep):
        return f"{override.get_key_element()}={interval.start}"
    return f"{override.get_key_element()}={next(iter(override.sweep_string_iterator()))}"


def _no_assignment(words: str) -> str:
    return (
        f"{words} is not of the form key=value, without spaces; a value with spaces is quoted, as in "
        "'data.root=/my photos'. --help shows how options are written."
    )


def _unreadable(line: str) -> str:
    key, _, value = line.partition("=")
    if not re.fullmatch(r"[+~]*[\w.@/:]+", key):
        return _no_assignment(line)
    return (
        f"{line} cannot be read: close its brackets and quotes; quote a text that contains such characters: "
        f"{as_argument(key, value)}"
    )


def _bad_yaml(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    place = f"{mark.name}, line {mark.line + 1}" if mark is not None else "a configuration file"
    return f"{place} is not valid YAML: {error.problem or error.context}; correct it there."


def _culprits(error: Exception, lines: Sequence[str]) -> list[str]:
    """Returns the overrides that an error is about."""
    text = f"{error} {error.__cause__ or ''}"
    tests: list[Callable[[str, str, str], bool]] = []
    if found := re.search(r"(?:override|already at|delete|delete from config\.|argument) '([^']+)'", text):
        named = found[1]
        tests.append(lambda line, key, value: named in (key, line.lstrip("~")))
    if found := re.search(r"full_key: (\S+)", text):
        full = found[1]
        tests.append(lambda line, key, value: f"{key}.".startswith(f"{full}."))
    if found := re.search(_NOT_FOUND, text):
        of, option = found[1], found[2]
        tests.append(lambda line, key, value: key.split("@")[0] == of and option in re.split(r"[\[\], ]+", value))
    if found := re.search(r"Multiple values for ([\w/@]+)", text):
        group = found[1]
        tests.append(lambda line, key, value: group == key)
    if "Config group override must be" in text:
        tests.append(lambda line, key, value: "." not in key and bool(re.fullmatch(r"null|true|false|\d.*", value)))
    parts = {line: line.lstrip("+~").partition("=") for line in lines}
    return [line for line, (key, _, value) in parts.items() if any(test(line, key, value) for test in tests)]


def _explained(error: Exception, bad: Sequence[str], lines: Sequence[str], command: Command) -> Iterator[str]:
    """Explains an error of Hydra or OmegaConf about the ``bad`` overrides."""
    text, cause = str(error), str(error.__cause__ or "")
    if sentence := missing_option(error, "" if bad else " (named in a file, not on the command line)"):
        yield sentence
    elif "Config group override must be" in text:
        yield from (_no_option(line) for line in bad)
    elif "already at" in text or "Multiple values for" in text:
        yield from (f"{line} adds a key that exists already; write {line.lstrip('+')}." for line in bad)
    elif "Could not delete" in text:
        yield from (f"{line} removes a key that does not exist; omit it." for line in bad)
    elif "is not a valid" in cause or "expected one of" in cause:
        yield from (f"{line} is not allowed: {cause.splitlines()[0]}." for line in bad)
    elif "Could not override" in text:
        known = _known([line for line in lines if line not in bad], command)
        yield from (unknown_key(line.lstrip("+~").partition("=")[0], known)[0] for line in bad)


def missing_option(error: Exception, where: str = "") -> str:
    """Explains that Hydra does not find a group's option; empty for other errors."""
    option = re.search(_NOT_FOUND, str(error))
    if option is None:
        return ""
    choices = re.findall(r"^\t(\S+)$", str(error), re.MULTILINE) or list_options(option[1])
    return f"{option[1]}={option[2]}{where} is not an option{_choose(option[2], choices)}"


def _choose(name: str, choices: Sequence[str]) -> str:
    if meant := did_you_mean(name, choices):
        return f".{meant} --help lists all."
    return f"; choose one of {', '.join(choices)}." if choices else "; there are none."


def _no_option(line: str) -> str:
    """Explains that values such as null are not options of a group."""
    group = line.partition("=")[0].lstrip("+")
    off = f", or switch single ones off with {group}.<name>=null" if group in ("callbacks", "logger") else ""
    choices = list_options(group)
    few = ", ".join(choices) if len(choices) <= 12 else "those that --help lists"
    return f"{line} is not an option; choose one of {few}{off}."


def _known(lines: Sequence[str], command: Command) -> list[str]:
    """Returns all keys of a configuration, without its overrides if it cannot be composed with them."""
    for overrides in (lines, ()):
        with suppress(HydraException, OmegaConfBaseException, ValueError, yaml.YAMLError):
            return list(full_keys(OmegaConf.to_container(command.compose(overrides))))
    return []
