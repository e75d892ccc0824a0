"""The commands and the output files of the GPU check."""

import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rld_lightning.bench.evidence import epochs, gather
from rld_lightning.models import create_model
from rld_lightning.models.weights.save import save_weights
from tests.helpers.configs import compose
from tests.helpers.run_factory import write_run

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "gpu_check.sh"


def test_every_training_of_the_check_composes(tmp_path):
    (tmp_path / "epochs").write_text("24\n")  # as computed from the short trainings
    variables = os.environ | {"DRY": "1", "STATE": str(tmp_path), "OUT": str(tmp_path / "out"), "TEACHER_EPOCHS": "16"}
    printed = subprocess.run(["bash", SCRIPT], check=True, capture_output=True, text=True, env=variables).stdout
    commands = [shlex.split(line) for line in printed.splitlines() if "scripts/fit.py" in line]
    assert len(commands) == 6
    found = [compose(*(o for o in words[2:] if not o.startswith("hydra.")), resolve=False) for words in commands[1:]]
    assert [cfg.model.label for cfg in found[:2]] == ["wrn40_2_to_wrn16_2", "wrn40_2"]
    assert [cfg.trainer.max_steps for cfg in found] == [782, -1, -1, -1, -1]
    # rld alone, then two students at once, in any order.
    assert found[2].loss._target_.endswith("RLDLoss")
    assert sorted(cfg.model.label for cfg in found[3:]) == ["wrn16_2", "wrn40_2_to_wrn16_2"]
    assert [cfg.recipe.epochs for cfg in found[1:]] == [16, 24, 24, 24]
    assert [cfg.recipe.scheduler.milestones for cfg in found[1:3]] == [[10, 12, 14], [15, 18, 21]]


def test_a_check_can_skip_stages_and_measures_no_speed_for_given_epochs(tmp_path):
    variables = os.environ | {"DRY": "1", "STATE": str(tmp_path), "OUT": str(tmp_path / "out"), "EPOCHS": "240"}
    variables["SKIP"] = "facts tests bench-step bench-overhead bench-loss bench-imagenet run-kd-0"
    printed = subprocess.run(["bash", SCRIPT], check=True, capture_output=True, text=True, env=variables).stdout
    commands = [words for words in map(shlex.split, printed.splitlines()) if "python3" in words[0]]
    assert [words[1] for words in commands[:-1]] == ["scripts/bench.py", *["scripts/fit.py"] * 3]
    assert "tests/end_to_end/test_gpu.py" in commands[-1]


def test_trainings_fit_their_time(tmp_path):
    assert epochs(tmp_path, 600) == 64  # no speed was measured
    for name, speed in (("pace-teacher", 25_000), ("pace-student", 50_000)):
        write_run(tmp_path / "runs" / name, summary={"images_per_s": speed})
    assert epochs(tmp_path, 100) == 24  # 2 s for the teacher, and 2 s for students at half their speed
    assert epochs(tmp_path, 10_000) == 240
    assert epochs(tmp_path, 1) == 8


def test_results_are_collected_in_few_small_files(tmp_path):
    state, out = tmp_path / "state", tmp_path / "out"
    network = create_model("resnet8", 10)
    for name in ("teacher", "rld-0", "kd-0", "ce-0", "rld-1", "kd-1"):
        run = write_run(state / "runs" / name, epochs=2)
        save_weights(network, run / "student.safetensors", {"name": "resnet8"})
    (state / "runs" / "ce-1").mkdir()
    (state / "stages.txt").write_text("tests 1 20\nrun-teacher 0 300\n")
    (state / "log.txt").write_text("all done\n")
    gather(state, out)

    files = sorted(path.name for path in out.iterdir())
    assert len(files) == 8
    assert {"log.txt", "metrics.csv", "results.json", "teacher.safetensors"} < set(files)
    results = json.loads((out / "results.json").read_text())
    assert results["stages"][0] == {"name": "tests", "status": 1, "seconds": 20}
    assert results["runs"]["teacher"]["top1"] == pytest.approx(60)
    assert results["runs"]["ce-1"] == {"unfinished": False}
    assert len((out / "metrics.csv").read_text().splitlines()) == 1 + 6 * 2
    halves = load_file(out / "teacher.safetensors")
    assert {value.dtype for value in halves.values()} == {torch.float16, torch.int64}
    for key, value in network.state_dict().items():
        torch.testing.assert_close(halves[key].to(value.dtype), value, rtol=1e-3, atol=1e-6)
