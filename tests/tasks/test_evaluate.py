"""What is measured, and what is refused or told before."""

import json

import pytest
import torch
from helpers.configs import compose

from rld_lightning.data import DigitsDataModule
from rld_lightning.errors import UserError
from rld_lightning.models import create_model
from rld_lightning.models.save import save_weights
from rld_lightning.tasks.evaluate import evaluate


@pytest.fixture
def measure(tmp_path):
    """Evaluates a small network, whose file says what is given, on the digits."""

    def run(*overrides, name="resnet8", facts=None):
        torch.manual_seed(0)
        model = create_model(name, 10)
        save_weights(model, tmp_path / "w.safetensors", {"name": name, "dataset": "digits"} | (facts or {}))
        options = ("data=digits", "trainer=cpu", f"weights={tmp_path / 'w.safetensors'}", *overrides)
        cfg = compose(*options, name="eval", resolve=False)
        cfg.paths.run = str(tmp_path / "run")
        return model.eval(), evaluate(cfg)

    return run


def test_validation_is_on_what_the_run_of_the_file_has_held_out(measure, capsys):
    data = DigitsDataModule(seed=3, val_fraction=0.1)
    data.setup()
    model, found = measure("split=val", facts=data.split_facts)
    assert "caution" not in capsys.readouterr().out
    assert found.images == data.val_size == 144
    with torch.no_grad():
        parts = [(model(batch.images), batch.label) for batch in data.val_dataloader()]
    logits, label = (torch.cat(values) for values in zip(*parts, strict=True))
    assert found.nll == pytest.approx(torch.nn.functional.cross_entropy(logits, label).item(), rel=1e-5)
    for override in ("seed=1", "data.val_fraction=0.2"):
        with pytest.raises(UserError, match="images that it was trained on; add data"):
            measure("split=val", override, facts=data.split_facts)


def test_a_run_that_held_none_out_has_no_validation_images(measure):
    with pytest.raises(UserError, match="no validation images of its own; its run held none out; use split=test"):
        measure("split=val", facts={"data_seed": 0, "val_fraction": 0.0})


def test_a_file_that_does_not_say_what_was_held_out_is_measured_with_a_word_of_caution(measure, capsys):
    _, found = measure("split=val", "data.val_fraction=0.1")
    assert found.images == 144
    assert "does not say what was held out when it was trained" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"hold some out with data\.val_fraction"):
        measure("split=val")


def test_classes_are_compared_by_name(measure):
    names = [str(digit) for digit in range(10)]
    assert measure(facts={"class_names": names})[1].images == 360
    with pytest.raises(UserError, match=r"class 0 is '9' there and '0' here\); choose the data it was trained on"):
        measure(facts={"class_names": names[::-1]})


def test_classes_of_other_names_may_be_the_same_ones(measure, capsys):
    assert measure(facts={"class_names": [f"n{digit}" for digit in range(10)]})[1].images == 360
    assert "knows other class names than digits, such as 'n0'" in capsys.readouterr().out


def test_another_look_of_the_images_is_told(measure, capsys):
    measure(facts={"image_shape": [3, 8, 8], "mean": [0.5, 0.5, 0.5], "std": [0.3760, 0.3760, 0.3760]})
    output = capsys.readouterr().out
    assert "was trained with mean [0.5, 0.5, 0.5], and is measured with [0.3054, 0.3054, 0.3054]" in output
    assert output.count("caution") == 1


def test_a_network_that_cannot_take_the_images_is_refused(measure):
    with pytest.raises(UserError, match=r"torchvision/squeezenet1_1 cannot take images of 3x8x8.*data\.image_size="):
        measure(name="torchvision/squeezenet1_1")


@pytest.mark.parametrize("form", ["safetensors", "ckpt"])
@pytest.mark.parametrize("key", ["data_seed", "val_fraction"])
@pytest.mark.parametrize(
    "value",
    [
        {"_target_": "pathlib.Path.touch", "_args_": [{"_target_": "pathlib.Path", "_args_": ["it_ran"]}]},
        {"_target_": "sympy.sympify", "_args_": ["__import__('pathlib').Path('it_ran').touch()"]},
        [{"_target_": "pathlib.Path", "_args_": ["it_ran"]}],
        "${oc.env:HOME}",
    ],
    ids=["target", "sympify", "list", "interpolation"],
)
def test_what_a_file_says_is_never_instantiated(measure, tmp_path, monkeypatch, form, key, value):
    monkeypatch.chdir(tmp_path)
    facts = {"name": "resnet8", "dataset": "digits", key: json.dumps(value)}
    state_dict = create_model("resnet8", 10).state_dict()
    if form == "safetensors":
        save_weights(state_dict, tmp_path / "s.safetensors", facts)
    else:
        torch.save({"state_dict": state_dict, "hyper_parameters": facts}, tmp_path / "s.ckpt")
    with pytest.raises(UserError, match=rf"s\.{form} says {key}=.*which is not a"):
        measure(f"weights={tmp_path / f's.{form}'}")
    assert not (tmp_path / "it_ran").exists()
