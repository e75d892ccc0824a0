"""Files in local folders and in stores: ``s3://``, ``gs://`` and ``http://``."""

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

# fsspec knows more: some read any local file (`local`, `reference`), make up content (`data`) or wrap others by `::`.
# An address may come from an index that a stranger wrote.
SCHEMES = ("http", "https", "s3", "gs", "gcs", "memory")
# Between bytes; a shard as a whole may take as long as it takes.
SILENCE_SECONDS = 60


def local_path(address: str) -> Path | None:
    """The local path that an address is or ``file://`` names, ``None`` for one of a store."""
    if address.startswith("file://"):
        return Path(unquote(urlsplit(address).path))
    return None if "://" in address else Path(address).expanduser()


def join(root: str, path: str) -> str:
    """The address of ``path``, which may be absolute, as seen from ``root``."""
    if "://" in path or Path(path).is_absolute():
        return path
    return f"{root.rstrip('/')}/{path}"


def open_store(address: str, options: dict[str, Any] | None = None) -> tuple[AbstractFileSystem, str]:
    """The file system of an address and the address's path in it.

    The file system must not be kept: fsspec makes another one in a forked worker.

    Args:
        address: what to open.
        options: options of the file system, such as ``endpoint_url`` for S3.

    Raises:
        ImportError: the file system's package is not installed.
        ValueError: the address is of another kind than ``SCHEMES``.
    """
    options = dict(options or {})
    protocol = address.partition("://")[0].lower()
    if protocol not in SCHEMES or "::" in address:
        raise ValueError(
            f"{address} cannot be opened: addresses of shards are paths or begin with file://, http://, https://, "
            "s3:// or gs://."
        )
    if protocol in ("http", "https"):
        import aiohttp  # a tenth of a second that only these addresses are worth

        # As curl does: through the proxy that the environment names.
        silence = aiohttp.ClientTimeout(total=None, sock_connect=SILENCE_SECONDS, sock_read=SILENCE_SECONDS)
        # Not packed: a few bytes may unpack to any number. A server that packs nevertheless is not understood.
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
    """Turns what a store raises, each its own kinds, into ``OSError`` with the address; a missing file stays one.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: something else went wrong.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{address} is missing.") from error
    except Exception as error:
        why = f"{address} cannot be reached ({reason(error)}): check the address and the access to it."
        raise OSError(why) from error


def reason(error: BaseException) -> str:
    """What an error says, on one line, or else its name."""
    unspoken = "no answer in time" if isinstance(error, TimeoutError) else type(error).__name__
    return " ".join(str(error).split()) or unspoken


class _Watch(Callback):
    """Ends a transfer that is too slow, or that goes on after its end."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most
        self._floor = SpeedFloor()

    def relative_update(self, inc: int = 1) -> None:
        """Counts bytes that were received."""
        super().relative_update(inc)
        if self.value > self._most:
            raise ConnectionError(f"the server sends more than the expected {self._most:,} bytes")
        self._floor.add(inc)


def get_file(store: AbstractFileSystem, path: str, target: Path, most: int) -> None:
    """Fetches a file of at most ``most`` bytes, and not too slowly.

    Raises:
        ConnectionError: it is longer, or the store is slower than :class:`~rld_lightning.download.SpeedFloor` allows;
            stores raise others.
    """
    store.get_file(path, str(target), callback=_Watch(most))


def get_range(store: AbstractFileSystem, path: str, offset: int, size: int) -> bytes:
    """The ``size`` bytes of a file from ``offset`` on, and more where the store sends more.

    Raises:
        TimeoutError: the store is too slow; stores raise others.
    """
    timeout = SILENCE_SECONDS + size / SLOWEST_BYTES_PER_SECOND
    if path.startswith(("http://", "https://")):
        return sync(store.loop, _get_range, store, path, offset, size, timeout=timeout)
    patience = {"timeout": timeout} if isinstance(store, AsyncFileSystem) else {}
    return store.cat_file(path, start=offset, end=offset + size, **patience)


async def _get_range(store: Any, path: str, offset: int, size: int) -> bytes:
    """As the file system's own, which would keep whatever a server sends."""
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
    """The content of a file of at most ``most`` bytes.

    Raises:
        FileNotFoundError: it is not there.
        OSError: the store does not give it for another reason, or it is larger, or none.
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
