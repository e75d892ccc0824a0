"""Reads from shards: in place, through a cache of bounded size, or image by image from object storage."""

import os
import re
import shutil
import stat
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from hashlib import blake2b
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from fsspec import AbstractFileSystem
from torch import Tensor

from rld_lightning.data.shards.remote import check_address, get_file, get_range, local_path, open_store, reason
from rld_lightning.errors import UserError

ATTEMPTS = 3
RETRY_SECONDS = 2.0
WAIT_SECONDS = 0.1
MOST_OPEN = 64
CACHED = ".shard"  # suffix of cached files, so that nothing else is ever deleted
FAILED = ".failed"  # suffix of files that say why a download has just failed
FAILED_SECONDS = 3600.0  # until they are removed; nobody waits for a download that long
LOCK = "cache.lock"
_LONGEST_NAME = 100  # characters of an address's end in a cached file's name, which systems limit
REPAIR = "copy it again, or make the index again if it was replaced on purpose."


class ShardError(UserError, OSError):
    """Raised for a shard that cannot be read; ends a run with its message, which names the shard and the reason."""


class ShardStore:
    """Reads bytes of shards; this class downloads single images, for a small share of many shards.

    Args:
        addresses: URLs of the shards.
        sizes: the expected length of each, in bytes.
        options: options of the storage; see :func:`~rld_lightning.data.shards.remote.open_store`.
    """

    def __init__(self, addresses: Sequence[str], sizes: Sequence[int], options: dict[str, Any] | None = None) -> None:
        self.addresses = list(addresses)
        self.sizes = list(sizes)
        self.options = options

    def check(self) -> None:
        """Checks before a run whether the shards can be read: here all addresses, and the first and the last shard.

        Raises:
            ImportError: the package of an address's scheme is not installed.
            ShardError: one is missing or has another length than in the index.
            ValueError: an address cannot be opened.
        """
        for address in {check_address(address): address for address in self.addresses}.values():
            open_store(address, self.options)
        for shard in {0, len(self.addresses) - 1}:
            size = self._request(shard, lambda store, path: store.info(path).get("size"))
            if size is not None:  # not every HTTP server sends it
                self._check_size(shard, size)

    def fetch(self, shard: int) -> None:
        """Starts to download a shard that will be read soon; does nothing here."""

    def read(self, shard: int, offset: int, size: int) -> Tensor:
        """Reads ``size`` bytes of a shard from ``offset`` on, uint8 ``(size,)``.

        Raises:
            ShardError: the shard is missing, cannot be reached or has another length than expected.
        """
        content = self._request(shard, lambda store, path: get_range(store, path, offset, size))
        if len(content) > size:
            raise ShardError(
                f"the server of {self.addresses[shard]} sends whole files only: give data.cache_gb room for shards."
            )
        return self._to_tensor(shard, content, size)

    def _to_tensor(self, shard: int, content: bytes, size: int) -> Tensor:
        if len(content) != size:
            raise ShardError(f"{self.addresses[shard]} ends early, it was cut off: {REPAIR}")
        return torch.frombuffer(bytearray(content), dtype=torch.uint8) if size else torch.empty(0, dtype=torch.uint8)

    def _check_size(self, shard: int, size: int) -> None:
        if size != self.sizes[shard]:
            what = "was cut off" if size < self.sizes[shard] else "is another file"
            raise ShardError(
                f"{self.addresses[shard]} has {size:,} bytes instead of the {self.sizes[shard]:,} in the index, "
                f"it {what}: {REPAIR}"
            )

    def _request(self, shard: int, action: Callable[[AbstractFileSystem, str], Any]) -> Any:
        """Sends a request about a shard to the storage, and repeats it if the connection may have failed."""
        address = self.addresses[shard]
        for attempt in range(1, ATTEMPTS + 1):
            store, path = open_store(address, self.options)
            try:
                return action(store, path)
            except FileNotFoundError as error:
                raise ShardError(f"{address}, which the index lists, is missing: {REPAIR}") from error
            except MemoryError:
                raise
            except Exception as error:  # each storage raises its own types
                if attempt == ATTEMPTS or isinstance(error, PermissionError):
                    raise ShardError(
                        f"{address} cannot be fetched ({reason(error)}): check the address, the access to it and the "
                        "connection, then run again."
                    ) from error
                time.sleep(RETRY_SECONDS * attempt)
        raise AssertionError("unreachable")


