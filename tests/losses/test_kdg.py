import pytest
import torch
from helpers.loss_tester import LossTester, batch, kl
from torch.testing import assert_close

from rld_lightning.losses import KDGLogitLoss, kdg_logit_loss


def fisher(logits):
    """``E over y ~ softmax(z) of [ g g' ]`` with g the gradient of the log-probability of y, by autograd: (C, C)."""
    gradient = torch.autograd.functional.jacobian(lambda z: z.log_softmax(-1), logits)
    return gradient.T @ (logits.softmax(-1)[:, None] * gradient)


class TestKDGLogit(LossTester):
    function = staticmethod(kdg_logit_loss)
    module = KDGLogitLoss
    settings = (
        {"weighting": "fisher", "temperature": 1.0, "weight": 1.0},
        {"weighting": "fisher", "temperature": 4.0, "weight": 0.9},
        {"weighting": "identity", "temperature": 1.0, "weight": 0.5},
        {"weighting": "fisher", "temperature": 2.0, "weight": 9.0, "logit_standardization": True},
    )
    weights = ("weight",)
    choices = ("weighting",)

    @staticmethod
    def naive(student, teacher, label, *, weighting, temperature, weight):
        d = student - teacher
        if weighting == "identity":
            return {"kdg_logit": weight * sum(x**2 for x in d) / 2}
        p = (teacher / temperature).softmax(-1)
        return {"kdg_logit": weight * d @ (p.diag() - p.outer(p)) @ d / 2}


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_fisher_is_half_the_fisher_information_along_the_difference(temperature):
    student, teacher, label = batch()
    d = student - teacher
    expected = torch.stack([d[i] @ fisher(teacher[i] / temperature) @ d[i] / 2 for i in range(8)])
    actual = kdg_logit_loss(student, teacher, label, temperature=temperature, reduction="none")["kdg_logit"]
    assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_fisher_approximates_the_divergence_near_the_teacher(temperature):
    direction, teacher, label = batch()
    student = teacher + 1e-4 * direction
    exact = torch.stack([kl(t / temperature, s / temperature) for t, s in zip(teacher, student, strict=True)])
    approximate = kdg_logit_loss(student, teacher, label, temperature=temperature, reduction="none")["kdg_logit"]
    assert_close(approximate, temperature**2 * exact, rtol=1e-3, atol=0)


def test_fisher_at_high_temperature_is_the_squared_error_of_centred_logits():
    student, teacher, label = batch()
    d = student - teacher
    expected = (d - d.mean(-1, keepdim=True)).square().sum(-1).mean() / (2 * 10)
    assert_close(kdg_logit_loss(student, teacher, label, temperature=1e6)["kdg_logit"], expected, rtol=1e-5, atol=0)


def test_a_constant_added_to_a_sample_changes_only_the_identity():
    student, teacher, label = batch()
    shifted = student + torch.arange(1.0, 9.0).unsqueeze(-1)
    assert_close(kdg_logit_loss(shifted, teacher, label), kdg_logit_loss(student, teacher, label))
    plain = [kdg_logit_loss(s, teacher, label, weighting="identity")["kdg_logit"] for s in (shifted, student)]
    assert abs(plain[0] - plain[1]) > 1
