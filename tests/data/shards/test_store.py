"""Missing, truncated and remote shards, and the cache of remote ones."""

import hashlib
import json
import math
import os
import re
import shutil
import socket
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import fsspec
import numpy as np
import pytest
import torch
from filelock import FileLock
from helpers.data import epoch_of, merge, same
from helpers.servers import running
from helpers.shards import pack_folder, serve, shards_data, write_images

from rld_lightning import download
from rld_lightning.data.shards import remote
from rld_lightning.data.shards import store as shard_store
from rld_lightning.data.shards.remote import open_store
from rld_lightning.data.shards.store import LOCK, CachedShards, ShardError, cached_bytes

pytest.importorskip("webdataset")
GB = 1e-9


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """45 training images and 18 test images, about two per shard."""
    root = tmp_path_factory.mktemp("store")
    write_images(root / "images")
    pack_folder(root / "images", root / "shards", shard_mb=0.0008)
    return root / "shards"


@pytest.fixture
def shards(good, tmp_path):
    return shutil.copytree(good, tmp_path / "shards")


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(shard_store, "RETRY_SECONDS", 0.01)
    monkeypatch.setattr(shard_store, "WAIT_SECONDS", 0.01)


def cut_off(path):
    os.truncate(path, path.stat().st_size - 5000)


def test_damaged_shards_are_named_before_a_run(shards):
    third = shards / "train-000003.tar"
    cut_off(third)
    size = (shards / "train-000003.tar").stat().st_size
    message = f"{third} has {size:,} bytes instead of the {size + 5000:,} in the index, it was cut off: copy it again"
    with pytest.raises(ShardError, match=re.escape(message)):
        shards_data(shards)
    with third.open("ab") as file:
        file.write(bytes(10_000))
    with pytest.raises(
        ShardError, match=r"train-000003.tar has .* it is another file: copy it again, or make the index"
    ):
        shards_data(shards)
    third.unlink()
    with pytest.raises(ShardError, match=r"train-000003.tar, which the index lists, is missing"):
        shards_data(shards)


def with_another_pixel(root):
    """Changes a bit of the first training image's pixels in its shard."""
    samples = shards_data(root).splits["train"].samples
    path, at = root / "train-000000.tar", int(samples.offset[0] + samples.size[0] - 3)
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def without_checksums(root):
    """Rewrites an index as earlier versions wrote it."""
    with np.load(root / "index.npz") as arrays:
        kept = {name: values for name, values in arrays.items() if not name.endswith(".crc32")}
    assert len(kept) == 8
    np.savez_compressed(root / "index.npz", **kept)
    digest = hashlib.sha256((root / "index.npz").read_bytes()).hexdigest()
    change(root, lambda index: index["samples"].update(sha256=digest))


@pytest.mark.parametrize("place", ["folder", "cache"])
def test_an_image_whose_bytes_have_changed_is_not_trained_on(shards, tmp_path, place, caplog):
    with_another_pixel(shards)
    reason = "its shard, or the copy in the cache, has been damaged since it was indexed"
    with serve(shards) as (address, _):
        root = {"folder": shards, "cache": address}[place]
        images = merge(epoch_of(shards_data(root, cache=tmp_path).train_dataloader()))
        assert len(images.index) == 45
        assert 0 not in images.index
        assert f"({reason}): another image of its class takes its place" in caplog.text
        with pytest.raises(ValueError, match=rf"train-000000.tar/.* cannot be read as an image \({reason}\)"):
            epoch_of(shards_data(root, cache=tmp_path, bad_images="error").train_dataloader())
        without_checksums(shards)  # it decodes
        assert 0 in merge(epoch_of(shards_data(root, cache=tmp_path, bad_images="error").train_dataloader())).index


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_shard_truncated_during_a_run_is_named(shards, num_workers):
    data = shards_data(shards, num_workers=num_workers)
    for path in shards.glob("train-*.tar"):
        os.truncate(path, 1000)
    with pytest.raises(ShardError, match=rf"^{shards}/train-0000\d\d.tar ends early, it was cut off: copy it"):
        list(data.train_dataloader())
    for path in shards.glob("test-*.tar"):
        path.unlink()
    with pytest.raises(ShardError, match=r"test-0000\d\d.tar cannot be read \(No such file or directory\): copy it"):
        list(data.test_dataloader())


