import pytest
import torch
from helpers.feature_tester import FeatureTester
from helpers.golden import golden_cases
from torch.testing import assert_close

from rld_lightning.losses.features import RKDLoss, rkd_loss


class TestRKD(FeatureTester):
    module = RKDLoss
    settings = ({}, {"distance_weight": 0.0}, {"angle_weight": 0.0, "squared": True})
    wrong = (({"distance_weight": -1.0}, "distance_weight=-1.0"), ({"angle_weight": -1.0}, "angle_weight=-1.0"))
    golden_method = "rkd"

    def golden(self, case, tensors):
        assert case.hyper["feat_weight"] == 1
        options = {name: case.hyper[name] for name in ("distance_weight", "angle_weight", "squared")}
        terms = rkd_loss(tensors["student_pooled"], tensors["teacher_pooled"], **options)
        return {name.removeprefix("rkd_"): term for name, term in terms.items()}


def features(size=5):
    generator = torch.Generator().manual_seed(0)
    make = {"generator": generator, "dtype": torch.float64}
    return torch.randn(size, 4, **make), torch.randn(size, 7, **make)


def smooth_l1(a, b):
    difference = abs(a - b)
    return difference**2 / 2 if difference < 1 else difference - 0.5


@pytest.mark.parametrize("squared", [False, True])
def test_pair_by_pair_and_triplet_by_triplet(squared):
    student, teacher = features()

    def distance(x, i, j):
        return (x[i] - x[j]).square().sum().item() ** (1.0 if squared else 0.5)

    def cosine(x, i, j, k):
        return torch.cosine_similarity(x[j] - x[i], x[k] - x[i], dim=0).item() if i not in (j, k) else 0.0

    means = [sum(distance(x, i, j) for i in range(5) for j in range(5)) / 20 for x in (student, teacher)]
    distances = sum(
        smooth_l1(distance(student, i, j) / means[0], distance(teacher, i, j) / means[1])
        for i in range(5)
        for j in range(5)
    )
    angles = sum(
        smooth_l1(cosine(student, i, j, k), cosine(teacher, i, j, k))
        for i in range(5)
        for j in range(5)
        for k in range(5)
    )
    terms = rkd_loss(student, teacher, distance_weight=2.0, angle_weight=3.0, squared=squared)
    assert terms["rkd_distance"].item() == pytest.approx(2 * distances / 25, rel=1e-9)
    assert terms["rkd_angle"].item() == pytest.approx(3 * angles / 125, rel=1e-9)


def test_is_invariant_to_similarity_transforms():
    student, teacher = features()
    rotation, _ = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))
    assert_close(rkd_loss(3 * student @ rotation + 5, 0.1 * teacher - 2), rkd_loss(student, teacher))


def test_weight_zero_disables_a_term():
    student, teacher = features()
    assert set(rkd_loss(student, teacher, angle_weight=0.0)) == {"rkd_distance"}
    assert set(rkd_loss(student, teacher, distance_weight=0.0)) == {"rkd_angle"}


def largest_gradient(student, teacher, **options):
    student = student.detach().clone().requires_grad_()
    terms = rkd_loss(student, teacher, **options)
    sum(terms.values()).backward()
    assert all(term.isfinite() for term in terms.values())
    assert student.grad.isfinite().all()
    return student.grad.abs().max().item()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("squared", [False, True])
def test_equal_samples_have_a_bounded_gradient(squared, dtype):
    (case,) = [case for case in golden_cases("rkd") if case.id == "rkd/duplicate_rows"]
    tensors = case.tensors(dtype)
    student, teacher = tensors["student_pooled"], tensors["teacher_pooled"]
    assert len(student.unique(dim=0)) == len(student) - 1
    ordinary = largest_gradient(student + 0.1 * torch.eye(*student.shape, dtype=dtype), teacher, squared=squared)
    assert 0 < largest_gradient(student, teacher, squared=squared) < 3 * ordinary
    assert 0 < largest_gradient(student, teacher[[0, 0, 0, 1, 2, 3]], squared=squared) < 3 * ordinary


def test_almost_equal_samples_have_a_bounded_gradient_in_float32():
    student, teacher = (one.float() for one in features())
    ordinary = largest_gradient(student, teacher)
    student[1] = student[0] * (1 + 1e-6)
    assert 0 < largest_gradient(student, teacher) < 3 * ordinary


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_collapsed_student(dtype):
    _, teacher = features()
    assert largest_gradient(torch.ones(5, 4, dtype=dtype), teacher.to(dtype)) == 0


def test_one_sample_has_no_loss():
    student, teacher = features(size=1)
    assert largest_gradient(student, teacher) == 0
    assert sum(rkd_loss(student, teacher).values()) == 0


def test_features_far_from_the_origin_keep_their_precision():
    student, teacher = (one.float() for one in features(size=12))
    far = student + 1000.0
    assert_close(rkd_loss(far, teacher), rkd_loss((far - 1000.0), teacher), rtol=1e-6, atol=1e-6)
