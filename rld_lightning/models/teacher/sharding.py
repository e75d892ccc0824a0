"""A frozen network too large for one device: its weights are shared out over the processes of a machine.

This is PyTorch's FSDP2 (``fully_shard``), which gathers the weights of one block at a time while it computes. Nothing
but the teacher is sharded; the student trains under DDP as ever.
"""

from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed import get_world_size
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def shard_over_machine(model: nn.Module, device: torch.device, processes: int) -> None:
    """Leaves each process of a machine its share of a network's weights, on its device; each machine has them all.

    The network is moved a block at a time, so that it never has to fit the device as a whole. From then on all
    processes must call it equally often, in the same order; what it computes, and what is tapped, stays as it was.

    Args:
        model: changed in place. Its parameters become ``DTensor`` in contiguous layout, its buffers stay whole.
        processes: how many there are on each machine, with consecutive ranks.
    """
    if isinstance(model, FSDPModule):  # a run is set up again for each of its stages
        return
    mesh = init_device_mesh(device.type, (get_world_size() // processes, processes), mesh_dim_names=("all", "machine"))
    model.to(memory_format=torch.contiguous_format)  # all that FSDP knows
    # The root takes what is in no block, and gives it back after each forward as the blocks do: there is no backward.
    for module in (*blocks(model), model):
        fully_shard(module, mesh=mesh["machine"], reshard_after_forward=True)


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The parts of a network that are gathered one at a time: what its sequences and lists hold, and what is between.

    A module that has such blocks inside is gone into, however deep. Any other stays whole: it might use the weights of
    its parts without calling them, as attention does.
    """
    for child in model.children():
        if isinstance(child, _CONTAINERS) or any(_holds_blocks(module) for module in child.modules()):
            yield from blocks(child)
        elif any(True for _ in child.parameters()):
            yield child


def _holds_blocks(module: nn.Module) -> bool:
    """Whether this is a container of several parts of one kind that have parts themselves."""
    if not isinstance(module, _CONTAINERS):
        return False
    kinds = [type(child) for child in module.children() if any(True for _ in child.children())]
    return len(kinds) > len(set(kinds))
