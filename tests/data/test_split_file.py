"""A folder that grows or shrinks keeps the splits of its split file."""

import pytest
from helpers.photos import grow

from rld_lightning.data import ImageFolderDataModule
from rld_lightning.runs.files import SPLIT


def members(root, file, **options):
    data = ImageFolderDataModule(root, split_file=file, image_size=8, num_workers=0, **options)
    data.setup()
    return data, {name: [images.path(i) for i in range(len(images.labels))] for name, images in data.splits.items()}


@pytest.mark.parametrize("folders", [("",), ("train", "val")])
def test_random_splits_are_drawn_once(tmp_path, folders):
    root, file = tmp_path / "photos", tmp_path / "run" / SPLIT
    for folder in folders:
        grow(root / folder, ("cat", "dog"))
    _, drawn = members(root, file, val_fraction=0.2, seed=3)
    assert {name: len(paths) for name, paths in drawn.items()} == (
        {"train": 12, "test": 4, "val": 4} if len(folders) == 1 else {"train": 16, "test": 20, "val": 4}
    )
    assert file.read_text().splitlines()[0] == "split,image"
    written = file.read_bytes()
    data, again = members(root, file, val_fraction=0.2, seed=3)
    assert (again, file.read_bytes()) == (drawn, written)
    assert "shared out" not in data.describe()
    grow(root / folders[0], ("cat", "dog"), start=10)  # without the file, splits would be drawn again
    gone = drawn["train"].pop()
    (root / gone).unlink()
    data, grown = members(root, file, val_fraction=0.2, seed=4)
    assert grown == drawn
    assert data.describe().endswith(f"split as in {file}, 1 of them are missing, 20 new ones are ignored")
    # A subset of the training images does not change the splits.
    _, few = members(root, file, val_fraction=0.2, subset=0.5)
    assert len(few["train"]) < len(drawn["train"])
    assert few["test"] == drawn["test"]


def test_without_random_splits_no_file_is_written(tmp_path):
    for split in ("train", "val"):
        grow(tmp_path / split, ("cat", "dog"), count=1)
    members(tmp_path, tmp_path / SPLIT)
    assert not (tmp_path / SPLIT).exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "has other lines than split,image"),
        ("split,image\nelsewhere,cat/0.png\n", "has other lines"),
        ("split,image\ntrain,a,b\n", "has other lines"),
        ("split,image\ntrain,/etc/passwd\ntest,../../x\n", "has no train image that is in"),
        ('split,image\ntrain,"cat/000, a.png"\n', "has no test image that is in"),
        ('split,image\ntrain,"cat/000, a.png"\ntest,"cat/001, a.png"\n', "set data.val_fraction=0"),
    ],
)
def test_an_invalid_file_is_refused(tmp_path, content, words):
    grow(tmp_path / "photos", ("cat", "dog"), count=5)
    (tmp_path / SPLIT).write_text(content)
    with pytest.raises(ValueError, match=words):
        members(tmp_path / "photos", tmp_path / SPLIT, val_fraction=0.2)
