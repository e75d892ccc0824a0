"""Checks the options of ``_target_`` classes against their signatures: unknown names, values of a wrong type."""

import inspect
import pydoc
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from enum import Enum
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf

from rld_lightning.errors import UserError, did_you_mean
from rld_lightning.hydra.checks.value_kinds import is_whole, shown
from rld_lightning.hydra.quoting import as_command
from rld_lightning.losses.ranges import WEIGHT, Range

_LISTS = (list, tuple, set, Sequence, Iterable)
_SCALARS: Mapping[Any, tuple[str, Callable[[Any], bool]]] = {
    bool: ("true or false", lambda value: isinstance(value, bool)),
    int: ("a whole number", is_whole),
    float: ("a number", lambda value: isinstance(value, int | float) and not isinstance(value, bool)),
    str: ("a text", lambda value: isinstance(value, str)),
    type(None): ("null", lambda value: value is None),
}


def check_recipe_and_loss(cfg: DictConfig) -> None:
    """Checks the options of optimizer, scheduler and loss; imports neither Lightning nor the data.

    Raises:
        UserError: a sentence for each mistake.
    """
    recipe = cfg.get("recipe") or {}
    settings = {f"recipe.{name}": recipe.get(name) for name in ("optimizer", "scheduler")} | {"loss": cfg.get("loss")}
    _check_options(settings)


def check_parts(cfg: DictConfig, *, found_later: Collection[str] = ()) -> None:
    """Checks the options of trainer, data, callbacks and loggers; imports them.

    Args:
        found_later: data options that may be null, because a weights file defines them.

    Raises:
        UserError: a sentence for each mistake.
    """
    groups = {group: cfg.get(group) or {} for group in ("callbacks", "logger")}
    parts = {f"{group}.{name}": part for group, node in groups.items() for name, part in node.items()}
    # Null is Lightning's default.
    trainer = {name: value for name, value in _plain(cfg.trainer).items() if value is not None}
    data = {name: value for name, value in _plain(cfg.data).items() if value is not None or name not in found_later}
    if data.get("batch_size") == "auto":  # determined later as well
        del data["batch_size"]
    _check_options({"trainer": trainer, "data": data} | parts)


def _plain(node: DictConfig) -> dict[str, Any]:
    return cast(dict[str, Any], OmegaConf.to_container(node, resolve=True))


def _check_options(settings: Mapping[str, Any]) -> None:
    faults = [fault for key, node in settings.items() if isinstance(node, Mapping) for fault in _faults(key, node)]
    if faults:
        raise UserError("\n".join(faults))


def _faults(key: str, node: Mapping[str, Any]) -> Iterator[str]:
    values = _plain(node) if isinstance(node, DictConfig) else dict(node)
    if not isinstance(target := values.get("_target_"), str):
        yield f"{key}._target_ is missing: name the class, such as {key}._target_=package.module.Class."
        return
    found = _locate(target)
    if found is None:
        yield f"{key}._target_={target} does not exist{_near_class(target)}"
        return
    options = {name: value for name, value in values.items() if not name.startswith("_")}
    declared = _parameters(found)
    # The first argument of a partial (parameters or optimizer) is passed later.
    named = list(declared or options)[1 if values.get("_partial_") and declared else 0 :]
    if unknown := [name for name in options if name not in named]:
        meant = dict.fromkeys(
            did_you_mean(name, [other for other in named if other not in options]) for name in unknown
        )
        them, removal = "it" if len(unknown) == 1 else "them", as_command(f"~{key}.{name}" for name in unknown)
        yield f"{target} takes no {' and no '.join(unknown)}: remove {them} ({removal}).{''.join(meant)}"
    hints = _hints(found)
    for name, value in options.items():
        if name in hints and not _fits(hints[name], value):
            yield f"{key}.{name}={shown(value)} is not allowed; {_rule(hints[name])}."
        if name not in unknown and isinstance(value, Mapping) and "_target_" in value:
            yield from _faults(f"{key}.{name}", value)
    if key == "loss" and _is_switched_off(values, found):
        yield "all weights of the loss are 0, so that there is nothing to minimise; set one, such as loss.ce_weight=1."


def _locate(target: str) -> Any:
    return pydoc.locate(target) if target else None  # locates builtins for an empty name


def _near_class(target: str) -> str:
    module, _, name = target.rpartition(".")
    try:
        names = dir(import_module(module))  # includes lazily imported names
    except ImportError as error:
        return f": {error}."
    except ValueError:  # an empty name
        return "; give the import path of a class."
    return f": {module} has no {name}.{did_you_mean(name, [other for other in names if not other.startswith('_')])}"


