import math

import pytest
import torch
from helpers.feature_tester import FeatureTester
from torch.testing import assert_close

from rld_lightning.losses.features import PKTLoss, pkt_loss


class TestPKT(FeatureTester):
    module = PKTLoss
    settings = ({}, {"weight": 10.0})
    golden_method = "pkt"

    def golden(self, case, tensors):
        assert case.hyper["eps"] == 1e-7
        terms = pkt_loss(tensors["student_pooled"], tensors["teacher_pooled"], weight=case.hyper["feat_weight"])
        return {"feature": terms["pkt"]}


def features(size=5):
    generator = torch.Generator().manual_seed(0)
    make = {"generator": generator, "dtype": torch.float64}
    return torch.randn(size, 4, **make), torch.randn(size, 7, **make)


def test_sample_by_sample():
    student, teacher = features()

    def probability(x, i, j):
        similarity = [(1 + torch.cosine_similarity(x[i], other, dim=0).item()) / 2 for other in x]
        return similarity[j] / sum(similarity)

    total = 0.0
    for i in range(5):
        for j in range(5):
            p, q = probability(teacher, i, j), probability(student, i, j)
            total += p * math.log(p / q)
    # The small constants of the published formula change the value by about as much.
    assert pkt_loss(student, teacher, weight=3.0)["pkt"].item() == pytest.approx(3 * total / 25, rel=1e-4)


def test_is_invariant_to_lengths_and_rotation():
    student, teacher = features()
    rotation, _ = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))
    lengths = torch.arange(1.0, 6.0, dtype=torch.float64).unsqueeze(1)
    expected = pkt_loss(student, teacher)
    assert_close(pkt_loss(lengths * student @ rotation, teacher / lengths), expected, rtol=1e-5, atol=0)


def test_a_sample_of_zeros_has_no_gradient():
    student, teacher = features()
    student[1] = 0
    student.requires_grad_()
    pkt_loss(student, teacher)["pkt"].backward()
    assert (student.grad[1] == 0).all()
    assert 0 < student.grad.abs().max() < 1e4


def test_opposite_features_stay_finite():
    torch.manual_seed(0)
    teacher, half = torch.randn(64, 512), torch.randn(32, 512)
    student = torch.cat([half, -half]).requires_grad_()
    term = pkt_loss(student, teacher)["pkt"]
    term.backward()
    assert term.isfinite()
    assert student.grad.isfinite().all()
