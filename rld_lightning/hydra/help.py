"""The text of ``--help``: a script's values, the options of its groups, networks and losses by family."""

import re
import textwrap
from collections.abc import Iterable
from itertools import chain

import yaml

from rld_lightning.hydra.options import CONF, list_options
from rld_lightning.hydra.registered_names import Known, known

WIDTH = 80
_INDENT = 4
_LONG = 25  # entries of this width or more have a line without description
_IMAGENET = ("resnet34_to_resnet18", "resnet50_to_mobilenetv1")


def script_help(config_name: str) -> str:
    """Returns the ``--help`` text of a script after its header: values, options, and how to print all values."""
    values = f"Values with their defaults (...: required):\n\n{values_help(config_name)}\n\n"
    if set(_groups(config_name)) == {"paths"}:
        return f"{values}--cfg job prints all values, --hydra-help lists the flags."
    return (
        f"{values}Options: group=option, with the default of each group.\n\n{options_help(config_name)}\n\n"
        "Any value: key=value, such as data.root=/photos. --cfg job prints all values,\n--hydra-help lists the flags."
    )


def options_help(config_name: str) -> str:
    """Returns the groups of a script with their options, in lines of :data:`WIDTH` columns."""
    registered = known()
    parts = []
    for group, default in _groups(config_name).items():
        options = list_options(group)
        title = f"{group}={default}" if default else group
        if group == "model":
            parts.append("\n".join([title, *_networks(options, registered)]))
        elif group == "loss":
            parts.append("\n".join([title, *_losses(options, registered)]))
        else:
            parts.append(f"{title}\n{_listed(options)}")
    return "\n\n".join(parts)


def values_help(config_name: str) -> str:
    """Returns the values of a script's file in ``conf/``, with their defaults and comments.

    Values that are interpolations are omitted.
    """
    own = (CONF / f"{config_name}.yaml").read_text().partition("_self_\n")[2].partition("\nhydra:")[0]
    entries = [
        (f"{key}={value.replace('???', '...').replace(', ', ',')}" if key else "", words or heading)
        for key, value, words, heading in re.findall(r"^(\w+): ([^$#\n]+?)(?: # (.*))?$|^# (.*)$", own, re.MULTILINE)
    ]
    wide = max(len(entry) for entry, _ in entries if len(entry) < _LONG)
    indent = " " * (_INDENT + wide + 2)
    lines = []
    for entry, words in entries:
        if not entry:
            lines.append(f"  {words}")
            continue
        first = f"{'':{_INDENT}}{entry:{wide}}  "
        if wide < len(entry):
            lines.append(first.rstrip())
            first = indent
        lines.append(textwrap.fill(words, WIDTH, initial_indent=first, subsequent_indent=indent) or first.rstrip())
    return "\n".join(lines)


def _groups(config_name: str) -> dict[str, str | None]:
    """Returns the config groups of a script and their default options."""
    defaults = yaml.safe_load((CONF / f"{config_name}.yaml").read_text())["defaults"]
    entries = chain.from_iterable(entry.items() for entry in defaults if isinstance(entry, dict))
    return {group: option for group, option in entries if not group.startswith("override ")}


def _networks(options: list[str], registered: Known) -> list[str]:
    pairs = [name for name in options if "_to_" in name]
    singles = {name for names in registered.families.values() for name in names}
    frames = [name for name in options if name not in singles and name not in pairs]
    families = {
        "Teacher and student on CIFAR-100": [name for name in pairs if name not in _IMAGENET],
        "Teacher and student on ImageNet": [name for name in pairs if name in _IMAGENET],
        "Any by name: model.teacher.name=torchvision/resnet34 model.student.name=...": frames,
        **registered.families,
    }
    return [f"  {family}\n{_listed(names)}" for family, names in families.items()]


def _losses(options: list[str], registered: Known) -> list[str]:
    presets = yaml.safe_load((CONF / "loss_presets.yaml").read_text()) or {}
    own = registered.methods
    features = {name for name in own if name in registered.on_features}
    families = {
        "On logits": {name: method for name, method in own.items() if name not in features},
        "On features": {name: method for name, method in own.items() if name in features},
        "One of these with other values": {
            name: _values(stated) for name, stated in presets.items() if name not in own
        },
        "A sum: loss=[rld,at]": {name: "" for name in options if name not in own and name not in presets},
    }
    width = max(map(len, options))
    lines = []
    for family, losses in families.items():
        lines.append(f"  {family}")
        room = WIDTH - _INDENT - width - 2
        lines += [
            f"{'':{_INDENT}}{name:{width}}  {textwrap.shorten(words, room, placeholder=' ...')}".rstrip()
            for name, words in losses.items()
        ]
    return lines


def _values(stated: dict[str, object]) -> str:
    """Returns a preset's base loss and the values that it sets."""
    values = " ".join(f"{key}={str(value).lower()}" for key, value in stated.items() if key != "of")
    return f"{stated['of']} {values}".rstrip()


def _listed(names: Iterable[str]) -> str:
    indent = " " * _INDENT
    return textwrap.fill(
        ", ".join(names), WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
    )
