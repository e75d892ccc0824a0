from itertools import pairwise

import pytest
import torch
from helpers.feature_tester import FeatureTester
from torch.testing import assert_close

from rld_lightning.losses.features import KDSVDLoss, kdsvd_loss


class TestKDSVD(FeatureTester):
    module = KDSVDLoss
    settings = ({}, {"weight": 10.0, "num_vectors": 2})
    wrong = (({"weight": -1.0}, "weight=-1.0"), ({"num_vectors": 0}, "num_vectors=0"))
    golden_method = "kdsvd"

    def golden(self, case, tensors):
        hyper = {"weight": case.hyper["feat_weight"], "num_vectors": case.hyper["k"]}
        return {"feature": kdsvd_loss(tensors["student_feats"], tensors["teacher_feats"], **hyper)["kdsvd"]}


def maps(batch=3):
    """Three stages of both networks: wider than high, higher than wide, and fewer rows than columns."""
    generator = torch.Generator().manual_seed(0)
    shapes = [((2, 5, 8), (4, 5, 8)), ((3, 6, 4), (5, 6, 4)), ((1, 3, 6), (2, 3, 6))]
    student, teacher = zip(
        *([torch.randn(batch, *one, generator=generator, dtype=torch.float64) for one in pair] for pair in shapes),
        strict=True,
    )
    return list(student), list(teacher)


def by_svd(student, teacher, n):
    """The loss image by image, with PyTorch's SVD and its gradient."""
    total = 0.0
    for i in range(len(student[0])):
        stages = []
        for s, t in zip(student, teacher, strict=True):
            _, _, ours = torch.linalg.svd(s[i].reshape(-1, s.shape[-1]), full_matrices=False)
            _, strength, theirs = torch.linalg.svd(t[i].reshape(-1, t.shape[-1]), full_matrices=False)
            strength = strength[:n] / strength[:n].square().sum().sqrt()
            pairs = []
            for j in range(n):
                v = theirs[j] * theirs[j][theirs[j].abs().argmax()].sign()
                best = max(ours[: n + 3], key=lambda u: abs(u.dot(v).item()))
                pairs.append((best * best.dot(v).sign().detach() * strength[j], v * strength[j]))
            stages.append(pairs)
        for shallow, deep in pairwise(stages):
            for (s0, t0), (s1, t1) in zip(shallow, deep, strict=True):
                for a in range(len(s1)):
                    for b in range(len(s0)):
                        ours = (-((s1[a] - s0[b]) ** 2) / 8).exp()
                        theirs = (-((t1[a] - t0[b]) ** 2) / 8).exp()
                        total = total + (ours - theirs) ** 2
    return total / len(student[0])


@pytest.mark.parametrize("n", [1, 2, 3])
def test_image_by_image(n):
    student, teacher = maps()
    leaves = [one.requires_grad_() for one in student]
    value = kdsvd_loss(student, teacher, weight=3.0, num_vectors=n)["kdsvd"]
    expected = 3 * by_svd(student, teacher, n)
    assert_close(value, expected, rtol=1e-9, atol=0)
    gradients, expected_gradients = (torch.autograd.grad(one, leaves) for one in (value, expected))
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        largest = expected_gradient.abs().max().item()
        assert_close(gradient, expected_gradient, rtol=0, atol=1e-4 * largest)  # the error from SMALLEST_GAP


def test_numerical_derivative():
    student, teacher = maps(batch=1)

    def loss(*student):
        return kdsvd_loss(student, teacher)["kdsvd"]

    assert torch.autograd.gradcheck(loss, [one.requires_grad_() for one in student])


def test_is_invariant_to_sign_scale_and_order_of_rows():
    student, teacher = maps()
    expected = kdsvd_loss(student, teacher)
    signs = [-1.0, 1.0, -1.0]
    others = [5 * sign * one.flip(1, 2) for sign, one in zip(signs, student, strict=True)]
    assert_close(kdsvd_loss(others, [-0.1 * one for one in teacher]), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["zero", "half_dead", "equal_columns", "orthogonal", "tiny"])
def test_maps_without_a_unique_decomposition_have_a_bounded_gradient(kind, dtype):
    student, teacher = ([one.to(dtype) for one in network] for network in maps())
    unscaled = 1.0
    if kind == "zero":
        student[1] = torch.zeros_like(student[1])
    elif kind == "half_dead":
        student[0][..., :5] = 0
    elif kind == "equal_columns":
        student[1] = torch.ones_like(student[1])
    elif kind == "orthogonal":
        student[1] = torch.eye(18, 4, dtype=dtype).reshape(1, 3, 6, 4).repeat(3, 1, 1, 1)
    else:
        unscaled = 1e-8
        student[1] = unscaled * student[1]
    leaves = [one.requires_grad_() for one in student]
    term = kdsvd_loss(student, teacher, num_vectors=2)["kdsvd"]
    assert term.isfinite()
    for gradient in torch.autograd.grad(term, leaves):
        assert gradient.isfinite().all()
        assert unscaled * gradient.abs().max() < 100


def test_a_single_stage_raises():
    student, teacher = maps()
    with pytest.raises(ValueError, match="at least two"):
        kdsvd_loss(student[:1], teacher[:1])
    with pytest.raises(ValueError, match="at least two"):
        KDSVDLoss().build([student[0].shape], [teacher[0].shape])


def test_vectors_raise():
    student, teacher = maps()
    with pytest.raises(ValueError, match="maps"):
        kdsvd_loss([one.flatten(1) for one in student], teacher)


def test_more_vectors_than_columns_raise():
    student, teacher = maps()
    with pytest.raises(ValueError, match=r"num_vectors=4 .* has 3 singular"):
        kdsvd_loss(student, teacher, num_vectors=4)
