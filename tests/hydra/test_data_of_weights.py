"""The data of a weights file, before a config is composed."""

import shutil

import numpy as np
import pytest
import yaml
from helpers.configs import compose
from safetensors.numpy import save_file

from rld_lightning.errors import UserError
from rld_lightning.hydra.data_of_weights import data_of


@pytest.mark.parametrize(
    ("dataset", "options", "found"),
    [
        ("digits", (), ("data=digits",)),
        ("digits", ("data=cifar100",), ()),
        ("photos", (), ()),  # a folder, which the command has to name
        ("../digits", (), ()),
        (None, (), ()),
    ],
)
def test_the_data_of_an_export(tmp_path, dataset, options, found):
    path = tmp_path / "seed=1" / "student.safetensors"
    path.parent.mkdir()
    save_file({"w": np.zeros(1)}, path, metadata={"dataset": dataset} if dataset else None)
    assert data_of([f"weights='{path}'", *options]) == found
    for weights in (path, path.parent, f"{path}::student", path.with_name("last.ckpt")):
        assert data_of([f"weights={weights}", *options]) == found
    path.rename(path.with_name("model.safetensors"))  # an export
    assert data_of([f"weights={path.parent}", *options]) == found


def test_other_files_are_left_to_the_script(tmp_path):
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    for weights in ("broken.safetensors", "missing.safetensors", "last.ckpt"):
        assert data_of([f"weights={tmp_path / weights}"]) == ()
    assert data_of([]) == ()


@pytest.fixture
def folder_run(tmp_path):
    """Creates a run directory on a folder of images, with changed or added settings."""

    def write(target="ImageFolderDataModule", **settings):
        (tmp_path / "photos of=mine").mkdir(exist_ok=True)
        data = {"root": str(tmp_path / "photos of=mine"), "image_size": 24, "resize": None, "mean": [0.5, 0.25, 1e-3]}
        data |= {"split_file": "/etc/passwd", "bad_images_file": "/etc/passwd", "seed": 7, "batch_size": 3}
        data |= {"test_fraction": 0.3, "decode": "cuda"} | settings
        run = tmp_path / "runs" / "first"
        run.mkdir(parents=True, exist_ok=True)
        config = {"data": {"_target_": f"rld_lightning.data.{target}"} | data}
        (run / "config.yaml").write_text(yaml.safe_dump(config))
        save_file({"w": np.zeros(1)}, run / "student.safetensors", metadata={"dataset": "photos of=mine"})
        return run

    return write


def composed(run, *arguments):
    arguments = [f"weights='{run}'", *arguments]
    return compose(*data_of(arguments), *arguments, name="eval").data


def test_the_folder_and_image_size_of_a_run(folder_run, tmp_path):
    run = folder_run(name="flowers")
    (run / "split.csv").write_text("split,image\n")
    (run / "export").mkdir()
    for name in ("model.onnx", "model.safetensors", "export.json"):
        (run / "export" / name).write_bytes(b"")
    (run / "best.ckpt").write_bytes(b"")
    for weights in (run, run / "best.ckpt", run / "student.safetensors", run / "export", run / "export" / "model.onnx"):
        data = composed(weights)
        assert data._target_ == "rld_lightning.data.ImageFolderDataModule"
        assert data.root == str(tmp_path / "photos of=mine")
        assert (data.image_size, data.test_fraction, data.resize) == (24, 0.3, None)
        assert (data.name, list(data.mean)) == ("flowers", [0.5, 0.25, 0.001])
        assert data.split_file == str(run / "split.csv")
        assert data.bad_images_file.startswith("/run/")  # paths to write are not read from a run
        assert (data.decode, data.seed, data.val_fraction) == ("auto", None, None)
    data = composed(run, "data.root=elsewhere", "data.image_size=32")  # the command takes precedence
    assert (data.root, data.image_size, data.test_fraction) == ("elsewhere", 32, 0.3)
    assert data_of([f"weights='{run}'", "data=digits"]) == ()
    (run / "alone").mkdir()  # a student alone has the run's split
    for name in ("config.yaml", "student.safetensors"):
        shutil.copy(run / name, run / "alone")
    assert composed(run / "alone").split_file == str(run / "split.csv")


def test_missing_images_raise_with_a_hint(folder_run, tmp_path):
    run = folder_run(root=str(tmp_path / "gone"))
    with pytest.raises(
        UserError, match=r"first was trained on data\.root=.*gone, which is not a folder here; add data\."
    ):
        data_of([f"weights='{run}'"])
    assert composed(run, "data.root=/moved").root == "/moved"
    run = folder_run("ShardsDataModule", root="s3://bucket/name")
    with pytest.raises(UserError, match=r"in a store, s3://bucket/name, .* add data=shards data\.root=s3://bucket/"):
        data_of([f"weights='{run}'"])


def test_nothing_is_downloaded_to_a_runs_paths(folder_run, tmp_path):
    (tmp_path / "mine").mkdir()
    for target, option, inside in (
        ("CIFAR100DataModule", "cifar100", "cifar-100-python"),
        ("ImageNetDataModule", "imagenet", "val"),
    ):
        run = folder_run(target, root=str(tmp_path / "mine"))
        assert not [argument for argument in data_of([f"weights='{run}'"]) if argument.startswith("data.root=")]
        (tmp_path / "mine" / inside).mkdir()
        assert data_of([f"weights='{run}'"])[:2] == (f"data={option}", f"data.root={tmp_path / 'mine'}")


@pytest.mark.parametrize("value", [{"_target_": "os.system"}, [["x"]], ["${oc.env:HOME}"], "${oc.env:HOME}", "a${b}"])
def test_values_that_are_not_plain_raise(folder_run, value):
    with pytest.raises(UserError, match=r"config\.yaml says data\.mean=.*which no run writes"):
        data_of([f"weights='{folder_run(mean=value)}'"])


@pytest.mark.parametrize("config", ["[]", "data: 3", "data: {_target_: os.system}", "data: {_target_: [x]}", "{"])
def test_other_configs_are_ignored(folder_run, config):
    run = folder_run()
    (run / "config.yaml").write_text(config)
    assert data_of([f"weights='{run}'"]) == ()
