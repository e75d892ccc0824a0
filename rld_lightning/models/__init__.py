"""Networks by name, and intermediate features by module path.

Network families are in ``cifar/`` and ``imagenet/``. Every file there is imported here, so adding a file that calls
:func:`~rld_lightning.models.registry.register_model` is enough to add a network. ``weights/`` reads and writes weights
files; ``teacher/`` holds the frozen teacher and its parts.
"""

from importlib import import_module
from pkgutil import iter_modules

from rld_lightning.models import cifar, imagenet
from rld_lightning.models.complexity import count_macs, count_parameters
from rld_lightning.models.factory import create_model, list_models
from rld_lightning.models.graft import GraftedStudent, graft
from rld_lightning.models.imported import trust
from rld_lightning.models.registry import register_model
from rld_lightning.models.stages import Stages, stages_of
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
    "trust",
]


def _import_families() -> None:
    for folder in (cifar, imagenet):
        for module in iter_modules(folder.__path__, prefix=f"{folder.__name__}."):
            import_module(module.name)


_import_families()
