import torch
from helpers.loss_tester import LossTester, batch, kl, one_against_rest
from torch.testing import assert_close

from rld_lightning.losses import DKDLoss, dkd_loss, kd_loss


class TestDKD(LossTester):
    function = staticmethod(dkd_loss)
    module = DKDLoss
    settings = (
        {"alpha": 1.0, "beta": 8.0, "temperature": 4.0},
        {"alpha": 2.0, "beta": 0.5, "temperature": 1.0},
        {"alpha": 9.0, "beta": 72.0, "temperature": 2.0, "logit_standardization": True},
    )
    weights = ("alpha", "beta")

    @staticmethod
    def naive(student, teacher, label, *, alpha, beta, temperature):
        student, teacher = student / temperature, teacher / temperature
        others = [k for k in range(len(student)) if k != label]
        return {
            "tckd": alpha * temperature**2 * kl(one_against_rest(teacher, label), one_against_rest(student, label)),
            "nckd": beta * temperature**2 * kl(teacher[others], student[others]),
        }


def test_defaults_are_the_papers():
    loss = DKDLoss()
    assert (loss.alpha, loss.beta, loss.temperature, loss.ce_weight, loss.warmup_epochs) == (1.0, 8.0, 4.0, 1.0, 20)


def test_kd_is_tckd_plus_nckd_weighted_by_the_rest():
    """Equation 5 of the paper: KD = TCKD + (1 - p_y) NCKD, of every sample."""
    student, teacher, label = batch()
    options = {"temperature": 3.0, "reduction": "none"}
    terms = dkd_loss(student, teacher, label, alpha=1.0, beta=1.0, **options)
    rest = 1 - (teacher / 3).softmax(-1).gather(-1, label.unsqueeze(-1)).squeeze(-1)
    assert_close(terms["tckd"] + rest * terms["nckd"], kd_loss(student, teacher, **options)["kd"])


def test_one_logit_far_above_the_rest():
    """The published code gives an infinite loss and NaN gradients here."""
    student = torch.zeros(2, 10)
    student[:, 0] = 120.0
    teacher = torch.zeros(2, 10)
    label = torch.tensor([0, 1])
    student.requires_grad_()
    terms = dkd_loss(student, teacher, label, alpha=1.0, beta=1.0, temperature=1.0)
    sum(terms.values()).backward()
    # Row 0: KL([.1, .9] || [1 - 9e-120, 9e-120]); row 1: KL([.1, .9] || [e-120, 1]), then uniform against a peak.
    row0 = 0.9 * (120 - torch.tensor(9.0).log()) + 0.1 * torch.tensor(0.1).log() + 0.9 * torch.tensor(0.9).log()
    row1 = 0.1 * 120 + 0.1 * torch.tensor(0.1).log() + 0.9 * torch.tensor(0.9).log()
    assert_close(terms["tckd"].detach(), (row0 + row1) / 2)
    assert_close(terms["nckd"].detach(), (120 * 8 / 9 - torch.tensor(9.0).log()) / 2)
    assert student.grad.isfinite().all()
