"""Weights with their metadata, from their own file and from the files beside it."""

import json
import os
from dataclasses import replace
from pathlib import Path

from rld_lightning.errors import malformed
from rld_lightning.models.weights.read import (
    HUB_WEIGHTS,
    RUN_WEIGHTS,
    Weights,
    WeightsError,
    read_weights,
    split_part,
)

HUB_CONFIG = "config.json"  # beside the weights in the layout of the Hugging Face Hub
_OF_AN_EPOCH = ("top1", "epochs")  # facts that differ between a run's checkpoints
_MOST_CONFIG = 10_000_000  # bytes; the class names of the largest data sets take some hundred thousand


def find_weights(path: str | os.PathLike[str]) -> Weights:
    """Reads weights from a file or folder, with the metadata in files beside them.

    Args:
        path: a run directory, the folder of an export, a ``.safetensors`` file or a checkpoint, optionally with a part,
            as for :func:`~rld_lightning.models.weights.read.read_weights`.

    Raises:
        FileNotFoundError: there is no such file or folder.
        WeightsError: it cannot be used.
    """
    file, part = split_part(path)
    if file.suffix == ".onnx":
        raise WeightsError(f"{file} is a program with weights in it, not weights; give the export's folder instead")
    if file.suffix == ".pt2":
        raise WeightsError(
            f"{file} is a program, and torch.export.load runs whatever is in one; give the export's folder or "
            "its model.safetensors, which hold the same network, or predict with its model.onnx"
        )
    weights = read_weights(path)
    if not part and file.suffix == ".ckpt" and (exported := file.with_name(RUN_WEIGHTS)).is_file():
        # A run's checkpoint has less metadata than the run's exported weights, which may be of another epoch.
        known = {key: value for key, value in read_weights(exported).metadata.items() if key not in _OF_AN_EPOCH}
        return replace(weights, metadata=known | weights.metadata)
    config = file.with_name(HUB_CONFIG)  # only if a folder was given: beside a single file it may be unrelated
    in_folder = file.name == HUB_WEIGHTS and Path(path).expanduser().is_dir()
    if in_folder and "name" not in weights.metadata and config.is_file():
        return replace(weights, metadata=_metadata_of_hub(config))
    return weights


def _metadata_of_hub(path: Path) -> dict[str, str]:
    """Converts timm's ``config.json`` to the keys of ``WeightsFacts``, which checks the values later."""
    try:
        if path.stat().st_size > _MOST_CONFIG:
            raise ValueError(f"more than {_MOST_CONFIG:,} bytes")
        config = json.loads(path.read_bytes())
        pretrained = config.get("pretrained_cfg") or {}
        merged = {**pretrained, **{key: value for key, value in config.items() if value is not None}}
        crop, shape = merged.get("crop_pct"), merged.get("input_size")
        values = {
            "num_classes": merged.get("num_classes"),
            "class_names": merged.get("label_names"),
            "image_shape": shape,
            "mean": merged.get("mean"),
            "std": merged.get("std"),
            "resize": int(shape[-1] / crop) if crop and shape else None,
        }
        names = {"name": f"timm/{merged['architecture']}", "interpolation": merged.get("interpolation")}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise WeightsError(f"{path} is not the configuration of an image classifier ({malformed(error)})") from error
    texts = {key: json.dumps(value) for key, value in values.items() if value is not None}
    return texts | {key: value for key, value in names.items() if isinstance(value, str)}
