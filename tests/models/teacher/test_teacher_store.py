"""The store saves, finds and downloads teachers, and reports failures in one sentence."""

import argparse
import hashlib
import io
import os
import re
import shutil
import tarfile
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.servers import FileServer, running

from rld_lightning.models.factory import create_model
from rld_lightning.models.teacher import published_archive, teacher_store
from rld_lightning.models.teacher.published_archive import DownloadError
from rld_lightning.models.teacher.teacher_store import PUBLISHED, TeacherStore, resolve_teacher_weights
from rld_lightning.models.weights.read import WeightsError, read_metadata, read_weights
from rld_lightning.models.weights.save import save_weights
from rld_lightning.models.weights.verify import load_weights

NAMES = ("resnet8", "wrn_16_1")  # as the archive spells them
WAYS_OUT = ("model.teacher.weights=/path/to/file", "model.teacher.weights=published", "model.teacher.weights=fit")


@pytest.fixture(autouse=True)
def small_archive(monkeypatch):
    for module in (published_archive, teacher_store):
        monkeypatch.setattr(module, "PUBLISHED", {"resnet8": 60.19, "wrn_16_1": 67.01})
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def store(tmp_path):
    return TeacherStore(tmp_path / "teachers")


def member_name(name):
    return f"cifar_teachers/{name}_vanilla/ckpt_epoch_240.pth"


def checkpoint(name, seed=0, **extra):
    torch.manual_seed(seed)
    state_dict = create_model(name, 100).state_dict()
    return {"opt": argparse.Namespace(model=name), "model": state_dict, "accuracy": np.float64(72.3), **extra}


