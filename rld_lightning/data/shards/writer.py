"""Packs images into shards in the WebDataset format, and indexes shards."""

import os
import re
import tarfile
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import fsspec
import numpy as np
import torch
from filelock import FileLock, Timeout
from fsspec import AbstractFileSystem
from torchvision.datasets.folder import IMG_EXTENSIONS

from rld_lightning.data.decode import BadImageError
from rld_lightning.data.shards.index import INDEX_FILE, Shard, ShardIndex
from rld_lightning.data.shards.remote import join, local_path, open_store, store_errors, write_bytes
from rld_lightning.data.shards.samples import Samples
from rld_lightning.data.streaming import Images
from rld_lightning.download import BLOCK_BYTES, open_tar, tar_members
from rld_lightning.limits import MOST_CLASSES
from rld_lightning.progress_bar import progress_bar

NEEDS_WEBDATASET = "packing shards needs the package webdataset: pip install 'rld-lightning[shards]'."
# Training images are packed in a random order that does not depend on the seed of a run.
ORDER_SEED = 0
PACKING = ".packing"  # marker file beside shards that are incomplete: being written, or left by an interrupted call
MOST_CLASS_BYTES = 100


class Listing(NamedTuple):
    """A shard and its images."""

    shard: Shard
    samples: Samples


def pack(
    splits: Mapping[str, Images],
    target: str,
    *,
    name: str,
    class_names: list[str],
    look: dict[str, Any],
    shard_mb: float,
    options: dict[str, Any] | None = None,
) -> ShardIndex:
    """Writes images into shards ``<split>-<number>.tar`` with an index; image files are copied unchanged.

    Args:
        target: the folder or URL to write to; must have no shards yet.
        class_names: the C names, in the order of the labels.
        look: the images' size and normalisation for the index.
        shard_mb: approximate size of a shard, in MB.

    Returns:
        the index, as written.

    Raises:
        ImportError: webdataset is not installed.
        ValueError: there are shards already, another process is packing there, or an image file cannot be read.
    """
    shard_writer = _webdataset("writer").ShardWriter
    if shard_mb <= 0:
        raise ValueError(f"shard_mb={shard_mb} must be positive, 128 or so.")
    folder = local_path(target)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    store, place = open_store(target, options) if folder is None else (fsspec.filesystem("file"), str(folder))
    listings: dict[str, list[Listing]] = {split: [] for split in splits}
    with _alone_in(folder), tempfile.TemporaryDirectory() as temporary:
        _clear(store, place, splits, target)
        write_bytes(join(target, PACKING), b"", options)
        here = Path(temporary) if folder is None else folder
        for split, images in splits.items():

            def finish(file: str, split: str = split) -> None:
                path = Path(file)
                listings[split].append(_listed(path.open("rb"), path.name, str(path)))
                if folder is None:
                    _upload(path, join(target, path.name), options)
                    path.unlink()

            pattern = f"{here}/{split}".replace("%", "%%") + "-%06d.tar"
            with (
                shard_writer(
                    pattern, maxcount=1 << 40, maxsize=1e6 * shard_mb, post=finish, verbose=0, mtime=0
                ) as writer,
                progress_bar("shards", f"{split} images packed", len(images.labels)) as advance,
            ):
                for sample in _encoded(split, images):
                    writer.write(sample)
                    advance(1)
        index = _index(name, class_names, listings, look)
        index.write(target, options)
        with suppress(OSError), store_errors(target):  # some may write to a store, and not delete
            store.rm_file(join(place, PACKING))
    return index


@contextmanager
def _alone_in(folder: Path | None) -> Iterator[None]:
    """Locks a folder; does nothing for a store, which has no locks that end with their process.

    Raises:
        ValueError: another process packs into it, and would take this one's shards for those of an interrupted call.
    """
    if folder is None:
        yield
        return
    lock = FileLock(folder / f"{PACKING}.lock")
    try:
        with suppress(NotImplementedError):  # a file system without locks
            lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"another process is packing shards into {folder}: wait for it, end it, or choose another folder."
        ) from None
    try:
        yield
    finally:
        with suppress(OSError):  # Windows keeps it until it is released
            (folder / f"{PACKING}.lock").unlink()
        lock.release()


