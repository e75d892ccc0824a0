"""Sweeps: what is swept is checked, trials are watched while Hydra runs them, and at the end told side by side."""

from rld_lightning.tasks.sweep.callback import Sweep

__all__ = ["Sweep"]
