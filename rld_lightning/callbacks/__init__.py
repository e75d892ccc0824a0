"""Callbacks that monitor and control training."""

from rld_lightning.callbacks.checkpoint_files import CheckpointFiles
from rld_lightning.callbacks.class_accuracy import ClassAccuracy
from rld_lightning.callbacks.divergence import Diverged, Divergence
from rld_lightning.callbacks.exact_resume import ExactResume
from rld_lightning.callbacks.gradient_norm import GradientNorm
from rld_lightning.callbacks.last_checkpoint import LastCheckpoint
from rld_lightning.callbacks.metrics_file import MetricsFile
from rld_lightning.callbacks.optuna_pruner import OptunaPruner
from rld_lightning.callbacks.own_checkpoints import OwnCheckpoints
from rld_lightning.callbacks.own_settings import OwnSettings
from rld_lightning.callbacks.progress import RunProgress
from rld_lightning.callbacks.same_configuration import SameConfiguration
from rld_lightning.callbacks.step_seed import StepSeed
from rld_lightning.callbacks.stop_signals import StopSignals
from rld_lightning.callbacks.teacher_monitor import TeacherMonitor
from rld_lightning.callbacks.throughput import Throughput
from rld_lightning.callbacks.weight_average import WeightAverage

__all__ = [
    "CheckpointFiles",
    "ClassAccuracy",
    "Diverged",
    "Divergence",
    "ExactResume",
    "GradientNorm",
    "LastCheckpoint",
    "MetricsFile",
    "OptunaPruner",
    "OwnCheckpoints",
    "OwnSettings",
    "RunProgress",
    "SameConfiguration",
    "StepSeed",
    "StopSignals",
    "TeacherMonitor",
    "Throughput",
    "WeightAverage",
]
