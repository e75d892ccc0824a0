"""Intermediate features by module path."""

import pytest
import torch
from torch import nn

from rld_lightning.models import FeatureTaps, create_model, forward_with_taps


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return create_model("resnet8", num_classes=10).eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_outputs_and_inputs(model, images):
    logits, features = forward_with_taps(model, images, ["layer3", "layer3.0.relu:in", "fc:in", "fc", ":in"])
    assert list(features) == ["layer3", "layer3.0.relu:in", "fc:in", "fc", ":in"]
    assert features["fc"] is logits
    assert features[":in"] is images
    assert torch.equal(features["layer3.0.relu:in"].relu(), features["layer3"])
    torch.testing.assert_close(features["fc:in"], features["layer3"].mean((2, 3)))
    assert hooks(model) == 0


def test_features_carry_the_gradient(model, images):
    _, features = forward_with_taps(model, images, ["layer1"])
    features["layer1"].sum().backward()
    assert model.conv1.weight.grad.any()
    assert model.layer2[0].conv1.weight.grad is None


def test_without_paths_no_hook_is_registered(model, images, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a hook was registered")

    monkeypatch.setattr(nn.Module, "register_forward_hook", refuse)
    monkeypatch.setattr(nn.Module, "register_forward_pre_hook", refuse)
    logits, features = forward_with_taps(model, images)
    assert features == {}
    assert torch.equal(logits, model(images))


def test_hooks_exist_only_inside_the_block(model, images):
    taps = FeatureTaps(model, ["layer1", "fc:in", "layer1"])
    assert hooks(model) == 0
    with taps:
        assert hooks(model) == 2
        model(images)
    assert hooks(model) == 0
    assert list(taps.features) == ["layer1", "fc:in"]


def test_hooks_are_removed_after_an_exception(model, images):
    with pytest.raises(RuntimeError), FeatureTaps(model, ["layer1", "fc:in"]):
        model(images[:, :2])
    assert hooks(model) == 0
    with pytest.raises(RuntimeError):
        forward_with_taps(model, images[:, :2], ["layer1"])
    assert hooks(model) == 0


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("layer4", "'layer4' names no module of ResNet. Did you mean 'layer"),
        ("layer1.0.Relu:in", "Did you mean 'layer1.0.relu'"),
        ("zzz", r"'zzz' names no module of ResNet\. model.named_modules\(\) lists all"),
        ("layer1:out", "ends in ':out'; only ':in'"),
    ],
)
def test_unknown_paths_are_refused_before_the_forward(model, path, message):
    with pytest.raises(ValueError, match=message):
        forward_with_taps(model, None, ["layer1", path])
    assert hooks(model) == 0


def test_the_last_call_counts():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.relu = nn.ReLU()

        def forward(self, x):
            return self.relu(self.relu(x) - 1)

    images = torch.tensor([[3.0, 0.5]])
    _, features = forward_with_taps(Twice(), images, ["relu", "relu:in"])
    assert features["relu:in"].tolist() == [[2.0, -0.5]]
    assert features["relu"].tolist() == [[2.0, 0.0]]


def test_features_before_and_after_the_forward(model, images):
    with FeatureTaps(model, ["layer1"]) as taps:
        with pytest.raises(RuntimeError, match="tap 'layer1' captured nothing"):
            _ = taps.features
        model(images)
        first = taps.features["layer1"]
        model(images + 1)
        assert not torch.equal(taps.features["layer1"], first)
    with taps, pytest.raises(RuntimeError, match="captured nothing"):
        _ = taps.features


@pytest.mark.parametrize("path", ["0", "1:in"])
def test_overwritten_features_are_not_returned(path):
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True), nn.Linear(3, 2))
    with pytest.raises(RuntimeError, match=f"tap '{path}' was overwritten in place"):
        forward_with_taps(model, torch.ones(1, 3), [path])
    _, features = forward_with_taps(model, torch.ones(1, 3), ["1"])
    assert features["1"].min() >= 0


def test_other_values_than_tensors_are_refused():
    model = nn.Sequential(nn.LSTM(3, 2))
    with pytest.raises(TypeError, match="tap '0' captured a tuple"):
        forward_with_taps(model, torch.ones(1, 3), ["0"])
    assert hooks(model) == 0


def test_inference_mode(model, images):
    with torch.inference_mode():
        _, features = forward_with_taps(model, images, ["layer1"])
    assert features["layer1"].is_inference()


def test_wrappers_are_unwrapped(model, images, tmp_path):
    expected = forward_with_taps(model, images, ["layer2", "fc:in"])[1]
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        actual = forward_with_taps(wrapped, images, ["layer2", "fc:in"])[1]
    finally:
        torch.distributed.destroy_process_group()
    torch.testing.assert_close(actual, expected)


def test_compiled_with_open_taps(model, images):
    expected = forward_with_taps(model, images, ["layer2", "fc:in"])[1]
    torch.compiler.reset()
    actual = forward_with_taps(torch.compile(model, backend="eager"), images, ["layer2", "fc:in"])[1]
    torch.testing.assert_close(actual, expected)


def test_compiling_before_opening_the_taps_is_reported(model, images):
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager")
    compiled(images)
    with pytest.raises(RuntimeError, match="compiled before the taps were opened"):
        forward_with_taps(compiled, images, ["layer2"])
