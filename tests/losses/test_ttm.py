import pytest
import torch
from helpers.loss_tester import LossTester, batch, kl
from torch.testing import assert_close

from rld_lightning.losses import TTMLoss, WTTMLoss, kd_loss, ttm_loss, wttm_loss
from rld_lightning.losses.wttm import power_sum


class TestTTM(LossTester):
    function = staticmethod(ttm_loss)
    module = TTMLoss
    settings = (
        {"gamma": 0.1, "weight": 45.0},
        {"gamma": 0.5, "weight": 1.0},
        {"gamma": 0.5, "weight": 9.0, "logit_standardization": True},
    )
    positive = ("gamma",)
    weights = ("weight",)
    vanishes = "never"

    @staticmethod
    def naive(student, teacher, label, *, gamma, weight):
        return {"ttm": weight * kl(gamma * teacher, student)}


class TestWTTM(TestTTM):
    function = staticmethod(wttm_loss)
    module = WTTMLoss
    settings = (
        {"gamma": 0.2, "weight": 4.0},
        {"gamma": 0.7, "weight": 1.0},
        {"gamma": 0.7, "weight": 9.0, "logit_standardization": True},
    )

    @staticmethod
    def naive(student, teacher, label, *, gamma, weight):
        uncertainty = sum(p**gamma for p in teacher.softmax(-1).tolist())
        return {"wttm": weight * uncertainty * kl(gamma * teacher, student)}


def test_defaults_are_the_published_examples():
    loss = TTMLoss()
    assert (loss.gamma, loss.weight, loss.ce_weight, loss.warmup_epochs) == (0.1, 45.0, 1.0, 1)
    loss = WTTMLoss()
    assert (loss.gamma, loss.weight, loss.ce_weight, loss.warmup_epochs) == (0.2, 4.0, 1.0, 1)


@pytest.mark.parametrize("gamma", [0.1, 0.5, 1.0])
def test_the_transformed_teacher_is_a_power_of_its_probabilities(gamma):
    student, teacher, _ = batch()
    powers = teacher.softmax(-1) ** gamma
    matched = powers / powers.sum(-1, keepdim=True)
    divergence = (matched * (matched.log() - student.log_softmax(-1))).sum(-1)
    assert_close(ttm_loss(student, teacher, gamma=gamma, reduction="none")["ttm"], divergence)
    weighted = wttm_loss(student, teacher, gamma=gamma, reduction="none")["wttm"]
    assert_close(weighted, powers.sum(-1) * divergence)


@pytest.mark.parametrize("gamma", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("scenario", ["random", "confident", "two_classes", "many_classes"])
def test_weight_of_a_sample(scenario, gamma):
    _, teacher, _ = batch(scenario)
    classes = teacher.shape[-1]
    uncertainty = power_sum(teacher, gamma)
    assert_close(uncertainty, (teacher.softmax(-1) ** gamma).sum(-1))
    assert (uncertainty >= 1 - 1e-12).all()
    assert (uncertainty <= classes ** (1 - gamma) + 1e-12).all()
    # The extremes: a certain teacher, and a uniform one.
    assert_close(power_sum(torch.eye(classes)[:1] * 1e4, gamma), torch.ones(1))
    assert_close(power_sum(torch.zeros(1, classes), gamma), torch.tensor([classes ** (1 - gamma)]))


@pytest.mark.parametrize("loss", [ttm_loss, wttm_loss])
def test_gamma_of_one_is_kd_at_temperature_one(loss):
    student, teacher, _ = batch()
    expected = kd_loss(student, teacher, temperature=1.0)["kd"]
    assert_close(next(iter(loss(student, teacher, gamma=1.0).values())), expected)


@pytest.mark.parametrize("loss", [ttm_loss, wttm_loss])
def test_vanishes_at_the_transformed_teacher(loss):
    _, teacher, _ = batch()
    terms, gradient = LossTester.value_and_gradient(loss, 0.3 * teacher, teacher, gamma=0.3)
    assert sum(terms.values()).abs() < 1e-12
    assert gradient.abs().max() < 1e-12


@pytest.mark.parametrize("gamma", [1.5, 0])
@pytest.mark.parametrize("call", [TTMLoss, WTTMLoss, lambda gamma: ttm_loss(*batch(), gamma=gamma)])
def test_gamma_out_of_range(call, gamma):
    with pytest.raises(ValueError, match=f"gamma={gamma} is not allowed; it must be > 0 and <= 1"):
        call(gamma=gamma)
