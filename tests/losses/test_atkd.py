import pytest
import torch
from helpers.loss_tester import LossTester, batch, kl, zscore
from torch.testing import assert_close

from rld_lightning.losses import ATKDLoss, atkd_loss, kd_loss
from rld_lightning.losses.atkd import adaptive_temperature


class TestATKD(LossTester):
    function = staticmethod(atkd_loss)
    module = ATKDLoss
    settings = (
        {"weight": 9.0, "source": "both", "logit_standardization": True},
        {"weight": 1.0, "source": "both", "logit_standardization": False},
    )
    positive = ()
    weights = ("weight",)
    choices = ("source",)
    detaches_student = True

    @staticmethod
    def naive(student, teacher, label, *, weight, source):
        scores = teacher.tolist() + (student.tolist() if source == "both" else [])
        temperature = (1 + 3**0.5) / 2 * max(abs(score) for score in scores)
        return {"atkd": weight * temperature**2 * kl(teacher / temperature, student / temperature)}


class TestATKDOfTheTeacher(TestATKD):
    settings = ({"weight": 9.0, "source": "teacher", "logit_standardization": True},)
    detaches_student = False


def test_defaults_are_the_published_example():
    loss = ATKDLoss()
    assert (loss.weight, loss.source, loss.ce_weight, loss.warmup_epochs) == (9.0, "both", 0.1, 1)


def test_temperature():
    student, teacher, _ = batch()
    student.requires_grad_()
    both = adaptive_temperature(student, teacher, "both")
    assert both.shape == (8, 1)
    assert not both.requires_grad
    assert (both > 0).all()
    largest = torch.cat([student, teacher], -1).abs().amax(-1, keepdim=True).detach()
    assert_close(both, 1.3660254037844386 * largest)
    assert_close(adaptive_temperature(student, teacher, "teacher"), 1.3660254037844386 * teacher.abs().amax(-1, True))
    # The absolute value counts.
    assert adaptive_temperature(torch.zeros(1, 3), torch.tensor([[1.0, -4.0, 3.0]]), "both").item() > 5


@pytest.mark.parametrize("source", ["both", "teacher"])
def test_equals_kd_with_a_temperature_per_sample(source):
    student, teacher, _ = batch()
    terms = atkd_loss(student, teacher, source=source, reduction="none")["atkd"]
    z = [torch.stack([zscore(row) for row in logits]) for logits in (student, teacher)]
    for i, temperature in enumerate(adaptive_temperature(*z, source).flatten().tolist()):
        sample = student[i : i + 1], teacher[i : i + 1]
        assert_close(terms[i], kd_loss(*sample, temperature=temperature, logit_standardization=True)["kd"])


def test_is_invariant_to_scale_and_offset_of_either_network():
    student, teacher, label = batch()
    expected = atkd_loss(student, teacher, label)
    assert_close(atkd_loss(5 * student - 3, 0.5 * teacher + 1, label), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("source", ["both", "teacher"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_constant_logits_stay_finite(dtype, source):
    student, _, _ = batch()
    constant = torch.full((8, 10), 3.3, dtype=dtype)
    for pair in ((student.to(dtype), constant), (constant, student.to(dtype)), (constant, constant)):
        terms, gradient = LossTester.value_and_gradient(atkd_loss, *pair, source=source)
        assert terms["atkd"].isfinite()
        assert gradient.isfinite().all()
