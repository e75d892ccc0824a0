"""A fingerprint of a network's weights, to tell whether they have changed."""

import torch
from torch import Tensor, nn

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(network: nn.Module) -> Tensor:
    """Sums the bits of each tensor of a network's state_dict as integers; returns one number per tensor.

    Unlike floating-point sums, these are equal on every device; a trainer moves the network to the CPU when it ends.
    They are on the network's device, so that nothing waits for it.
    """
    values = network.state_dict().values()
    # The dtype is stated because Apple's GPUs would add int32 in int32.
    return torch.stack([value.detach().view(_BITS[value.itemsize]).sum(dtype=torch.int64) for value in values])