def test_shards_are_downloaded_once_for_all_processes(shards, tmp_path):
    with serve(shards) as (address, asked):
        alone = epoch_of(shards_data(shards).train_dataloader(), 1)
        ranks = [shards_data(address, rank, 2, cache=tmp_path / "cache") for rank in range(2)]
        epochs = [epoch_of(rank.train_dataloader(), 1) for rank in ranks]
        together = [merge(step) for step in zip(*epochs, strict=True)]
        assert same(together[:-1], alone[:-1])
        tars = [name for name in asked if name.endswith(".tar")]
        assert len(set(tars)) == len(tars) == len(list(shards.glob("train-*.tar")))
        assert same(epoch_of(shards_data(address, 0, 2, cache=tmp_path / "cache").train_dataloader(), 1), epochs[0])
        assert [name for name in asked if name.endswith(".tar")] == tars


@pytest.mark.thinned(3)
@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_cache_stays_within_its_limit(shards, tmp_path, num_workers):
    size = (shards / "train-000000.tar").stat().st_size
    expected = [epoch_of(shards_data(shards, streams=1, mixed_shards=2).train_dataloader(), epoch) for epoch in (0, 1)]
    limit = 12 * size
    with serve(shards) as (address, asked):
        data = shards_data(
            address, streams=1, mixed_shards=2, cache=tmp_path / "cache", cache_gb=limit * GB, num_workers=num_workers
        )
        loader = data.train_dataloader()
        for epoch in (0, 1):
            loader.sampler.set_epoch(epoch)
            for batch, right in zip(loader, expected[epoch], strict=True):
                assert torch.equal(batch.images, right.images)
                with FileLock(tmp_path / "cache" / LOCK):
                    assert sum(path.stat().st_size for path in (tmp_path / "cache").glob("*")) <= limit
                    assert cached_bytes(tmp_path / "cache") <= limit
        list(data.test_dataloader())
    assert len([name for name in asked if name.startswith("train")]) > len(list(shards.glob("train-*.tar")))


def test_a_cache_that_is_too_small_is_refused(shards, tmp_path):
    size = (shards / "train-000000.tar").stat().st_size
    with serve(shards) as (address, _):
        with pytest.raises(
            ShardError, match=r"data\.cache_gb=.* is too little: data\.mixed_shards=4 and those ahead .* take .* GB"
        ):
            shards_data(address, cache=tmp_path, cache_gb=10 * size * GB)
        with pytest.raises(ShardError, match=r"data\.mixed_shards=None"):
            shards_data(address, cache=tmp_path, cache_gb=20 * size * GB, mixed_shards=None)
        shards_data(address, cache=tmp_path, cache_gb=20 * size * GB)


def test_partial_files_of_killed_processes_are_removed_from_the_cache(shards, tmp_path):
    size = (shards / "train-000000.tar").stat().st_size
    with serve(shards) as (address, _):
        addresses = [f"{address}/train-{number:06d}.tar" for number in range(3)]
        store = CachedShards(addresses, [size] * 3, tmp_path, 2 * size)
        for shard in (1, 2):
            store.target(shard).with_name(f"{store.target(shard).name}.part").write_bytes(b"half")
        for shard in (0, 1, 2):
            assert store.read(shard, size - 100, 100).tolist() == [0] * 100
        assert {path for path in tmp_path.iterdir() if path.suffix in (".shard", ".part")} == {
            store.target(shard) for shard in (1, 2)
        }
        with pytest.raises(ShardError, match=r"larger than the cache"):
            CachedShards(addresses, [size] * 3, tmp_path / "small", size - 1).read(0, 0, 1)