def _clear(store: AbstractFileSystem, place: str, splits: Iterable[str], target: str) -> None:
    """Removes the shards of an interrupted call.

    Raises:
        ValueError: there are complete shards, which would be overwritten.
    """
    found: dict[str, str] = {}
    with suppress(FileNotFoundError), store_errors(target):
        found = {path.rpartition("/")[2]: path for path in store.ls(place, detail=False)}
    shards = [path for name, path in found.items() if re.fullmatch(rf"({'|'.join(splits)})-\d{{6,}}\.tar", name)]
    if INDEX_FILE in found or (shards and PACKING not in found):
        raise ValueError(f"{target} holds shards already; choose another place, nothing is overwritten.")
    with store_errors(target):
        for path in shards:
            store.rm_file(path)


def index_shards(
    patterns: Mapping[str, str],
    target: str,
    *,
    name: str,
    class_names: list[str] | None = None,
    options: dict[str, Any] | None = None,
) -> ShardIndex:
    """Writes an index of existing shards, such as published ones; each is read once.

    A sample is an image and its class as a number: ``<key>.jpg`` (or another image suffix) and ``<key>.cls``.

    Args:
        patterns: for each split, the paths or URLs of its shards, with ``{000..123}`` or, if files can be listed, with
            ``*``; several are separated by ``::``.
        target: the folder or URL for the index.
        class_names: the C names; by default the numbers.

    Returns:
        the index, as written.

    Raises:
        ImportError: webdataset is not installed.
        OSError: a shard cannot be read.
        ValueError: a shard is damaged or its samples are not as described above.
    """
    listings: dict[str, list[Listing]] = {split: [] for split in patterns}
    addresses = [(split, address) for split, pattern in patterns.items() for address in _addresses(pattern, options)]
    with progress_bar("shards", "shards indexed", len(addresses)) as advance:
        for split, address in addresses:
            listings[split].append(_listed(_open(address, options), _as_seen_from(target, address), address))
            advance(1)
    largest = max(int(listing.samples.label.max()) for listed in listings.values() for listing in listed)
    names = class_names or [str(number) for number in range(largest + 1)]
    if largest >= len(names):
        raise ValueError(f"the shards have a class {largest} and there are {len(names)} class names: name all classes.")
    index = _index(name, names, listings, {})
    if (folder := local_path(target)) is not None:
        folder.mkdir(parents=True, exist_ok=True)
    index.write(target, options)
    return index


def list_shard(file: BinaryIO, address: str) -> Samples:
    """Lists the images of a tar file.

    Args:
        file: the open tar file.
        address: its name for messages.

    Raises:
        ValueError: it is damaged, compressed, or has samples without an image or a class.
    """
    split_name = _webdataset("tariterators").base_plus_ext
    samples: dict[str, dict[str, Any]] = {}
    try:
        with open_tar(file) as tar:
            for member in tar_members(tar):
                key, suffix = split_name(member.name)
                if not member.isreg() or key is None or member.name.startswith("__"):
                    continue
                if member.issparse():  # which may claim any size
                    raise ValueError(f"{address}/{member.name} is a sparse file, which shards do not hold")
                sample = samples.setdefault(key, {})
                if f".{suffix.lower()}" in IMG_EXTENSIONS:
                    if "member" in sample:
                        raise ValueError(f"{address}/{key} has more than one image, or is there twice")
                    sample |= {"offset": member.offset_data, "size": member.size, "member": os.fsencode(member.name)}
                    sample["crc32"] = _checksum(tar, member)
                elif suffix.lower() == "cls":
                    if member.size > MOST_CLASS_BYTES:
                        raise ValueError(
                            f"{address}/{member.name} has {member.size:,} bytes, too many for a class number"
                        )
                    content = tar.extractfile(member)
                    assert content is not None  # of a regular file
                    sample["label"] = _class_of(content.read(), f"{address}/{member.name}")
            file.seek(tar.offset)
            # tarfile stops at a truncated or damaged header just as at the empty block that ends a tar file.
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"no header and no end at byte {tar.offset:,}")
    except tarfile.TarError as error:
        raise ValueError(
            f"{address} is not a whole tar file ({error}): copy it again; compressed shards have to be unpacked."
        ) from error
    if not samples:
        raise ValueError(f"{address} has no images: leave it out.")
    for key, sample in samples.items():
        if len(sample) < len(Samples._fields):
            what = "class (.cls)" if "member" in sample else f"image ({', '.join(IMG_EXTENSIONS)})"
            raise ValueError(f"{address}/{key} has no {what}: shards for classification need both for each sample.")
        if sample["label"] < 0:
            raise ValueError(f"{address}/{key} has the class {sample['label']}: classes are numbers from 0 on.")
    columns = {name: np.array([sample[name] for sample in samples.values()]) for name in Samples._fields}
    return Samples(**columns | {"crc32": columns["crc32"].astype(np.uint32)})


