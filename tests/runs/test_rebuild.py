"""A run directory, possibly foreign, yields only this package's data and losses, and no code is run."""

import sys
from dataclasses import replace

import pytest
import yaml
from helpers.run_factory import write_run

import rld_lightning.data
from rld_lightning.data import DigitsDataModule
from rld_lightning.losses import CombinedLoss, RLDLoss
from rld_lightning.losses.features import ATLoss
from rld_lightning.runs.finished import read_run
from rld_lightning.runs.rebuild import build_data, build_loss

PAYLOADS = [
    {"_target_": "sympy.sympify", "a": "print(1)"},
    {"_target_": "os.system", "command": "touch {marker}"},
    {"_target_": "posix.system", "command": "touch {marker}"},
    {"_target_": "subprocess.run", "args": ["touch", "{marker}"]},
    {"_target_": "builtins.eval", "_args_": ["open('{marker}', 'w')"]},
    {"_target_": "builtins.exec", "_args_": ["open('{marker}', 'w')"]},
    {"_target_": "torch.load", "f": "{marker}", "weights_only": False},
    {"_target_": "torch.hub.load", "repo_or_dir": ".", "model": "x", "source": "local"},
    {"_target_": "pandas.read_pickle", "filepath_or_buffer": "{marker}"},
    {"_target_": "joblib.load", "filename": "{marker}"},
    {"_target_": "numpy.load", "file": "{marker}", "allow_pickle": True},
    {"_target_": "shutil.copyfile", "src": "/etc/hostname", "dst": "{marker}"},
    {"_target_": "urllib.request.urlretrieve", "url": "file:///etc/hostname", "filename": "{marker}"},
    {"_target_": "pathlib.Path.touch", "self": "{marker}"},
    {"_target_": "hydra.utils.instantiate", "config": {"_target_": "os.getcwd"}},
    {"_target_": "rld_lightning.data.base.torch.load", "f": "{marker}"},
    {"_target_": "rld_lightning.data.os.system", "command": "touch {marker}"},
    {"_target_": "rld_lightning.losses.registry.import_module", "name": "antigravity"},
    {"_target_": "rld_lightning.losses.rld_loss"},
    {"_target_": "rld_lightning.losses.RLDLoss.__init__.__globals__"},
    {"_target_": "rld_lightning.data.DigitsDataModule", "_args_": ["{marker}"]},
    {"_target_": "rld_lightning.losses.RLDLoss", "_args_": [1.0]},
    {"_target_": "rld_lightning.losses.RLDLoss", "_partial_": True},
    {"_target_": ["os.system"]},
    {"_target_": None},
    {},
]
EVERYWHERE = [
    lambda payload: payload,
    lambda payload: {"_target_": "rld_lightning.data.DigitsDataModule", "image_size": payload},
    lambda payload: {"_target_": "rld_lightning.data.DigitsDataModule", "padding": [payload]},
    lambda payload: {"_target_": "rld_lightning.losses.RLDLoss", "alpha": payload},
    lambda payload: {"_target_": "rld_lightning.losses.RLDLoss", "mask": [{"deep": payload}]},
    lambda payload: {
        "_target_": "rld_lightning.losses.CombinedLoss",
        "rld": {"_target_": "rld_lightning.losses.RLDLoss", "temperature": payload},
        "at": {"_target_": "rld_lightning.losses.features.ATLoss"},
    },
    lambda payload: {
        "_target_": "rld_lightning.losses.CombinedLoss",
        "rld": {"_target_": "rld_lightning.losses.RLDLoss"},
        "at": payload,
    },
]


def run_with(folder, **parts):
    run = read_run(write_run(folder, "rld"))
    return replace(run, config=run.config | parts)


@pytest.mark.parametrize("place", range(len(EVERYWHERE)))
def test_nothing_named_in_a_directory_is_run(tmp_path, place):
    marker, before, run = tmp_path / "marker", set(sys.modules), run_with(tmp_path / "run")
    for payload in PAYLOADS:
        if not payload and place not in (0, 6):  # an empty mapping is a value, of which a class may say what it likes
            continue
        config = yaml.safe_load(yaml.safe_dump(EVERYWHERE[place](payload)).replace("{marker}", str(marker)))
        poisoned = replace(run, config=run.config | {"data": config, "loss": config})
        for build in (build_data, build_loss):
            with pytest.raises(ValueError, match=r"is not read|does not fit"):
                build(poisoned)
        assert not marker.exists(), payload
        assert not {"antigravity", "sympy"} & (set(sys.modules) - before), payload


