"""What is watched while training."""

from rld_lightning.callbacks.teacher_monitor import TeacherMonitor
from rld_lightning.callbacks.throughput import Throughput

__all__ = ["TeacherMonitor", "Throughput"]
