"""Holding a module in another one without registering it as a submodule."""

from torch import nn


def hold_outside(module: nn.Module, name: str, value: nn.Module | None) -> None:
    """Sets ``module.<name> = value`` without registering ``value`` as a submodule.

    A submodule would be written to every checkpoint, passed to the optimizer, broadcast by DDP at every forward,
    converted by ``sync_batchnorm``, ``.half()`` and the precision plugins, and put in train mode. This way it is a
    plain attribute, which the owner has to move to its device itself.
    """
    object.__setattr__(module, name, value)  # bypasses nn.Module.__setattr__, which registers submodules
