"""The shared pieces, against exact arithmetic where rounding is the question."""

from decimal import Decimal, localcontext

import pytest
import torch
import torch.nn.functional as F
from helpers.loss_tester import batch
from torch.testing import assert_close

from rld_lightning.losses import dkd_loss, kd_loss, numerics, rld_loss
from rld_lightning.losses.numerics import (
    binary_kl,
    by_row_blocks,
    check_positive,
    check_weights,
    kl_rows,
    logit_rows,
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


# Row blocks


def three_losses(student, teacher, label):
    """Per-row losses that have nothing in common but the rows."""
    log_probs = student.log_softmax(-1)
    true = log_probs.gather(-1, label.unsqueeze(-1)).squeeze(-1)
    return kl_rows(teacher.log_softmax(-1), log_probs), -true, student.square().mean(-1)


def rows_of(count, dtype=torch.float64, classes=5):
    generator = torch.Generator().manual_seed(count)
    student, teacher = torch.randn(2, count, classes, generator=generator, dtype=dtype)
    return student.requires_grad_(), teacher, torch.randint(classes, (count,), generator=generator)


@pytest.fixture
def blocks(monkeypatch):
    """Sets the size of a block, in elements; returns a list that the sizes of the blocks run are added to."""

    def use(elements):
        monkeypatch.setattr(numerics, "BLOCK_ELEMENTS", {"cpu": elements, "other": 1})
        sizes = []

        def recorded(student, *others):
            assert all(len(other) == len(student) for other in others)
            sizes.append(len(student))
            return three_losses(student, *others)

        return recorded, sizes

    return use


@pytest.mark.parametrize(
    ("elements", "sizes"),
    [
        (1, [1] * 23),  # less than a row is a row
        (5, [1] * 23),
        (17, [3] * 7 + [2]),
        (28, [5] * 4 + [3]),
        (29, [23]),  # 4 * 29 > 23 * 5: not worth it
    ],
)
@FLOATS
def test_blocks_equal_the_direct_way(elements, sizes, dtype, blocks):
    student, teacher, label = rows_of(23, dtype)
    outer = torch.randn(3, 23, generator=torch.Generator().manual_seed(1), dtype=dtype)
    expected = three_losses(student, teacher, label)
    (expected_gradient,) = torch.autograd.grad(expected, student, outer.unbind())

    function, run = blocks(elements)
    losses = by_row_blocks(function, student, teacher, label)
    assert run == sizes
    assert_close(losses, expected)
    (gradient,) = torch.autograd.grad(losses, student, outer.unbind())
    assert run == sizes
    assert_close(gradient, expected_gradient)


def test_blocks_of_only_some_losses(blocks):
    student, teacher, label = rows_of(23)
    losses = by_row_blocks(blocks(17)[0], student, teacher, label)
    for i, expected in enumerate(three_losses(student, teacher, label)):
        (gradient,) = torch.autograd.grad(losses[i].sum(), student, retain_graph=True)
        assert_close(gradient, torch.autograd.grad(expected.sum(), student, retain_graph=True)[0])


def test_blocks_backward_twice(blocks):
    student, teacher, label = rows_of(23)
    total = sum(loss.mean() for loss in by_row_blocks(blocks(17)[0], student, teacher, label))
    first, second = (torch.autograd.grad(total, student, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    total.backward()
    assert torch.equal(student.grad, first)


def test_blocks_refuse_second_derivatives(blocks):
    student, teacher, label = rows_of(23)
    total = sum(loss.sum() for loss in by_row_blocks(blocks(17)[0], student, teacher, label))
    with pytest.raises(RuntimeError, match="has no second derivative"):
        torch.autograd.grad(total, student, create_graph=True)


def test_blocks_without_gradient(blocks):
    student, teacher, label = rows_of(23)
    function, sizes = blocks(17)
    expected = three_losses(student, teacher, label)
    losses = by_row_blocks(function, student.detach(), teacher, label)
    assert not any(loss.requires_grad for loss in losses)
    assert_close(losses, tuple(loss.detach() for loss in expected))
    with torch.no_grad():
        losses = by_row_blocks(function, student, teacher, label)
    assert not any(loss.requires_grad for loss in losses)
    assert_close(losses, tuple(loss.detach() for loss in expected))
    assert sizes == 2 * [3, 3, 3, 3, 3, 3, 3, 2]


def test_blocks_reach_through_what_came_before(blocks):
    """The student's logits are the output of something, not a leaf, and need not lie in one piece."""
    weight, teacher, label = rows_of(23)
    direct, blocked = (
        torch.autograd.grad(sum(loss.sum() for loss in losses), weight)[0]
        for losses in (
            three_losses((3 * weight).flip(-1).T.contiguous().T, teacher, label),
            by_row_blocks(blocks(17)[0], (3 * weight).flip(-1).T.contiguous().T, teacher, label),
        )
    )
    assert_close(blocked, direct)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@FLOATS
def test_blocks_in_the_losses(reduction, dtype, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 2, 7, 3, 5, generator=generator, dtype=dtype)  # maps: rows are not contiguous
    label = torch.randint(7, (2, 3, 5), generator=generator)
    label[0, 0, 0] = label[1, 2] = -100
    outer = torch.randn(2, 3, 5, generator=generator, dtype=dtype) if reduction == "none" else 1.0

    def run():
        leaf = student.clone().requires_grad_()
        results = [
            rld_loss(leaf, teacher, label, reduction=reduction),
            dkd_loss(leaf, teacher, label, alpha=1.0, beta=8.0, temperature=4.0, reduction=reduction),
            kd_loss(leaf, teacher, label, temperature=4.0, logit_standardization=True, reduction=reduction),
        ]
        terms = [term for result in results for term in result.values()]
        (gradient,) = torch.autograd.grad(sum((outer * term).sum() for term in terms), leaf)
        return [term.detach() for term in terms], gradient

    expected = run()
    monkeypatch.setitem(numerics.BLOCK_ELEMENTS, "cpu", 29)
    assert_close(run(), expected)


def test_block_sizes_that_are_shipped():
    """A batch of CIFAR-100 goes straight through; ImageNet batches on a CPU do not."""
    assert 64 * 100 <= 4 * numerics.BLOCK_ELEMENTS["cpu"] < 2048 * 1000


# Standardization


@FLOATS
def test_standardize(dtype):
    logits = torch.tensor([[1.0, 2.0, 3.0, 6.0], [0.0, 0.0, 0.0, -1.0]], dtype=dtype)
    # Means 3 and -1/4; sums of squares 14 and 3/4, divided by C - 1 = 3.
    expected = torch.tensor([[-2.0, -1, 0, 3], [0.25, 0.25, 0.25, -0.75]], dtype=dtype)
    expected = expected / torch.tensor([[14 / 3], [1 / 4]], dtype=dtype).sqrt()
    assert_close(standardize(logits), expected, rtol=1e-6, atol=1e-6)


@FLOATS
def test_standardize_keeps_order_and_forgets_scale(dtype):
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
    # The difference of two logits is as good as they are.
    precision = 8 * torch.finfo(dtype).eps
    assert_close(margin(logits, label).double(), expected, rtol=0, atol=precision * logits.abs().max().item())


def test_margin_is_the_log_odds_of_the_softmax():
    logits, _, label = batch()
    probability = logits.softmax(-1).gather(-1, label.unsqueeze(-1)).squeeze(-1)
    assert_close(margin(logits, label).sigmoid(), probability)
    assert torch.autograd.gradcheck(lambda logits: margin(logits, label), logits.requires_grad_())


@FLOATS
def test_margin_of_a_logit_far_above_the_rest_is_not_infinite(dtype):
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
    # What cancels between two nearly equal distributions is at most a rounding of their logarithms.
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
    """Both sure of the rest: what is left is the tiny probability times the difference of its logarithms."""
    value = binary_kl(torch.tensor([-40.0]), torch.tensor([-80.0]))
    expected = exactly(exact_binary_kl, torch.tensor([-40.0]), torch.tensor([-80.0]))
    assert value > 0
    assert_close(value.double(), expected, rtol=1e-5, atol=0)


# Masked softmax


@FLOATS
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_masked_log_softmax_is_the_softmax_of_what_is_kept(scale, dtype):
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
def test_nothing_dropped_is_log_softmax(dtype):
    logits = batch()[0].to(dtype)
    none = torch.zeros(8, 10, dtype=torch.bool)
    assert torch.equal(masked_log_softmax(logits, none), logits.log_softmax(-1))


# Rows


@pytest.mark.parametrize(
    ("student", "teacher", "rows"),
    [
        (torch.float16, torch.float16, torch.float32),
        (torch.bfloat16, torch.float16, torch.float32),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.float32, torch.float64, torch.float64),
        (torch.float64, torch.float16, torch.float64),
    ],
    ids=str,
)
def test_rows_are_float32_or_better(student, teacher, rows):
    result = logit_rows(torch.randn(3, 4).to(student), torch.randn(3, 4).to(teacher))
    assert result.student.dtype == result.teacher.dtype == rows


def test_rows_of_maps():
    student, teacher = torch.arange(2 * 3 * 4.0).reshape(2, 3, 4), torch.zeros(2, 3, 4, requires_grad=True)
    label = torch.tensor([[0, 1, 2, -100], [1, 1, -100, 0]], dtype=torch.int32)
    rows = logit_rows(student, teacher, label)
    assert rows.shape == (2, 4)
    assert rows.student.tolist() == [[b * 12 + p, b * 12 + 4 + p, b * 12 + 8 + p] for b in range(2) for p in range(4)]
    assert rows.label.tolist() == [0, 1, 2, 0, 1, 1, 0, 0]
    assert rows.valid.tolist() == [True, True, True, False, True, True, False, True]
    assert not rows.teacher.requires_grad


def test_reduce():
    per_row = torch.tensor([1.0, torch.nan, 2.0, 6.0])
    logits = torch.zeros(2, 3, 2)
    rows = logit_rows(logits, logits, torch.tensor([[0, -100], [1, 2]]))
    assert rows.reduce(per_row, "mean") == 3.0
    assert rows.reduce(per_row, "sum") == 9.0
    assert rows.reduce(per_row, "none").tolist() == [[1.0, 0.0], [2.0, 6.0]]
    unlabelled = logit_rows(logits, logits)
    assert unlabelled.reduce(torch.ones(4), "mean") == 1.0
    assert unlabelled.reduce(torch.ones(4), "sum") == 4.0


def test_an_empty_batch_is_zero():
    nothing = torch.zeros(0, 5, requires_grad=True)
    label = torch.zeros(0, dtype=torch.long)
    for terms in (rld_loss(nothing, nothing, label), kd_loss(nothing, nothing, temperature=4.0)):
        assert all(term == 0 for term in terms.values())
        assert_close(torch.autograd.grad(sum(terms.values()), nothing)[0], nothing.detach())


def test_label_range_names_the_first_wrong_label():
    logits = torch.zeros(4, 5)
    with pytest.raises(ValueError, match=r"label 9 is outside \[0, 5\) and is not ignore_index=-100"):
        logit_rows(logits, logits, torch.tensor([-100, 4, 9, -3]))
    with pytest.raises(ValueError, match="label -100 is outside"):
        logit_rows(logits, logits, torch.tensor([-100, 4, 9, -3]), ignore_index=255)


# Hyper-parameters


def test_checks_name_the_value():
    check_positive(temperature=1e-3)
    check_weights(alpha=0, beta=0.0)
    with pytest.raises(ValueError, match="temperature=0 is not allowed; it must be a finite number > 0"):
        check_positive(alpha=1, temperature=0)
    with pytest.raises(ValueError, match=r"beta=-1 is not allowed; it must be a finite number >= 0"):
        check_weights(alpha=1, beta=-1)
