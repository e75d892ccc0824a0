"""Shards a frozen network that is too large for one device over the processes of a machine.

Uses PyTorch's FSDP2 (``fully_shard``), which gathers the weights of one block at a time. Only the teacher is sharded;
the student trains with plain DDP.
"""

from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed import get_world_size
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def shard_over_machine(model: nn.Module, device: torch.device, processes: int) -> None:
    """Shards a network's weights over the processes of each machine, onto their devices.

    The network is moved one block at a time, so that it never has to fit the device as a whole. Afterwards all
    processes must call it equally often, in the same order; outputs and tapped features do not change.

    Args:
        model: changed in place. Its parameters become ``DTensor`` in contiguous layout, its buffers are not sharded.
        processes: number of processes on each machine, with consecutive ranks.
    """
    if isinstance(model, FSDPModule):  # already done: setup runs once per stage of a run
        return
    mesh = init_device_mesh(device.type, (get_world_size() // processes, processes), mesh_dim_names=("all", "machine"))
    model.to(memory_format=torch.contiguous_format)  # FSDP supports no other
    # The root holds the parameters outside blocks, and reshards them after each forward too, as there is no backward.
    for module in (*blocks(model), model):
        fully_shard(module, mesh=mesh["machine"], reshard_after_forward=True)


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """Yields the parts of a network to gather one at a time: the items of its sequences and lists, and those between.

    Modules that contain such blocks are searched recursively. Others are not divided: they might use the weights of
    their parts without calling them, as attention does.
    """
    for child in model.children():
        if isinstance(child, _CONTAINERS) or any(_holds_blocks(module) for module in child.modules()):
            yield from blocks(child)
        elif any(True for _ in child.parameters()):
            yield child


def _holds_blocks(module: nn.Module) -> bool:
    """Whether this is a container of several parts of the same type that have parts themselves."""
    if not isinstance(module, _CONTAINERS):
        return False
    kinds = [type(child) for child in module.children() if any(True for _ in child.children())]
    return len(kinds) > len(set(kinds))
