"""A teacher sharded over the processes gives the same student as the whole teacher."""

import json

import pytest
import torch
from helpers.scripts import run_script
from safetensors.torch import load_file

from rld_lightning.models import create_model

PAIR = ("data=digits", "model=pair", "model.teacher.name=wrn16_1", "model.student.name=resnet8", "loss=[rld,at]")


def fit(folder, shard):
    run = folder / f"shard-{shard}"
    options = (f"model.teacher.weights={folder / 'teacher.pth'}", f"model.teacher.shard={shard}", f"paths.run={run}")
    short = ("recipe=quick", "recipe.epochs=1", "trainer=ddp_cpu", "trainer.precision=32-true", f"hydra.run.dir={run}")
    done = run_script("fit.py", *PAIR, *options, *short, folder=folder)
    return run, json.loads((run / "summary.json").read_text()), done.stdout


@pytest.mark.slow
def test_a_sharded_teacher_gives_the_same_student(tmp_path):
    torch.save(create_model("wrn16_1", 10).state_dict(), tmp_path / "teacher.pth")
    whole_run, whole, _ = fit(tmp_path, "false")
    shared_run, shared, said = fit(tmp_path, "true")
    assert "shared out over 2 processes" in said
    student, expected = (load_file(run / "student.safetensors") for run in (shared_run, whole_run))
    for key, value in expected.items():
        torch.testing.assert_close(student[key], value, rtol=1e-4, atol=1e-5)
    assert (shared["teacher_top1"], shared["agreement"]) == (whole["teacher_top1"], whole["agreement"])
    checkpoint = torch.load(shared_run / "last.ckpt", weights_only=True)
    assert all(key.startswith("student.") for key in checkpoint["state_dict"])
