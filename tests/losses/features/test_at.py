import pytest
import torch
from helpers.feature_tester import FeatureTester
from torch.testing import assert_close

from rld_lightning.losses.features import ATLoss, NSTLoss, VIDLoss, at_loss
from rld_lightning.models import create_model, stages_of


class TestAT(FeatureTester):
    module = ATLoss
    settings = ({}, {"weight": 10.0, "power": 1.0})
    wrong = (({"weight": -1.0}, "weight=-1.0"), ({"power": 0.5}, r"power=0\.5 .* >= 1"))
    golden_method = "at"

    def golden(self, case, tensors):
        weight, power = case.hyper["feat_weight"], case.hyper["p"]
        terms = at_loss(tensors["student_feats"], tensors["teacher_feats"], weight=weight, power=power)
        return {"feature": terms["at"]}


def test_the_scale_of_the_maps_does_not_matter():
    student, teacher = torch.randn(2, 4, 3, 5, 5, dtype=torch.float64)
    expected = at_loss([student], [teacher])
    assert_close(at_loss([7 * student], [0.1 * teacher]), expected)
    assert_close(at_loss([student.roll(1, 1)], [-teacher]), expected)


@pytest.mark.parametrize("method", [ATLoss, NSTLoss, VIDLoss])
@pytest.mark.parametrize(
    ("teacher", "student", "teacher_taps", "student_taps", "size"),
    [
        ("wrn40_2", "mobilenetv2", ("block1", "block2", "block3"), ("blocks.1", "blocks.2", "blocks.4"), 32),
        (
            "torchvision/resnet50",
            "mobilenetv1",
            ("layer1", "layer2", "layer3"),
            ("model.5", "model.11", "model.13"),
            224,
        ),
    ],
)
def test_stages_are_paired_from_the_shallow_end_as_in_the_published_code(
    method, teacher, student, teacher_taps, student_taps, size
):
    """mdistiller's and RepDistiller's loops zip the stages after the stem; the longer list's deepest are skipped."""
    with torch.device("meta"):
        networks = [create_model(name, 10).eval() for name in (student, teacher)]
        loss = method()
        loss.connect(*networks, (3, size, size), torch.arange(10))
    zipped = zip(*(stages_of(network).features[1:] for network in networks), strict=False)
    assert list(zip(loss.student_taps, loss.teacher_taps, strict=True)) == list(zipped)
    assert loss.teacher_taps == teacher_taps
    assert loss.student_taps == student_taps


def test_named_stages_are_paired_from_the_deep_end():
    teacher, student = FeatureTester.networks()
    loss = ATLoss(student_taps=["layer3"])
    loss.connect(student, teacher, (3, 32, 32), torch.arange(10))
    assert (loss.student_taps, loss.teacher_taps) == (("layer3",), ("layer3",))
