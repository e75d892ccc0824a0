import pytest
import torch
from helpers.feature_tester import FeatureTester
from torch.testing import assert_close

from rld_lightning.losses.features import NSTLoss, nst_loss


class TestNST(FeatureTester):
    module = NSTLoss
    settings = ({}, {"weight": 10.0})
    golden_method = "nst"

    def golden(self, case, tensors):
        terms = nst_loss(tensors["student_feats"], tensors["teacher_feats"], weight=case.hyper["feat_weight"])
        return {"feature": terms["nst"]}


def maps(side, students=4, teachers=6):
    generator = torch.Generator().manual_seed(0)
    make = {"generator": generator, "dtype": torch.float64}
    return torch.randn(2, students, side, side, **make), torch.randn(2, teachers, side, side, **make)


# Fewer positions than channels, as many as the student's, and more: both computations.
@pytest.mark.parametrize("side", [1, 2, 3])
def test_channel_by_channel(side):
    student, teacher = maps(side)
    expected = 0.0
    for s, t in zip(student, teacher, strict=True):
        ours, theirs = ([c.flatten() / c.square().sum().sqrt() for c in one] for one in (s, t))

        def mean_kernel(a, b):
            return sum(x.dot(y) ** 2 for x in a for y in b) / (len(a) * len(b))

        discrepancy = mean_kernel(ours, ours) + mean_kernel(theirs, theirs) - 2 * mean_kernel(ours, theirs)
        expected += discrepancy.item() / 2
    value = nst_loss([student, student], [teacher, teacher], weight=3.0)["nst"]
    assert value.item() == pytest.approx(3 * 2 * expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("side", [2, 3])
def test_gradcheck(side):
    student, teacher = maps(side)
    assert torch.autograd.gradcheck(lambda s: nst_loss([s], [teacher])["nst"], student.requires_grad_())


@pytest.mark.parametrize("side", [2, 3])
def test_is_invariant_to_order_sign_scale_and_copies_of_channels(side):
    student, teacher = maps(side)
    expected = nst_loss([student], [teacher])
    other = torch.cat([student.roll(1, 1), -3 * student], 1)
    assert_close(nst_loss([other], [0.1 * teacher.flip(1)]), expected)
    assert nst_loss([torch.cat([teacher, teacher], 1)], [teacher])["nst"].abs() < 1e-12


@pytest.mark.parametrize("side", [2, 3])
def test_dead_channels_receive_no_gradient(side):
    student, teacher = maps(side)
    student[:, 1] = 0
    student.requires_grad_()
    nst_loss([student], [teacher])["nst"].backward()
    assert (student.grad[:, 1] == 0).all()
    assert 0 < student.grad.abs().max() < 1e3
