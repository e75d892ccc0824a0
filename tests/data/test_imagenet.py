"""ImageNet's folders and archives, with three classes instead of a thousand."""

import hashlib
import importlib.util
import io
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.data import merge, ready
from PIL import Image
from scipy.io import savemat
from torchvision.datasets import imagenet as torchvision_imagenet

from rld_lightning.data import ImageNetDataModule, imagenet

WNIDS = ["n01440764", "n02012849", "n03126707"]
NAMES = ["tench, Tinca tinca", "crane", "crane"]
# The devkit numbers classes in another order.
NUMBERS = {"n01440764": 3, "n02012849": 1, "n03126707": 2}
VAL_WNIDS = ["n02012849", "n01440764", "n03126707", "n02012849", "n01440764", "n03126707", "n01440764"]
TRAIN, VAL, DEVKIT = (torchvision_imagenet.ARCHIVE_META[name][0] for name in ("train", "val", "devkit"))


def jpeg(colour):
    file = io.BytesIO()
    Image.new("RGB", (20, 16), (colour, colour, 0)).save(file, "JPEG")
    return file.getvalue()


def write_tar(target, files, mode="w"):
    with tarfile.open(fileobj=target, mode=mode) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def tar_bytes(files, mode="w"):
    target = io.BytesIO()
    write_tar(target, files, mode)
    return target.getvalue()


def devkit():
    fields = ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children")
    rows = sorted((NUMBERS[wnid], wnid, name, "a thing", 0) for wnid, name in zip(WNIDS, NAMES, strict=True))
    rows.append((4, "n00000001", "entity", "not a leaf", 2))
    synsets = np.array(rows, dtype=[(field, object) for field in fields])
    meta = io.BytesIO()
    savemat(meta, {"synsets": synsets})
    truth = "".join(f"{NUMBERS[wnid]}\n" for wnid in VAL_WNIDS)
    folder = "ILSVRC2012_devkit_t12/data"
    files = {f"{folder}/meta.mat": meta.getvalue(), f"{folder}/ILSVRC2012_validation_ground_truth.txt": truth.encode()}
    return tar_bytes(files, "w:gz")


@pytest.fixture(scope="module")
def contents():
    """Returns the bytes of the three archives."""
    classes = {
        f"{wnid}.tar": tar_bytes({f"{wnid}_{number}.JPEG": jpeg(10 * number) for number in range(4)}) for wnid in WNIDS
    }
    images = {f"ILSVRC2012_val_{number:08d}.JPEG": jpeg(30 * number) for number in range(1, len(VAL_WNIDS) + 1)}
    return {TRAIN: tar_bytes(classes), VAL: tar_bytes(images), DEVKIT: devkit()}


@pytest.fixture
def root(contents, tmp_path, monkeypatch):
    """Writes the three archives, and replaces the published MD5s by theirs."""
    for name, (file, _) in list(torchvision_imagenet.ARCHIVE_META.items()):
        (tmp_path / file).write_bytes(contents[file])
        md5 = hashlib.md5(contents[file]).hexdigest()
        monkeypatch.setitem(torchvision_imagenet.ARCHIVE_META, name, (file, md5))
    return tmp_path


def data_at(root, **options):
    options = {"image_size": 8, "num_workers": 0, "batch_size": 6} | options
    return ready(ImageNetDataModule(root, **options))


def files_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_the_archives_are_unpacked(root):
    data = data_at(root)
    assert data.describe() == (
        "imagenet: 3 classes, 3x8x8, 12 train and 7 test images, validated on the test split, as the literature does"
    )
    assert data.splits["train"].class_names == WNIDS
    assert data.class_names == ["tench (n01440764)", "crane (n02012849)", "crane (n03126707)"]
    assert files_in(root / "train") == [f"{wnid}/{wnid}_{number}.JPEG" for wnid in WNIDS for number in range(4)]
    numbered = enumerate(VAL_WNIDS, 1)
    assert files_in(root / "val") == sorted(f"{wnid}/ILSVRC2012_val_{i:08d}.JPEG" for i, wnid in numbered)
    assert {path.name for path in root.iterdir()} - {".imagenet.lock"} == {
        TRAIN,
        VAL,
        DEVKIT,
        "train",
        "val",
        "meta.bin",
    }
    assert Counter(merge(data.test_dataloader()).label.tolist()) == {0: 3, 1: 2, 2: 2}


def test_classes_are_known_before_the_data_is_prepared(root):
    data = ImageNetDataModule(root)
    assert (data.num_classes, data.image_shape) == (3, (3, 224, 224))


def test_existing_folders_are_not_changed(root):
    data_at(root)
    for archive in (TRAIN, VAL, DEVKIT):
        (root / archive).unlink()
    (root / ".imagenet.lock").unlink(missing_ok=True)
    before = files_in(root)
    assert data_at(root).train_size == 12
    assert files_in(root) == before


