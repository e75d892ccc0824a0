"""What is evaluated, and what is refused or reported before."""

import json
import math
import shutil

import pytest
import torch
from helpers.configs import compose
from helpers.exports import digits_facts, small_onnx

from rld_lightning.data import DigitsDataModule
from rld_lightning.data.base import Batch
from rld_lightning.errors import UserError
from rld_lightning.models import create_model
from rld_lightning.models.weights.save import save_weights
from rld_lightning.tasks.evaluate import EvaluationModule, evaluate


@pytest.fixture
def measure(tmp_path):
    """Evaluates a small network on the digits, with given facts in its file."""

    def run(*overrides, name="resnet8", facts=None, classes=10):
        torch.manual_seed(0)
        model = create_model(name, classes)
        save_weights(model, tmp_path / "w.safetensors", {"name": name, "dataset": "digits"} | (facts or {}))
        options = ("data=digits", "trainer=cpu", f"weights={tmp_path / 'w.safetensors'}", *overrides)
        cfg = compose(*options, name="eval", resolve=False)
        cfg.paths.run = str(tmp_path / "run")
        return model.eval(), evaluate(cfg)

    return run


def test_validation_uses_the_images_that_the_run_held_out(measure, capsys):
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


def test_run_export_and_checkpoint_are_evaluated_like_the_weights_file(measure, tmp_path):
    model, whole = measure(facts=digits_facts("resnet8"))
    run, export = tmp_path / "a run", tmp_path / "export"
    run.mkdir()
    (tmp_path / "w.safetensors").rename(run / "student.safetensors")
    shutil.copytree(run, export)
    (export / "student.safetensors").rename(export / "model.safetensors")
    torch.save({"state_dict": model.state_dict(), "hyper_parameters": {"student": "resnet8"}}, run / "last.ckpt")
    for path in (run, export, run / "last.ckpt"):
        _, found = measure(f"weights='{path}'")
        assert found.nll == pytest.approx(whole.nll, rel=1e-4)
        assert (found.top1, found.images, found.model) == (whole.top1, whole.images, "resnet8")
    with pytest.raises(UserError, match=r"holds neither student\.safetensors.*name its best\.ckpt or last\.ckpt"):
        measure(f"weights='{tmp_path}'")


def test_onnx_file_is_evaluated(measure, tmp_path):
    pytest.importorskip("onnxruntime")
    content, weights = small_onnx({"name": "timm/any"})
    (tmp_path / "model.onnx").write_bytes(content)
    _, found = measure(f"weights={tmp_path / 'model.onnx'}")
    logits, label = by_hand(lambda images: images.flatten(1) @ weights)
    assert (found.model, found.top1) == ("timm/any", pytest.approx(top1(logits, label)))
    (tmp_path / "model.onnx").write_bytes(small_onnx({}, pixels=True)[0])
    with pytest.raises(UserError, match=r"maps pixels .* use the file of an export with pixels=false\."):
        measure(f"weights={tmp_path / 'model.onnx'}")


def test_run_that_held_out_no_images_has_no_validation_images(measure):
    with pytest.raises(UserError, match="no validation images of its own; its run held none out; use split=test"):
        measure("split=val", facts={"data_seed": 0, "val_fraction": 0.0})


def test_file_without_the_held_out_fraction_is_evaluated_with_a_warning(measure, capsys):
    _, found = measure("split=val", "data.val_fraction=0.1")
    assert found.images == 144
    assert "does not say what was held out when it was trained" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"hold some out with data\.val_fraction"):
        measure("split=val")


def by_hand(model, look=None):
    """Returns logits and labels of the test split, with the model's normalisation."""
    data = DigitsDataModule()
    data.setup()
    if look is not None:
        data.normalize_with(*look)
    with torch.no_grad():
        parts = [(model(batch.images), batch.label) for batch in data.test_dataloader()]
    return [torch.cat(values) for values in zip(*parts, strict=True)]


def top1(logits, label):
    return 100 * (logits.argmax(1) == label).float().mean().item()


NAMES = [str(digit) for digit in range(10)]


def test_classes_are_matched_by_name(measure, capsys):
    model, found = measure(facts={"class_names": NAMES[::-1]})
    logits, label = by_hand(model)
    assert (found.images, found.shared_classes) == (360, None)
    assert found.top1 == pytest.approx(top1(logits, 9 - label), abs=1e-4)
    assert found.nll == pytest.approx(torch.nn.functional.cross_entropy(logits, 9 - label).item(), rel=1e-5)
    assert "matched to those of digits by name, in another order" in capsys.readouterr().out


@pytest.mark.parametrize("known", [["7", "8", "9", "owl", "cat"], [*NAMES, "owl", "cat"]], ids=["others", "more"])
def test_shared_classes_are_evaluated_and_the_others_reported(measure, capsys, known):
    model, found = measure(facts={"class_names": known, "num_classes": len(known)}, classes=len(known))
    logits, label = by_hand(model)
    kept = label >= 7 if len(known) == 5 else label >= 0
    label = (label - 7 if len(known) == 5 else label)[kept]
    assert (found.images, found.shared_classes) == (len(label), len(known) - 2)
    assert found.top1 == pytest.approx(top1(logits[kept], label), abs=1e-4)  # all classes of the model compete
    output = capsys.readouterr().out
    assert f"measured on the {len(known) - 2} classes that model and digits share by name" in output
    assert "2 that it knows are not in the data, and still compete (cat, owl)" in output
    assert ("images of 7 that it does not know are left out (0, 1, 2, ...)" in output) == (len(known) == 5)
    assert f"{found.shared_classes} shared classes only" in output


