"""Benchmarks of losses and training steps."""

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


def test_unknown_loss_to_measure_is_refused():
    with pytest.raises(ValueError, match=r"rdl is not a loss\. Did you mean .*'rld'"):
        bench.configured_losses(["rdl"])


@pytest.mark.parametrize("compiled", ["nothing", pytest.param("all", marks=pytest.mark.slow)])
def test_a_captured_step_trains_like_a_plain_loop(compiled):
    torch.manual_seed(0)
    images, label, rows = torch.randn(8, 3, 32, 32), torch.randint(10, (8,)), torch.arange(8)
    teacher, student, other = (bench.create_model("resnet8", 10) for _ in range(3))
    other.load_state_dict(student.state_dict())
    step = bench.graph_step(student, teacher, None, rows, images, label, compiled=compiled)
    optimizer = torch.optim.SGD(other.parameters(), 0.01, momentum=0.9, weight_decay=5e-4)
    for _ in range(2):
        step()
        with torch.no_grad():
            soft = teacher.eval()(images)
        terms = bench.rld_loss(other(images), soft, label)
        optimizer.zero_grad()
        (torch.nn.functional.cross_entropy(other(images), label) + sum(terms.values())).backward()
        optimizer.step()
    for ours, theirs in zip(student.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.05, atol=2e-3)  # bfloat16
