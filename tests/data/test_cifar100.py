import hashlib
import io
import os
import pickle
import tarfile
import threading

import numpy as np
import pytest
import torch
from helpers.servers import FileServer, running
from torchvision.datasets import CIFAR100

from rld_lightning.data import CIFAR100DataModule, cifar100

SIZES = {"train": 200, "test": 100}


def md5(content):
    return hashlib.md5(content).hexdigest()


def pixels_of(split):
    return np.random.default_rng(SIZES[split]).integers(256, size=(SIZES[split], 3072), dtype=np.uint8)


@pytest.fixture(scope="module")
def files():
    """Returns the three files of the data set, with few images."""
    contents = {
        split: pickle.dumps({"data": pixels_of(split), "fine_labels": [i % 100 for i in range(size)]}, protocol=2)
        for split, size in SIZES.items()
    }
    return contents | {"meta": pickle.dumps({"fine_label_names": cifar100.FINE_LABELS.split()}, protocol=2)}


@pytest.fixture
def archive(files, monkeypatch):
    """Returns the archive of these files, with its checksum in place of the published one's."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"cifar-100-python/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    monkeypatch.setattr(cifar100, "FILE_MD5", {name: md5(content) for name, content in files.items()})
    monkeypatch.setattr(cifar100, "ARCHIVE_MD5", md5(buffer.getvalue()))
    return buffer.getvalue()


@pytest.fixture
def server(archive):
    with running(FileServer(archive)) as server:
        yield server


@pytest.fixture
def forbid_unpickling(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("unpickled unchecked bytes")

    monkeypatch.setattr(cifar100.pickle, "loads", refuse)


def place(root, files):
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def names_in(root):
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


def test_downloads_and_reads(server, tmp_path):
    data = CIFAR100DataModule(tmp_path / "new", url=server.url, augment=False, shuffle=False)
    data.prepare_data()
    data.setup()

    assert data.describe().startswith("cifar100: 100 classes, 3x32x32, 200 train and 100 test images")
    batch = next(iter(data.train_dataloader()))
    images = pixels_of("train")[:64].reshape(-1, 3, 32, 32)
    mean, std = torch.tensor([data.mean, data.std]).view(2, 3, 1, 1)
    assert torch.equal(batch.images, (torch.from_numpy(images).float() / 255 - mean) / std)
    assert batch.label.tolist() == list(range(64))
    assert not [name for name in names_in(tmp_path) if name.endswith(".part")]


def test_layout_is_torchvisions(server, tmp_path, files, monkeypatch):
    CIFAR100DataModule(tmp_path, url=server.url).prepare_data()
    for attribute, names in (("train_list", ["train"]), ("test_list", ["test"])):
        monkeypatch.setattr(CIFAR100, attribute, [[name, md5(files[name])] for name in names])
    monkeypatch.setattr(CIFAR100, "meta", CIFAR100.meta | {"md5": md5(files["meta"])})
    theirs = CIFAR100(tmp_path, train=False)
    images, labels = CIFAR100DataModule(tmp_path).read_split(train=False)
    assert np.array_equal(images.numpy(), theirs.data)
    assert labels.tolist() == theirs.targets


def test_present_files_are_used_without_a_download_or_a_writable_root(tmp_path, files, archive):
    place(tmp_path, files)
    before = names_in(tmp_path)
    data = CIFAR100DataModule(tmp_path, url="http://127.0.0.1:9/unreachable")
    data.prepare_data()
    data.setup()
    assert names_in(tmp_path) == before


def test_archive_placed_by_hand_is_unpacked(tmp_path, archive):
    (tmp_path / "cifar-100-python.tar.gz").write_bytes(archive)
    data = CIFAR100DataModule(tmp_path, url="http://127.0.0.1:9/unreachable")
    data.prepare_data()
    data.setup()
    assert data.train_size == 200


def test_damaged_archive_placed_by_hand_is_refused(tmp_path, archive):
    (tmp_path / "cifar-100-python.tar.gz").write_bytes(archive[:-10])
    with pytest.raises(ValueError, match=r"cifar-100-python.tar.gz is damaged .* delete it and run again"):
        CIFAR100DataModule(tmp_path).prepare_data()


def test_truncated_download_is_reported_and_continued(server, tmp_path):
    data = CIFAR100DataModule(tmp_path, url=server.url)
    server.cut = 1000
    with pytest.raises(FileNotFoundError, match=rf"{server.url} to .*tar.gz failed: .* 1000 of .* place it at"):
        data.prepare_data()
    assert not (tmp_path / "cifar-100-python").exists()

    server.cut = None
    data.prepare_data()
    data.setup()
    assert server.requests == [None, "bytes=1000-"]


@pytest.mark.usefixtures("forbid_unpickling")
def test_wrong_download_is_discarded(server, tmp_path):
    server.content = b"<html>not found</html>"
    with pytest.raises(ValueError, match=rf"{server.url} has MD5 .* discarded.* place it at .*cifar-100-python.tar.gz"):
        CIFAR100DataModule(tmp_path, url=server.url).prepare_data()
    assert names_in(tmp_path) == [".cifar-100-python.lock"]


@pytest.mark.usefixtures("forbid_unpickling")
def test_unreachable_server_is_reported(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"http://127.0.0.1:9/x to .*refused.* place it at .*tar.gz"):
        CIFAR100DataModule(tmp_path, url="http://127.0.0.1:9/x").prepare_data()


@pytest.mark.usefixtures("forbid_unpickling")
def test_damaged_file_is_never_unpickled(tmp_path, files, archive):
    folder = place(tmp_path, files | {"train": files["train"] + b"."})
    data = CIFAR100DataModule(tmp_path)
    data.prepare_data()
    with pytest.raises(ValueError, match=rf"{folder / 'train'} is damaged \(MD5 .* delete it and run again"):
        data.setup()


def test_pipes_in_a_copied_folder_are_replaced(tmp_path, files, archive):
    folder = place(tmp_path, files)
    (folder / "train").unlink()
    os.mkfifo(folder / "train")
    (tmp_path / cifar100.ARCHIVE).write_bytes(archive)
    data = CIFAR100DataModule(tmp_path)
    data.prepare_data()
    assert (folder / "train").read_bytes() == files["train"]


def test_missing_files_without_download(tmp_path):
    data = CIFAR100DataModule(tmp_path, download=False)
    with pytest.raises(FileNotFoundError, match=r"data\.download=false: get https://.*, place it at .*tar.gz"):
        data.prepare_data()
    with pytest.raises(FileNotFoundError, match=r"train is missing: call prepare_data\(\)"):
        data.setup()
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match=r"file is not a folder: set data\.root to one"):
        CIFAR100DataModule(tmp_path / "file").prepare_data()


def test_two_processes_download_once(server, tmp_path):
    modules = [CIFAR100DataModule(tmp_path, url=server.url) for _ in range(3)]
    threads = [threading.Thread(target=module.prepare_data) for module in modules]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.requests == [None]


def test_constants():
    data = CIFAR100DataModule()
    assert len(set(data.class_names)) == data.num_classes == 100
    assert data.class_names == sorted(data.class_names)
    assert dict([*CIFAR100.train_list, *CIFAR100.test_list, ["meta", CIFAR100.meta["md5"]]]) == cifar100.FILE_MD5
    assert (CIFAR100.url, CIFAR100.tgz_md5) == (cifar100.URL, cifar100.ARCHIVE_MD5)
