"""What the YAML files in ``conf/`` can call: resolvers, registered by importing this module."""

import torch
from omegaconf import OmegaConf

from rld_lightning.distributed import devices_per_node, nodes, unique_name
from rld_lightning.runs.naming import loss_choice


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


# Cached, because a run has one folder and one precision.
OmegaConf.register_new_resolver("unique_name", unique_name, use_cache=True, replace=True)
OmegaConf.register_new_resolver("devices_per_node", devices_per_node, replace=True)
OmegaConf.register_new_resolver("nodes", nodes, replace=True)
OmegaConf.register_new_resolver("fast_precision", fast_precision, use_cache=True, replace=True)
OmegaConf.register_new_resolver("loss_choice", loss_choice, replace=True)
