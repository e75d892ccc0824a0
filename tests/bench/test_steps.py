"""The bench as functions."""

import pytest
import torch

from rld_lightning.bench import steps as bench


def test_the_plain_formula_of_the_bench_is_rld():
    student, teacher = torch.randn(2, 6, 9, dtype=torch.float64)
    label = torch.arange(6)
    torch.testing.assert_close(bench.plain_rld(student, teacher, label), bench._log_space_rld(student, teacher, label))


@pytest.mark.slow
def test_bench_of_the_loss_prints_ratios(capsys):
    bench.bench_loss(8, 50, torch.device("cpu"), rounds=1)
    assert "memory ratio" in capsys.readouterr().out


def test_bench_of_steps_prints_ratios(capsys):
    bench.bench_step("wrn_16_1", "resnet8", 4, (3, 16, 16), torch.device("cpu"), rounds=1)
    assert "plain eager float32" in capsys.readouterr().out


@pytest.mark.slow
def test_bench_of_losses_is_relative_to_kd(capsys):
    losses = bench.configured_losses(["[rld,fitnet]", "simkd", "mlkd", "crd"])
    bench.bench_losses(losses, "wrn_16_1", "resnet8", 4, (3, 16, 16), torch.device("cpu"), rounds=1)
    rows = [line.split("│")[1:4] for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert [name.strip() for name, *_ in rows] == ["kd", "[rld,fitnet]", "simkd", "mlkd", "crd"]
    assert float(rows[0][2]) == 1
