"""A trainer, as its part of the configuration says."""

from typing import TYPE_CHECKING, Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def make_trainer(settings: DictConfig, **others: Any) -> "Trainer":
    """Makes a trainer; what is null has Lightning's default.

    Args:
        settings: ``trainer``.
        others: what is not for the user to say.
    """
    values: Any = OmegaConf.to_container(settings, resolve=True)
    stated = {key: value for key, value in (values | others).items() if value is not None}
    trainer: Trainer = instantiate(stated)
    return trainer