@pytest.mark.parametrize("ending", ["", ".part", ".failed"])
@pytest.mark.parametrize("kind", ["link", "pipe", "file"])
def test_files_of_others_in_a_cache_are_neither_followed_nor_believed(shards, tmp_path, ending, kind):
    size = (shards / "train-000000.tar").stat().st_size
    (tmp_path / "precious").write_bytes(bytes(size))
    (tmp_path / "cache").mkdir()
    with serve(shards) as (address, _):
        store = CachedShards([f"{address}/train-000000.tar?signed={'x' * 300}"], [size], tmp_path / "cache", 2 * size)
        path = store.target(0).with_name(f"{store.target(0).name}{ending}")
        (tmp_path / "cache" / f"mine.shard{ending}").write_bytes(b"no shard")
        if kind == "link":
            path.symlink_to(tmp_path / "precious")
        elif kind == "pipe":
            os.mkfifo(path)
        elif ending:
            path.write_text("nonsense")
            os.utime(path, (2**32, 2**32))
        assert store.read(0, 0, 512).tolist() == list((shards / "train-000000.tar").read_bytes()[:512])
        assert cached_bytes(tmp_path / "cache") == size
    assert (tmp_path / "precious").read_bytes() == bytes(size)
    assert (tmp_path / "cache" / f"mine.shard{ending}").read_bytes() == b"no shard"


def test_a_cache_that_cannot_be_written_is_named(shards, tmp_path):
    size = (shards / "train-000000.tar").stat().st_size
    with serve(shards) as (address, _):
        store = CachedShards([f"{address}/train-000000.tar"], [size], tmp_path, size)
        store.target(0).mkdir()
        with pytest.raises(ShardError, match=rf"{tmp_path}/.* cannot be read or written .*, or choose another folder"):
            store.read(0, 0, 1)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_missing_or_truncated_shards_of_a_server_are_named(shards, tmp_path, num_workers):
    with serve(shards) as (address, _):
        data = shards_data(address, cache=tmp_path, num_workers=num_workers)
        (shards / "train-000004.tar").unlink()
        with pytest.raises(ShardError, match=f"^{address}/train-000004.tar, which the index lists, is missing"):
            list(data.train_dataloader())
        cut_off(shards / "test-000001.tar")
        with pytest.raises(ShardError, match=rf"{address}/test-000001.tar has .* bytes instead of .* it was cut off"):
            list(data.test_dataloader())
        (shards / "train-000000.tar").unlink()
        with pytest.raises(ShardError, match=r"train-000000.tar, which the index lists, is missing"):
            shards_data(address, cache=tmp_path)


def test_the_reason_of_a_failed_download_is_forgotten_by_later_runs(shards, tmp_path):
    with serve(shards) as (address, _):
        (shards / "test-000001.tar").rename(tmp_path / "moved")
        data = shards_data(address, cache=tmp_path / "cache")
        with pytest.raises(ShardError, match=r"test-000001.tar, which the index lists, is missing"):
            list(data.test_dataloader())
        (failed,) = (tmp_path / "cache").glob("*.failed")
        shards_data(address, cache=tmp_path / "cache")  # others may be waiting for the same shard
        assert failed.exists()
        os.utime(failed, (0, 0))
        shards_data(address, cache=tmp_path / "cache")
        assert not failed.exists()


