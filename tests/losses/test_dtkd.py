import pytest
import torch
from helpers.loss_tester import LossTester, batch, kl
from torch.testing import assert_close

from rld_lightning.losses import DTKDLoss, dtkd_loss, kd_loss
from rld_lightning.losses.dtkd import dynamic_temperatures


class TestDTKD(LossTester):
    function = staticmethod(dtkd_loss)
    module = DTKDLoss
    settings = (
        {"temperature": 4.0, "dtkd_weight": 3.0, "kd_weight": 1.0},
        {"temperature": 1.0, "dtkd_weight": 1.0, "kd_weight": 0.5},
        {"temperature": 2.0, "dtkd_weight": 9.0, "kd_weight": 9.0, "logit_standardization": True},
    )
    weights = ("dtkd_weight", "kd_weight")

    @staticmethod
    def naive(student, teacher, label, *, temperature, dtkd_weight, kd_weight):
        smallest = torch.tensor(1e-7, dtype=torch.float64)
        largest_s, largest_t = torch.maximum(student.max(), smallest), torch.maximum(teacher.max(), smallest)
        of_student = temperature * largest_s / ((largest_s + largest_t) / 2)
        of_teacher = temperature * largest_t / ((largest_s + largest_t) / 2)
        return {
            "dtkd": dtkd_weight * of_student * of_teacher * kl(teacher / of_teacher, student / of_student),
            "kd": kd_weight * temperature**2 * kl(teacher / temperature, student / temperature),
        }


def test_defaults_are_those_of_the_authors_code():
    loss = DTKDLoss()
    assert (loss.temperature, loss.dtkd_weight, loss.kd_weight) == (4.0, 3.0, 1.0)
    assert (loss.ce_weight, loss.warmup_epochs) == (1.0, 20)


def test_temperatures():
    student, teacher, _ = batch()
    of_student, of_teacher = dynamic_temperatures(student, teacher, 4.0)
    assert of_student.shape == of_teacher.shape == (8, 1)
    assert_close(of_student + of_teacher, torch.full((8, 1), 8.0, dtype=torch.float64))
    # In proportion to the largest logits, so that both softened largest logits are equal.
    assert_close((student / of_student).amax(-1), (teacher / of_teacher).amax(-1))
    pair = dynamic_temperatures(torch.tensor([[-9.0, 1.0]]), torch.tensor([[3.0, -4.0]]), 4.0)
    assert_close(torch.cat(pair), torch.tensor([[2.0], [6.0]]))


def test_equal_largest_logits_are_kd():
    student, teacher, label = batch()
    student = student - student.amax(-1, keepdim=True) + 5
    teacher = teacher - teacher.amax(-1, keepdim=True) + 5
    terms = dtkd_loss(student, teacher, label, temperature=4.0, reduction="none")
    assert_close(terms["dtkd"], terms["kd"])
    assert_close(terms["kd"], kd_loss(student, teacher, temperature=4.0, reduction="none")["kd"])


def test_a_common_scale_acts_as_the_inverse_temperature():
    """The temperatures do not change if all logits are multiplied by c: the same as T / c, up to the factor T^2."""
    student, teacher, _ = batch()
    scaled = dtkd_loss(3 * student, 3 * teacher, temperature=4.0)["dtkd"]
    assert_close(scaled, 9 * dtkd_loss(student, teacher, temperature=4 / 3)["dtkd"])


def test_gradient_passes_through_the_temperatures():
    """The derivative along the student's scale differs from the one at fixed temperatures."""
    student, teacher, _ = batch()
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    dtkd = dtkd_loss(scale * student, teacher, temperature=4.0)["dtkd"]
    (slope,) = torch.autograd.grad(dtkd, scale)
    step = 1e-5
    up, down = (dtkd_loss((1 + h) * student, teacher, temperature=4.0)["dtkd"] for h in (step, -step))
    assert_close(slope, (up - down) / (2 * step), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("offset", [(-50.0, 0.0), (0.0, -50.0), (-50.0, -50.0)], ids=["student", "teacher", "both"])
def test_rows_without_a_positive_logit_stay_finite(offset, dtype):
    student, teacher, _ = (tensor.to(dtype) for tensor in batch())
    student, teacher = student + offset[0], teacher + offset[1]
    terms, gradient = LossTester.value_and_gradient(dtkd_loss, student, teacher, temperature=4.0, kd_weight=0.0)
    assert terms["dtkd"].isfinite()
    assert terms["dtkd"] >= 0
    assert gradient.isfinite().all()
    for temperature in dynamic_temperatures(student, teacher, 4.0):
        assert (temperature > 0).all()
        assert (temperature <= 8).all()
    if offset[0] == offset[1]:
        # Both maxima are clamped to the same value: plain KD.
        assert_close(terms["dtkd"], kd_loss(student, teacher, temperature=4.0)["kd"])


def test_opposite_largest_logits():
    """Their sum, by which the published code divides, is 0."""
    student, teacher = torch.tensor([[-2.0, -3.0]]), torch.tensor([[2.0, 1.0]])
    terms, gradient = LossTester.value_and_gradient(dtkd_loss, student, teacher, temperature=4.0)
    assert all(term.isfinite() for term in terms.values())
    assert gradient.isfinite().all()


def test_logits_of_zeros():
    student, teacher, _ = batch()
    zeros = torch.zeros_like(student)
    for pair in ((student, zeros), (zeros, teacher), (zeros, zeros)):
        terms, gradient = LossTester.value_and_gradient(dtkd_loss, *pair, temperature=4.0)
        assert all(term.isfinite() for term in terms.values())
        assert gradient.isfinite().all()
