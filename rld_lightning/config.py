"""What the YAML files in ``conf/`` can call: resolvers, registered by importing this module."""

import netrc
import os
import secrets
import socket
from collections.abc import Mapping
from datetime import datetime
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from omegaconf import OmegaConf


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


def wandb_mode() -> str:
    """W&B's mode: ``WANDB_MODE`` if set; ``offline`` without a key, or without a way to the server in two seconds.

    The key is looked for without asking wandb, which would start a session and then ignore the mode.
    """
    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"]
    server = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    if not (os.environ.get("WANDB_API_KEY") or _netrc_knows(server.hostname)):
        return "offline"
    if getproxies().get(server.scheme):  # the way leads through the proxy, which a plain connection does not show
        return "online"
    port = server.port or (443 if server.scheme == "https" else 80)
    try:
        socket.create_connection((server.hostname, port), timeout=2).close()
    except OSError:
        return "offline"
    return "online"


def _netrc_knows(host: str) -> bool:
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def class_name(target: str) -> str:
    """``SGD`` of ``torch.optim.SGD``."""
    return target.rsplit(".", 1)[-1]


def loss_choice(choice: str, loss: Mapping[str, Any]) -> str:
    """The option of the loss group, for folders: ``rld``, or ``rld+at`` of a combination.

    Args:
        choice: ``hydra.runtime.choices.loss``.
        loss: the loss's part of the configuration.
    """
    return "+".join(_parts(loss)) or choice


def loss_name(loss: Mapping[str, Any]) -> str:
    """What a run is called after its loss: ``RLD``, or ``RLD+AT`` of a combination.

    Args:
        loss: the loss's part of the configuration.
    """
    return "+".join(map(loss_name, _parts(loss).values())) or class_name(loss["_target_"]).removesuffix("Loss")


def _parts(loss: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {name: part for name, part in loss.items() if isinstance(part, Mapping) and "_target_" in part}


# Cached, because a run has one folder, one precision and one answer of the network.
OmegaConf.register_new_resolver("unique_name", unique_name, use_cache=True, replace=True)
OmegaConf.register_new_resolver("fast_precision", fast_precision, use_cache=True, replace=True)
OmegaConf.register_new_resolver("wandb_mode", wandb_mode, use_cache=True, replace=True)
OmegaConf.register_new_resolver("loss_choice", loss_choice, replace=True)
OmegaConf.register_new_resolver("loss_name", loss_name, replace=True)
