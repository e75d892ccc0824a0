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
    """Lightning's ``bf16-mixed`` where bfloat16 has instructions of its own, ``32-true`` elsewhere.

    That is NVIDIA GPUs from compute capability 8.0 on, and CPUs with AVX512-BF16 or AMX.
    """
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        fast = torch.cuda.get_device_capability() >= (8, 0)
    else:
        fast = accelerator in ("auto", "cpu") and _cpu_has_bfloat16()
    return "bf16-mixed" if fast else "32-true"


def _cpu_has_bfloat16() -> bool:
    if hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    probes = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(probe() for probe in probes if probe is not None)


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
