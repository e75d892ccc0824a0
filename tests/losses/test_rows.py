"""Rows of logits: checks, blocks of rows, reduction."""

import pytest
import torch
from torch.testing import assert_close

from rld_lightning.losses import dkd_loss, kd_loss, rld_loss, rows
from rld_lightning.losses.numerics import kl_rows
from rld_lightning.losses.rows import by_row_blocks, logit_rows

FLOATS = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


# Row blocks


def three_losses(student, teacher, label):
    """Three unrelated losses per row."""
    log_probs = student.log_softmax(-1)
    true = log_probs.gather(-1, label.unsqueeze(-1)).squeeze(-1)
    return kl_rows(teacher.log_softmax(-1), log_probs), -true, student.square().mean(-1)


def rows_of(count, dtype=torch.float64, classes=5):
    generator = torch.Generator().manual_seed(count)
    student, teacher = torch.randn(2, count, classes, generator=generator, dtype=dtype)
    return student.requires_grad_(), teacher, torch.randint(classes, (count,), generator=generator)


@pytest.fixture
def blocks(monkeypatch):
    """Sets the block size in elements; returns ``three_losses`` and a list to which it adds each block's size."""

    def use(elements):
        monkeypatch.setattr(rows, "BLOCK_ELEMENTS", {"cpu": elements, "other": 1})
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
        (1, [1] * 23),  # at least one row
        (5, [1] * 23),
        (17, [3] * 7 + [2]),
        (28, [5] * 4 + [3]),
        (29, [23]),  # 4 * 29 > 23 * 5: computed directly
    ],
)
@FLOATS
def test_blocks_equal_the_direct_computation(elements, sizes, dtype, blocks):
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


def test_blocks_with_a_gradient_of_only_some_losses(blocks):
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


@pytest.mark.parametrize("together", [True, False])
def test_blocks_that_assume_a_sum(together, blocks):
    """Correct for any weights; only if they differ, the blocks are computed again."""
    student, teacher, label = rows_of(23)
    outer = torch.randn(3, 23, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    if together:
        outer = outer[:1].expand(3, -1)
    expected = torch.autograd.grad(three_losses(student, teacher, label), student, outer.unbind())
    function, sizes = blocks(17)
    losses = by_row_blocks(function, student, teacher, label, assume_sum=True)
    assert_close(torch.autograd.grad(losses, student, outer.unbind(), retain_graph=True), expected)
    assert len(sizes) == (8 if together else 16)
    # The stored gradient is used up: the blocks are computed again.
    assert_close(torch.autograd.grad(losses, student, outer.unbind()), expected)
    assert len(sizes) == (16 if together else 24)


def test_blocks_have_no_second_derivative(blocks):
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


def test_blocks_pass_the_gradient_to_earlier_operations(blocks):
    """The student's logits are not a leaf, and need not be contiguous."""
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
    monkeypatch.setitem(rows.BLOCK_ELEMENTS, "cpu", 29)
    # T^2 beta = 128 times the rounding of a sum, whose vectorised exponentials depend on the block's size.
    assert_close(run(), expected, rtol=1e-5, atol=2e-5)


def test_default_block_sizes():
    """A batch of CIFAR-100 is computed directly; ImageNet batches on a CPU are computed in blocks."""
    assert 64 * 100 <= 4 * rows.BLOCK_ELEMENTS["cpu"] < 2048 * 1000


# Rows


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        (torch.float16, torch.float16, torch.float32),
        (torch.bfloat16, torch.float16, torch.float32),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.float32, torch.float64, torch.float64),
        (torch.float64, torch.float16, torch.float64),
    ],
    ids=str,
)
def test_rows_are_float32_or_better(student, teacher, expected):
    result = logit_rows(torch.randn(3, 4).to(student), torch.randn(3, 4).to(teacher))
    assert result.student.dtype == result.teacher.dtype == expected


def test_rows_of_maps():
    student, teacher = torch.arange(2 * 3 * 4.0).reshape(2, 3, 4), torch.zeros(2, 3, 4, requires_grad=True)
    label = torch.tensor([[0, 1, 2, -100], [1, 1, -100, 0]], dtype=torch.int32)
    found = logit_rows(student, teacher, label)
    assert found.shape == (2, 4)
    expected = [[b * 12 + p, b * 12 + 4 + p, b * 12 + 8 + p] for b in range(2) for p in range(4)]
    expected[3] = expected[6] = [0, 0, 0]  # ignored
    assert found.student.tolist() == expected
    assert found.label.tolist() == [0, 1, 2, 0, 1, 1, 0, 0]
    assert found.valid.tolist() == [True, True, True, False, True, True, False, True]
    assert not found.teacher.requires_grad


def test_reduce():
    per_row = torch.tensor([1.0, torch.nan, 2.0, 6.0])
    logits = torch.zeros(2, 3, 2)
    found = logit_rows(logits, logits, torch.tensor([[0, -100], [1, 2]]))
    assert found.reduce(per_row, "mean") == 3.0
    assert found.reduce(per_row, "sum") == 9.0
    assert found.reduce(per_row, "none").tolist() == [[1.0, 0.0], [2.0, 6.0]]
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
