"""The OmegaConf resolvers of the YAML files in ``conf/``; importing this module registers them.

They import PyTorch only when called, so that help, completion and messages about typos are fast.
"""

import sys
from collections.abc import Callable
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from rld_lightning.distributed import devices_per_node, nodes, unique_name
from rld_lightning.hydra.gpu_shares import trials_at_once
from rld_lightning.hydra.help import script_help
from rld_lightning.hydra.registered_names import known
from rld_lightning.runs.naming import dataset_name, loss_choice


def tuned(key: str, default: Any, *, _root_: DictConfig) -> Any:
    """Returns the value that the model or pair sets for a loss (``model.tuned``), or the loss's default.

    Args:
        key: the loss's option and the hyper-parameter, such as ``rld.beta``.
        default: the loss's default.
    """
    value = OmegaConf.create(default) if isinstance(default, list | dict) else default
    return OmegaConf.select(_root_, f"model.tuned.{key}", default=value)


def choice(group: str, otherwise: str | None = None, *, _root_: DictConfig) -> str | None:
    """Returns the chosen option of a group, such as ``quick`` of ``recipe``."""
    if "hydra" in _root_:
        return OmegaConf.select(_root_, f"hydra.runtime.choices.{group}", default=otherwise)
    return HydraConfig.get().runtime.choices.get(group, otherwise) if HydraConfig.initialized() else otherwise


def network(name: str | None) -> str | None:
    """Returns a network's canonical name; ``None`` if none is given."""
    # Names of ``known()`` are canonical: no need to import the networks.
    if not name or ("rld_lightning.models.registry" not in sys.modules and name in known().models):
        return name or None
    if name.startswith("transformers/"):  # possibly followed by a folder
        return name.rstrip("/").rpartition("/")[2]
    from rld_lightning.models.registry import canonical_name

    return canonical_name(name).replace(":", ".")


def fast_precision(accelerator: str = "auto") -> str:
    """Returns ``bf16-mixed`` if the hardware has bfloat16 instructions, else ``32-true``.

    NVIDIA GPUs have them from compute capability 8.0, and CPUs with AVX512-BF16 or AMX. Apple's GPUs train in float32.
    """
    import torch

    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        fast = torch.cuda.get_device_capability() >= (8, 0)
    else:
        on_cpu = accelerator == "cpu" or (accelerator == "auto" and not torch.backends.mps.is_available())
        fast = on_cpu and _cpu_has_bfloat16()
    return "bf16-mixed" if fast else "32-true"


def _cpu_has_bfloat16() -> bool:
    import torch

    if hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    probes = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(probe() for probe in probes if probe is not None)


# Cached, so that a run has a single folder and precision.
_CACHED: tuple[Callable[..., Any], ...] = (unique_name, fast_precision)
_OTHERS: tuple[Callable[..., Any], ...] = (
    *(choice, dataset_name, devices_per_node, loss_choice, network, nodes, script_help, trials_at_once, tuned),
)
for _resolver in (*_CACHED, *_OTHERS):
    OmegaConf.register_new_resolver(_resolver.__name__, _resolver, use_cache=_resolver in _CACHED, replace=True)
