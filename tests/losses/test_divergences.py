"""The hand-written gradients against those of the formulas, of first and second order."""

import pytest
import torch
from torch.testing import assert_close

from rld_lightning.losses import numerics, rld_loss
from rld_lightning.losses.divergences import float_mask, largest_margin, margin, margin_kl, softmax_kl

FLOATS = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
SCALES = pytest.mark.parametrize("scale", [1.0, 30.0, 1e4, 1e10])


def rows(dtype=torch.float64, scale=1.0, count=12, classes=7):
    generator = torch.Generator().manual_seed(0)
    student, teacher = scale * torch.randn(2, count, classes, generator=generator, dtype=torch.float64)
    drop = torch.rand(count, classes, generator=generator) < 0.5
    drop[0], drop[1, 1:], drop[1, 0] = True, True, False  # no class left, and a single one
    label = torch.randint(classes, (count,), generator=generator)
    return student.to(dtype).requires_grad_(), teacher.to(dtype), drop, label


def value_and_gradient(function, student):
    outer = torch.linspace(-1, 2, len(student), dtype=student.dtype)
    value = function(student)
    return value.detach(), torch.autograd.grad(value, student, outer)[0]


def masked_formula(teacher, student, drop):
    return numerics.kl_rows(*(numerics.masked_log_softmax(logits, drop) for logits in (teacher, student)))


@SCALES
@FLOATS
def test_softmax_kl(dtype, scale):
    student, teacher, drop, _ = rows(dtype, scale)
    tolerance = {"rtol": 1e-5, "atol": 1e-6 * scale} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-12}
    for ours, formula in (
        (lambda s: softmax_kl(teacher, s), lambda s: numerics.softmax_kl(teacher, s)),
        (lambda s: softmax_kl(teacher, s, drop.to(dtype)), lambda s: masked_formula(teacher, s, drop)),
    ):
        value, gradient = value_and_gradient(ours, student)
        expected, expected_gradient = value_and_gradient(formula, student)
        assert_close(value, expected, **tolerance)
        assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-6)
    assert (value[:2] == 0).all()
    assert (gradient[:2] == 0).all()
    assert (gradient[drop] == 0).all()


@SCALES
@FLOATS
def test_margin_kl(dtype, scale):
    student, teacher, _, label = rows(dtype, scale)
    odds = numerics.margin(teacher, teacher.argmax(-1))
    value, gradient = value_and_gradient(lambda s: margin_kl(odds, s, label), student)
    expected = value_and_gradient(lambda s: numerics.binary_kl(odds, numerics.margin(s, label)), student)
    assert_close((value, gradient), expected, rtol=1e-5, atol=1e-6)


@SCALES
@FLOATS
def test_margins_of_the_teacher(dtype, scale):
    _, teacher, _, label = rows(dtype, scale)
    teacher[1, 2] = teacher[1, 4] = teacher[1].max()  # ties of two or three
    teacher[2] = 3.0
    teacher[3, 1:] = -1e12
    assert_close(margin(teacher, label), numerics.margin(teacher, label))
    assert_close(largest_margin(teacher), numerics.margin(teacher, teacher.argmax(-1)))


def test_a_teacher_that_requires_a_gradient_receives_it():
    student, teacher, drop, _ = rows()
    teacher.requires_grad_()
    value = softmax_kl(teacher, student, drop.double()).sum()
    expected = masked_formula(teacher, student, drop).sum()
    inputs = (student, teacher)
    assert_close(torch.autograd.grad(value, inputs), torch.autograd.grad(expected, inputs))


def test_derivatives_of_higher_order():
    student, teacher, drop, label = (tensor[:4] for tensor in rows())
    student = student.detach().requires_grad_()
    odds = numerics.margin(teacher, label)
    for function in (
        lambda s: softmax_kl(teacher, s),
        lambda s: softmax_kl(teacher, s, drop.double()),
        lambda s: margin_kl(odds, s, label),
    ):
        assert torch.autograd.gradcheck(function, student)
        assert torch.autograd.gradgradcheck(function, student)


def test_torch_func_transforms_use_the_formula():
    student, teacher, _, label = rows()
    student = student.detach()

    def total(student):
        kept = softmax_kl(teacher, student, float_mask(torch.ge, teacher, teacher[:, :1]))
        return (kept + margin_kl(largest_margin(teacher), student, label)).sum()

    leaf = student.clone().requires_grad_()
    assert_close(torch.func.grad(total)(student), torch.autograd.grad(total(leaf), leaf)[0])
    assert_close(torch.func.vmap(total)(torch.stack([student, teacher])), torch.stack([total(student), total(teacher)]))


@FLOATS
def test_marks(dtype):
    _, teacher, _, _ = rows(dtype)
    for comparison in (torch.ge, torch.gt, torch.eq):
        assert torch.equal(
            float_mask(comparison, teacher, teacher[:, :1]), comparison(teacher, teacher[:, :1]).to(dtype)
        )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("classes", [100, 21841])
def test_gpu_and_cpu_agree(classes, compiled):
    """Eagerly, in blocks of rows, and compiled."""
    student, teacher, _, label = rows(torch.float32, 3.0, count=1024, classes=classes)
    label[::5] = -100
    function = torch.compile(rld_loss) if compiled else rld_loss

    def run(function, device):
        leaf = student.detach().to(device).requires_grad_()
        terms = function(leaf, teacher.to(device), label.to(device))
        (gradient,) = torch.autograd.grad(sum(terms.values()), leaf)
        return {name: term.detach().cpu() for name, term in terms.items()}, gradient.cpu()

    assert_close(run(function, "cuda"), run(rld_loss, "cpu"), rtol=1e-4, atol=1e-6)
