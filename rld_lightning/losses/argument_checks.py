"""Checks of a loss's arguments, and hints for invalid ones."""

from torch import Size, Tensor


def check_tensor(name: str, value: object) -> None:
    """Raises ``ValueError`` if an argument is not a tensor."""
    if isinstance(value, Tensor):
        return
    hint = (
        "torch.as_tensor(label)"
        if name == "label"
        else "the logits of a model's output, as in output.logits or output[0]"
    )
    raise ValueError(f"{name} must be a tensor, got a {type(value).__name__}; pass {hint}.")


def label_hint(label: Tensor, shape: Size, logits: Size) -> str:
    """Returns how to fix an invalid label, as the end of a sentence; an empty string if its kind is not recognised.

    Args:
        label: the invalid label.
        shape: the expected shape ``(B, *)``.
        logits: the shape of the logits ``(B, C, *)``.
    """
    if label.shape == shape:
        return "; use label.long()" if label.is_floating_point() else ""
    if label.shape == logits:
        return "; for soft or one-hot labels use label.argmax(1)"
    if label.shape == logits[:-1]:
        return "; classes are dimension 1 of logits: for (B, L, C) use logits.transpose(1, 2)"
    if label.shape == (*shape, 1):
        return "; use label.squeeze(-1)"
    return ""