def test_an_unreachable_storage_is_named(shards, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(
        OSError, match=rf"http://127.0.0.1:{port}/index.json cannot be reached \(.+\): check the address"
    ):
        shards_data(f"http://127.0.0.1:{port}")
    with serve(shards) as (address, _):
        data = shards_data(address, cache=tmp_path)
    with pytest.raises(ShardError, match=rf"{address}/train-.* cannot be fetched \(.*\): check the address"):
        list(data.train_dataloader())


def test_single_images_are_downloaded_without_a_cache(shards, tmp_path):
    store = fsspec.filesystem("memory")
    store.put(str(shards), "/pets", recursive=True)
    try:
        options = {"subset": 0.2, "cache_gb": 0, "cache": tmp_path / "none"}
        data = shards_data("memory://pets", **options)
        assert same(epoch_of(data.train_dataloader()), epoch_of(shards_data(shards, subset=0.2).train_dataloader()))
        assert not (tmp_path / "none").exists()
        store.pipe_file("/pets/train-000000.tar", b"short")
        with pytest.raises(ShardError, match=r"memory://pets/train-000000.tar has 5 bytes instead of"):
            shards_data("memory://pets", **options)
    finally:
        store.rm("/pets", recursive=True)


def test_a_server_without_ranges_cannot_serve_single_images(shards, tmp_path):
    with serve(shards) as (address, _):
        data = shards_data(address, cache=tmp_path, cache_gb=0)
        with pytest.raises(ShardError, match=r"sends whole files only: give data.cache_gb room for shards"):
            list(data.train_dataloader())


def test_an_unknown_url_scheme_is_refused():
    with pytest.raises(ValueError, match=r"carrier-pigeon://loft/index.json cannot be opened"):
        shards_data("carrier-pigeon://loft")


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    "address",
    [
        "local:///etc",
        "data://text/plain,x",
        "reference://x",
        "simplecache::file:///etc",
        "zip://x::file:///etc/x.zip",
        "http://host/a::file:///etc",
        "github://owner:repo@main/x",
        "ftp://host/x",
    ],
)
def test_file_systems_that_read_local_files_or_wrap_others_are_refused_in_one_sentence(shards, tmp_path, address):
    sentence = re.escape(": addresses of shards are paths or begin with file://, http://, https://, s3:// or gs://.")
    with pytest.raises(ValueError, match=rf"{re.escape(address)}/index.json cannot be opened{sentence}"):
        shards_data(address)
    with pytest.raises(ValueError, match=rf"^{re.escape(address)} cannot be opened{sentence}"):
        open_store(address)
    # Likewise for an index written by someone else.
    change(shards, lambda index: index["shards"]["train"][len(index["shards"]["train"]) // 2].update(path=address))
    with (
        serve(shards) as (server, _),
        pytest.raises(ValueError, match=f"{re.escape(address)} cannot be opened{sentence}"),
    ):
        shards_data(server, cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*"))


def change(shards, edit):
    """Edits ``index.json`` while ``index.npz`` stays valid."""
    index = json.loads((shards / "index.json").read_text())
    edit(index)
    (shards / "index.json").write_text(json.dumps(index))
    return shards


@pytest.mark.parametrize("place", ["/etc/passwd", "file:///etc/passwd", "{shards}/train-000000.tar"])
def test_a_remote_index_cannot_name_local_files(shards, tmp_path, place):
    place = place.format(shards=shards)
    change(shards, lambda index: [shard.update(path=place) for split in index["shards"].values() for shard in split])
    with serve(shards) as (address, asked):
        with pytest.raises(ValueError, match=rf"it is remote and names {place}, a local file"):
            shards_data(address, cache=tmp_path / "cache")
        assert asked == ["index.json"]
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda index: index["samples"].update(file="/etc/passwd"), "its samples are in '/etc/passwd' instead of"),
        (lambda index: index.update(name="../../x"), "'../../x' is not a valid name of a data set"),
        (lambda index: index.update(class_names=["a", "b", 3]), "its class names are not text"),
        (lambda index: index.update(class_names="abc"), "its class names are not text"),
        (
            lambda index: index["look"].update(image_size=10**6, resize=10**6),
            "its image_size is not a number of pixels",
        ),
        (lambda index: index["look"].update(image_size="9"), "its image_size is not a number of pixels"),
        (lambda index: index["look"].update(std=[0.2, 0.2, -1]), "its std is not three numbers"),
        (lambda index: index.update(class_names=["a", "b"]), "images of classes that it does not name"),
        (lambda index: index["look"].update(_target_="os.system"), "its look has '_target_', not one of image_size"),
        (lambda index: index["shards"]["train"][0].update(images=10**9), "hold .* images and 45 are listed"),
        (lambda index: index["shards"]["train"][0].update(images=-1), "has .* bytes and -1 images"),
        (lambda index: index["shards"]["train"][0].update(bytes="many"), "has 'many' bytes"),
        (lambda index: index["shards"]["train"][0].update(bytes=100), "it has train images outside their shards"),
        (lambda index: index["shards"]["train"][0].update(path={}), "the paths of its shards are not texts"),
        (lambda index: index["shards"]["train"][0].update(path="a\0b"), "the paths of its shards are not texts"),
        (lambda index: index["shards"]["train"][0].update(path="x" * 5000), "the paths of its shards are not texts"),
        (lambda index: index["shards"]["train"].insert(0, 5), "its values are of another kind"),
        (lambda index: index.update(shards="x"), "its values are of another kind"),
        (lambda index: index.update(look=[]), "its values are of another kind"),
        (lambda index: index.pop("samples"), "it has no 'samples'"),
        (lambda index: index.update(name="x" * 400), "is not a valid name of a data set"),
        (lambda index: index.update(class_names=["a", "b", "\ud800"]), "its class names are not text"),
        (lambda index: index["look"].update(std=[0.2, 0.2, 1e-300]), "its std is not three numbers"),
        (lambda index: index["look"].update(mean=[0, 0, math.inf]), "its mean is not three numbers"),
        (lambda index: index["look"].update(mean=[0, 0, 10**400]), "its mean is not three numbers"),
    ],
)
def test_an_invalid_index_is_refused(shards, edit, message):
    with pytest.raises(ValueError, match=rf"index.json is not an index of shards \(.*{message}.*\): make it again"):
        shards_data(change(shards, edit))