def _parameters(found: Any) -> list[str] | None:
    """Returns the parameter names of a class or function; None if it also accepts undeclared ones."""
    try:
        own = list(inspect.signature(found).parameters.values())
    except (TypeError, ValueError):
        return None
    names = [parameter.name for parameter in own]
    bases = iter(found.__mro__[1:] if inspect.isclass(found) else ())
    while rest := [parameter for parameter in own if parameter.kind is parameter.VAR_KEYWORD]:
        base = next((base for base in bases if "__init__" in vars(base) and base is not object), None)
        # **options: Any are declared by the base classes, or by the function that `hands_options_to` names.
        function: Any = vars(base)["__init__"] if base is not None else _locate(getattr(found, "hands_options_to", ""))
        if function is None or rest[0].annotation not in (Any, inspect.Parameter.empty):
            return None
        names.remove(rest[0].name)
        own = list(inspect.signature(function).parameters.values())
        own = own if base is None else own[1:]  # without self
        names += [parameter.name for parameter in own]
    return names


def _hints(found: Any) -> dict[str, Any]:
    """Returns the annotations of the constructor and its base classes', with strings evaluated if possible."""
    hints: dict[str, Any] = {}
    for function in (
        [vars(base).get("__init__") for base in reversed(found.__mro__)] if inspect.isclass(found) else [found]
    ):
        with suppress(Exception):  # evaluating third-party annotations may raise anything
            hints |= get_type_hints(function, include_extras=True)
    return hints


def _fits(annotation: Any, value: Any) -> bool:
    """Whether a configuration value fits an annotation; true if that cannot be told."""
    if annotation in _SCALARS:
        return _SCALARS[annotation][1](value)
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return any(_fits(arg, value) for arg in args)
    if origin is Annotated:
        ranges = [fact for fact in args[1:] if isinstance(fact, Range)]
        return _fits(args[0], value) and all(range_.allows(value) for range_ in ranges)
    if origin is Literal:
        return value in args
    is_mapping = isinstance(value, Mapping)
    if is_mapping and "_target_" in value:
        return True
    container = origin or annotation
    if container in _LISTS:
        inner = [arg for arg in args if arg is not Ellipsis]
        is_list = isinstance(value, Sequence) and not isinstance(value, str)
        return is_list and (len(inner) != 1 or all(_fits(inner[0], entry) for entry in value))
    if container in (dict, Mapping):
        return is_mapping and (len(args) != 2 or all(_fits(args[1], entry) for entry in value.values()))
    if isinstance(annotation, type) and not issubclass(annotation, Enum | Path) and annotation is not object:
        return is_mapping or isinstance(value, annotation)  # a plain value is not a tensor
    return True


def _rule(annotation: Any) -> str:
    """Describes in words the values that an annotation allows."""
    origin, args = get_origin(annotation), get_args(annotation)
    for arg in (annotation, *args):
        for fact in get_args(arg)[1:] if get_origin(arg) is Annotated else ():
            if isinstance(fact, Range):
                whole = "a whole number, and " if get_args(arg)[0] is int else ""
                return fact.rule.replace("it must be ", f"it must be {whole}", 1)
    if origin is Literal:
        return f"choose {' or '.join(map(shown, args))}"
    names = [
        _SCALARS[arg][0] for arg in (args if origin in (Union, types.UnionType) else (annotation,)) if arg in _SCALARS
    ]
    lists = ["a list"] if any((get_origin(arg) or arg) in _LISTS for arg in (annotation, *args)) else []
    return f"it must be {' or '.join([*names, *lists]) or inspect.formatannotation(annotation)}"


def _is_switched_off(values: Mapping[str, Any], loss: Any) -> bool:
    """Whether the weights of all terms of a loss are 0."""
    if values.get("ce_weight", 1.0) != 0:
        return False
    parts = {name: part for name, part in values.items() if isinstance(part, Mapping) and "_target_" in part}
    if parts:  # a combination, with its own cross-entropy
        weights = values.get("weights") or {}
        return all(
            weights.get(name) == 0 or _is_switched_off({**part, "ce_weight": 0}, pydoc.locate(part["_target_"]))
            for name, part in parts.items()
        )
    hints = inspect.signature(loss).parameters
    weights = [name for name, parameter in hints.items() if WEIGHT in get_args(parameter.annotation)]
    own = [name for name in weights if name != "ce_weight"]
    return all(values.get(name, hints[name].default) == 0 for name in own) if own else loss.__name__ == "CELoss"
