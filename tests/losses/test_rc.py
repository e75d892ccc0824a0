import pytest
import torch
from helpers.loss_tester import LossTester, batch, kl
from torch.testing import assert_close

from rld_lightning.losses import RCLoss, kd_loss, rc_loss
from rld_lightning.losses.rc import correct_logits


class TestRC(LossTester):
    function = staticmethod(rc_loss)
    module = RCLoss
    settings = (
        {"temperature": 4.0, "kd_weight": 1.0, "rc_weight": 0.1},
        {"temperature": 1.0, "kd_weight": 0.5, "rc_weight": 2.0},
        {"temperature": 2.0, "kd_weight": 9.0, "rc_weight": 0.9, "logit_standardization": True},
    )
    weights = ("kd_weight", "rc_weight")
    vanishes = "never"
    detaches_student = True

    @staticmethod
    def naive(student, teacher, label, *, temperature, kd_weight, rc_weight):
        corrected = student.detach().clone()
        corrected[label] += max(corrected.tolist())
        return {
            "kd": kd_weight * temperature**2 * kl(teacher / temperature, student / temperature),
            "rc": rc_weight * temperature**2 * kl(corrected / temperature, student / temperature),
        }


def test_defaults_are_those_of_the_public_code():
    loss = RCLoss()
    assert (loss.temperature, loss.kd_weight, loss.rc_weight) == (4.0, 1.0, 0.1)
    assert (loss.ce_weight, loss.warmup_epochs) == (1.0, 1)


@pytest.mark.parametrize("standardize", [False, True])
def test_first_term_is_kd(standardize):
    student, teacher, label = batch()
    options = {"temperature": 3.0, "logit_standardization": standardize}
    expected = kd_loss(student, teacher, label, **options)["kd"]
    assert_close(rc_loss(student, teacher, label, **options)["kd"], expected)


def test_correction_uses_the_student_only():
    student, teacher, label = batch()
    expected = rc_loss(student, teacher, label, temperature=4.0)["rc"]
    assert_close(rc_loss(student, -teacher, label, temperature=4.0)["rc"], expected, rtol=0, atol=0)


def test_only_the_true_class_is_corrected():
    student = torch.tensor([[1.0, 3.0, 0.0], [-1.0, -3.0, -2.0], [-1.0, 2.0, 0.0]])
    corrected = correct_logits(student, torch.tensor([0, 1, 0]))
    # Becomes the largest if it is not negative; decreases if all are negative; ties stay.
    assert corrected.tolist() == [[4.0, 3.0, 0.0], [-1.0, -4.0, -2.0], [1.0, 2.0, 0.0]]


def test_gradient_is_the_difference_of_probabilities():
    """The target is a constant: T (softmax(s / T) - softmax(s' / T)) for each sample, which raises the true class."""
    student, teacher, label = batch()
    student = student + 5
    leaf = student.clone().requires_grad_()
    rc_loss(leaf, teacher, label, temperature=2.0, rc_weight=1.0, reduction="sum")["rc"].backward()
    expected = 2 * ((student / 2).softmax(-1) - (correct_logits(student, label) / 2).softmax(-1))
    assert_close(leaf.grad, expected)
    assert (leaf.grad.gather(-1, label.unsqueeze(-1)) < 0).all()


def test_depends_on_the_offset_of_the_student():
    student, teacher, label = batch()
    terms = rc_loss(student, teacher, label, temperature=4.0)
    shifted = rc_loss(student + 3, teacher, label, temperature=4.0)
    assert_close(shifted["kd"], terms["kd"])
    assert shifted["rc"] > 1.5 * terms["rc"]
    standardized = {"temperature": 2.0, "logit_standardization": True}
    assert_close(rc_loss(student + 3, teacher, label, **standardized), rc_loss(student, teacher, label, **standardized))
