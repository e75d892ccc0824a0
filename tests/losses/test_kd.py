import pytest
import torch
from helpers.loss_tester import LossTester, batch, kl
from torch.testing import assert_close

from rld_lightning.losses import KDLoss, kd_loss


class TestKD(LossTester):
    function = staticmethod(kd_loss)
    module = KDLoss
    settings = (
        {"temperature": 4.0, "weight": 0.9},
        {"temperature": 1.0, "weight": 0.5},
        {"temperature": 2.0, "weight": 9.0, "logit_standardization": True},
    )
    weights = ("weight",)

    @staticmethod
    def naive(student, teacher, label, *, temperature, weight):
        return {"kd": weight * temperature**2 * kl(teacher / temperature, student / temperature)}


def test_defaults_are_the_papers():
    loss = KDLoss()
    assert (loss.temperature, loss.weight, loss.ce_weight, loss.warmup_epochs) == (4.0, 0.9, 0.1, 1)


def test_hand_worked():
    """Teacher (1/2, 1/4, 1/4) and student (1/4, 1/4, 1/2): ln(2)/2 - ln(2)/4 = ln(2)/4."""
    teacher = torch.tensor([[0.5, 0.25, 0.25]]).log()
    student = torch.tensor([[0.25, 0.25, 0.5]]).log()
    assert kd_loss(student, teacher, temperature=1.0)["kd"].item() == pytest.approx(0.1732868, abs=1e-6)
    # At temperature 2, logits twice as large give the same distributions, and the term is four times as large.
    assert kd_loss(2 * student, 2 * teacher, temperature=2.0)["kd"].item() == pytest.approx(0.6931472, abs=1e-6)


@pytest.mark.parametrize(("temperature", "tolerance"), [(1e2, 5e-2), (1e4, 5e-4)])
def test_high_temperature_compares_centred_logits(temperature, tolerance):
    student, teacher, _ = batch()
    difference = student - teacher
    centred = difference - difference.mean(-1, keepdim=True)
    expected = centred.square().sum(-1).mean() / (2 * student.shape[-1])
    assert_close(kd_loss(student, teacher, temperature=temperature)["kd"], expected, rtol=tolerance, atol=0)


def test_standardization_removes_the_scale():
    student, teacher, _ = batch()
    options = {"temperature": 2.0, "logit_standardization": True}
    expected = kd_loss(student, teacher, **options)
    assert_close(kd_loss(5 * student - 3, 0.5 * teacher + 1, **options), expected, rtol=1e-6, atol=0)