def test_classes_with_other_names_may_be_mapped(measure, capsys):
    names = [f"n{digit}" for digit in range(10)]
    assert measure(facts={"class_names": names})[1].images == 360
    assert "knows other class names than digits, such as 'n0'" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"knows the 11 classes of digits and digits has 10; .* with data=digits\."):
        measure(facts={"class_names": [*names, "owl"], "num_classes": 11}, classes=11)


def test_model_gets_images_as_in_its_training(measure, capsys):
    look = ((0.5, 0.4, 0.3), (0.25, 0.5, 1.0))
    model, found = measure(facts={"image_shape": [3, 8, 8], "mean": list(look[0]), "std": list(look[1])})
    logits, label = by_hand(model, look)
    assert found.top1 == pytest.approx(top1(logits, label), abs=1e-4)
    assert found.nll == pytest.approx(torch.nn.functional.cross_entropy(logits, label).item(), rel=1e-5)
    output = capsys.readouterr().out
    assert "its own mean [0.5, 0.4, 0.3] and std [0.25, 0.5, 1.0], as its file says" in output
    assert "caution" not in output
    measure(facts={"image_shape": [3, 32, 32]})
    said = capsys.readouterr().out
    assert "was trained with image_shape [3, 32, 32], and is measured with [3, 8, 8]; data.image_size=32 " in said


def test_preprocessing_of_a_library_is_reported_if_the_file_has_none(measure, capsys):
    measure(name="torchvision/shufflenet_v2_x0_5", facts={"mean": [0.3054] * 3, "std": [0.376] * 3})
    assert "caution" not in capsys.readouterr().out
    measure(name="torchvision/shufflenet_v2_x0_5")
    output = capsys.readouterr().out
    assert "is published for mean [0.485, 0.456, 0.406] and std [0.229, 0.224, 0.225]; it is measured with" in output


def test_network_that_does_not_accept_the_images_is_refused(measure):
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
def test_facts_of_a_file_are_never_instantiated(measure, tmp_path, monkeypatch, form, key, value):
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


@pytest.mark.parametrize(("classes", "draw"), [(10, torch.rand), (10, torch.randn), (4, torch.rand)])
def test_scores_match_their_definitions(classes, draw):
    generator = torch.Generator().manual_seed(0)
    logits = draw(300, classes, generator=generator)  # of which none lies outside of [0, 1], with rand
    label = torch.where(torch.rand(300, generator=generator) < 0.5, logits.argmax(1), 1)  # some classes have no image
    module = EvaluationModule(torch.nn.Identity(), classes)
    for part in torch.arange(300).split(128):  # the last batch is smaller
        module.test_step(Batch(logits[part], label[part], part), 0)
    module.on_test_epoch_end()
    probabilities = logits.double().softmax(1)
    confidence, found = probabilities.max(1)
    right, bins, ece = found == label, (15 * confidence).ceil(), 0.0
    for number in range(1, 16):
        own = bins == number
        if own.any():
            ece += float(own.sum() * (right[own].double().mean() - confidence[own].mean()).abs() / 300)
    ranks = (logits > logits.gather(1, label[:, None])).sum(1)
    expected = {"top1": 100 * float(right.double().mean()), "ece": 100 * ece}
    expected["nll"] = -float(probabilities.gather(1, label[:, None]).log().mean())
    scores = module.scores("val")
    assert (scores.pop("split"), scores.pop("images")) == ("val", 300)
    if classes > 5:
        expected["top5"] = 100 * float((ranks < 5).double().mean())
    else:
        assert scores.pop("top5") is None
    assert scores == pytest.approx(expected, rel=1e-5)


def test_confidence_of_1_belongs_to_the_last_bin():
    logits = torch.zeros(100, 4)
    logits[:50, 0], logits[50:, 0] = 100, math.log(3 * 0.95 / 0.05)  # a confidence of 1 in float32, and of 0.95
    label = torch.zeros(100, dtype=torch.long)
    label[:10] = 1
    module = EvaluationModule(torch.nn.Identity(), 4)
    module.test_step(Batch(logits, label, label), 0)
    module.on_test_epoch_end()
    assert module.scores("val")["ece"] == pytest.approx(100 * abs(0.9 - 0.975), rel=1e-4)


def test_network_with_nan_logits_has_no_score(measure, tmp_path, monkeypatch):
    forward = EvaluationModule.test_step

    def spoiled(module, batch, batch_idx):
        forward(module, Batch(batch.images * math.nan, *batch[1:]) if batch_idx == 1 else batch, batch_idx)

    monkeypatch.setattr(EvaluationModule, "test_step", spoiled)
    with pytest.raises(UserError, match=r"logits are not numbers \(NaN\) for images of the test split"):
        measure("data.batch_size=64", facts=digits_facts("resnet8"))
    assert not (tmp_path / "run" / "evaluation.json").exists()
