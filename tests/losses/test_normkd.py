import pytest
import torch
from helpers.loss_tester import LossTester, batch, kl
from torch.testing import assert_close

from rld_lightning.losses import NormKDLoss, kd_loss, normkd_loss


class TestNormKD(LossTester):
    function = staticmethod(normkd_loss)
    module = NormKDLoss
    settings = (
        {"temperature": 2.0, "weight": 0.9},
        {"temperature": 1.0, "weight": 0.5},
        {"temperature": 2.0, "weight": 9.0, "logit_standardization": True},
    )
    weights = ("weight",)

    @staticmethod
    def naive(student, teacher, label, *, temperature, weight):
        def spread(logits):
            return ((logits - logits.mean()).square().sum() / (len(logits) - 1)).sqrt()

        a, b = temperature * spread(teacher), temperature * (spread(student) + 1e-7)
        # The library's z-scores add 1e-7 to the deviation, for both networks.
        return {"normkd": weight * a**2 * kl(teacher / (a + temperature * 1e-7), student / b)}

    def assert_naive(self, student, teacher, label, hyper, dtype, float32_rtol=5e-5):
        if student.shape[-1] > 2 or dtype == torch.float64:
            super().assert_naive(student, teacher, label, hyper, dtype, float32_rtol)
            return
        # Two normalised logits depend only on their order: the gradient is 0, up to rounding.
        student, teacher = student.to(dtype), teacher.to(dtype)
        expected = self.naive_batch(student.double(), teacher.double(), label, **hyper)["normkd"]
        actual = self.call(student, teacher, label, **hyper)["normkd"]
        assert_close(actual.double(), expected, rtol=float32_rtol, atol=1e-5)


def test_defaults_are_the_papers():
    loss = NormKDLoss()
    assert (loss.temperature, loss.weight, loss.ce_weight, loss.warmup_epochs) == (2.0, 0.9, 0.1, 1)


def test_is_invariant_to_the_students_scale_and_offset():
    student, teacher, label = batch()
    expected = normkd_loss(student, teacher, label, temperature=2.0)
    assert_close(normkd_loss(7 * student - 3, teacher, label, temperature=2.0), expected, rtol=1e-6, atol=0)
    leaf = student.clone().requires_grad_()
    normkd_loss(leaf, teacher, label, temperature=2.0)["normkd"].backward()
    assert leaf.grad.sum(-1).abs().max() < 1e-12
    assert (leaf.grad * student).sum(-1).abs().max() < 1e-6


def test_the_teachers_scale_determines_the_weight_of_a_sample():
    student, teacher, label = batch()
    expected = normkd_loss(student, teacher, label, temperature=2.0)["normkd"]
    actual = normkd_loss(student, 3 * teacher + 1, label, temperature=2.0)["normkd"]
    assert_close(actual, 9 * expected, rtol=1e-6, atol=0)


def test_equals_standardized_kd_weighted_by_the_teachers_variance():
    student, teacher, label = batch()
    options = {"temperature": 2.0, "reduction": "none"}
    standardized = kd_loss(student, teacher, label, **options, logit_standardization=True)["kd"]
    assert_close(normkd_loss(student, teacher, label, **options)["normkd"], teacher.var(-1) * standardized)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_constant_logits_stay_finite(dtype):
    student, teacher, _ = batch()
    constant = torch.full((8, 10), 3.3, dtype=dtype)
    terms, gradient = LossTester.value_and_gradient(normkd_loss, constant, teacher.to(dtype), temperature=2.0)
    assert terms["normkd"].isfinite()
    assert gradient.isfinite().all()
    terms, gradient = LossTester.value_and_gradient(normkd_loss, student.to(dtype), constant, temperature=2.0)
    assert terms["normkd"].abs() < 1e-10
    assert gradient.abs().max() < 1e-10