def test_a_shard_that_is_a_pipe_does_not_block(shards):
    path = shards / "train-000003.tar"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ShardError, match=r"train-000003.tar, which the index lists, is not a regular file"):
        shards_data(shards)


class _Endless(SimpleHTTPRequestHandler):
    """Sends more than announced, or slowly."""

    def do_GET(self):
        if not self.path.endswith(self.server.bad):
            super().do_GET()
            return
        self.send_response(200)
        if self.server.packed:
            self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        with suppress(OSError):
            while self.command != "HEAD":
                self.wfile.write(self.server.block)
                time.sleep(self.server.pause)

    def log_message(self, *args):
        pass


@contextmanager
def lying(folder, bad, block, pause, *, packed=False):
    with running(ThreadingHTTPServer(("127.0.0.1", 0), partial(_Endless, directory=str(folder)))) as server:
        server.bad, server.block, server.pause, server.packed = bad, block, pause, packed
        yield f"http://127.0.0.1:{server.server_port}"


def test_an_endless_shard_is_not_written_beyond_its_size(shards, tmp_path):
    size = (shards / "test-000000.tar").stat().st_size
    with lying(shards, "test-000000.tar", bytes(1 << 16), 0) as address:
        data = shards_data(address, cache=tmp_path / "cache")
        with pytest.raises(ShardError, match=rf"the server sends more than the expected {size:,} bytes"):
            list(data.test_dataloader())
    assert not list((tmp_path / "cache").glob("test-000000*.part"))  # others may be downloading


@pytest.mark.parametrize("bad", ["test-000000.tar", "index.json"])
def test_a_transfer_that_is_too_slow_is_aborted(shards, tmp_path, bad, monkeypatch):
    monkeypatch.setattr(download, "SLOW_SECONDS", 0.2)
    message = r"the server has sent \d+ bytes/s for \d s, less than the minimum of 10,000"
    with lying(shards, bad, b"x", 0.02) as address, pytest.raises(OSError, match=message):
        list(shards_data(address, cache=tmp_path / "cache").test_dataloader())


