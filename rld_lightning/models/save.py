"""Weights written as safetensors."""

import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn


def save_weights(
    model: nn.Module | Mapping[str, Tensor], path: str | os.PathLike[str], metadata: Mapping[str, object] | None = None
) -> None:
    """Writes a model's weights as safetensors; the file appears whole or not at all.

    Args:
        model: the model, or its state_dict.
        path: the file to write; its folder is made if need be.
        metadata: what to note in the header. Strings are kept, other values are written as JSON.
    """
    path = Path(path).expanduser()
    state_dict = model.state_dict() if isinstance(model, nn.Module) else model
    # Cloned, because safetensors refuses tensors that share memory, such as tied weights.
    tensors = {
        key.replace("_orig_mod.", ""): value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, value in state_dict.items()
    }
    header = {key: value if isinstance(value, str) else _to_json(value) for key, value in (metadata or {}).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        # Not safetensors' save_file, whose files nobody but the owner can read, whatever the umask.
        temporary.write_bytes(safetensors.torch.save(tensors, metadata=header or None))
        os.replace(temporary, path)  # noqa: PTH105 -- atomic on every platform
    finally:
        temporary.unlink(missing_ok=True)


def _to_json(value: object) -> str:
    def convert(item: Any) -> object:
        return item.item() if hasattr(item, "item") else str(item)  # numpy and torch scalars; paths and the like

    return json.dumps(value, default=convert)