def pickled(content):
    torch.save(content, buffer := io.BytesIO(), _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def archive(**members):
    """Returns a tar file like the published one, with some members replaced, or omitted if None."""
    contents = {name: pickled(checkpoint(name)) for name in NAMES} | members
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.addfile(link := tarfile.TarInfo("cifar_teachers/evil"))
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        for name, content in contents.items():
            if content is not None:
                info = tarfile.TarInfo(member_name(name))
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def member_bytes(content, name):
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        return tar.extractfile(member_name(name)).read()


@pytest.fixture
def server():
    with running(FileServer(archive())) as server:
        yield server


def files(store):
    return sorted(str(path.relative_to(store.root)) for path in store.root.rglob("*") if path.is_file())


DONE = [
    "cifar100/.published.json",
    "cifar100/.published.lock",
    "cifar100/resnet8.safetensors",
    "cifar100/wrn16_1.safetensors",
]


def assert_downloaded(store, paths):
    assert files(store) == DONE, "nothing but the teachers is left"
    assert paths == [store.path("cifar100", name) for name in NAMES]
    for name, path in zip(NAMES, paths, strict=True):
        state_dict = read_weights(path).state_dict
        for key, value in checkpoint(name)["model"].items():
            assert torch.equal(state_dict[key], value), key


def test_published_names():
    assert set(PUBLISHED) == {"resnet56", "resnet110", "resnet32x4", "ResNet50", "wrn_40_2", "vgg13"}


def test_saves_and_finds(store):
    model = create_model("resnet8", 10)
    assert store.find("cifar10", "resnet8") is None
    path = store.save(model, "cifar10", "resnet8", {"num_classes": 10, "top1": 90.5, "epochs": 240})
    assert path == store.find("cifar10", "resnet8") == store.path("cifar10", "resnet8")
    assert path == store.root / "cifar10" / "resnet8.safetensors"
    assert load_weights(create_model("resnet8", 10), path).metadata == {
        "dataset": "cifar10",
        "name": "resnet8",
        "source": "fit",
        "num_classes": "10",
        "top1": "90.5",
        "epochs": "240",
    }


@pytest.mark.parametrize("name", ["wrn16_1", "wrn_16_1", "WRN-16-1"])
def test_a_teacher_is_found_in_any_spelling_of_its_name(store, server, name):
    old = store.root / "cifar100" / "wrn_16_1.safetensors"  # written by an earlier version
    save_weights(create_model("wrn16_1", 100), old, {"source": "fit"})
    assert store.find("cifar100", name) == resolve("auto", store, name) == old
    assert store.download_published(server.url) == [store.path("cifar100", "resnet8")]
    path = store.save(create_model("wrn16_1", 100), "cifar100", name, {})
    assert path == store.find("cifar100", name) == store.root / "cifar100" / "wrn16_1.safetensors"
    assert read_metadata(path)["name"] == "wrn16_1"


@pytest.mark.parametrize("name", ["torchvision/resnet8", "timm/ResNet8", "resnet_8x4", "other"])
def test_other_teachers_are_not_found(store, name):
    store.save(create_model("resnet8", 100), "cifar100", "resnet8", {})
    assert store.find("cifar100", name) is None


def test_a_run_s_file_is_stored_unchanged(store, tmp_path):
    file = tmp_path / "student.safetensors"
    for content in (b"one", b"another"):
        file.write_bytes(content)
        path = store.add(file, "cifar10", "resnet8")
        assert path == store.find("cifar10", "resnet8")
        assert path.read_bytes() == content
    assert [path] == list(path.parent.iterdir())


def test_download(store, server):
    assert_downloaded(store, store.download_published(server.url))
    assert read_metadata(store.path("cifar100", "resnet8")) == {
        "dataset": "cifar100",
        "name": "resnet8",
        "num_classes": "100",
        "top1": "60.19",
        "source": "published",
        "url": server.url,
        "archive_sha256": hashlib.sha256(server.content).hexdigest(),
        "member": member_name("resnet8"),
        "member_sha256": hashlib.sha256(member_bytes(server.content, "resnet8")).hexdigest(),
    }
    assert len(store.download_published(server.url)) == 2
    assert server.requests == [None], "what is there is not downloaded again"


def test_download_from_a_file(store, tmp_path):
    (path := tmp_path / "local.tar").write_bytes(archive())
    assert_downloaded(store, store.download_published(path.as_uri()))
    assert path.exists()


def test_an_interrupted_download_is_continued(store, server):
    server.cut = half = len(server.content) // 2
    with pytest.raises(DownloadError, match=f"broke off after {half} of {len(server.content)} bytes, run again"):
        store.download_published(server.url)
    server.cut = None
    assert_downloaded(store, store.download_published(server.url))
    assert server.requests == [None, f"bytes={half}-"]


def test_an_interrupted_download_restarts_if_the_server_cannot_continue(store, server):
    server.cut, server.ranges = 5000, False
    with pytest.raises(DownloadError, match="broke off"):
        store.download_published(server.url)
    server.cut = None
    assert_downloaded(store, store.download_published(server.url))


@pytest.mark.parametrize("surplus", [0, 10], ids=["complete", "too_long"])
def test_a_partial_file_that_is_already_complete(store, server, surplus):
    server.cut = 5000
    with pytest.raises(DownloadError):
        store.download_published(server.url)
    (partial,) = (store.root / "cifar100").glob("*.partial")
    partial.write_bytes(server.content + bytes(surplus))
    server.cut = None
    assert_downloaded(store, store.download_published(server.url))
    assert len(server.requests) == (3 if surplus else 2)


def test_concurrent_calls_download_once(store, server):
    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(lambda _: store.download_published(server.url), range(3)))
    for paths in results:
        assert_downloaded(store, paths)
    assert len(server.requests) == 1


class Exploit:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def with_nan():
    content = checkpoint("wrn_16_1")
    content["model"]["fc.bias"][3] = torch.nan
    return content


