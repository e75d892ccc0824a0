"""Weights and images of the golden model values, by the integer hash that `tests/golden/models.json` describes."""

import json
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

GOLDEN = Path(__file__).parents[1] / "golden"
FACTS = json.loads((GOLDEN / "models.json").read_text())
MODELS = FACTS["models"]

_WORD = 2**64


def hash_uniform(position: int, count: int, seed: int) -> np.ndarray:
    """`count` float64 values in [-1, 1) for the tensor at `position` of a state_dict."""
    start = (seed * 0xD1342543DE82EF95 + (position + 1) * 0xBF58476D1CE4E5B9 + 0x9E3779B97F4A7C15) % _WORD
    z = np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(start)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return 2 * (z >> np.uint64(11)).astype(np.float64) * 2.0**-53 - 1


def fill(model: nn.Module, conv_gain: float, seed: int = FACTS["seed"]) -> nn.Module:
    """Replaces every parameter and buffer by its golden value."""
    state = model.state_dict()
    for position, (key, tensor) in enumerate(state.items()):
        r = hash_uniform(position, tensor.numel(), seed).reshape(tensor.shape)
        state[key] = torch.from_numpy(np.asarray(_value(key, tensor.shape, r, conv_gain))).to(tensor.dtype)
    model.load_state_dict(state)
    return model


def _value(key: str, shape: torch.Size, r: np.ndarray, conv_gain: float) -> np.ndarray:
    match key.rpartition(".")[2], len(shape):
        case "num_batches_tracked", _:
            return np.zeros_like(r)
        case "running_var", _:
            return 1 + 0.25 * r
        case "running_mean", _:
            return 0.1 * r
        case "weight", 4:
            return conv_gain * math.sqrt(6 / math.prod(shape[1:])) * r
        case "weight", 2:
            return math.sqrt(3 / shape[1]) * r
        case "bias", 1:
            return 0.1 * r
        case "weight", 1:
            return 1 + 0.25 * r
    raise AssertionError(f"the golden fill does not define {key} of shape {tuple(shape)}")


def golden_images(size: int, phase: float = FACTS["phase"]) -> Tensor:
    """The two input images, `(2, 3, size, size)` float32."""
    n, c, h, w = np.ogrid[0:2, 0:3, 0:size, 0:size]
    s = 32 / size
    x = np.sin(0.21 * (n + 1) * s * h + 0.13 * (c + 1) * s * w + 0.9 * c + 1.7 * n + phase)
    x = x + 0.5 * np.cos(0.57 * s * h - 0.31 * (n + 1) * s * w + 0.4 * c) + 0.8 * np.cos(2.0 * n + 1.3 * c + phase)
    return torch.from_numpy(x.astype(np.float32))
