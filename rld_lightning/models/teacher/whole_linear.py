"""The last layer of a teacher, whose logits autocast does not round."""

import torch
from torch import Tensor, nn


class WholeLinear(nn.Linear):
    """A linear layer that autocast does not reach: it computes in the type of its weights, or a wider one."""

    def forward(self, input: Tensor) -> Tensor:
        """``(*, D)`` to ``(*, K)``."""
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(input.to(torch.promote_types(input.dtype, self.weight.dtype)))


def last_linear(model: nn.Module) -> nn.Linear | None:
    """The last plain linear layer, plain again where the model has been a teacher before."""
    layers: list[nn.Linear] = [m for m in model.modules() if isinstance(m, nn.Linear)]
    plain = [layer for layer in layers if type(layer) in (nn.Linear, WholeLinear)]
    if not plain:
        return None
    plain[-1].__class__ = nn.Linear
    return plain[-1]
