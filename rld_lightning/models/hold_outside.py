"""A module that another one uses and that is no part of it."""

from torch import nn


def hold_outside(module: nn.Module, name: str, value: nn.Module | None) -> None:
    """Sets ``module.<name> = value`` without making ``value`` a part of ``module``.

    A submodule would be written to every checkpoint, handed to the optimizer, broadcast by DDP at every forward,
    converted by ``sync_batchnorm``, ``.half()`` and the precision plugins, and put in train mode. Held like this it is
    a plain attribute, which the owner has to move to its device itself.
    """
    object.__setattr__(module, name, value)  # nn.Module's own __setattr__ is what registers submodules
