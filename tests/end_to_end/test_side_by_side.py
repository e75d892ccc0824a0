"""Parallel, forked trials of a sweep give the same results as single runs."""

import json

import pytest
from helpers.scripts import run_script
from safetensors.torch import load_file
from torch.testing import assert_close

pytestmark = pytest.mark.slow

JOB = (
    "data=digits", "model=resnet8", "loss=ce", "recipe=quick", "recipe.epochs=1", "data.batch_size=128",
    "trainer=cpu", "trainer.precision=32-true", "data.val_fraction=0.1", "print_config=false",
)  # fmt: skip


def test_parallel_trials_equal_single_runs(tmp_path):
    values = ("0.01", "0.05")
    swept = (*JOB, f"recipe.optimizer.lr={','.join(values)}")
    beside = ("launcher=joblib", "hydra.launcher.n_jobs=2", f"hydra.sweep.dir={tmp_path / 'sweep'}")
    run_script("fit.py", "-m", *swept, *beside, folder=tmp_path)
    alone = ("hydra.callbacks.sweep.warm=false", f"hydra.sweep.dir={tmp_path / 'plain'}")
    run_script("fit.py", "-m", *swept, *alone, folder=tmp_path)
    for value in values:
        trial, plain = (tmp_path / kind / f"recipe.optimizer.lr={value}" for kind in ("sweep", "plain"))
        assert_close(load_file(trial / "student.safetensors"), load_file(plain / "student.safetensors"), rtol=0, atol=0)
        summaries = [json.loads((folder / "summary.json").read_text()) for folder in (trial, plain)]
        assert summaries[0]["top1"] == summaries[1]["top1"]
        assert sorted(path.name for path in trial.iterdir()) == sorted(path.name for path in plain.iterdir())
        assert "resnet8" in (trial / "trial.log").read_text()
