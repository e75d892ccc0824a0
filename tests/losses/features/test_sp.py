import pytest
import torch
from helpers.feature_tester import FeatureTester
from torch.testing import assert_close

from rld_lightning.losses.features import SPLoss, sp_loss


class TestSP(FeatureTester):
    module = SPLoss
    settings = ({}, {"weight": 10.0})
    golden_method = "sp"

    def golden(self, case, tensors):
        (student,), (teacher,) = tensors["student_feats"], tensors["teacher_feats"]
        return {"feature": sp_loss(student, teacher, weight=case.hyper["feat_weight"])["sp"]}


def features(size=5):
    generator = torch.Generator().manual_seed(0)
    make = {"generator": generator, "dtype": torch.float64}
    return torch.randn(size, 3, 2, 2, **make), torch.randn(size, 7, **make)


def test_sample_by_sample():
    student, teacher = features()

    def row(feature, i):
        products = torch.stack([(feature[i] * other).sum() for other in feature])
        return products / products.square().sum().sqrt()

    expected = sum((row(student, i) - row(teacher, i)).square().sum() for i in range(5)) / 25
    assert_close(sp_loss(student, teacher, weight=4.0)["sp"], 4 * expected)


def test_is_invariant_to_rotation_and_scale():
    student, teacher = features()
    rotation, _ = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64))
    assert_close(sp_loss(3 * student.flatten(1) @ rotation, 0.1 * teacher), sp_loss(student, teacher))


def test_a_sample_of_zeros_moves_towards_similar_samples():
    student, teacher = (one.flatten(1) for one in features())
    student[1] = 0
    student.requires_grad_()
    sp_loss(student, teacher, weight=1.0)["sp"].backward()
    student, gradient = student.detach(), student.grad
    wanted = torch.nn.functional.normalize(teacher @ teacher.T)[:, 1:2]
    direction = student / (student @ student.T).norm(dim=1, keepdim=True).clamp(min=1e-9)
    assert_close(gradient[1], -2 * (wanted * direction).sum(0) / 25)
    assert gradient.abs().max() < 1


def test_different_batch_sizes_raise():
    student, teacher = features()
    with pytest.raises(ValueError, match="batch"):
        sp_loss(student, teacher[:-1])
