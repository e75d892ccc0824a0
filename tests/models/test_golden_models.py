"""Every network against the reference: keys and shapes of its weights and, if available, its outputs."""

import numpy as np
import pytest
import torch
import torchvision
from helpers.golden_fill import GOLDEN, MODELS, fill, golden_images
from torch import nn

from rld_lightning.models import count_parameters, create_model, forward_with_taps, stages_of

WITH_LOGITS = [name for name, facts in MODELS.items() if facts["logits"]]


def build(golden_name: str) -> nn.Module:
    source, name = golden_name.split("/")
    num_classes = MODELS[golden_name]["state_dict"][-1][1][0]
    if source == "imagenet" and name.startswith("ResNet"):
        name = f"torchvision/{name.lower()}"
    return create_model(name, num_classes=num_classes)


@pytest.fixture(scope="module")
def logits():
    with np.load(GOLDEN / "models.npz") as arrays:
        return {name: torch.from_numpy(arrays[MODELS[name]["logits"]]) for name in WITH_LOGITS}


@pytest.mark.parametrize("name", MODELS)
def test_state_dict_and_sizes(name):
    facts = MODELS[name]
    with torch.device("meta"):
        model = build(name)
    state = model.state_dict()
    listed = [[key, list(value.shape), str(value.dtype).removeprefix("torch.")] for key, value in state.items()]
    assert listed == facts["state_dict"]
    assert count_parameters(model) == facts["num_parameters"]
    assert len(list(model.parameters())) == facts["num_parameter_tensors"]
    assert sum(buffer.numel() for buffer in model.buffers()) == facts["num_buffer_elements"]


@pytest.mark.thinned(4)
@pytest.mark.parametrize("name", MODELS)
def test_feature_shapes(name):
    facts = MODELS[name]
    with torch.device("meta"):
        model = build(name).eval()
        images = torch.empty(2, *facts["input"])
    stages = stages_of(model)
    paths = (*stages.features, *stages.preactivations, stages.pooled)
    _, features = forward_with_taps(model, images, paths)

    def shapes(paths):
        return [list(features[path].shape[1:]) for path in paths]

    assert shapes(stages.features) == facts["feats"]
    assert shapes(stages.preactivations) == (facts["preact_feats"] or [])
    assert shapes([stages.pooled]) == [facts["pooled_feat"]]


@pytest.mark.parametrize("name", MODELS)
def test_norms_before_the_preactivations(name):
    with torch.device("meta"):
        model = build(name)
    norms, declared = stages_of(model).norms, MODELS[name]["bn_before_relu"] or []
    # The reference omits the first stage of the ImageNet ResNets.
    assert list(norms[len(norms) - len(declared) :]) == declared
    assert len(norms) == len(declared) or name.startswith("imagenet/ResNet")
    assert all(isinstance(model.get_submodule(norm), nn.BatchNorm2d) for norm in norms)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", WITH_LOGITS)
def test_logits_and_features(name, logits):
    facts = MODELS[name]
    model = fill(build(name), facts["conv_gain"]).eval()
    stages = stages_of(model)
    paths = (*stages.features, *stages.preactivations, stages.pooled)
    with torch.inference_mode():
        actual, features = forward_with_taps(model, golden_images(facts["input"][1]), paths)
    torch.testing.assert_close(actual, logits[name], rtol=0, atol=1e-4)

    expected = facts["feature_stats"]
    named = [(stages.pooled, expected["pooled_feat"])]
    named += zip(stages.features, expected["feats"], strict=True)
    named += zip(stages.preactivations, expected.get("preact_feats", []), strict=True)
    for path, stats in named:
        feature = features[path].double()
        assert feature.mean().item() == pytest.approx(stats["mean"], rel=1e-4, abs=1e-5), path
        assert feature.square().mean().sqrt().item() == pytest.approx(stats["rms"], rel=1e-4), path


@torch.inference_mode()
def test_shufflenetv2_matches_torchvision():
    # There are no golden logits; except for stem and head it is torchvision's network, with weights in the same order.
    ours = create_model("shufflev2").eval()
    theirs = torchvision.models.shufflenet_v2_x1_0().eval()
    trunk = nn.Sequential(theirs.stage2, theirs.stage3, theirs.stage4, theirs.conv5)
    values = [value for key, value in fill(ours, 0.9).state_dict().items() if key.startswith(("layer", "conv2", "bn2"))]
    trunk.load_state_dict(dict(zip(trunk.state_dict(), values, strict=True)))

    _, features = forward_with_taps(ours, golden_images(32), ["relu", "linear:in"])
    expected = trunk(features["relu"]).mean((2, 3))
    torch.testing.assert_close(features["linear:in"], expected, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_shufflenetv2_preactivations_become_the_features():
    model = fill(create_model("shufflev2"), 0.9).eval()
    stages = stages_of(model)
    _, features = forward_with_taps(model, golden_images(32), (*stages.features, *stages.preactivations))
    for feature, preactivation in zip(stages.features[1:], stages.preactivations[1:], strict=True):
        left, right = features[preactivation].relu().chunk(2, dim=1)
        assert torch.equal(features[feature][:, 0::2], left)
        assert torch.equal(features[feature][:, 1::2], right)
        assert features[preactivation].min() < 0


@torch.inference_mode()
def test_four_stage_resnet50_matches_torchvision():
    ours = fill(create_model("resnet50"), 0.75).eval()
    theirs = torchvision.models.resnet50(num_classes=100).eval()
    names = {"shortcut": "downsample", "linear": "fc"}
    state = {".".join(names.get(part, part) for part in key.split(".")): v for key, v in ours.state_dict().items()}
    theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    theirs.load_state_dict(state)
    images = golden_images(32)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-4)
