"""The commands and the output files of the GPU check."""

import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rld_lightning.bench.evidence import gather
from rld_lightning.models import create_model
from rld_lightning.models.weights.save import save_weights
from tests.helpers.configs import compose
from tests.helpers.run_factory import write_run

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "gpu_check.sh"


def dry(tmp_path, **variables):
    """The commands of a check that only prints them."""
    variables = os.environ | {"DRY": "1", "STATE": str(tmp_path), "OUT": str(tmp_path / "out")} | variables
    printed = subprocess.run(["bash", SCRIPT], check=True, capture_output=True, text=True, env=variables).stdout
    return [words for words in map(shlex.split, printed.splitlines()) if "python3" in words[0]]


def trainings(commands):
    return [words[2:] for words in commands if words[1] == "scripts/fit.py"]


def test_every_training_of_the_check_composes(tmp_path):
    commands = trainings(dry(tmp_path, EPOCHS="24", TEACHER_EPOCHS="16"))
    assert len(commands) == 4
    found = [compose(*(o for o in words if not o.startswith("hydra.")), resolve=False) for words in commands]
    assert found[0].model.label == "wrn40_2"
    # rld alone, then two students at once, in any order.
    assert found[1].loss._target_.endswith("RLDLoss")
    assert sorted(cfg.model.label for cfg in found[2:]) == ["wrn16_2", "wrn40_2_to_wrn16_2"]
    assert [cfg.recipe.epochs for cfg in found] == [16, 24, 24, 24]
    assert [cfg.recipe.scheduler.milestones for cfg in found[:2]] == [[10, 12, 14], [15, 18, 21]]


def test_the_first_student_is_trained_as_in_the_literature_before_single_steps_are_timed(tmp_path):
    commands = dry(tmp_path)
    assert {"recipe.epochs=240", "recipe.warmup_epochs=20", "recipe.scheduler.milestones=[150,180,210]"} <= {
        *trainings(commands)[1]
    }
    scripts = [" ".join(words) for words in commands]
    first, fit, step = (
        next(n for n, words in enumerate(scripts) if part in words) for part in ("loss=rld", "bench-fit.json", " step")
    )
    assert first < fit < step


def test_a_check_can_skip_stages(tmp_path):
    skipped = "facts tests bench-step bench-overhead bench-loss bench-imagenet run-kd-0"
    commands = dry(tmp_path, SKIP=skipped)
    assert [words[1] for words in commands[:-1]] == [*["scripts/fit.py"] * 2, "scripts/bench.py", "scripts/fit.py"]
    assert "tests/end_to_end/test_gpu.py" in commands[-1]


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
