"""How trials that run side by side share the GPUs of a machine."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

VISIBLE = "CUDA_VISIBLE_DEVICES"
_ON_CPU = 2  # trials at a time where there is no GPU for them


def trials_at_once(accelerator: str | None = None, devices: Any = None) -> int:
    """How many trials run at a time unless the command says it: one a GPU, or two on a machine without."""
    shares = gpu_shares({"accelerator": accelerator, "devices": devices})
    return len(shares) if shares else _ON_CPU


def gpu_shares(trainer: Mapping[str, Any]) -> list[str]:
    """What each trial sees of the GPUs, as ``CUDA_VISIBLE_DEVICES`` has it; none where trials use none, or say which.

    Args:
        trainer: ``trainer``: trials on several devices get as many, others one.
    """
    accelerator, devices = trainer.get("accelerator"), trainer.get("devices")
    if accelerator not in (None, "auto", "gpu", "cuda") or not isinstance(devices, int | str | None):
        return []
    each = int(devices or 0) if str(devices).isdecimal() else 1  # auto and -1 are all, and each trial sees one
    if each == 0:
        return []
    gpus = visible_gpus()
    return [",".join(gpus[first : first + each]) for first in range(0, len(gpus) - each + 1, each)]


def visible_gpus() -> Sequence[str]:
    """The GPUs that processes of this one see, by the names that ``CUDA_VISIBLE_DEVICES`` has for them."""
    import torch  # which the trials need as well

    count = torch.cuda.device_count()
    named = [name.strip() for name in os.environ.get(VISIBLE, "").split(",") if name.strip()]
    return named[:count] if named else [str(number) for number in range(count)]
