"""Parallel, forked trials of a sweep give the same results as single runs."""

import json
import os
import subprocess
import sys

import pytest
from helpers.configs import CONF
from safetensors.torch import load_file
from torch.testing import assert_close

pytestmark = pytest.mark.slow

JOB = (
    "data=digits", "model=resnet8", "loss=ce", "recipe=quick", "recipe.epochs=1", "data.batch_size=128",
    "trainer=cpu", "trainer.precision=32-true", "data.val_fraction=0.1", "print_config=false",
)  # fmt: skip


def run(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(CONF.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "scripts/fit.py", *arguments]
    done = subprocess.run(command, cwd=CONF.parent, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_parallel_trials_equal_single_runs(tmp_path):
    values = ("0.01", "0.05")
    swept = f"recipe.optimizer.lr={','.join(values)}"
    run("-m", *JOB, swept, "launcher=joblib", "hydra.launcher.n_jobs=2", f"hydra.sweep.dir={tmp_path / 'sweep'}")
    run("-m", *JOB, swept, "hydra.callbacks.sweep.warm=false", f"hydra.sweep.dir={tmp_path / 'plain'}")
    for value in values:
        trial, plain = (tmp_path / kind / f"recipe.optimizer.lr={value}" for kind in ("sweep", "plain"))
        assert_close(load_file(trial / "student.safetensors"), load_file(plain / "student.safetensors"), rtol=0, atol=0)
        summaries = [json.loads((folder / "summary.json").read_text()) for folder in (trial, plain)]
        assert summaries[0]["top1"] == summaries[1]["top1"]
        assert sorted(path.name for path in trial.iterdir()) == sorted(path.name for path in plain.iterdir())
        assert "resnet8" in (trial / "trial.log").read_text()
