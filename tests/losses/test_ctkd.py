import math

import pytest
import torch
from helpers.loss_tester import LossTester, batch, kl, zscore
from torch.testing import assert_close

from rld_lightning.losses import CTKDLoss, ModelOutput, StepContext, ctkd_loss, kd_loss, rows
from rld_lightning.losses.ctkd import ScaleGradient


def ctkd_at_the_start(
    student,
    teacher,
    label=None,
    *,
    weight,
    lowest_temperature,
    temperature_range,
    curriculum_epochs=10,
    logit_standardization=False,
    ignore_index=-100,
    reduction="mean",
):
    """The function with the module's hyper-parameters and temperature."""
    temperature = CTKDLoss(
        lowest_temperature=lowest_temperature,
        temperature_range=temperature_range,
        curriculum_epochs=curriculum_epochs,
    ).temperature()
    return ctkd_loss(
        student,
        teacher,
        label,
        temperature=temperature,
        weight=weight,
        logit_standardization=logit_standardization,
        ignore_index=ignore_index,
        reduction=reduction,
    )


class TestCTKD(LossTester):
    function = staticmethod(ctkd_at_the_start)
    module = CTKDLoss
    settings = (
        {"weight": 0.9, "lowest_temperature": 1.0, "temperature_range": 20.0},
        {"weight": 2.0, "lowest_temperature": 0.5, "temperature_range": 3.0, "curriculum_epochs": 5},
        {"weight": 9.0, "lowest_temperature": 1.0, "temperature_range": 2.0, "logit_standardization": True},
    )
    positive = ("lowest_temperature", "temperature_range", "curriculum_epochs")
    weights = ("weight",)

    @staticmethod
    def naive(
        student,
        teacher,
        label,
        *,
        weight,
        lowest_temperature,
        temperature_range,
        curriculum_epochs=10,
        logit_standardization=False,
    ):
        if logit_standardization:
            student, teacher = zscore(student), zscore(teacher)
        # The parameter is a float32 number.
        temperature = (lowest_temperature + temperature_range * torch.ones(()).sigmoid()).item()
        return {"ctkd": weight * temperature**2 * kl(teacher / temperature, student / temperature)}


def context(epoch=None):
    student, teacher, label = batch()
    return StepContext(ModelOutput(student), ModelOutput(teacher), label, epoch=epoch)


def test_defaults_are_the_papers():
    loss = CTKDLoss()
    assert (loss.weight, loss.ce_weight, loss.warmup_epochs, loss.curriculum_epochs) == (0.9, 0.1, 1, 10)
    assert loss.temperature().item() == pytest.approx(1 + 20 / (1 + math.exp(-1)))
    assert loss.temperature().item() == pytest.approx(15.62, abs=0.01)
    assert loss.statistics(context()) == {"temperature": loss.temperature()}


def test_curriculum():
    loss = CTKDLoss(curriculum_epochs=10)
    assert loss.curriculum(1) == pytest.approx(-0.0245, abs=1e-4)
    assert loss.curriculum(5) == pytest.approx(-0.5)
    assert [loss.curriculum(epoch) for epoch in (10, 11, 200, None)] == [-1, -1, -1, -1]
    factors = [loss.curriculum(epoch) for epoch in range(1, 11)]
    assert factors == sorted(factors, reverse=True)


@pytest.mark.parametrize("epoch", [1, 4, 10, None])
def test_the_gradient_of_theta_is_reversed_and_scaled(epoch):
    loss = CTKDLoss(ce_weight=0.0)
    loss(context(epoch))["ctkd"].backward()
    theta = torch.ones((), requires_grad=True)
    student, teacher, label = batch()
    plain = ctkd_loss(student, teacher, label, temperature=1 + 20 * theta.sigmoid(), weight=0.9)["ctkd"]
    plain.backward()
    assert theta.grad != 0
    # theta is float32, and so is its gradient.
    assert_close(loss.theta.grad, loss.curriculum(epoch) * theta.grad, rtol=1e-5, atol=0)


def test_a_step_on_theta_increases_the_loss():
    loss = CTKDLoss()
    optimizer = torch.optim.SGD(loss.parameters(), lr=1.0)
    before = loss(context())["ctkd"]
    before.backward()
    optimizer.step()
    assert loss(context())["ctkd"] > before


def test_the_students_gradient_is_not_reversed():
    student, teacher, label = batch()
    loss = CTKDLoss(ce_weight=0.0)
    actual = LossTester.value_and_gradient(loss, student, teacher, label)[1]
    expected = LossTester.value_and_gradient(
        kd_loss, student, teacher, label, temperature=loss.temperature().item(), weight=0.9
    )[1]
    assert_close(actual, expected)


@pytest.mark.parametrize("standardize", [False, True])
def test_temperature_gradient_through_distributions_and_factor(standardize):
    student, teacher, label = batch()

    def term(student, temperature):
        options = {"temperature": temperature, "logit_standardization": standardize}
        return ctkd_loss(student, teacher, label, **options)["ctkd"]

    temperature = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(term, (student.requires_grad_(), temperature))


def test_gradient_of_the_temperature_in_blocks(monkeypatch):
    student, teacher, label = batch()
    gradients = []
    for elements in (2**18, 10):
        monkeypatch.setitem(rows.BLOCK_ELEMENTS, "cpu", elements)
        temperature = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
        ctkd_loss(student, teacher, label, temperature=temperature)["ctkd"].backward()
        gradients.append(temperature.grad)
    assert_close(*gradients)


def test_scaled_gradient():
    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert torch.equal(ScaleGradient.apply(x, -0.5), x)
    (gradient,) = torch.autograd.grad(ScaleGradient.apply(x, -0.5).square().sum(), x)
    assert_close(gradient, -x.detach())


def test_theta_is_saved_and_trained():
    loss = CTKDLoss()
    assert list(loss.state_dict()) == ["theta"]
    assert [name for name, parameter in loss.named_parameters() if parameter.requires_grad] == ["theta"]


def test_temperature_must_be_a_scalar():
    with pytest.raises(ValueError, match=r"temperature must be a scalar tensor, got shape \(8,\)"):
        ctkd_loss(*batch(), temperature=torch.ones(8))
