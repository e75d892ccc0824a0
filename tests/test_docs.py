"""What the README says works: its code runs, its commands compose, its tables list what is there."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from helpers.configs import CONF, LOSSES, compose

from rld_lightning.losses import ModelOutput, StepContext
from rld_lightning.models import create_model, forward_with_taps, registry

README = (Path(__file__).parents[1] / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    shlex.split(command, comments=True)
    for command in re.findall(r"^    (python scripts/.*)$", README.replace("\\\n", ""), re.MULTILINE)
]


def block(text):
    (found,) = [code for code in PYTHON if text in code]
    return found


def logits():
    return torch.randn(8, 10, requires_grad=True), torch.randn(8, 10), torch.arange(8)


def test_a_loss_in_a_loop_of_your_own():
    student, teacher, label = logits()
    scope = {"student_logits": student, "teacher_logits": teacher, "label": label}
    exec(block("criterion = RLDLoss"), scope)
    assert set(scope["terms"]) == {"ce", "scd", "mcd"}
    assert student.grad.abs().sum() > 0


def pair():
    return create_model("resnet14", 10).eval(), create_model("resnet8", 10)


def test_a_loss_on_features_in_a_loop_of_your_own():
    teacher, student = pair()
    scope = {"torch": torch, "teacher": teacher, "student": student, "train_label": torch.arange(10)}
    scope |= {"images": torch.randn(4, 3, 32, 32), "label": torch.arange(4)}
    exec(block("criterion = ReviewKDLoss"), scope)
    sum(scope["terms"].values()).backward()
    assert all(p.grad is not None for p in [*student.parameters(), *scope["criterion"].parameters()])


def test_adding_a_loss_on_features():
    scope = {}
    exec(block("class HintLoss"), scope)
    teacher, student = pair()
    loss = scope["HintLoss"]()
    loss.connect(student, teacher, (3, 32, 32), torch.arange(10))
    assert loss.widen.weight.shape == (64, 64, 1, 1)
    images = torch.randn(4, 3, 32, 32)
    outputs = [ModelOutput(*forward_with_taps(student, images, loss.student_taps))]
    outputs.append(ModelOutput(*forward_with_taps(teacher, images, loss.teacher_taps)))
    sum(loss(StepContext(*outputs, torch.arange(4))).values()).backward()
    assert loss.widen.weight.grad.abs().sum() > 0


def test_adding_a_loss():
    scope = {}
    exec(block("class MSELoss"), scope)
    student, teacher, label = logits()
    terms = scope["MSELoss"]()(student, teacher, label)
    assert terms["mse"].item() == pytest.approx(0.1 * torch.nn.functional.mse_loss(student, teacher).item())


def test_adding_a_model(monkeypatch):
    monkeypatch.setattr(registry, "REGISTRY", dict(registry.REGISTRY))
    exec(block("def tiny_cnn"), {"__name__": "readme"})
    assert create_model("tiny_cnn", 7)(torch.zeros(2, 3, 8, 8)).shape == (2, 7)


def test_adding_a_data_set():
    scope = {}
    exec(block("class NoiseDataModule"), scope)
    data = scope["NoiseDataModule"](batch_size=100)
    data.setup()
    assert [len(batch.label) for batch in data.train_dataloader()] == [100] * 10


OPTIONS = set(re.findall(r"`([a-z]\w*(?:\.\w+)*=[^`\s]+)`", README.split("## Adding to it")[0]))


@pytest.mark.parametrize("override", sorted(OPTIONS))
def test_every_option_composes(override):
    assert compose(override)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_composes(command):
    _, script, *overrides = command
    if script in ("scripts/report.py", "scripts/figures.py", "scripts/dashboard.py"):  # argparse's
        text = (CONF.parent / script).read_text()
        assert all(f'"{word}"' in text for word in overrides if word.startswith("--"))
        return
    if script == "scripts/compare.py":
        own = dict(o.split("=") for o in overrides if o.startswith(("losses=", "seeds=")))
        losses = [f"loss={loss}" for loss in own["losses"].split(",")]
        for loss in losses:
            assert compose(loss, *(o for o in overrides if o.partition("=")[0] not in own))
        return
    name = {"scripts/fit.py": "fit", "scripts/eval.py": "eval", "scripts/shards.py": "shards"}[script]
    overrides = [o for o in overrides if not o.startswith("-")]
    if any(o.startswith("sweep=") for o in overrides):  # Hydra's own part is tested with the configuration
        overrides = [o for o in overrides if not o.startswith("hydra.")]
    if "-m" in command:  # of the values of a sweep, the first
        overrides = [o.split(",")[0] for o in overrides]
    assert compose(*overrides, name=name, resolve=not any("optuna" in o for o in overrides))


def test_the_losses_table_is_complete():
    table = README.split("## Losses")[1].split("\n## ")[0]
    names = {name for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    assert names - {"loss"} == {*LOSSES, "combined"}


def test_options_that_are_named_exist():
    table = README.split("| group | options |")[1].split("\n\n")[0]
    for group in ("data", "recipe", "trainer", "logger"):
        (row,) = [line for line in table.splitlines() if line.startswith(f"| `{group}`")]
        files = {path.stem for path in (CONF / group).glob("*.yaml")}
        assert set(re.findall(r"`(\w+)`", row)) - {group, "val_fraction"} == files


def test_make_targets_that_are_named_exist():
    makefile = (Path(__file__).parents[1] / "Makefile").read_text()
    for target in re.findall(r"`?make ([a-z-]+)", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
