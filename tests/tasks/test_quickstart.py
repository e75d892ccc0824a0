"""The quickstart and the bench as functions."""

import torch
from test_config import compose

from rld_lightning.tasks import bench
from rld_lightning.tasks.quickstart import quickstart


def test_quickstart_compares_teacher_student_and_distilled_student(tmp_path, capsys):
    options = ("experiment=quickstart", "recipe.epochs=1", "loss=dkd", "callbacks.progress=null")
    cfg = compose(*options, resolve=False)
    cfg.paths.run, cfg.paths.teachers, cfg.print_config = str(tmp_path / "run"), str(tmp_path / "teachers"), False

    quickstart(cfg)

    output = capsys.readouterr().out
    for row in ("│ teacher ", "│ student, cross-entropy ", "│ student, DKD "):
        assert row in output
    assert (tmp_path / "teachers" / "digits" / "wrn_16_2.safetensors").exists()
    assert (tmp_path / "run" / "distilled" / "curves.png").exists()
    assert (tmp_path / "run" / "alone" / "student.safetensors").exists()


def test_the_plain_formula_of_the_bench_is_rld():
    student, teacher = torch.randn(2, 6, 9, dtype=torch.float64)
    label = torch.arange(6)
    torch.testing.assert_close(bench.plain_rld(student, teacher, label), bench._log_space_rld(student, teacher, label))


def test_bench_prints_ratios(capsys):
    bench.bench_loss(8, 50, torch.device("cpu"), rounds=1)
    bench.bench_step("wrn_16_1", "resnet8", 4, (3, 16, 16), torch.device("cpu"), rounds=1)
    output = capsys.readouterr().out
    assert "memory ratio" in output
    assert "plain eager float32" in output
