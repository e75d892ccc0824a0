import math

import pytest
import torch
from helpers.loss_tester import LossTester, batch, kl, one_against_rest
from torch.testing import assert_close

from rld_lightning.losses import EADKDLoss, EAKDLoss, dkd_loss, eadkd_loss, eakd_loss, kd_loss


def naive_weight(student, teacher, temperature, bound):
    """Of one sample: the sum over classes of -p ln p, which is 0 at p = 0."""
    entropies = [torch.special.entr((logits.detach() / temperature).softmax(-1)).sum() for logits in (teacher, student)]
    bound = math.log(len(student)) if bound is None else bound
    return (entropies[0] + entropies[0] * entropies[1] / bound) / 2


class TestEAKD(LossTester):
    function = staticmethod(eakd_loss)
    module = EAKDLoss
    settings = (
        {"temperature": 4.0, "weight": 0.9, "entropy_temperature": 3.0, "entropy_bound": None},
        {"temperature": 1.0, "weight": 0.5, "entropy_temperature": 2.0, "entropy_bound": 100.0},
        {
            "temperature": 1.0,
            "weight": 0.5,
            "entropy_temperature": 2.0,
            "entropy_bound": 100.0,
            "logit_standardization": True,
        },
    )
    positive = ("temperature", "entropy_temperature", "entropy_bound")
    weights = ("weight",)
    detaches_student = True

    @staticmethod
    def naive(student, teacher, label, *, temperature, weight, entropy_temperature, entropy_bound):
        factor = naive_weight(student, teacher, entropy_temperature, entropy_bound)
        return {"eakd": weight * factor * temperature**2 * kl(teacher / temperature, student / temperature)}


class TestEADKD(LossTester):
    function = staticmethod(eadkd_loss)
    module = EADKDLoss
    settings = (
        {"alpha": 1.0, "beta": 8.0, "temperature": 4.0, "entropy_temperature": 3.0, "entropy_bound": None},
        {"alpha": 2.0, "beta": 0.5, "temperature": 1.0, "entropy_temperature": 2.0, "entropy_bound": 100.0},
        {
            "alpha": 2.0,
            "beta": 0.5,
            "temperature": 1.0,
            "entropy_temperature": 2.0,
            "entropy_bound": 100.0,
            "logit_standardization": True,
        },
    )
    positive = ("temperature", "entropy_temperature", "entropy_bound")
    weights = ("alpha", "beta")
    detaches_student = True

    @staticmethod
    def naive(student, teacher, label, *, alpha, beta, temperature, entropy_temperature, entropy_bound):
        factor = naive_weight(student, teacher, entropy_temperature, entropy_bound) * temperature**2
        student, teacher = student / temperature, teacher / temperature
        others = [k for k in range(len(student)) if k != label]
        return {
            "tckd": alpha * factor * kl(one_against_rest(teacher, label), one_against_rest(student, label)),
            "nckd": beta * factor * kl(teacher[others], student[others]),
        }


def test_defaults_are_those_of_the_authors_code():
    kd, dkd = EAKDLoss(), EADKDLoss()
    assert (kd.temperature, kd.weight, kd.ce_weight, kd.warmup_epochs) == (4.0, 0.9, 0.1, 1)
    assert (dkd.alpha, dkd.beta, dkd.temperature, dkd.ce_weight, dkd.warmup_epochs) == (1.0, 8.0, 4.0, 1.0, 20)
    for loss in (kd, dkd):
        assert (loss.entropy_temperature, loss.entropy_bound) == (3.0, 100.0)


@pytest.mark.parametrize("bound", [None, 100.0])
def test_equal_entropies_give_kd_times_a_constant(bound):
    """All samples are permutations of the same logits, so that all have the same weight."""
    student, teacher, _ = batch("one_sample")
    orders = torch.stack([torch.randperm(10, generator=torch.Generator().manual_seed(i)) for i in range(6)])
    student, teacher = student[0][orders], teacher[0][orders.flip(0)]
    terms, gradient = LossTester.value_and_gradient(eakd_loss, student, teacher, temperature=4.0, entropy_bound=bound)
    kd, kd_gradient = LossTester.value_and_gradient(kd_loss, student, teacher, temperature=4.0)
    factor = naive_weight(student[0], teacher[0], 3.0, bound)
    assert_close(terms["eakd"], factor * kd["kd"])
    assert_close(gradient, factor * kd_gradient)


def test_uniform_teacher_and_student_have_the_largest_weight():
    """Both entropies are log C: the weight is log C, and with the bound 100 half of log C (1 + log C / 100)."""
    student, teacher = torch.zeros(2, 4, 10, dtype=torch.float64)
    # Differences that matter for KD at a tiny temperature, but not for the entropies at temperature 3.
    teacher[:, 0] = 1e-9
    options = {"temperature": 1e-9, "reduction": "none"}
    kd = kd_loss(student, teacher, **options)["kd"]
    assert_close(eakd_loss(student, teacher, entropy_bound=None, **options)["eakd"], math.log(10) * kd)
    published = eakd_loss(student, teacher, **options)["eakd"]
    assert_close(published, math.log(10) / 2 * (1 + math.log(10) / 100) * kd)


def test_a_certain_teacher_has_weight_zero():
    student, _, label = batch()
    teacher = 1e4 * torch.nn.functional.one_hot(label, 10).double()
    for loss in (eakd_loss, eadkd_loss):
        hyper = {"alpha": 1.0, "beta": 1.0} if loss is eadkd_loss else {}
        terms, gradient = LossTester.value_and_gradient(loss, student, teacher, label, temperature=4.0, **hyper)
        assert all(term == 0 for term in terms.values())
        assert (gradient == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradient_is_that_of_kd_times_the_weight(reduction):
    """The weight depends on the student, but carries no gradient."""
    student, teacher, label = batch()
    options = {"alpha": 1.0, "beta": 8.0, "temperature": 4.0, "reduction": reduction}
    _, gradient = LossTester.value_and_gradient(eadkd_loss, student, teacher, label, **options)
    _, plain = LossTester.value_and_gradient(dkd_loss, student, teacher, label, **options)
    factors = torch.stack([naive_weight(s, t, 3.0, 100.0) for s, t in zip(student, teacher, strict=True)])
    assert_close(gradient, factors.unsqueeze(-1) * plain)


def test_hand_worked():
    """Four classes, the teacher uniform over two and the student over the others: both entropies are ln 2.

    The weight is ln 2 / 2 (1 + ln 2 / ln 4) = 3/4 ln 2, or ln 2 / 2 (1 + ln 2 / 100); KD at temperature 1 is
    ln(1/2) - (-300 + ln(1/2)) = 300.
    """
    teacher = torch.tensor([[0.0, 0.0, -300.0, -300.0]])
    term = eakd_loss(teacher.flip(-1), teacher, temperature=1.0, entropy_bound=None)["eakd"]
    assert term.item() == pytest.approx(0.75 * 0.6931472 * 300, rel=1e-6)
    published = eakd_loss(teacher.flip(-1), teacher, temperature=1.0)["eakd"]
    assert published.item() == pytest.approx(0.5034657 * 0.6931472 * 300, rel=1e-6)
