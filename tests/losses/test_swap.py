import pytest
import torch
from helpers.loss_tester import LossTester, batch, kl
from torch.testing import assert_close

from rld_lightning.losses import SwapLoss, kd_loss, swap_loss
from rld_lightning.losses.swap import swap_logits


class TestSwap(LossTester):
    function = staticmethod(swap_loss)
    module = SwapLoss
    settings = (
        {"temperature": 4.0, "weight": 1.0},
        {"temperature": 1.0, "weight": 0.5},
        {"temperature": 2.0, "weight": 9.0, "logit_standardization": True},
    )
    weights = ("weight",)
    vanishes = "right"

    @staticmethod
    def naive(student, teacher, label, *, temperature, weight):
        values = teacher.tolist()
        top = values.index(max(values))
        values[top], values[label] = values[label], values[top]
        teacher = teacher.new_tensor(values)
        return {"swap": weight * temperature**2 * kl(teacher / temperature, student / temperature)}


def test_defaults_are_those_of_the_public_code():
    loss = SwapLoss()
    assert (loss.temperature, loss.weight, loss.ce_weight, loss.warmup_epochs) == (4.0, 1.0, 0.0, 1)
    assert list(loss(*batch())) == ["swap"]


@pytest.mark.parametrize("scenario", ["random", "teacher_right", "teacher_wrong", "all_masked", "two_classes"])
def test_the_true_class_is_largest_and_values_are_permuted(scenario):
    _, teacher, label = batch(scenario)
    swapped = swap_logits(teacher, label)
    assert torch.equal(swapped.argmax(-1), label)
    assert torch.equal(swapped.sort(-1).values, teacher.sort(-1).values)
    assert ((swapped != teacher).sum(-1) <= 2).all()
    assert torch.equal(swap_logits(swapped, label), swapped)


def test_equals_kd_if_the_teacher_is_right():
    student, teacher, label = batch("teacher_right")
    assert torch.equal(swap_logits(teacher, label), teacher)
    expected = kd_loss(student, teacher, temperature=3.0)["kd"]
    assert_close(swap_loss(student, teacher, label, temperature=3.0)["swap"], expected)


def test_the_first_of_tied_maxima_is_swapped():
    teacher = torch.tensor([[1.0, 5.0, 5.0, 2.0]])
    assert swap_logits(teacher, torch.tensor([3])).tolist() == [[1.0, 2.0, 5.0, 5.0]]
    # The true class shares the maximum: nothing changes.
    assert swap_logits(teacher, torch.tensor([2])).tolist() == [[1.0, 5.0, 5.0, 2.0]]


def test_hand_worked():
    """Teacher (1/2, 1/4, 1/4), true class 1, becomes (1/4, 1/2, 1/4); student (1/4, 1/4, 1/2): ln(2) / 4."""
    teacher = torch.tensor([[0.5, 0.25, 0.25]]).log()
    student = torch.tensor([[0.25, 0.25, 0.5]]).log()
    label = torch.tensor([1])
    assert swap_loss(student, teacher, label, temperature=1.0)["swap"].item() == pytest.approx(0.1732868, abs=1e-6)


def test_refined_logits_have_two_logits_swapped():
    passed_on = SwapLoss().refined(torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0]]), torch.tensor([2, 2]))
    assert passed_on.tolist() == [[0.0, 1.0, 2.0], [0.0, 1.0, 2.0]]
