"""scripts/shards.py: packs a folder into shards, and indexes existing shards."""

from functools import partial

import pytest
from helpers.configs import compose
from hydra.utils import instantiate
from PIL import Image

from rld_lightning.errors import UserError
from rld_lightning.hydra.checks.values import check_values
from rld_lightning.tasks.shards import make_shards

pytest.importorskip("webdataset")
pack_options = partial(compose, name="shards", resolve=False)


@pytest.fixture
def photos(tmp_path):
    for split, count in (("train", 4), ("val", 2)):
        for number, name in enumerate(("n01", "n02")):
            (tmp_path / "photos" / split / name).mkdir(parents=True)
            for shade in range(count):
                image = Image.new("RGB", (20, 30), (50 * shade, 200 * number, 0))
                image.save(tmp_path / "photos" / split / name / f"{shade}.jpg")
    return tmp_path / "photos"


def test_packed_data_can_be_trained_on(photos, tmp_path, capsys):
    out = tmp_path / "shards"
    make_shards(pack_options(f"data.root={photos}", f"out={out}", "data.image_size=16"))
    printed = capsys.readouterr().out
    assert "8 images in 1 shards" in printed
    assert f"data=shards data.root={out}" in printed
    data = instantiate(compose("data=shards", f"data.root={out}", resolve=False).data)
    data.setup()
    assert data.describe().startswith("photos: 2 classes, 3x16x16, 8 train and 4 test images")
    assert data.class_names == ["n01", "n02"]
    with pytest.raises(UserError, match="holds shards already"):
        make_shards(pack_options(f"data.root={photos}", f"out={out}"))


def test_existing_shards_are_indexed(photos, tmp_path):
    make_shards(pack_options(f"data.root={photos}", f"out={tmp_path / 'shards'}"))
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    patterns = [f'index.{split}="{tmp_path}/shards/{split}-{{000000..000000}}.tar"' for split in ("train", "test")]
    make_shards(pack_options(*patterns, f"index.class_names={tmp_path}/names.txt", f"out={tmp_path / 'index'}"))
    data = instantiate(compose("data=shards", f"data.root={tmp_path / 'index'}", resolve=False).data)
    data.setup()
    assert (data.name, data.class_names, data.image_shape) == ("index", ["cat", "dog"], (3, 224, 224))
    with pytest.raises(UserError, match=r"index.test has no value; say where the shards of both"):
        make_shards(pack_options(patterns[0], f"out={tmp_path / 'more'}"))
    check_values(pack_options(*patterns, f"out={tmp_path / 'more'}"))  # the data are not asked for
    with pytest.raises(UserError, match=r"data\.root has no value; add"):
        check_values(pack_options(f"out={tmp_path / 'more'}"))
    with pytest.raises(UserError, match=r"no file at /gone, which index\.class_names names"):
        make_shards(pack_options(*patterns, "index.class_names=/gone", f"out={tmp_path / 'more'}"))


def test_mistakes_are_one_sentence(photos, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="digits fits the device and is not packed"):
        make_shards(pack_options("data=digits", f"out={tmp_path}"))
    with pytest.raises(UserError, match=r"index\.name=mine is for existing shards: name them with index\.train"):
        make_shards(pack_options(f"data.root={photos}", "index.name=mine", f"out={tmp_path / 'named'}"))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file is not a folder; choose another one with out="):
        make_shards(pack_options(f"data.root={photos}", f"out={tmp_path / 'file'}"))
    with pytest.raises(UserError, match=r"out has no value; add out=... to the command"):
        make_shards(pack_options(f"data.root={photos}"))
    (photos / "train" / "n01" / "0.jpg").unlink()
    (photos / "train" / "n01" / "0.jpg").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match=r"n01/0.jpg"):
        make_shards(pack_options(f"data.root={photos}", f"out={tmp_path / 'broken'}"))
    assert not (tmp_path / "broken" / "index.json").exists()
    monkeypatch.setitem(__import__("sys").modules, "webdataset.writer", None)
    with pytest.raises(UserError, match=r"packing shards needs the package webdataset: pip install 'rld-"):
        make_shards(pack_options(f"data.root={photos}", f"out={tmp_path / 'without'}"))
