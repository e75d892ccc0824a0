"""Networks by name, and intermediate features by module path.

Every module of this folder is imported here, so a family that registers its models with
:func:`~rld_lightning.models.factory.register_model` is complete when its file lies in the folder.
"""

from importlib import import_module
from pkgutil import iter_modules

from rld_lightning.models.complexity import count_macs, count_parameters
from rld_lightning.models.factory import Stages, create_model, list_models, register_model, stages_of
from rld_lightning.models.graft import GraftedStudent, graft
from rld_lightning.models.taps import FeatureTaps, forward_with_taps

__all__ = [
    "FeatureTaps",
    "GraftedStudent",
    "Stages",
    "count_macs",
    "count_parameters",
    "create_model",
    "forward_with_taps",
    "graft",
    "list_models",
    "register_model",
    "stages_of",
]


def _import_families() -> None:
    for module in iter_modules(__path__):
        import_module(f"{__name__}.{module.name}")


_import_families()
