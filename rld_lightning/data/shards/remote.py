"""Files in local folders and object storage: ``s3://``, ``gs://`` and ``http://``."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import fsspec
from fsspec import AbstractFileSystem
from fsspec.asyn import AsyncFileSystem, sync
from fsspec.callbacks import Callback

from rld_lightning.atomic_files import write_whole
from rld_lightning.download import SLOWEST_BYTES_PER_SECOND, SpeedFloor

# fsspec supports more: some read any local file (`local`, `reference`), contain data (`data`) or wrap others with `::`.
# An address may come from an untrusted index.
SCHEMES = ("http", "https", "s3", "gs", "gcs", "memory")
# Timeout between bytes; there is none for a whole shard.
SILENCE_SECONDS = 60


def local_path(address: str) -> Path | None:
    """Returns the local path of a plain path or ``file://`` URL; ``None`` for other URLs."""
    if address.startswith("file://"):
        return Path(unquote(urlsplit(address).path))
    return None if "://" in address else Path(address).expanduser()


def join(root: str, path: str) -> str:
    """Resolves ``path``, which may be absolute, relative to ``root``."""
    if "://" in path or Path(path).is_absolute():
        return path
    return f"{root.rstrip('/')}/{path}"


def check_address(address: str) -> str:
    """Returns the scheme of a URL.

    Raises:
        ValueError: it is not one of ``SCHEMES``.
    """
    scheme = address.partition("://")[0].lower()
    if scheme not in SCHEMES or "::" in address:
        raise ValueError(
            f"{address} cannot be opened: addresses of shards are paths or begin with file://, http://, https://, "
            "s3:// or gs://."
        )
    return scheme


def open_store(address: str, options: dict[str, Any] | None = None) -> tuple[AbstractFileSystem, str]:
    """Returns the file system of a URL, and the path in it.

    Do not keep the file system: fsspec creates another one in a forked worker.

    Args:
        address: the URL.
        options: options of the file system, such as ``endpoint_url`` for S3.

    Raises:
        ImportError: the file system's package is not installed.
        ValueError: the URL's scheme is not one of ``SCHEMES``.
    """
    options, protocol = dict(options or {}), check_address(address)
    if protocol in ("http", "https"):
        import aiohttp  # here, as the import takes a tenth of a second

        # trust_env uses the environment's proxy, like curl.
        silence = aiohttp.ClientTimeout(total=None, sock_connect=SILENCE_SECONDS, sock_read=SILENCE_SECONDS)
        # No compression, since a few bytes may unpack to any number; a server that compresses anyway is not supported.
        ours = {"trust_env": True, "timeout": silence, "auto_decompress": False}
        given: dict[str, Any] = ours | dict(options.get("client_kwargs", {}))
        given["headers"] = {"Accept-Encoding": "identity"} | dict(given.get("headers", {}))
        options["client_kwargs"] = given
    try:
        return fsspec.url_to_fs(address, **options)
    except ImportError as error:
        raise ImportError(f"{protocol}:// needs another package: {error}") from error
    except ValueError as error:
        raise ValueError(f"{address} cannot be opened: {error}") from error


@contextmanager
def store_errors(address: str) -> Iterator[None]:
    """Converts the various errors of a storage to ``OSError`` with the URL, or ``FileNotFoundError``.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: any other error.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{address} is missing.") from error
    except Exception as error:
        why = f"{address} cannot be reached ({reason(error)}): check the address and the access to it."
        raise OSError(why) from error


def reason(error: BaseException) -> str:
    """Returns an error's message on one line, or its name if it has none."""
    unspoken = "no answer in time" if isinstance(error, TimeoutError) else type(error).__name__
    return " ".join(str(error).split()) or unspoken


class _Watch(Callback):
    """Aborts a transfer that is too slow or too long."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most
        self._floor = SpeedFloor()

    def relative_update(self, inc: int = 1) -> None:
        """Counts received bytes."""
        super().relative_update(inc)
        if self.value > self._most:
            raise ConnectionError(f"the server sends more than the expected {self._most:,} bytes")
        self._floor.add(inc)


def get_file(store: AbstractFileSystem, path: str, target: Path, most: int) -> None:
    """Downloads a file of at most ``most`` bytes.

    Raises:
        ConnectionError: it is longer, or the storage is slower than :class:`~rld_lightning.download.SpeedFloor` allows;
            storages raise other types too.
    """
    store.get_file(path, str(target), callback=_Watch(most))


def get_range(store: AbstractFileSystem, path: str, offset: int, size: int) -> bytes:
    """Reads ``size`` bytes of a file from ``offset`` on; may return more if the server sends more.

    Raises:
        TimeoutError: the storage is too slow; storages raise other types too.
    """
    timeout = SILENCE_SECONDS + size / SLOWEST_BYTES_PER_SECOND
    if path.startswith(("http://", "https://")):
        return sync(store.loop, _get_range, store, path, offset, size, timeout=timeout)
    patience = {"timeout": timeout} if isinstance(store, AsyncFileSystem) else {}
    return store.cat_file(path, start=offset, end=offset + size, **patience)


async def _get_range(store: Any, path: str, offset: int, size: int) -> bytes:
    """Replaces the file system's own function, which would keep everything that a server sends."""
    options = dict(store.kwargs)
    headers = {**options.pop("headers", {}), "Range": f"bytes={offset}-{offset + size - 1}"}
    session = await store.set_session()
    async with session.get(store.encode_url(path), headers=headers, **options) as answer:
        store._raise_not_found_for_status(answer, path)
        content = bytearray()
        async for part in answer.content.iter_chunked(1 << 20):
            content += part
            if len(content) > size:
                break
        return bytes(content)


def read_bytes(address: str, most: int, options: dict[str, Any] | None = None) -> bytes:
    """Reads a file of at most ``most`` bytes.

    Raises:
        FileNotFoundError: it does not exist.
        OSError: it is larger, is not a regular file, or cannot be read.
    """
    if (path := local_path(address)) is not None:
        if path.exists() and not (path.is_file() and path.stat().st_size <= most):
            raise OSError(f"{path} is not a file of at most {most:,} bytes.")
        return path.read_bytes()
    store, inner = open_store(address, options)
    with store_errors(address), tempfile.TemporaryDirectory() as folder:
        get_file(store, inner, Path(folder) / "file", most)
        return (Path(folder) / "file").read_bytes()


def write_bytes(address: str, content: bytes, options: dict[str, Any] | None = None) -> None:
    """Writes a small file."""
    if (path := local_path(address)) is not None:
        write_whole(path, content)
        return
    store, inner = open_store(address, options)
    with store_errors(address):
        store.pipe_file(inner, content)
