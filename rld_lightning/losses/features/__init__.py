"""Losses that look inside the networks: features by tap path, connectors built from their shapes."""

from rld_lightning.losses.features.at import ATLoss, at_loss
from rld_lightning.losses.features.base import FeatureLoss

__all__ = ["ATLoss", "FeatureLoss", "at_loss"]