def _checksum(tar: tarfile.TarFile, member: tarfile.TarInfo) -> int:
    content = tar.extractfile(member)
    assert content is not None  # of a regular file
    crc32 = 0
    while block := content.read(BLOCK_BYTES):
        crc32 = zlib.crc32(block, crc32)
    return crc32


def _class_of(content: bytes, member: str) -> int:
    try:
        if (number := int(content)) < MOST_CLASSES:
            return number
        raise ValueError
    except ValueError as error:
        raise ValueError(
            f"{member} holds {content[:30].decode(errors='replace')!r} instead of a class number."
        ) from error


def _encoded(split: str, images: Images) -> Iterator[dict[str, Any]]:
    """Yields the samples of a split in the form that webdataset's writer expects."""
    count = len(images.labels)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(ORDER_SEED))
    order = order if split == "train" else torch.arange(count)
    for number, index in enumerate(order.tolist()):
        file = Path(images.path(index))
        # A dot would end the key; the number makes equal file names of different classes unique.
        key = f"{number:08d}_{re.sub(r'[^A-Za-z0-9_-]', '_', file.stem)[:60]}"
        try:
            content = images.read(index).numpy().tobytes()
        except BadImageError as error:
            raise ValueError(f"{file} cannot be packed ({error}): replace or delete it.") from error
        yield {"__key__": key, file.suffix[1:].lower(): content, "cls": int(images.labels[index])}


def _listed(file: BinaryIO, path: str, address: str) -> Listing:
    with file:
        samples = list_shard(file, address)
        size = file.seek(0, 2)
    return Listing(Shard(path, size, len(samples.label)), samples)


def _index(
    name: str, class_names: list[str], listings: Mapping[str, list[Listing]], look: dict[str, Any]
) -> ShardIndex:
    shards = {split: [listing.shard for listing in listed] for split, listed in listings.items()}
    samples = {split: Samples.join([listing.samples for listing in listed]) for split, listed in listings.items()}
    return ShardIndex(name, list(class_names), shards, samples, look)


def _upload(path: Path, address: str, options: dict[str, Any] | None) -> None:
    store, target = open_store(address, options)
    try:
        with store_errors(address):
            store.put_file(str(path), target)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{address} cannot be written: there is no such bucket or folder.") from error


def _addresses(pattern: str, options: dict[str, Any] | None) -> list[str]:
    addresses = []
    for address in _webdataset("shardlists").expand_urls(pattern):
        if "*" not in address:
            addresses.append(address)
        elif (path := local_path(address)) is not None:
            addresses += sorted(map(str, path.parent.glob(path.name)))
        else:
            store, inner = open_store(address, options)
            addresses += sorted(store.unstrip_protocol(match) for match in store.glob(inner))
    if not addresses:
        raise FileNotFoundError(f"there are no shards at {pattern}.")
    return addresses


def _open(address: str, options: dict[str, Any] | None) -> BinaryIO:
    with store_errors(address):
        if (path := local_path(address)) is not None:
            if path.exists() and not path.is_file():  # reading a pipe would wait for a writer
                raise OSError("it is not a regular file")
            return path.open("rb")
        store, inner = open_store(address, options)
        return store.open(inner, "rb")


def _as_seen_from(target: str, address: str) -> str:
    """Returns an address relative to the folder of the index if it is inside, otherwise the absolute address."""
    path, folder = local_path(address), local_path(target)
    if path is None or folder is None:
        return address.removeprefix(f"{target.rstrip('/')}/")
    path, folder = path.resolve(), folder.resolve()
    return str(path.relative_to(folder) if path.is_relative_to(folder) else path)


def _webdataset(module: str) -> Any:
    try:
        return import_module(f"webdataset.{module}")
    except ImportError as error:
        raise ImportError(NEEDS_WEBDATASET) from error
