"""Helpers for tests of data modules and loaders."""

from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

from rld_lightning.data import Batch


def same(a, b):
    """Whether two lists of tuples of tensors (or ``None``) are bitwise equal."""
    return len(a) == len(b) and all(
        x is y if x is None or y is None else torch.equal(x, y)
        for left, right in zip(a, b, strict=True)
        for x, y in zip(left, right, strict=True)
    )


def merge(batches):
    """Concatenates batches into one."""
    return Batch(*(None if fields[0] is None else torch.cat(fields) for fields in zip(*batches, strict=True)))


def part(batch, *bounds):
    """Slices all tensors of a batch."""
    return Batch(*(None if values is None else values[slice(*bounds)] for values in batch))


def ready(data, rank=0, world_size=1):
    """Prepares and sets up a data module as in process ``rank`` of ``world_size``."""
    if world_size > 1:
        strategy = SimpleNamespace(root_device=torch.device("cpu"))
        data.trainer = SimpleNamespace(global_rank=rank, world_size=world_size, strategy=strategy)
    data.prepare_data()
    data.setup()
    return data


def epoch_of(loader, epoch=0):
    """Returns the batches of an epoch."""
    loader.sampler.set_epoch(epoch)
    return list(loader)


def write_jpegs(root, counts, *, size, ending):
    """Writes three classes per split, with colour, grey and CMYK images in turn."""
    generator = np.random.default_rng(0)
    for split, count in counts.items():
        for name in "abc":
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                noise = Image.fromarray(generator.integers(256, size=(5, 4, 3), dtype=np.uint8))
                mode = ("RGB", "L", "CMYK")[number % 3]
                noise.resize(size).convert(mode).save(root / split / name / f"{number}{ending}")
