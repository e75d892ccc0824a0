"""What is watched while training."""

from rld_lightning.callbacks.epoch_seed import EpochSeed
from rld_lightning.callbacks.same_configuration import SameConfiguration
from rld_lightning.callbacks.teacher_monitor import TeacherMonitor
from rld_lightning.callbacks.throughput import Throughput

__all__ = ["EpochSeed", "SameConfiguration", "TeacherMonitor", "Throughput"]