BAD_ARCHIVES = {
    "garbage": (lambda _: b"<html>please log in</html>" * 100, "is not the expected tar archive"),
    "empty": (lambda _: b"", "is not the expected tar archive"),
    "cut": (lambda _: archive()[:200_000], "is not the expected tar archive"),
    "missing": (lambda _: archive(wrn_16_1=None), f"lacks {member_name('wrn_16_1')}"),
    "damaged": (lambda _: archive(wrn_16_1=b"garbage"), "may be damaged"),
    "other_model": (lambda _: archive(wrn_16_1=pickled(checkpoint("resnet14"))), "looks like resnet14"),
    "other_classes": (
        lambda _: archive(wrn_16_1=pickled({"model": create_model("wrn_16_1", 10).state_dict()})),
        "the file has 10 classes, the model 100",
    ),
    "not_finite": (lambda _: archive(wrn_16_1=pickled(with_nan())), "not finite"),
    "malicious": (
        lambda marker: archive(wrn_16_1=pickled(checkpoint("wrn_16_1", extra=Exploit(marker)))),
        r"was refused: it wants to run or build '\w+\.system'",
    ),
}


def assert_names_another_way(message, url):
    others = [way for way in WAYS_OUT if way in message]
    assert url in message
    assert others == ["model.teacher.weights=/path/to/file", "model.teacher.weights=fit"]  # not what has just failed


@pytest.mark.parametrize("case", BAD_ARCHIVES)
def test_wrong_content_is_refused(store, server, tmp_path, case):
    build, expected = BAD_ARCHIVES[case]
    server.content = build(marker := tmp_path / "executed")
    with pytest.raises(DownloadError, match=expected) as caught:
        store.download_published(server.url)
    message = str(caught.value)
    assert_names_another_way(message, server.url)
    assert "\n" not in message
    assert not marker.exists()
    assert not list(store.root.rglob("*.partial")), "the next call must not meet the bad archive again"
    assert store.find("cifar100", "wrn_16_1") is None
    server.content = archive()
    assert_downloaded(store, store.download_published(server.url))


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://127.0.0.1:9/x.tar", "refused"),
        ("file:///no/such/file.tar", "No such file"),
        ("not an address", "unknown url type"),
    ],
)
def test_a_url_that_does_not_answer(store, url, reason):
    with pytest.raises(DownloadError, match=f"cannot be downloaded .*{reason}") as caught:
        store.download_published(url)
    assert_names_another_way(str(caught.value), url)


@pytest.mark.parametrize("status", [404, 503])
def test_an_http_error(store, server, status):
    server.status = status
    with pytest.raises(
        DownloadError, match=rf"{re.escape(server.url)} cannot be downloaded \(.*(Not Found|Unavailable)"
    ):
        store.download_published(server.url)


def test_a_teacher_trained_here_is_not_replaced(store, server):
    path = store.save(create_model("resnet8", 100), "cifar100", "resnet8", {"top1": 1.0})
    before = path.read_bytes()
    assert store.download_published(server.url) == [store.path("cifar100", "wrn_16_1")]
    assert path.read_bytes() == before


def test_another_archive_than_the_first_is_refused(store, server):
    store.download_published(server.url)
    path = store.path("cifar100", "resnet8")
    path.unlink()
    other = server.content = archive(resnet8=pickled(checkpoint("resnet8", seed=5)))
    with pytest.raises(DownloadError, match=r"is not the archive of the first download: .*remove that"):
        store.download_published(server.url)
    assert not path.exists()
    (store.root / "cifar100" / ".published.json").unlink()
    assert len(store.download_published(server.url)) == 2
    assert read_metadata(path)["archive_sha256"] == hashlib.sha256(other).hexdigest()


def test_a_known_checksum_of_a_member_is_verified(store, server, monkeypatch):
    monkeypatch.setattr(published_archive, "PUBLISHED_SHA256", {"wrn_16_1": "0" * 64})
    with pytest.raises(DownloadError, match=r"has the SHA-256 .*, not that of the published wrn_16_1"):
        store.download_published(server.url)
    known = hashlib.sha256(member_bytes(server.content, "wrn_16_1")).hexdigest()
    monkeypatch.setattr(published_archive, "PUBLISHED_SHA256", {"wrn_16_1": known})
    assert_downloaded(store, store.download_published(server.url))