class LocalShards(ShardStore):
    """Shards in local folders, read in place."""

    def __init__(self, addresses: Sequence[str], sizes: Sequence[int]) -> None:
        super().__init__(addresses, sizes)
        self._open: OrderedDict[int, FileIO] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": OrderedDict()}

    def check(self) -> None:
        """Checks the length of each shard."""
        for shard, address in enumerate(self.addresses):
            try:
                status = self._path(shard).stat()
            except OSError as error:
                raise ShardError(
                    f"{address}, which the index lists, is missing ({error.strerror}): {REPAIR}"
                ) from error
            if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait for a writer
                raise ShardError(f"{address}, which the index lists, is not a regular file: {REPAIR}")
            self._check_size(shard, status.st_size)

    def read(self, shard: int, offset: int, size: int) -> Tensor:
        """Reads from the file."""
        content = torch.empty(size, dtype=torch.uint8)
        try:
            file = self._file(shard)
            # Unlike seeking, this is safe if a worker shares the open file with another process.
            read = os.preadv(file.fileno(), [content.numpy().data], offset)
        except OSError as error:
            raise ShardError(f"{self.addresses[shard]} cannot be read ({error.strerror}): {REPAIR}") from error
        if read != size:
            raise ShardError(f"{self.addresses[shard]} ends early, it was cut off: {REPAIR}")
        return content

    def _path(self, shard: int) -> Path:
        path = local_path(self.addresses[shard])
        assert path is not None, f"{self.addresses[shard]} is in a store"
        return path

    def _file(self, shard: int) -> FileIO:
        """Returns the open file of a shard, opening it if necessary."""
        if shard not in self._open:
            if len(self._open) == MOST_OPEN:
                self._open.popitem(last=False)[1].close()
            self._open[shard] = self._path(shard).open("rb", buffering=0)
        self._open.move_to_end(shard)
        return self._open[shard]


