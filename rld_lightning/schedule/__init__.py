"""Learning rate schedules beyond PyTorch's, and changing the learning rate of a resumed run."""

from rld_lightning.schedule.make import make_schedule
from rld_lightning.schedule.rescale import remember_first_rates, rescale
from rld_lightning.schedule.warmup import WarmupCosine, WarmupMultiStep

__all__ = ["WarmupCosine", "WarmupMultiStep", "make_schedule", "remember_first_rates", "rescale"]
