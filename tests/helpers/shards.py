"""Folders of small JPEGs, their shards, and a server for the shards."""

from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

from helpers.data import ready, write_jpegs
from helpers.servers import running
from rld_lightning.data import ImageFolderDataModule, ShardsDataModule
from rld_lightning.data.shards.writer import pack

COUNTS = {"train": 15, "val": 6}
LOOK = {"image_size": 16, "resize": 18, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}


def write_images(root):
    write_jpegs(root, COUNTS, size=(30, 24), ending=".a b.JPEG")


def folder_data(root, rank=0, world_size=1, **options):
    options = {"batch_size": 6, "eval_batch_size": 4, "num_workers": 0} | options
    return ready(ImageFolderDataModule(root, **LOOK, name="pets", **options), rank, world_size)


def pack_folder(root, target, shard_mb=0.002, **options):
    """Packs a folder into shards of about four images."""
    data = folder_data(root)
    return pack(
        data.splits, str(target), name="pets", class_names=data.class_names, look=LOOK, shard_mb=shard_mb, **options
    )


def shards_data(root, rank=0, world_size=1, **options):
    options = {
        "batch_size": 6, "eval_batch_size": 4, "num_workers": 0, "streams": 2, "mixed_shards": 4,
    } | options  # fmt: skip
    return ready(ShardsDataModule(root, **options), rank, world_size)


class _Handler(SimpleHTTPRequestHandler):
    def do_GET(self):
        self.server.requested.append(self.path.rpartition("/")[2])
        super().do_GET()

    def log_message(self, *args):
        pass


@contextmanager
def serve(folder):
    """Serves a folder; yields its address and the names of the requested files."""
    with running(ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, directory=str(folder)))) as server:
        server.requested = []
        yield f"http://127.0.0.1:{server.server_port}", server.requested
