import math
from itertools import combinations

import pytest
import torch
from helpers.loss_tester import LossTester, batch, kl
from torch.testing import assert_close

from rld_lightning.losses import LDRLDLoss, dkd_loss, kd_loss, ldrld_loss
from rld_lightning.losses.ldrld import pair_weights


class TestLDRLD(LossTester):
    function = staticmethod(ldrld_loss)
    module = LDRLDLoss
    settings = (
        {"alpha": 10.5, "beta": 7.0, "k": 7, "temperature": 4.0},
        {"alpha": 1.0, "beta": 0.5, "k": 3, "temperature": 1.0},
        {"alpha": 2.0, "beta": 1.0, "k": 2, "temperature": 2.0},
        {"alpha": 9.0, "beta": 9.0, "k": 7, "temperature": 2.0, "logit_standardization": True},
    )
    weights = ("alpha", "beta")

    @staticmethod
    def naive(student, teacher, label, *, alpha, beta, k, temperature):
        k = min(k, len(student))
        leading = student.topk(k).indices.tolist()
        rest = [c for c in range(len(student)) if c not in leading]
        student, teacher = student / temperature, teacher / temperature
        local = kl(teacher[leading], student[leading])
        for i, j in combinations(range(k), 2):
            pair = [leading[i], leading[j]]
            weight = 2 * math.exp(-0.05 * (i + 1 + j + 1)) / (1.5 + j - i)
            local = local + weight * kl(teacher[pair], student[pair])
        return {
            "local": alpha * temperature**2 * local / (math.comb(k, 2) + 1),
            "remaining": beta * temperature**2 * kl(teacher[rest], student[rest]),
        }


OPTIONS = {"alpha": 1.0, "beta": 1.0, "temperature": 3.0, "reduction": "none"}


def test_defaults_are_those_of_the_published_example():
    loss = LDRLDLoss()
    assert (loss.alpha, loss.beta, loss.k, loss.temperature) == (10.5, 7.0, 7, 4.0)
    assert (loss.ce_weight, loss.warmup_epochs) == (1.0, 1)


def test_pair_weights():
    weights = pair_weights(torch.zeros(1, 7, dtype=torch.float64))
    assert (weights > 0).sum() == 21
    # 2 e^-0.15 / 2.5 of ranks 1 and 2, 2 e^-0.4 / 7.5 of ranks 1 and 7, 2 e^-0.65 / 2.5 of ranks 6 and 7.
    expected = [0.6885663811400462, 0.17875201227617040, 0.4176366214089077]
    assert_close(weights[[0, 0, 5], [1, 6, 6]], torch.tensor(expected, dtype=torch.float64))


def test_k_of_two_is_the_kd_of_one_pair_counted_twice():
    student, teacher, _ = batch()
    pair = student.topk(2).indices
    expected = kd_loss(student.gather(-1, pair), teacher.gather(-1, pair), temperature=3.0, reduction="none")["kd"]
    local = ldrld_loss(student, teacher, k=2, **OPTIONS)["local"]
    assert_close(local, (2 * math.exp(-0.15) / 2.5 + 1) / 2 * expected)


def test_fewer_than_two_remaining_classes_have_no_loss():
    """With k = C no class remains, with k = C - 1 a single one: the remaining term and its gradient are exactly 0."""
    student, teacher, _ = batch()
    for k in (9, 10, 11):
        leaf = student.clone().requires_grad_()
        term = ldrld_loss(leaf, teacher, k=k, **OPTIONS)["remaining"]
        (gradient,) = torch.autograd.grad(term.sum(), leaf)
        assert (term == 0).all()
        assert (gradient == 0).all()


def test_k_above_the_number_of_classes_is_all_classes():
    student, teacher, _ = batch()
    assert_close(ldrld_loss(student, teacher, k=99, **OPTIONS), ldrld_loss(student, teacher, k=10, **OPTIONS))


def test_shifted_top_classes_change_only_the_remaining_relations():
    """Shifting the teacher's top logits together changes their relation to the remaining classes only."""
    _, teacher, _ = batch()
    leading = teacher.topk(3).indices
    student = teacher.scatter_add(-1, leading, torch.full((8, 3), 5.0, dtype=torch.float64))
    terms = ldrld_loss(student, teacher, k=3, **OPTIONS)
    zeros = torch.zeros(8, dtype=torch.float64)
    assert_close(terms, {"local": zeros, "remaining": zeros}, rtol=0, atol=1e-12)
    assert (kd_loss(student, teacher, temperature=3.0, reduction="none")["kd"] > 0.01).all()


def test_remaining_is_nckd_without_the_top_classes():
    """Without the top class, and with the second as the true class, the remaining classes are DKD's non-target ones."""
    student, teacher, _ = batch()
    first, second = student.topk(2).indices.unbind(-1)
    keep = torch.ones_like(student, dtype=torch.bool).scatter(-1, first.unsqueeze(-1), False)
    kept = [logits[keep].reshape(8, 9) for logits in (student, teacher)]
    expected = dkd_loss(*kept, second - (second > first).long(), **OPTIONS)["nckd"]
    assert_close(ldrld_loss(student, teacher, k=2, **OPTIONS)["remaining"], expected)


@pytest.mark.parametrize("k", [1, 0, -7, 7.5])
def test_k_out_of_range(k):
    for call in (lambda: ldrld_loss(*batch(), k=k, **OPTIONS), lambda: LDRLDLoss(k=k)):
        with pytest.raises(ValueError, match=f"k={k} is not allowed; it must be a whole number >= 2"):
            call()


def test_hand_worked():
    """Student (3, 2, 1, 1) ln 2, teacher all equal, k = 2: the pair is KL([1/2, 1/2] || [2/3, 1/3]) = ln(9/8) / 2."""
    student = math.log(2) * torch.tensor([[3.0, 2.0, 1.0, 1.0]])
    options = OPTIONS | {"temperature": 1.0}
    terms = ldrld_loss(student, torch.zeros(1, 4), k=2, **options)
    # (0.6885664 + 1) / 2 * 0.0588915
    assert terms["local"].item() == pytest.approx(0.0497212, abs=1e-6)
    assert terms["remaining"].item() == 0