def test_a_member_that_claims_too_much_is_not_read(store, server):
    """The member is sparse: one block of 512 bytes, and a size of a terabyte."""
    head = bytearray(tarfile.TarInfo(member_name("resnet8")).tobuf(tarfile.GNU_FORMAT))
    head[156:157] = tarfile.GNUTYPE_SPARSE
    head[124:136] = b"%011o\0" % 512
    head[386:410] = b"%011o\0" % 0 + b"%011o\0" % 512
    head[483:495] = b"\x80" + (1 << 40).to_bytes(11, "big")
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    server.content = bytes(head) + bytes(512) + archive(resnet8=None)
    with pytest.raises(DownloadError, match=r"claims 1,099,511,627,776 bytes"):
        store.download_published(server.url)


def test_teachers_that_do_not_fit_on_the_disk_are_not_stored(store, server, monkeypatch):
    usage, asked = shutil.disk_usage, []

    def filled(path):
        asked.append(path)
        return usage(path) if len(asked) == 1 else SimpleNamespace(free=1000)

    monkeypatch.setattr(shutil, "disk_usage", filled)
    with pytest.raises(DownloadError, match=r"has 1,000 bytes free, and the teachers in .* take"):
        store.download_published(server.url)


def resolve(spec, store, name="resnet8", dataset="cifar100", **kwargs):
    return resolve_teacher_weights(spec, name=name, dataset=dataset, store=store, **kwargs)


def test_resolve_a_path(store, tmp_path, monkeypatch):
    (path := tmp_path / "teacher.pth").touch()
    assert resolve(str(path), store) == path
    assert resolve(path, store) == path
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/teacher.pth", store) == path
    for wrong in (tmp_path / "gone.pth", tmp_path, "publisched"):
        with pytest.raises(FileNotFoundError, match="no teacher's weights file at") as caught:
            resolve(wrong, store)
        assert all(way in str(caught.value) for way in WAYS_OUT)


def test_resolve_published_and_auto_download_once(store, server):
    path = store.path("cifar100", "resnet8")
    assert resolve("published", store, url=server.url) == path
    assert resolve("published", store, url=server.url) == path
    assert resolve("auto", store, url=server.url) == path
    assert resolve("auto", store, "wrn_16_1", url=server.url) == store.path("cifar100", "wrn_16_1")
    assert len(server.requests) == 1


def test_resolve_prefers_the_store(store):
    path = store.save(create_model("resnet8", 100), "cifar100", "resnet8", {})
    assert resolve("auto", store, url="http://127.0.0.1:9/") == path
    assert resolve("fit", store) == path
    with pytest.raises(ValueError, match="trained here and is not replaced"):
        resolve("published", store, url="http://127.0.0.1:9/")


def test_resolve_fit_is_for_the_caller_to_train(store):
    assert resolve("fit", store, "any", "any") is None
    assert not store.root.exists()


@pytest.mark.parametrize("spec", ["auto", "published"])
@pytest.mark.parametrize(("name", "dataset"), [("resnet14", "cifar100"), ("resnet8", "cifar10")])
def test_resolve_names_the_ways_out(store, spec, name, dataset):
    with pytest.raises(ValueError, match=f"no published weights of {name} for {dataset}") as caught:
        resolve(spec, store, name, dataset)
    assert all(way in str(caught.value) for way in WAYS_OUT)
    assert not store.root.exists()


@pytest.mark.parametrize("spec", ["auto", "published"])
def test_resolve_names_the_ways_out_when_the_download_fails(store, spec):
    with pytest.raises(WeightsError, match=r"127\.0\.0\.1:9") as caught:
        resolve(spec, store, url="http://127.0.0.1:9/x.tar")
    assert_names_another_way(str(caught.value), "http://127.0.0.1:9/x.tar")
