"""What a loss is given, and the way out where it is something else."""

from torch import Size, Tensor


def check_tensor(name: str, value: object) -> None:
    """Looks whether an argument is a tensor.

    Raises:
        ValueError: it is not.
    """
    if isinstance(value, Tensor):
        return
    way_out = (
        "torch.as_tensor(label)"
        if name == "label"
        else "the logits of a model's output, as in output.logits or output[0]"
    )
    raise ValueError(f"{name} must be a tensor, got a {type(value).__name__}; pass {way_out}.")


def way_out_for_label(label: Tensor, shape: Size, logits: Size) -> str:
    """What to do with a label that does not fit, to end a sentence; nothing where it does not tell what it is.

    Args:
        label: that was given.
        shape: that it should have, ``(B, *)``.
        logits: the shape of the logits, ``(B, C, *)``.
    """
    if label.shape == shape:
        return "; take label.long()" if label.is_floating_point() else ""
    if label.shape == logits:
        return "; of soft or one-hot labels take label.argmax(1)"
    if label.shape == logits[:-1]:
        return "; classes are dimension 1 of logits: of (B, L, C) take logits.transpose(1, 2)"
    if label.shape == (*shape, 1):
        return "; take label.squeeze(-1)"
    return ""
