"""Which files named in a checkpoint a resumed run accepts."""

import shutil
from pathlib import Path

import pytest
import torch
from helpers.configs import compose
from helpers.training import job, quiet_trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from rld_lightning.callbacks import OwnCheckpoints
from rld_lightning.callbacks.own_checkpoints import _restricted_state
from rld_lightning.data import DigitsDataModule


def best(folder, **options):
    """Returns the callback of ``best.ckpt``."""
    options = {"filename": "best", "enable_version_counter": False, "save_weights_only": True} | options
    return ModelCheckpoint(folder, monitor="val/top1", mode="max", **options)


def fit(folder, epochs, resume=None, watched=None):
    """Trains in a directory and returns the callback of its best epochs."""
    watched = watched or best(folder)
    last = ModelCheckpoint(folder, filename="last", enable_version_counter=False)
    trainer = quiet_trainer(OwnCheckpoints(), watched, last, max_epochs=epochs, limit_train_batches=2)
    trainer.fit(job(), DigitsDataModule(batch_size=16), ckpt_path=resume, weights_only=True)
    return watched


def rewrite(path, change):
    """Modifies the states of the two callbacks in a checkpoint."""
    checkpoint = torch.load(path, weights_only=True)
    for state in checkpoint["callbacks"].values():
        change(state)
    torch.save(checkpoint, path)


def scores(callback):
    return {path.rpartition("/")[2]: float(score) for path, score in callback.best_k_models.items()}


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """Returns a run of one epoch, and its best callback."""
    folder = tmp_path_factory.mktemp("first")
    return folder, fit(folder, 1)


@pytest.mark.parametrize("copied", [True, False])
@pytest.mark.parametrize("score", [101.0, 0.0])
def test_best_epoch_is_copied_with_its_score(first, tmp_path, copied, score):
    folder = shutil.copytree(first[0], tmp_path / "before")
    rewrite(folder / "last.ckpt", lambda state: state.update(best_k_models={"/gone/best.ckpt": torch.tensor(score)}))
    if not copied:
        (folder / "best.ckpt").unlink()
    after = fit(tmp_path / "after", 2, resume=folder / "last.ckpt")
    stays = copied and score > 100
    assert after.best_model_path == str(tmp_path / "after" / "best.ckpt")
    assert bool(after.best_model_score == score) is stays
    saved = torch.load(after.best_model_path, weights_only=True)["epoch"]
    assert saved == (0 if stays else 1)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize(
    "form", ["local://{victim}", "file://{victim}", "{victim}", "{run}/../victim", "{run}/../victim/best.ckpt"]
)
def test_nothing_outside_the_directory_is_deleted_or_copied(first, tmp_path, form, moved):
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "best.ckpt").write_text("secret")
    before = shutil.copytree(first[0], tmp_path / "before")
    run = tmp_path / "after" if moved else before
    path = form.format(victim=victim, run=run)

    def poison(state):
        keys = ("best_model_path", "kth_best_model_path", "last_model_path")
        state |= dict.fromkeys(keys, path) | {"best_k_models": {path: torch.tensor(0.0)}, "dirpath": str(run)}
        state |= {"kth_value": torch.tensor(0.0), "best_model_score": torch.tensor(0.0)}

    rewrite(before / "last.ckpt", poison)
    after = fit(run, 2, resume=before / "last.ckpt")
    assert (victim / "best.ckpt").read_text() == "secret"
    assert sorted(path.name for path in run.iterdir()) == ["best.ckpt", "last.ckpt"]
    assert set(after.best_k_models) == {str(run / "best.ckpt")}
    assert torch.load(run / "best.ckpt", weights_only=True)["state_dict"]


def test_invalid_paths_and_scores_are_ignored():
    for state in ({}, {"best_k_models": [3]}, {"best_k_models": {3: 1}, "last_model_path": 4, "best_model_path": []}):
        assert _restricted_state(best("folder"), state, Path("elsewhere"))["best_k_models"] == {}


@pytest.mark.parametrize("name", ["metrics.csv", "student.safetensors", "last.ckpt", "best.ckpt.bak"])
def test_files_that_the_callback_does_not_write_are_not_accepted(first, tmp_path, name):
    run = shutil.copytree(first[0], tmp_path / "run")
    (run / "best.ckpt").unlink()
    if name != "last.ckpt":
        (run / name).write_text("kept")
    path = str(run / name)
    known = {"best_model_path": path, "kth_best_model_path": path, "best_k_models": {path: torch.tensor(0.0)}}
    rewrite(run / "last.ckpt", lambda state: state.update(known))
    fit(run, 2, resume=run / "last.ckpt")
    assert (run / name).exists()


def test_links_are_not_followed(first, tmp_path):
    before = shutil.copytree(first[0], tmp_path / "before")
    (tmp_path / "secret").write_text("secret")
    (before / "best.ckpt").unlink()
    (before / "best.ckpt").symlink_to(tmp_path / "secret")
    after = fit(tmp_path / "after", 1, resume=before / "last.ckpt")  # no epoch is left
    assert not (tmp_path / "after" / "best.ckpt").exists()
    assert after.best_model_path == ""


def test_best_of_several_keep_their_scores(tmp_path):
    options = {"filename": "{epoch}", "save_top_k": 2}
    before = fit(tmp_path, 3, watched=best(tmp_path, **options))
    known = scores(before)
    assert len(known) == 2
    after = fit(tmp_path, 3, resume=tmp_path / "last.ckpt", watched=best(tmp_path, **options))
    assert scores(after) == known
    assert after.best_model_path == before.best_model_path
    assert after.kth_best_model_path == before.kth_best_model_path
    assert after.kth_value == before.kth_value
    fit(tmp_path, 4, resume=tmp_path / "last.ckpt", watched=best(tmp_path, **options))
    assert len(list(tmp_path.glob("epoch=*.ckpt"))) == 2


def test_every_run_has_the_callback():
    targets = [callback["_target_"] for callback in compose().callbacks.values()]
    assert "rld_lightning.callbacks.OwnCheckpoints" in targets
