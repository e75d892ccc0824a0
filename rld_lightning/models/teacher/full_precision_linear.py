"""The last layer of a teacher, without autocast, which would round the logits."""

import torch
from torch import Tensor, nn


class FullPrecisionLinear(nn.Linear):
    """A linear layer that ignores autocast: computes in the dtype of its weights, or of its input if that is wider."""

    def forward(self, input: Tensor) -> Tensor:
        """Maps ``(*, D)`` to ``(*, K)``."""
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(input.to(torch.promote_types(input.dtype, self.weight.dtype)))


def last_linear(model: nn.Module) -> nn.Linear | None:
    """Returns the last plain linear layer; reverts its class if the model has been a teacher before."""
    layers: list[nn.Linear] = [m for m in model.modules() if isinstance(m, nn.Linear)]
    plain = [layer for layer in layers if type(layer) in (nn.Linear, FullPrecisionLinear)]
    if not plain:
        return None
    plain[-1].__class__ = nn.Linear
    return plain[-1]
