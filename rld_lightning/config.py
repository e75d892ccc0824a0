"""What the YAML files in ``conf/`` can call: resolvers, registered by importing this module."""

import os
import secrets
import socket
from datetime import datetime

import torch
from omegaconf import OmegaConf

WANDB_HOST = ("api.wandb.ai", 443)


def unique_name() -> str:
    """A folder name that no other run has: the time, and four random letters for runs of the same second."""
    return f"{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def fast_precision(accelerator: str = "auto") -> str:
    """Lightning's ``bf16-mixed`` where the accelerator computes it fast, ``32-true`` elsewhere.

    That is NVIDIA GPUs from compute capability 8.0 on. CPUs stay in float32: few have fast bfloat16 convolutions.
    """
    on_gpu = accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return "bf16-mixed" if on_gpu and torch.cuda.get_device_capability() >= (8, 0) else "32-true"


def wandb_offline() -> bool:
    """Whether W&B has to log offline: no key, or no way to its server within two seconds."""
    import wandb

    mode = os.environ.get("WANDB_MODE")
    if mode:
        return mode != "online"
    if not (os.environ.get("WANDB_API_KEY") or wandb.api.api_key):
        return True
    try:
        socket.create_connection(WANDB_HOST, timeout=2).close()
    except OSError:
        return True
    return False


# Cached, because a run has one folder, one precision and one answer of the network.
OmegaConf.register_new_resolver("unique_name", unique_name, use_cache=True, replace=True)
OmegaConf.register_new_resolver("fast_precision", fast_precision, use_cache=True, replace=True)
OmegaConf.register_new_resolver("wandb_offline", wandb_offline, use_cache=True, replace=True)
