import pytest
import torch
from helpers.loss_tester import LossTester, batch, zscore

from rld_lightning.losses import DISTLoss, dist_loss


def correlation(x, y):
    x, y = x - x.sum() / len(x), y - y.sum() / len(y)
    return (x * y).sum() / (x.norm() * y.norm() + 1e-8)


class TestDIST(LossTester):
    function = staticmethod(dist_loss)
    module = DISTLoss
    settings = (
        {"beta": 2.0, "gamma": 2.0, "temperature": 4.0},
        {"beta": 1.0, "gamma": 0.5, "temperature": 1.0},
        {"beta": 2.0, "gamma": 2.0, "temperature": 2.0, "logit_standardization": True},
    )
    weights = ("beta", "gamma")
    per_sample = False

    def naive_batch(self, student, teacher, label, *, beta, gamma, temperature, logit_standardization=False):
        if logit_standardization:
            student, teacher = (torch.stack([zscore(row) for row in logits]) for logits in (student, teacher))
        p, q = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)
        inter = sum(1 - correlation(p[i], q[i]) for i in range(len(p))) / len(p)
        intra = sum(1 - correlation(p[:, k], q[:, k]) for k in range(p.shape[1])) / p.shape[1]
        return {"inter": beta * temperature**2 * inter, "intra": gamma * temperature**2 * intra}

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    def test_student_with_the_teachers_logits(self, dtype, hyper):
        """Almost 0, because of the published 1e-8 in the denominator."""
        _, teacher, label = batch("teacher_wrong")
        teacher = teacher.to(dtype)
        terms, gradient = self.value_and_gradient(self.call, teacher, teacher, label, **hyper)
        assert sum(terms.values()).abs() < 1e-3
        assert gradient.abs().max() < 1e-3


def test_defaults_are_those_of_the_authors_code():
    loss = DISTLoss()
    assert (loss.beta, loss.gamma, loss.temperature, loss.ce_weight, loss.warmup_epochs) == (2.0, 2.0, 4.0, 1.0, 1)


def test_linearly_related_probabilities_have_no_loss():
    """Probabilities mixed with uniform ones have correlation 1; at temperature 1, logits are log-probabilities."""
    _, teacher, label = batch()
    p = teacher.softmax(-1)
    terms = dist_loss((0.3 * p + 0.07).log(), teacher, label, temperature=1.0)
    assert all(term < 1e-4 for term in terms.values())


def test_reversed_probabilities_hand_worked():
    teacher = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.3, 0.5]], dtype=torch.float64).log()
    terms = dist_loss(teacher.flip(0), teacher, beta=1.0, gamma=1.0, temperature=1.0)
    # Rows: the centred (5, -1, -4)/30 against (-4, -1, 5)/30: -39/42. Columns: -1, 0 (constant), -1.
    assert terms["inter"].item() == pytest.approx(1 + 39 / 42, rel=1e-6)
    assert terms["intra"].item() == pytest.approx(5 / 3, rel=1e-6)


def test_intra_of_a_single_sample_is_constant():
    student, teacher, label = batch("one_sample")
    leaf = student.clone().requires_grad_()
    terms = dist_loss(leaf, teacher, label, gamma=2.0, temperature=3.0)
    (gradient,) = torch.autograd.grad(terms["intra"], leaf)
    assert terms["intra"] == 18
    assert (gradient == 0).all()
