"""Chooses the number of threads of a process that trains on a CPU."""

import os

import torch
from lightning.pytorch import Trainer

from rld_lightning.console import print_line
from rld_lightning.data.base import ImageDataModule
from rld_lightning.distributed import devices_per_node, trials_at_once
from rld_lightning.models.complexity import count_macs
from rld_lightning.module import DistillationModule

# Multiply-accumulates of a step for which an additional thread pays off. All threads wait for the slowest at every
# layer: if another program uses one core, small layers run at the pace of its time slices.
_WORTH = 1e9


def choose_threads(module: DistillationModule, data: ImageDataModule, trainer: Trainer) -> None:
    """Sets and prints the number of threads for the work of a step, unless the user has set it.

    It depends on the job and the number of cores, not on their load: another number of threads sums in another order,
    and the same command must train the same student.
    """
    if trainer.strategy.root_device.type != "cpu" or os.environ.get("OMP_NUM_THREADS"):
        return
    seen = data.image_shape if module.teacher is None else module.teacher.input_shape(data.image_shape)
    teacher = 0 if module.teacher is None else count_macs(module.teacher.model, seen)
    work = data.batch_size / trainer.world_size * (teacher + 3 * count_macs(module.student, data.image_shape))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = threads_for(work, cores, int(devices_per_node(1)) * (trials_at_once() or 1))
    torch.set_num_threads(threads)
    print_line("threads", f"{threads} of {cores} cores, for {work / 1e9:.1f} G multiply-accumulates a step")


def threads_for(work: float, cores: int, processes: int) -> int:
    """Returns the number of threads per process.

    Args:
        work: multiply-accumulates of a step in this process.
        processes: number of processes, of this run and of concurrent trials, that share the cores.
    """
    return max(1, min(cores // processes, round(work / _WORTH)))
