"""Writes weights as safetensors."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rld_lightning.atomic_files import write_whole
from rld_lightning.models.weights.seal import sealed_safetensors


def save_weights(
    model: nn.Module | Mapping[str, Tensor], path: str | os.PathLike[str], metadata: Mapping[str, object] | None = None
) -> None:
    """Writes a model's weights as safetensors with a checksum, atomically.

    Args:
        model: the model, or its state_dict.
        path: the file to write; its folder is created if necessary.
        metadata: entries of the header. Strings are written unchanged, other values as JSON.

    Raises:
        OSError: it cannot be written; an existing file is unchanged.
    """
    path = Path(path).expanduser()
    state_dict = model.state_dict() if isinstance(model, nn.Module) else model
    # Cloned, because safetensors refuses tensors that share memory, such as tied weights.
    tensors = {
        key.replace("_orig_mod.", ""): value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, value in state_dict.items()
    }
    header = {key: value if isinstance(value, str) else _to_json(value) for key, value in (metadata or {}).items()}
    write_whole(path, sealed_safetensors(tensors, header))


def _to_json(value: object) -> str:
    def convert(item: Any) -> object:
        return item.item() if hasattr(item, "item") else str(item)  # numpy and torch scalars; paths etc.

    return json.dumps(value, default=convert)
