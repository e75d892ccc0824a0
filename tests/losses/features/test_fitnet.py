import pytest
import torch
from helpers.feature_tester import FeatureTester
from torch import nn
from torch.testing import assert_close

from rld_lightning.losses.features import FitNetLoss, fitnet_loss


class TestFitNet(FeatureTester):
    module = FitNetLoss
    settings = ({}, {"weight": 10.0, "hint_layer": -1})
    golden_method = "fitnet"
    unconnectable = (("resnet14", "mobilenetv1", "hint_layer"),)

    def golden(self, case, tensors):
        (student,), (teacher,) = tensors["student_feats"], tensors["teacher_feats"]
        loss = FitNetLoss(weight=case.hyper["feat_weight"])
        loss.build([student.shape], [teacher.shape])
        weights = tensors["connector"]
        del weights["conv.bias"]  # cancelled by the batch norm
        weights["bn.num_batches_tracked"] = torch.tensor(0)
        loss.regressor.load_state_dict(weights)
        terms = loss.feature_terms(*loss.to(student.dtype).align([student], [teacher]), step=None)
        return {"feature": terms["fitnet"]}


def test_mean_over_all_elements():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 2, 2, 2, dtype=torch.float64)
    total = sum((s - t) ** 2 for s, t in zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True))
    assert fitnet_loss(student, teacher, weight=7.0)["fitnet"].item() == pytest.approx(7 * total / 24, rel=1e-12)


def test_gradient_and_none_into_the_teacher():
    student, teacher = torch.randn(2, 3, 2, 2, 2, dtype=torch.float64).unbind()
    student.requires_grad_()
    teacher.requires_grad_()
    fitnet_loss(student, teacher, weight=7.0)["fitnet"].backward()
    assert_close(student.grad, 7 * 2 * (student - teacher).detach() / 24)
    assert teacher.grad is None


@pytest.mark.parametrize(
    ("student", "teacher", "kind", "kernel"),
    [
        ((8, 8), (8, 8), nn.Conv2d, (1, 1)),
        ((8, 4), (4, 2), nn.Conv2d, (3, 3)),
        ((4, 3), (8, 6), nn.ConvTranspose2d, (4, 4)),
        ((7, 8), (5, 8), nn.Conv2d, (3, 1)),
        ((8, 8), (4, 8), nn.Conv2d, (5, 1)),
    ],
)
def test_regressors_by_size(student, teacher, kind, kernel):
    loss = FitNetLoss()
    shapes = torch.Size((2, 3, *student)), torch.Size((2, 5, *teacher))
    loss.build([shapes[0]], [shapes[1]])
    assert type(loss.regressor.conv) is kind
    assert loss.regressor.conv.kernel_size == kernel
    (regressed,), _ = loss.align([torch.randn(shapes[0])], [torch.randn(shapes[1])])
    assert regressed.shape == shapes[1]
    assert regressed.min() == 0  # after the ReLU


@pytest.mark.parametrize("teacher", [(12, 12), (7, 7), (8, 4), (2, 5)])
def test_a_larger_teacher_map_must_be_exactly_twice_as_large(teacher):
    with pytest.raises(ValueError, match="exactly twice as large; choose another hint_layer"):
        FitNetLoss().build([torch.Size((2, 3, 4, 4))], [torch.Size((2, 5, *teacher))])


def test_vectors_raise():
    with pytest.raises(ValueError, match="maps"):
        FitNetLoss().build([torch.Size((2, 3))], [torch.Size((2, 5))])


@pytest.mark.parametrize("hint_layer", [4, -5])
def test_a_missing_hint_layer_raises(hint_layer):
    teacher, student = FeatureTester.networks()
    with pytest.raises(ValueError, match=f"hint_layer={hint_layer} .* between -4 and 3"):
        FitNetLoss(hint_layer=hint_layer).connect(student, teacher, (3, 32, 32), torch.zeros(1))


def test_the_default_hint_is_the_third_feature():
    teacher, student = FeatureTester.networks()
    loss = FitNetLoss()
    loss.connect(student, teacher, (3, 32, 32), torch.zeros(1))
    assert loss.student_taps == (student.stages.features[2],)
    assert loss.teacher_taps == (teacher.stages.features[2],)
