"""RLD where every sample has many labels: tokens of a text, pixels of a map. `python examples/tokens_and_maps.py`."""

import torch
from torch import Tensor

from rld_lightning import RLDLoss, rld_loss

PADDING = -100  # the label of what counts for nothing


def token_loss(student_logits: Tensor, teacher_logits: Tensor, label: Tensor) -> dict[str, Tensor]:
    """Terms of a language model's logits ``(B, L, V)`` and the next tokens ``(B, L)``, ``PADDING`` among them.

    Classes are dimension 1, as in ``torch.nn.functional.cross_entropy``, so each token becomes a row. All terms are
    means over the tokens that count.
    """
    rows = (student_logits.flatten(0, 1), teacher_logits.flatten(0, 1), label.flatten())
    return RLDLoss(ignore_index=PADDING)(*rows)


def map_loss(student_logits: Tensor, teacher_logits: Tensor, label: Tensor) -> dict[str, Tensor]:
    """Terms of segmentation logits ``(B, C, H, W)`` and classes ``(B, H, W)``, ``PADDING`` where nobody knows."""
    return RLDLoss(ignore_index=PADDING)(student_logits, teacher_logits, label)


def loss_by_pixel(student_logits: Tensor, teacher_logits: Tensor, label: Tensor) -> Tensor:
    """The distillation of each pixel, ``(B, H, W)``: to weight it, or to look at it."""
    terms = rld_loss(student_logits, teacher_logits, label, ignore_index=PADDING, reduction="none")
    return terms["scd"] + terms["mcd"]


if __name__ == "__main__":
    torch.manual_seed(0)
    tokens, label = torch.randn(2, 2, 12, 50, requires_grad=True), torch.randint(50, (2, 12))
    label[:, 9:] = PADDING
    terms = token_loss(*tokens, label)
    sum(terms.values()).backward()
    print("tokens", {name: round(term.item(), 3) for name, term in terms.items()})

    pixels, label = torch.randn(2, 2, 5, 8, 8, requires_grad=True), torch.randint(5, (2, 8, 8))
    label[:, :2] = PADDING
    print("pixels", {name: round(term.item(), 3) for name, term in map_loss(*pixels, label).items()})
    print("by pixel", tuple(loss_by_pixel(*pixels, label).shape))