def test_an_interrupted_unpacking_starts_over(root, monkeypatch):
    def stopped(*arguments, **options):
        torchvision_imagenet.parse_val_archive(*arguments, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(imagenet, "parse_val_archive", stopped)
        with pytest.raises(KeyboardInterrupt):
            data_at(root)
    assert not (root / "val").exists()
    (root / TRAIN).unlink()  # unpacked, so no longer needed
    assert data_at(root).test_size == 7
    assert not (root / ".val.part").exists()


def test_only_missing_archives_are_requested(root):
    data_at(root)
    (root / "train").rename(root / "kept")
    (root / VAL).unlink()
    (root / DEVKIT).unlink()
    assert data_at(root).train_size == 12


def test_without_a_devkit_class_names_are_the_folders_names(root):
    data_at(root)
    (root / "meta.bin").unlink()
    assert data_at(root).class_names == WNIDS


def test_the_thousand_classes_have_the_names_of_torchvision_s_models(root, monkeypatch):
    digest = hashlib.sha256("\n".join(WNIDS).encode()).hexdigest()
    monkeypatch.setattr(imagenet, "WNIDS_SHA256", digest)
    names = data_at(root).class_names
    assert (len(names), len(set(names)), names[0], names[134], names[517]) == (
        1000,
        1000,
        "tench",
        "crane bird",
        "crane",
    )


def test_the_thousand_classes_are_recognised():
    spec = importlib.util.find_spec("timm")  # importing it would take seconds
    if spec is None:
        pytest.skip("timm, which lists them, is not installed")
    wnids = (Path(spec.origin).parent / "data" / "_info" / "imagenet_synsets.txt").read_text().split()
    assert hashlib.sha256("\n".join(wnids).encode()).hexdigest() == imagenet.WNIDS_SHA256


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ([TRAIN], rf"has no train/ and no val/, nor {TRAIN} to unpack. Get .* at https://image-net.org"),
        ([DEVKIT, VAL], rf"has no train/ and no val/, nor {VAL} and {DEVKIT} to unpack"),
    ],
)
def test_missing_archives_are_named_before_anything_is_unpacked(root, missing, message):
    for archive in missing:
        (root / archive).unlink()
    with pytest.raises(FileNotFoundError, match=message):
        data_at(root)
    assert files_in(root) == sorted({TRAIN, VAL, DEVKIT} - set(missing))  # no lock file either
    assert not any(path.is_dir() for path in root.iterdir())


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere is not a folder: set data\.root to ImageNet's"):
        data_at(tmp_path / "nowhere")


@pytest.mark.parametrize("name", [TRAIN, VAL, DEVKIT])
def test_a_damaged_archive_is_refused(root, name):
    (root / name).write_bytes((root / name).read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"^{root / name} is damaged, its MD5 is not the published one: delete it"):
        data_at(root)
    assert not (root / ("train" if name == TRAIN else "val")).exists()


@pytest.mark.parametrize(
    "content",
    [
        None,
        5,
        ({"n01440764": ()}, VAL_WNIDS),
        ({"n01440764": (5,)}, VAL_WNIDS),
        ({"n01440764": ("a\x1b[2J",)}, VAL_WNIDS),
        ({wnid: (name,) for wnid, name in zip(WNIDS, NAMES, strict=True)}, ["../../elsewhere"] * 7),
    ],
)
def test_a_damaged_meta_file_is_refused(root, content):
    torch.save(content, root / "meta.bin")
    if content is None:
        (root / "meta.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=rf"meta.bin, which torchvision makes from {DEVKIT}, is damaged: delete it"):
        data_at(root)


def test_unsorted_validation_images_are_explained(root):
    (root / "val").mkdir()
    (root / "val" / "ILSVRC2012_val_00000001.JPEG").write_bytes(jpeg(3))
    with pytest.raises(ValueError, match=r"val has no class folders: sort its images .* or move it away"):
        data_at(root)


def test_a_disk_that_is_too_small_is_reported_before_unpacking(root, monkeypatch):
    monkeypatch.setattr(imagenet.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 5}))
    with pytest.raises(ValueError, match=rf"unpacking .*{TRAIN} takes 0 GB, and .* has 0 GB free"):
        data_at(root)


def test_a_subset_has_all_classes(root):
    data = data_at(root, subset=0.5, val_fraction=0.25)
    assert torch.bincount(data.train_label).tolist() in ([1, 1, 1], [2, 2, 2])
    assert (data.val_size, data.test_size) == (3, 7)
    assert "imagenet: 3 classes, 3x8x8, 6 train (subset 0.5) and 7 test images" in data.describe()
