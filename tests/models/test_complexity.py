"""Counting parameters and multiply-accumulate operations."""

import pytest
import torch
from torch import nn

from rld_lightning.models import count_macs, count_parameters, create_model
from rld_lightning.models.complexity import is_mostly_depthwise
from rld_lightning.models.factory import blueprint


def test_frozen_parameters_count_too():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    model[0].requires_grad_(False)
    assert count_parameters(model) == 3 * 4 + 4 + 4 + 4


def test_macs_of_each_kind_of_layer():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8),
        nn.Conv2d(8, 12, 1, groups=2),
        nn.Flatten(),
        nn.Linear(12 * 4 * 4, 5),
    )
    expected = 64 * 3 * 8 * 9 + 16 * 8 * 9 + 16 * 8 * 12 // 2 + 12 * 4 * 4 * 5
    assert count_macs(model, (3, 8, 8)) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [("mobilenetv2", True), ("shufflev1", True), ("resnet8", False), ("torchvision/vit_b_16", False)],
)
def test_networks_of_depthwise_convolutions_are_detected(name, expected):
    assert is_mostly_depthwise(blueprint(name)) is expected


def test_macs_of_resnet8():
    model = create_model("resnet8", num_classes=100)
    stem, first = 32 * 32 * 3 * 16 * 9, 2 * 32 * 32 * 16 * 16 * 9
    second = 16 * 16 * (16 * 32 * 9 + 32 * 32 * 9 + 16 * 32)
    third = 8 * 8 * (32 * 64 * 9 + 64 * 64 * 9 + 32 * 64)
    assert count_macs(model) == stem + first + second + third + 64 * 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_is_not_changed(dtype):
    model = create_model("wrn16_1").to(dtype).train()
    model.bn1.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    random_state = torch.get_rng_state()

    count_macs(model)

    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_training_modes_are_restored_after_an_exception():
    model = nn.Sequential(nn.Conv2d(4, 2, 1)).train()
    with pytest.raises(RuntimeError):
        count_macs(model)
    assert model.training


def test_no_memory_is_needed_on_the_meta_device():
    with torch.device("meta"):
        model = create_model("torchvision/resnet50", num_classes=1000)
    assert count_macs(model, (3, 224, 224)) == 4_089_184_256


def test_attention_in_one_fast_operation_counts():
    tokens, width, hidden = 3, 64, 128  # each channel is a token
    model = nn.Sequential(
        nn.Flatten(2), nn.TransformerEncoderLayer(width, 4, hidden, batch_first=True), nn.Flatten(), nn.Linear(192, 5)
    )
    projections, perceptron = 4 * tokens * width**2, 2 * tokens * width * hidden
    scores_and_sums = 2 * tokens**2 * width
    assert count_macs(model, (3, 8, 8)) == projections + perceptron + scores_and_sums + 3 * 64 * 5
    assert torch.backends.mha.get_fastpath_enabled()