class CachedShards(ShardStore):
    """Shards downloaded whole into a local cache, which all processes of a machine share.

    The least recently used shards are evicted.

    Args:
        addresses: URLs of the shards.
        sizes: the expected length of each, in bytes.
        folder: folder of the cache.
        limit: size limit of the cache in bytes, including downloads in progress.
        options: options of the storage.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        sizes: Sequence[int],
        folder: Path,
        limit: int,
        options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(addresses, sizes, options)
        self.folder = folder
        self.limit = limit

    def fetch(self, shard: int) -> None:
        """Starts to download a shard in the background, unless it is cached."""
        if not _is_plain(self.target(shard)):
            # Errors occur again when the shard is read, and are reported then.
            threading.Thread(target=self._prefetch, args=(shard,), daemon=True).start()

    def read(self, shard: int, offset: int, size: int) -> Tensor:
        """Reads from the cached file."""
        try:
            while True:
                path = self._download(shard)
                try:
                    with path.open("rb", buffering=0) as file:
                        os.utime(file.fileno())  # marks it as recently used
                        content = os.pread(file.fileno(), size, offset)
                except FileNotFoundError:  # just evicted
                    continue
                return self._to_tensor(shard, content, size)
        except ShardError:
            raise
        except OSError as error:
            raise ShardError(
                f"{error.filename or self.folder} cannot be read or written ({error.strerror or error}): check it, or "
                "choose another folder with data.cache."
            ) from error

    def target(self, shard: int) -> Path:
        """Returns the path of a shard in the cache, which is unique to its URL and size."""
        size = self.sizes[shard]
        digest = blake2b(f"{self.addresses[shard]} {size}".encode(), digest_size=6).hexdigest()
        name = re.sub(r"[^\w.-]", "_", self.addresses[shard].rpartition("/")[2], flags=re.ASCII)[:_LONGEST_NAME]
        return self.folder / f"{name}.{digest}.{size}{CACHED}"

    def _prefetch(self, shard: int) -> None:
        with suppress(Exception):
            self._download(shard, timeout=0)  # times out if another process is downloading it

    def _download(self, shard: int, timeout: float = -1) -> Path:
        target = self.target(shard)
        if _is_plain(target):
            return target
        self.folder.mkdir(parents=True, exist_ok=True)
        part, failed = (target.with_name(f"{target.name}{ending}") for ending in (".part", FAILED))
        started = time.time()
        with FileLock(f"{target}.lock", timeout=timeout):
            if _is_plain(target):  # another process has downloaded it
                return target
            # Else dozens of workers would each retry a slow server.
            if _is_plain(failed) and started < _last_use(failed) < time.time() + FAILED_SECONDS:
                raise ShardError(failed.read_text(errors="replace"))
            while not self._reserve(part, self.sizes[shard]):
                time.sleep(WAIT_SECONDS)
            try:
                self._check_space(self.sizes[shard])
                self._request(shard, lambda store, path: get_file(store, path, part, self.sizes[shard]))
                self._check_size(shard, part.stat().st_size)
                with FileLock(self.folder / LOCK):  # so that counting sees exactly one of the two names
                    part.replace(target)
                failed.unlink(missing_ok=True)
            except ShardError as error:
                with suppress(OSError):  # a full disk
                    failed.unlink(missing_ok=True)  # as above
                    failed.write_text(str(error), errors="replace")
                raise
            finally:
                part.unlink(missing_ok=True)
        return target

    def _check_space(self, size: int) -> None:
        if (free := shutil.disk_usage(self.folder).free) < size:
            raise ShardError(
                f"the disk of {self.folder} has {free:,} bytes left, and the next shard takes {size:,}: make room or "
                "choose another folder with data.cache."
            )

    def _reserve(self, part: Path, size: int) -> bool:
        """Evicts shards to make room for a shard and reserves it; False while other downloads take the room."""
        with FileLock(self.folder / LOCK):
            # An existing part of this shard was left by a killed process, and will be overwritten.
            others = [path for path in _files(self.folder, f"{CACHED}.part") if path != part]
            coming = sum(_size(path) for path in others if self._is_alive(path))
            kept = list(_files(self.folder, CACHED))
            taken = coming + sum(map(_size, kept))
            for path in sorted(kept, key=_last_use):
                if taken + size <= self.limit:
                    break
                path.unlink(missing_ok=True)
                taken -= _size(path)
            if taken + size > self.limit:
                if not coming:
                    raise ShardError(
                        f"{part.stem} is larger than the cache, {self.limit:,} bytes: raise data.cache_gb."
                    )
                return False
            part.unlink(missing_ok=True)  # in a copied folder it may be a symbolic link
            part.touch()
            return True

    def _is_alive(self, part: Path) -> bool:
        """Whether a process is downloading this file; removes it if its process was killed."""
        try:
            with FileLock(f"{part.with_suffix('')}.lock", timeout=0):
                part.unlink(missing_ok=True)
            return False
        except Timeout:
            return True


def cached_bytes(folder: Path) -> int:
    """Returns the size of all shards in a cache, in bytes."""
    return sum(map(_size, _files(folder, CACHED)))


def remove_old_failures(folder: Path) -> None:
    """Removes from a cache what earlier runs have noted about failed downloads."""
    for path in _files(folder, f"{CACHED}{FAILED}"):
        if time.time() - _last_use(path) > FAILED_SECONDS:
            path.unlink(missing_ok=True)


def _files(folder: Path, ending: str) -> Iterator[Path]:
    """Yields the files of a cache with this ending; there may be others, of anyone."""
    for path in folder.glob(f"*{ending}"):
        if re.search(rf"\.[0-9a-f]{{12}}\.[0-9]{{1,18}}{re.escape(ending)}$", path.name) and not path.is_dir():
            yield path


def _size(path: Path) -> int:
    return int(path.name.removesuffix(".part").removesuffix(CACHED).rpartition(".")[2])


def _is_plain(path: Path) -> bool:
    """Whether it is a file, and not a pipe, or a symbolic link from a copied folder; those are replaced."""
    return path.is_file() and not path.is_symlink()


def _last_use(path: Path) -> float:
    try:
        return path.lstat().st_mtime
    except FileNotFoundError:
        return 0.0
