"""Benchmark of the data pipeline: images/s that one core prepares for training, against the usual Pillow pipeline."""

import itertools
import os
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate
from torchvision.transforms import v2

from rld_lightning.bench.steps import time_in_turn
from rld_lightning.console import console, print_table
from rld_lightning.data.augment import Normalize
from rld_lightning.data.crops import RandomCropFlip
from rld_lightning.data.image_list import ImageList
from rld_lightning.data.shards.index import ShardList
from rld_lightning.data.shards.samples import Samples
from rld_lightning.data.shards.store import LocalShards
from rld_lightning.data.streaming import Images, StreamedImages, stack
from rld_lightning.data.streaming_module import IMAGENET_MEAN, IMAGENET_STD

SCALE = (0.08, 1.0)


def bench_data(images: int, width: int, height: int, quality: int, size: int, rounds: int) -> None:
    """Reads, crops, resizes and flips a batch of generated JPEGs with each pipeline in alternation, on one thread.

    The Pillow pipeline is the usual one: open, convert, ``RandomResizedCrop`` and flip of a Pillow image, ``ToTensor``,
    ``Normalize``, collate. Ours normalises whole batches on the device; the last row adds that on this core.

    Args:
        images: number of JPEGs, which form one batch.
        width: mean width; sizes vary by a fifth.
        size: height and width of a crop after resizing.
    """
    torch.set_num_threads(1)  # as in a worker process
    with tempfile.TemporaryDirectory() as folder:
        paths = write_jpegs(Path(folder), images, width, height, quality)
        megabytes = sum(path.stat().st_size for path in paths) / 1e6
        contenders = pipelines(paths, size)
        seconds = time_in_turn(contenders, rounds, torch.device("cpu"))
    base = next(iter(contenders))
    print_table(
        f"{images} JPEGs of about {width} x {height}, quality {quality}, {1e3 * megabytes / images:.0f} kB each, to "
        f"{size} x {size}, on one core, torch {torch.__version__}",
        ("pipeline", "ms/image, median", "images/s", "speed ratio"),
        [(name, 1e3 * value / images, images / value, seconds[base] / value) for name, value in seconds.items()],
    )
    console.print(f"medians of {rounds} rounds in alternation; files in the page cache", style="dim")


def pipelines(paths: list[Path], size: int) -> dict[str, Callable[[], object]]:
    """Returns one function per pipeline; each prepares a batch of all files."""
    usual = v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=SCALE, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )

    def pillow() -> Tensor:
        batch = []
        for seed, path in enumerate(paths):
            torch.manual_seed(seed)
            with Image.open(path) as image:
                batch.append(usual(image.convert("RGB")))
        return default_collate(batch)

    listed = ImageList(["image"], np.array([str(path).encode() for path in paths]), torch.zeros(len(paths)).long())
    crop = RandomCropFlip((size, size), SCALE, flip=True)
    normalize = Normalize(IMAGENET_MEAN, IMAGENET_STD, size, size)

    packed = _pack(paths)

    def ours(decode: str, images: Images = listed) -> Tensor:
        dataset = StreamedImages(images, crop, decode=decode)
        return stack([dataset.load((index, index)) for index in range(len(dataset))]).tensors[2]

    return {
        "Pillow, float tensors": pillow,
        "ours, decode=pil": lambda: ours("pil"),
        "ours, decode=auto": lambda: ours("auto"),
        "ours, auto, from a shard": lambda: ours("auto", packed),
        "ours, auto, normalised": lambda: normalize(ours("auto").permute(0, 2, 3, 1).contiguous()),
    }


def _pack(paths: list[Path]) -> ShardList:
    """Packs the files into a shard in the same folder."""
    shard = paths[0].with_name("shard.tar")
    with tarfile.open(shard, "w") as tar:
        for path in paths:
            tar.add(path, path.name)
    with tarfile.open(shard) as tar:
        members = [
            (member.offset_data, member.size, 0, member.name.encode(), zlib.crc32(path.read_bytes()))
            for member, path in zip(tar, paths, strict=True)
        ]
    samples = Samples(*map(np.array, zip(*members, strict=True)))
    store = LocalShards([str(shard)], [shard.stat().st_size])
    return ShardList(["image"], samples, np.zeros(len(paths), np.int32), store)


def write_jpegs(folder: Path, images: int, width: int, height: int, quality: int) -> list[Path]:
    """Writes images of coloured clouds with camera noise; sizes vary by a fifth around the mean."""
    generator, paths = np.random.default_rng(0), []
    for number in range(images):
        shape = tuple((generator.uniform(0.8, 1.2, 2) * (width, height)).astype(int).tolist())
        clouds = generator.integers(256, size=(shape[1] // 24 + 1, shape[0] // 24 + 1, 3), dtype=np.uint8)
        pixels = np.asarray(Image.fromarray(clouds).resize(shape, Image.Resampling.BICUBIC))
        noisy = pixels + generator.normal(0, 8, pixels.shape)
        paths.append(folder / f"{number:04d}.jpg")
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(paths[-1], quality=quality)
    return paths


def write_image_folder(root: Path, classes: int = 1000, each: int = 32, images: int = 1000) -> None:
    """Writes a folder of ``train/<class>/`` and ``val/<class>/`` with JPEGs of ImageNet's size, unless it exists.

    Args:
        each: number of training images per class; each class has one validation image.
        images: number of different images; the others are hard links to them, which are read and decoded all the same.
    """
    if root.exists():
        return
    part = root.with_name(f"{root.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # left by an interrupted call
    (part / "unlike").mkdir(parents=True)
    paths = itertools.cycle(write_jpegs(part / "unlike", images, 500, 375, 90))
    for split, count in (("train", each), ("val", 1)):
        for number in range(classes):
            folder = part / split / f"c{number:04d}"
            folder.mkdir(parents=True)
            for image in range(count):
                os.link(next(paths), folder / f"{image}.jpg")
    part.rename(root)
