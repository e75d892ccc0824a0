import pytest
import torch
from helpers.loss_tester import LossTester, batch
from torch.testing import assert_close

from rld_lightning.losses import NKDLoss, dkd_loss, nkd_loss


class TestNKD(LossTester):
    function = staticmethod(nkd_loss)
    module = NKDLoss
    settings = (
        {"gamma": 1.5, "temperature": 1.0},
        {"gamma": 3.5, "temperature": 3.0},
        {"gamma": 1.5, "temperature": 2.0, "logit_standardization": True},
    )
    weights = ("gamma",)
    vanishes = "never"

    @staticmethod
    def naive(student, teacher, label, *, gamma, temperature):
        others = [k for k in range(len(student)) if k != label]
        target = -teacher.softmax(-1)[label] * student.log_softmax(-1)[label]
        p = (teacher[others] / temperature).softmax(-1)
        rest = -(p * (student[others] / temperature).log_softmax(-1)).sum()
        return {"target": target, "non_target": gamma * temperature**2 * rest}


def test_defaults_are_the_papers():
    loss = NKDLoss()
    assert (loss.gamma, loss.temperature, loss.ce_weight, loss.warmup_epochs) == (1.5, 1.0, 1.0, 1)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_non_target_is_nckd_plus_the_teachers_entropy(temperature):
    student, teacher, label = batch()
    nkd, nckd = student.clone().requires_grad_(), student.clone().requires_grad_()
    ours = nkd_loss(nkd, teacher, label, gamma=1.0, temperature=temperature)["non_target"]
    dkds = dkd_loss(nckd, teacher, label, alpha=0.0, beta=1.0, temperature=temperature)["nckd"]
    ours.backward()
    dkds.backward()
    assert_close(nkd.grad, nckd.grad)
    others = (teacher / temperature).scatter(-1, label.unsqueeze(-1), -torch.inf).softmax(-1)
    assert_close((ours - dkds).detach(), temperature**2 * torch.special.entr(others).sum(-1).mean())


def test_target_is_a_cross_entropy_weighted_by_the_teacher():
    student, teacher, label = batch()
    target = nkd_loss(student, teacher, label, temperature=3.0, reduction="none")["target"]
    ce = torch.nn.functional.cross_entropy(student, label, reduction="none")
    assert_close(target, teacher.softmax(-1)[range(8), label] * ce)


def test_two_classes_have_no_non_target_term():
    student, teacher, label = batch("two_classes")
    leaf = student.clone().requires_grad_()
    term = nkd_loss(leaf, teacher, label)["non_target"]
    term.backward()
    assert term == 0
    assert (leaf.grad == 0).all()


def test_hand_worked():
    """Teacher (1/2, 1/4, 1/4), true class 0, student (1/4, 1/4, 1/2): (1/2) ln 4, and 1/2 ln 3 + 1/2 ln(3/2)."""
    teacher = torch.tensor([[0.5, 0.25, 0.25]]).log()
    student = torch.tensor([[0.25, 0.25, 0.5]]).log()
    terms = nkd_loss(student, teacher, torch.tensor([0]), gamma=1.0)
    assert terms["target"].item() == pytest.approx(0.6931472, abs=1e-6)
    assert terms["non_target"].item() == pytest.approx(0.7520387, abs=1e-6)
