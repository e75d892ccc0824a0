"""Sweeps: checks swept values, shows trials while Hydra runs them, and compares them at the end."""

from rld_lightning.tasks.sweep.callback import Sweep

__all__ = ["Sweep"]
