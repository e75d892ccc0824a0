"""The shared numerical functions; against exact arithmetic where rounding matters."""

from decimal import Decimal, localcontext

import pytest
import torch
import torch.nn.functional as F
from helpers.loss_tester import batch
from torch.testing import assert_close

from rld_lightning.losses.numerics import (
    binary_kl,
    kl_rows,
    margin,
    masked_log_softmax,
    standardize,
)

FLOATS = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


def exactly(function, *tensors):
    """``function`` of Decimal numbers with 60 digits and no underflow, rounded once at the end."""
    with localcontext(prec=60):
        values = [float(function(*map(to_decimal, row))) for row in zip(*tensors, strict=True)]
    return torch.tensor(values, dtype=torch.float64)


def to_decimal(tensor):
    return [Decimal(x) for x in tensor.tolist()] if tensor.ndim else Decimal(tensor.item())


def exact_margin(logits, index):
    rest = sum(x.exp() for k, x in enumerate(logits) if k != index)
    return logits[int(index)] - rest.ln()


def exact_binary_kl(teacher, student):
    p, q = 1 / (1 + (-teacher).exp()), 1 / (1 + (-student).exp())
    rest_p, rest_q = 1 / (1 + teacher.exp()), 1 / (1 + student.exp())
    return p * (p.ln() - q.ln()) + rest_p * (rest_p.ln() - rest_q.ln())


# Standardization


@FLOATS
def test_standardize(dtype):
    logits = torch.tensor([[1.0, 2.0, 3.0, 6.0], [0.0, 0.0, 0.0, -1.0]], dtype=dtype)
    # Means 3 and -1/4; sums of squares 14 and 3/4, divided by C - 1 = 3.
    expected = torch.tensor([[-2.0, -1, 0, 3], [0.25, 0.25, 0.25, -0.75]], dtype=dtype)
    expected = expected / torch.tensor([[14 / 3], [1 / 4]], dtype=dtype).sqrt()
    assert_close(standardize(logits), expected, rtol=1e-6, atol=1e-6)


@FLOATS
def test_standardize_keeps_order_and_removes_scale(dtype):
    logits = batch("many_classes")[0].to(dtype)
    scores = standardize(logits)
    assert_close(scores.mean(-1), torch.zeros(3, dtype=dtype), rtol=0, atol=1e-6)
    assert_close(scores.std(-1), torch.ones(3, dtype=dtype))
    assert torch.equal(scores.argsort(-1), logits.argsort(-1))
    assert_close(standardize(1e4 * logits + 50), scores, rtol=1e-3, atol=1e-4)


@FLOATS
def test_standardize_of_equal_logits_is_finite(dtype):
    logits = torch.full((2, 5), 3.0, dtype=dtype, requires_grad=True)
    scores = standardize(logits)
    scores.square().sum().backward()
    assert (scores == 0).all()
    assert logits.grad.isfinite().all()


# Two outcomes

MARGINS = [-1e4, -1e3, -120.0, -30.0, -5.0, -0.5, 0.0, 1e-3, 0.5, 5.0, 30.0, 120.0, 1e3, 1e4]


@FLOATS
@pytest.mark.parametrize("scale", [1.0, 10.0, 1e3, 1e4])
@pytest.mark.parametrize("scenario", ["random", "two_classes", "ties"])
def test_margin(scenario, scale, dtype):
    logits, _, label = batch(scenario)
    logits = (scale * logits).to(dtype)
    expected = exactly(exact_margin, logits.double(), label)
    # The difference of two logits is as precise as the logits.
    precision = 8 * torch.finfo(dtype).eps
    assert_close(margin(logits, label).double(), expected, rtol=0, atol=precision * logits.abs().max().item())


def test_margin_is_the_log_odds_of_the_softmax():
    logits, _, label = batch()
    probability = logits.softmax(-1).gather(-1, label.unsqueeze(-1)).squeeze(-1)
    assert_close(margin(logits, label).sigmoid(), probability)
    assert torch.autograd.gradcheck(lambda logits: margin(logits, label), logits.requires_grad_())