def test_processes_waiting_for_a_shard_get_the_error_of_its_download(tmp_path, monkeypatch):
    """Otherwise the last of eight workers on each of eight GPUs would report it after hours."""
    asked, locks, wait = [], [], threading.Event()

    def lock(path, **options):
        locks.append(str(path))
        return FileLock(path, **options)

    def refuse(*args):
        asked.append(args)
        wait.wait(60)
        raise ConnectionError("the server is slow")

    monkeypatch.setattr(shard_store, "get_file", refuse)
    monkeypatch.setattr(shard_store, "FileLock", lock)
    store = CachedShards(["memory://pets/train-000000.tar"], [10], tmp_path, 100)
    store.fetch(0)
    with ThreadPoolExecutor(4) as workers:
        waiting = [workers.submit(store.read, 0, 0, 1) for _ in range(4)]
        while not asked or locks.count(f"{store.target(0)}.lock") < 5:
            time.sleep(0.01)
        store.fetch(0)  # does not wait
        while locks.count(f"{store.target(0)}.lock") < 6:
            time.sleep(0.01)
        wait.set()
        for error in (one.exception() for one in waiting):
            assert isinstance(error, ShardError)
            assert "train-000000.tar cannot be fetched (the server is slow): check the address" in str(error)
    assert len(asked) == shard_store.ATTEMPTS
    with pytest.raises(ShardError, match="the server is slow"):
        store.read(0, 0, 1)
    assert len(asked) == 2 * shard_store.ATTEMPTS  # a later process tries again
    monkeypatch.setattr(shard_store, "get_file", lambda store, path, target, most: target.write_bytes(bytes(10)))
    assert store.read(0, 0, 1).tolist() == [0]
    assert {path.suffix for path in tmp_path.iterdir()} == {".shard", ".lock"}


@pytest.mark.parametrize("packed", [False, True])
def test_a_single_image_is_not_read_beyond_its_size(shards, packed):
    block = zlib.compress(bytes(1 << 22), wbits=31) if packed else bytes(1 << 16)
    message = "sends whole files only"
    with lying(shards, "test-000000.tar", block, 0, packed=packed) as address, pytest.raises(ShardError, match=message):
        list(shards_data(address, cache_gb=0).test_dataloader())


def test_waiting_for_a_single_image_is_limited(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "SILENCE_SECONDS", 0.1)
    with lying(shards, "test-000000.tar", b"x", 0.02) as address:
        data = shards_data(address, cache_gb=0)
        with pytest.raises(ShardError, match=r"test-000000.tar cannot be fetched \(no answer in time\)"):
            list(data.test_dataloader())


def test_a_disk_without_space_for_the_next_shard_is_named(shards, tmp_path, monkeypatch):
    with serve(shards) as (address, _):
        data = shards_data(address, cache=tmp_path / "cache")
        monkeypatch.setattr(shard_store.shutil, "disk_usage", lambda folder: SimpleNamespace(free=5000))
        with pytest.raises(ShardError, match=r"cache has 5,000 bytes left, and the next shard takes .*: make room or"):
            list(data.test_dataloader())
    for thread in threading.enumerate():
        if "_prefetch" in thread.name:
            thread.join(10)
    assert not list((tmp_path / "cache").glob("*.part"))


def test_a_missing_or_invalid_index_is_named(shards, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=f"{tmp_path}/index.json does not exist: set data.root to .* scripts/shards.py"
    ):
        shards_data(tmp_path)
    index = shards / "index.json"
    text = index.read_text()
    for content, message in (
        ("{}", r"is not an index of shards \(.*format.*\): make it again"),
        (text[:100], "is not an index of shards"),
        (text.replace("shards 1", "shards 9"), "its format is 'rld-lightning shards 9'"),
        (text.replace('"test": [', '"tests": ['), "is not an index of shards"),
    ):
        index.write_text(content)
        with pytest.raises(ValueError, match=message):
            shards_data(shards)
    index.write_text(text)
    with Path(shards / "index.npz").open("ab") as file:
        file.write(b"more")
    with pytest.raises(ValueError, match=r"index.npz beside it belongs to another index"):
        shards_data(shards)
