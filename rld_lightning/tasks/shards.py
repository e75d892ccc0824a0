"""Packs a data set into shards, or indexes existing shards."""

from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from rld_lightning.console import print_line
from rld_lightning.data.shards.index import ShardIndex
from rld_lightning.data.shards.writer import index_shards, pack
from rld_lightning.data.streaming_module import StreamingDataModule
from rld_lightning.errors import user_errors
from rld_lightning.models.classes import read_class_names
from rld_lightning.runs.folder import check_folder


def make_shards(cfg: DictConfig) -> ShardIndex:
    """Runs the job of ``conf/shards.yaml`` and prints the result.

    Raises:
        UserError: the images, the shards or the output directory are invalid.
    """
    with user_errors():
        options: Any = OmegaConf.to_container(cfg.storage_options, resolve=True)
        target = str(cfg.out)
        if "://" not in target:
            check_folder(Path(target), "out=", written=())
        if cfg.index.train is not None or cfg.index.test is not None:
            index = _index(cfg, target, options)
        else:
            if given := [f"index.{key}={value}" for key, value in cfg.index.items() if value is not None]:
                raise ValueError(f"{given[0]} is for existing shards: name them with index.train and index.test, too.")
            index = _pack(cfg, target, options)
    for split, shards in index.shards.items():
        size = sum(shard.bytes for shard in shards) / 1e9
        images = sum(shard.images for shard in shards)
        print_line(split, f"{images:,} images in {len(shards):,} shards, {size:.3g} GB")
    print_line("train with", f"data=shards data.root={target}", pasted=True)
    return index


def _pack(cfg: DictConfig, target: str, options: dict[str, Any]) -> ShardIndex:
    data = instantiate(cfg.data)
    if not isinstance(data, StreamingDataModule):
        raise ValueError(
            f"{data.name} fits the device and is not packed: choose a data set in files, data=imagefolder or imagenet."
        )
    data.prepare_data()
    data.setup()
    print_line("data", data.describe())
    look = {
        "image_size": data.image_shape[1],
        "resize": data.resize,
        "mean": list(data.mean),
        "std": list(data.std),
    }
    # Class names from the data module: folders of ImageNet are named by WordNet ids.
    return pack(
        data.splits,
        target,
        name=data.name,
        class_names=data.class_names,
        look=look,
        shard_mb=cfg.shard_mb,
        options=options,
    )


def _index(cfg: DictConfig, target: str, options: dict[str, Any]) -> ShardIndex:
    patterns = {split: pattern for split, pattern in cfg.index.items() if split in ("train", "val", "test") and pattern}
    if missing := {"train", "test"} - set(patterns):
        raise ValueError(f"index.{missing.pop()} has no value; say where the shards of both train and test are.")
    file = cfg.index.class_names
    names = None if file is None else read_class_names(file, "index.class_names")
    return index_shards(patterns, target, name=cfg.index.name or Path(target).name, class_names=names, options=options)