@FLOATS
def test_margin_of_a_logit_far_above_the_rest_is_finite(dtype):
    logits = torch.tensor([[1e4, 0.0, 0.0], [-1e4, 0.0, 0.0]], dtype=dtype, requires_grad=True)
    values = margin(logits, torch.tensor([0, 0]))
    values.sum().backward()
    assert_close(values.detach(), torch.tensor([1e4, -1e4], dtype=dtype) - torch.tensor(2.0, dtype=dtype).log())
    assert_close(logits.grad, torch.tensor([[1.0, -0.5, -0.5]] * 2, dtype=dtype))


@FLOATS
def test_binary_kl(dtype):
    teacher, student = torch.cartesian_prod(*2 * [torch.tensor(MARGINS, dtype=dtype)]).unbind(-1)
    student.requires_grad_()
    values = binary_kl(teacher, student)
    values.sum().backward()
    assert values.isfinite().all()
    expected = exactly(exact_binary_kl, teacher.double(), student.detach().double())
    # For nearly equal distributions, the error is at most a rounding of their logarithms.
    tolerance = {"rtol": 1e-14, "atol": 1e-15} if dtype == torch.float64 else {"rtol": 1e-6, "atol": 1e-6}
    assert_close(values.detach().double(), expected, **tolerance)
    # d/ds = q - p: without cancellation in either tail.
    gradient = exactly(
        lambda t, s: 1 / (1 + (-s).exp()) - 1 / (1 + (-t).exp()), teacher.double(), student.detach().double()
    )
    assert_close(student.grad.double(), gradient, rtol=0, atol=1e-15 if dtype == torch.float64 else 1e-6)


@FLOATS
def test_binary_kl_of_equal_margins_is_exactly_zero(dtype):
    teacher = torch.tensor(MARGINS, dtype=dtype)
    assert (binary_kl(teacher, teacher.clone()) == 0).all()


def test_binary_kl_in_the_tails():
    """If both are certain of the rest, the tiny probability times the difference of its logarithms remains."""
    value = binary_kl(torch.tensor([-40.0]), torch.tensor([-80.0]))
    expected = exactly(exact_binary_kl, torch.tensor([-40.0]), torch.tensor([-80.0]))
    assert value > 0
    assert_close(value.double(), expected, rtol=1e-5, atol=0)


# Masked softmax


@FLOATS
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_masked_log_softmax_is_the_softmax_of_the_kept_classes(scale, dtype):
    logits, other, _ = batch()
    logits = (scale * logits).to(dtype)
    drop = other > 0.5
    assert drop.any(-1).all()
    assert not drop.all(-1).any()
    log_probs = masked_log_softmax(logits, drop)
    for row, keep, actual in zip(logits, ~drop, log_probs, strict=True):
        assert_close(actual[keep], row[keep].log_softmax(-1))
        assert (actual[~keep].exp() == 0).all()
        assert actual.isfinite().all()


@FLOATS
def test_a_row_with_everything_dropped_has_no_divergence_and_no_gradient(dtype):
    student, teacher, _ = (tensor.to(dtype) for tensor in batch())
    drop = torch.zeros(8, 10, dtype=torch.bool)
    drop[:4] = True
    drop[4:, :3] = True
    student.requires_grad_()
    rows = kl_rows(masked_log_softmax(teacher, drop), masked_log_softmax(student, drop))
    rows.sum().backward()
    assert (rows[:4] == 0).all()
    assert (student.grad[:4] == 0).all()
    assert (rows[4:] > 0).all()
    assert (student.grad[4:, :3] == 0).all()
    assert student.grad.isfinite().all()


@FLOATS
def test_a_row_with_one_class_kept_has_no_divergence_and_no_gradient(dtype):
    student, teacher, label = batch()
    student, teacher = (1e3 * student).to(dtype).requires_grad_(), (1e3 * teacher).to(dtype)
    drop = F.one_hot(label, 10) == 0
    rows = kl_rows(masked_log_softmax(teacher, drop), masked_log_softmax(student, drop))
    rows.sum().backward()
    assert (rows == 0).all()
    assert (student.grad == 0).all()


@FLOATS
def test_masked_log_softmax_without_dropped_classes_is_log_softmax(dtype):
    logits = batch()[0].to(dtype)
    none = torch.zeros(8, 10, dtype=torch.bool)
    assert torch.equal(masked_log_softmax(logits, none), logits.log_softmax(-1))
