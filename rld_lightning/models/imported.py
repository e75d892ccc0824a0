"""External networks, by import path or of transformers, which only the user may name.

A network's name may also come from a file by someone else, and importing a module or contacting a server because a
file says so would be more than reading it. So these names are accepted only after a call of :func:`trust`.
"""

import re
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from rld_lightning.errors import did_you_mean, first_line
from rld_lightning.models.input_size import split_size

_PATH = re.compile(r"[A-Za-z_]\w*(\.\w+)*:[A-Za-z_]\w*(\.\w+)*")
_HUB = "transformers/"
_named: set[str] = set()


def is_external(name: str) -> bool:
    """Whether a name is ``my_package.module:build`` or ``transformers/...``."""
    return name.startswith(_HUB) or _PATH.fullmatch(name) is not None


def trust(*names: str | Sequence[str] | None) -> None:
    """Marks names that the user has given, on a command line or in a program, as trusted.

    Args:
        names: network names or lists of them; None is ignored.
    """
    flat = (one for name in names if name is not None for one in ((name,) if isinstance(name, str) else name))
    each = (part for name in flat for part in {name, *name.split("+")})  # members of an ensemble
    _named.update(plain for part in each for plain in {part, split_size(part)[0]} if is_external(plain))


def build_imported(name: str, num_classes: int, **kwargs: Any) -> nn.Module:
    """Imports and calls a builder, and makes the network return its logits alone.

    Args:
        name: ``my_package.module:build``, a callable that takes ``num_classes``; modules are also searched in the
            working directory.
        num_classes: C.
        **kwargs: passed to the builder.

    Raises:
        ValueError: the name is not trusted, cannot be imported, or builds no network.
    """
    check_trusted(name)
    module, _, path = name.partition(":")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        builder: Any = import_module(module)
    except ImportError as error:
        raise ValueError(
            f"{name} cannot be imported ({first_line(error)}); run this in the folder that {module.split('.')[0]} is "
            "in, or put that on PYTHONPATH."
        ) from error
    for part in path.split("."):
        if not hasattr(builder, part):
            raise ValueError(f"{name} is not there: {module} has no {path}.{did_you_mean(path, dir(builder))}")
        builder = getattr(builder, part)
    try:
        network = builder(num_classes=num_classes, **kwargs)
    except TypeError as error:
        raise ValueError(f"{name} does not build a network from num_classes={num_classes}: {error}.") from error
    if not isinstance(network, nn.Module):
        raise ValueError(f"{name} builds a {type(network).__name__}, which is not a torch.nn.Module.")
    return with_logits(network)


def check_trusted(name: str) -> None:
    """Checks that the user has trusted a name.

    Raises:
        ValueError: the name was read from a file.
    """
    if name not in _named:
        raise ValueError(
            f"{name!r} is an external network, named by a file and not by you: nothing was imported or fetched. "
            f"If you trust it, name it yourself (trust={name} or name={name}, whichever the command has; in a program "
            f"rld_lightning.models.trust({name!r}))."
        )


def with_logits(network: nn.Module) -> nn.Module:
    """Makes a network that returns a tuple, a mapping or an object return its logits alone; its keys do not change.

    Args:
        network: modified: its class becomes a subclass of the same name.
    """
    own = type(network)
    network.__class__ = type(own.__name__, (_Logits, own), {"__module__": own.__module__})
    return network


class _Logits(nn.Module):
    def forward(self, images: Tensor) -> Tensor:  # no *args, whose sizes exporters cannot declare
        return logits_of(super().forward(images))


def logits_of(output: Any) -> Tensor:
    """Returns the logits in a network's output: the tensor, the first of a tuple or list, or the entry ``logits``.

    Raises:
        ValueError: there are no logits.
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping) and "logits" in output:
        return logits_of(output["logits"])
    if isinstance(found := getattr(output, "logits", None), Tensor):
        return found
    if isinstance(output, tuple | list) and output:
        return logits_of(output[0])
    raise ValueError(f"the network returns a {type(output).__name__} without logits.")