@pytest.mark.parametrize("value", ["${oc.env:HOME}", "${oc.decode:x}", "a${b}", {1: 2}, {"_recursive_": False}])
def test_values_are_plain(tmp_path, value):
    config = {"_target_": "rld_lightning.losses.RLDLoss", "mask": value}
    with pytest.raises(ValueError, match=r"is not a plain value|which no run writes"):
        build_loss(run_with(tmp_path / "run", loss=config))


def test_message_names_directory_and_target(tmp_path):
    run = run_with(tmp_path / "run", loss={"_target_": "os.system", "command": "true"})
    with pytest.raises(ValueError, match=r"run is not read: its settings name 'os.system', .*nothing was run"):
        build_loss(run)


def test_own_classes_are_built_including_nested_ones(tmp_path):
    data = {"_target_": "rld_lightning.data.DigitsDataModule", "image_size": 8, "_convert_": "all"}
    loss = {
        "_target_": "rld_lightning.losses.CombinedLoss",
        "rld": {"_target_": "rld_lightning.losses.RLDLoss", "alpha": 3.0},
        "at": {"_target_": "rld_lightning.losses.features.ATLoss"},
        "weights": {"at": 0.5},
    }
    run = run_with(tmp_path / "run", data=data, loss=loss)
    assert isinstance(build_data(run), DigitsDataModule)
    built = build_loss(run)
    assert isinstance(built, CombinedLoss)
    assert isinstance(built.losses["rld"], RLDLoss)
    assert isinstance(built.losses["at"], ATLoss)
    assert (built.losses["rld"].alpha, built.weights["at"]) == (3.0, 0.5)
    assert build_loss(run, loss["rld"]).alpha == 3.0


def test_data_set_added_as_a_module_is_built(tmp_path, monkeypatch):
    folder = tmp_path / "added"
    folder.mkdir()
    (folder / "noise.py").write_text(
        "from rld_lightning.data import DigitsDataModule\n\n\nclass NoiseDataModule(DigitsDataModule): ...\n"
    )
    monkeypatch.setattr(rld_lightning.data, "__path__", [*rld_lightning.data.__path__, str(folder)])
    data = {"_target_": "rld_lightning.data.noise.NoiseDataModule", "image_size": 8}
    built = build_data(run_with(tmp_path / "run", data=data))
    assert type(built).__name__ == "NoiseDataModule"
    for name in ("DigitsDataModule", "Missing", "__name__"):  # what it has imported is not its own
        with pytest.raises(ValueError, match="not one of this package's data sets"):
            build_data(run_with(tmp_path / "run", data=data | {"_target_": f"rld_lightning.data.noise.{name}"}))
    monkeypatch.delitem(sys.modules, "rld_lightning.data.noise")
    monkeypatch.delattr(rld_lightning.data, "noise")


def test_data_are_downloaded_and_written_only_where_the_user_says(tmp_path):
    elsewhere = str(tmp_path / "elsewhere")
    places = {"root": elsewhere, "url": "http://127.0.0.1:9/x", "download": True, "cache": elsewhere}
    places |= {"bad_images_file": elsewhere, "storage_options": {"fo": "x"}}
    run = run_with(tmp_path / "run", data={"_target_": "rld_lightning.data.CIFAR100DataModule", **places})
    data = build_data(run)
    with pytest.raises(FileNotFoundError, match="CIFAR-100 is missing"):
        data.prepare_data()
    assert not (tmp_path / "elsewhere").exists()
    given = build_data(run, tmp_path / "given")
    assert (given.root, given.download) == (tmp_path / "given", True)
    assert "127.0.0.1" not in given.url
    imagenet = {"_target_": "rld_lightning.data.ImageNetDataModule", **places}
    with pytest.raises(
        FileNotFoundError, match=r"run was trained on the data in .*elsewhere, which is not a folder here"
    ):
        build_data(run_with(tmp_path / "run", data=imagenet))
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(FileNotFoundError, match=r"there is no val/ in .*; give the data's folder with root=<folder>"):
        build_data(run_with(tmp_path / "run", data=imagenet), option="root=")
    for root in ("reference://x", "s3://bucket/x", "simplecache::file://x"):
        shards = {"_target_": "rld_lightning.data.ShardsDataModule", **places, "root": root}
        with pytest.raises(ValueError, match="give another place with --data <folder>"):
            build_data(run_with(tmp_path / "run", data=shards))
