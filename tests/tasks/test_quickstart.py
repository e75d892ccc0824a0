"""The quickstart and the bench as functions."""

import hydra
import pytest
import torch
from helpers.configs import CONF, compose
from hydra._internal.callbacks import Callbacks

from rld_lightning.bench import steps as bench
from rld_lightning.tasks.quickstart import NO_SWEEP, quickstart


def test_quickstart_compares_teacher_student_and_distilled_student(tmp_path, capsys):
    options = ("experiment=quickstart", "recipe.epochs=1", "loss=dkd", "callbacks.progress=null")
    cfg = compose(*options, resolve=False)
    cfg.paths.run, cfg.paths.teachers, cfg.print_config = str(tmp_path / "run"), str(tmp_path / "teachers"), False

    quickstart(cfg)

    output = capsys.readouterr().out
    for row in ("│ teacher ", "│ student, cross-entropy ", "│ student, DKD "):
        assert row in output
    assert (tmp_path / "teachers" / "digits" / "wrn16_2.safetensors").exists()
    assert (tmp_path / "run" / "distilled" / "curves.png").exists()
    assert (tmp_path / "run" / "alone" / "student.safetensors").exists()


@pytest.mark.parametrize("command", [["seed=1"], ["sweep=rld_grid"]])
def test_quickstart_is_no_sweep_and_says_so_before_anything_runs(command, capsys):
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        config = hydra.compose("fit", ["experiment=quickstart", NO_SWEEP, *command], return_hydra_config=True)
    with pytest.raises(SystemExit, match="2"):
        Callbacks(config).on_multirun_start(config=config, config_name="fit")
    assert "error: the quickstart is one comparison and no sweep: use scripts/fit.py -m" in capsys.readouterr().out


def test_the_plain_formula_of_the_bench_is_rld():
    student, teacher = torch.randn(2, 6, 9, dtype=torch.float64)
    label = torch.arange(6)
    torch.testing.assert_close(bench.plain_rld(student, teacher, label), bench._log_space_rld(student, teacher, label))


@pytest.mark.slow
def test_bench_of_the_loss_prints_ratios(capsys):
    bench.bench_loss(8, 50, torch.device("cpu"), rounds=1)
    assert "memory ratio" in capsys.readouterr().out


def test_bench_of_steps_prints_ratios(capsys):
    bench.bench_step("wrn16_1", "resnet8", 4, (3, 16, 16), torch.device("cpu"), rounds=1)
    assert "plain eager float32" in capsys.readouterr().out


def test_bench_of_losses_is_relative_to_kd(capsys):
    losses = bench.configured_losses(["[rld,fitnet]", "simkd", "mlkd", "crd"])
    bench.bench_losses(losses, "wrn16_1", "resnet8", 4, (3, 16, 16), torch.device("cpu"), rounds=1)
    rows = [line.split("│")[1:4] for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert [name.strip() for name, *_ in rows] == ["kd", "[rld,fitnet]", "simkd", "mlkd", "crd"]
    assert float(rows[0][2]) == 1
