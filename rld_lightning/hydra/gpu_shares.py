"""How parallel trials share the GPUs of a machine."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

VISIBLE = "CUDA_VISIBLE_DEVICES"
_ON_CPU = 2  # parallel trials without a GPU


def trials_at_once(accelerator: str | None = None, devices: Any = None) -> int:
    """Returns the default number of parallel trials: one per GPU, or two on a machine without GPUs."""
    shares = gpu_shares({"accelerator": accelerator, "devices": devices})
    return len(shares) if shares else _ON_CPU


def gpu_shares(trainer: Mapping[str, Any]) -> list[str]:
    """Returns ``CUDA_VISIBLE_DEVICES`` of each trial; an empty list if trials use no GPU, or select theirs.

    Args:
        trainer: the ``trainer`` config: trials with several devices get as many GPUs, others one.
    """
    accelerator, devices = trainer.get("accelerator"), trainer.get("devices")
    if accelerator not in (None, "auto", "gpu", "cuda") or not isinstance(devices, int | str | None):
        return []
    each = int(devices or 0) if str(devices).isdecimal() else 1  # auto and -1 use all visible GPUs: one per trial
    if each == 0:
        return []
    gpus = visible_gpus()
    return [",".join(gpus[first : first + each]) for first in range(0, len(gpus) - each + 1, each)]


def visible_gpus() -> Sequence[str]:
    """Returns the GPUs that child processes see, named as in ``CUDA_VISIBLE_DEVICES``."""
    import torch  # the trials need it anyway

    count = torch.cuda.device_count()
    named = [name.strip() for name in os.environ.get(VISIBLE, "").split(",") if name.strip()]
    return named[:count] if named else [str(number) for number in range(count)]
