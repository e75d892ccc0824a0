"""Whether a network is still what it was."""

import torch
from torch import Tensor, nn

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def mark(network: nn.Module) -> Tensor:
    """Sums of the bits of a network's weights and statistics, one number a tensor, on the CPU.

    On any device the same for the same ones, as sums of floating-point numbers are not: a trainer that has ended has
    brought them back to the CPU.
    """
    values = network.state_dict().values()
    return torch.stack([value.detach().view(_BITS[value.itemsize]).sum() for value in values]).cpu()
