"""Losses by name: adding one needs only a file."""

import sys
from pathlib import Path

import pytest

import rld_lightning.losses
from rld_lightning.losses import (
    DistillationLoss,
    RLDLoss,
    StepContext,
    list_losses,
    loss_class,
    loss_options,
    register_loss,
    registry,
)

FOLDER = Path(__file__).parent
NOT_OF_ONE_LOSS = ("test_registry.py", "test_on_gpu.py", "test_on_apple_gpu.py", "test_golden.py", "test_combined.py")

MSE = '''
from rld_lightning.losses.base import DistillationLoss
from rld_lightning.losses.ranges import Weight
from rld_lightning.losses.registry import register_loss

@register_loss("mse")
class MSELoss(DistillationLoss):
    """Squared difference of logits."""

    weight: Weight = 0.5

    def terms(self, step):
        return {"mse": self.weight * (step.student.logits - step.teacher.logits).square().mean()}
'''


def test_names_match_the_command_line():
    names = list_losses()
    assert names == sorted(names)
    assert {"kd", "dkd", "rld", "ctkd", "kdg_logit", "mlkd", "mlkd_noaug", "wttm", "at", "crd", "reviewkd"} <= {*names}
    assert "combined" not in names  # its losses have to be given
    assert loss_class("rld") is RLDLoss


@pytest.mark.parametrize("name", list_losses())
def test_options_build_the_loss(name):
    options = loss_options(name)
    home, _, target = options.pop("_target_").rpartition(".")
    cls = getattr(sys.modules[home], target)
    assert cls is loss_class(name)
    assert home in ("rld_lightning.losses", "rld_lightning.losses.features")  # the public import path
    assert cls(**options).describe() == cls().describe()
    assert cls.method
    assert cls.papers or name == "ce"


@pytest.mark.parametrize("name", list_losses())
def test_every_loss_has_its_own_tests(name):
    tests = [path.read_text() for path in FOLDER.rglob("test_*.py") if path.name not in NOT_OF_ONE_LOSS]
    assert any(f"import {cls}" in text or f", {cls}" in text for text in tests for cls in [loss_class(name).__name__])


def test_options_are_complete():
    assert loss_options("rld") == {
        "_target_": "rld_lightning.losses.RLDLoss",
        "alpha": 1.0,
        "beta": 8.0,
        "temperature": 4.0,
        "confidence_temperature": None,
        "logit_standardization": False,
        "mask": "ge",
        "ce_weight": 1.0,
        "warmup_epochs": 20,
        "ignore_index": -100,
        "label_smoothing": 0.0,
    }
    assert loss_options("at") == {
        "_target_": "rld_lightning.losses.features.ATLoss",
        "weight": 1000.0,
        "power": 2.0,
        "student_taps": (),
        "teacher_taps": (),
        "ce_weight": 1.0,
        "warmup_epochs": 1,
        "label_smoothing": 0.0,
    }


@pytest.fixture
def dropped_in(tmp_path, monkeypatch):
    """A file with one loss, in a folder that is added to the package."""
    (tmp_path / "mse.py").write_text(MSE)
    monkeypatch.setattr(rld_lightning.losses, "__path__", [*rld_lightning.losses.__path__, str(tmp_path)])
    monkeypatch.setattr(registry, "_REGISTRY", {**registry._REGISTRY})
    yield
    sys.modules.pop("rld_lightning.losses.mse", None)
    vars(rld_lightning.losses).pop("mse", None)


def test_a_loss_of_a_module_outside_any_package_has_options(monkeypatch):
    monkeypatch.setattr(registry, "_REGISTRY", {**registry._REGISTRY})
    exec(MSE, {"__name__": "mine"})
    assert loss_options("mse")["_target_"] == "mine.MSELoss"


def test_a_file_in_the_package_is_a_loss(dropped_in):
    assert loss_options("mse") == {
        "_target_": "rld_lightning.losses.mse.MSELoss",
        "weight": 0.5,
        "ce_weight": 1.0,
        "warmup_epochs": 1,
        "ignore_index": -100,
        "label_smoothing": 0.0,
    }
    with pytest.raises(ValueError, match="weight=-1 is not allowed"):
        loss_class("mse")(-1)
    assert "mse" in list_losses()
    assert issubclass(loss_class("mse"), DistillationLoss)


def test_a_name_cannot_be_registered_twice():
    with pytest.raises(ValueError, match=r"loss 'rld' is already registered, by rld_lightning\.losses\.rld"):

        @register_loss("rld")
        class Another(DistillationLoss):
            def terms(self, step: StepContext):
                return {}


def test_an_unknown_name():
    with pytest.raises(ValueError, match=r"unknown loss 'rdl'; choose one of at, atkd, .*rld"):
        loss_class("rdl")
