"""What holds of every loss of logits, whatever these are: finite, non-negative, no gradient along a common offset."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rld_lightning.losses import ModelOutput, StepContext
from rld_lightning.losses.registry import list_losses, loss_class

LOSSES = [name for name in list_losses() if ".features." not in loss_class(name).__module__]
# A common offset of the logits matters to these: they copy logits, or make temperatures of the largest.
KNOW_OFFSETS = {"revision", "dtkd"}
# Of the gradient of a sample, and of one that saturates: its largest is some tens.
ROUNDING = {torch.float64: 1e-9, torch.float32: 2e-3, torch.bfloat16: 2e-2, torch.float16: 2e-3}
SATURATED = {torch.float64: 1e-13, torch.float32: 2e-5, torch.bfloat16: 1e-4, torch.float16: 1e-4}
KINDS = ("random", "ties", "one-hot teacher", "constant", "equal", "ruled out", "true class ruled out")


@st.composite
def batches(draw):
    """Student logits, teacher logits and labels, of magnitudes up to 1e4."""
    size, classes = draw(st.sampled_from([1, 2, 7])), draw(st.sampled_from([2, 3, 10, 100]))
    dtype, kind = draw(st.sampled_from(list(ROUNDING))), draw(st.sampled_from(KINDS))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    scales = st.sampled_from([1e-4, 1.0, 5.0, 100.0, 1e4])
    student, teacher = (draw(scales) * torch.randn(size, classes, generator=generator) for _ in range(2))
    label = torch.randint(classes, (size,), generator=generator)
    true, other = label.unsqueeze(-1), (label.unsqueeze(-1) + 1) % classes
    if kind == "ties":
        student, teacher = (2 * (logits / 2).round() for logits in (student, teacher))
    elif kind == "one-hot teacher":
        teacher = torch.zeros_like(teacher).scatter(-1, draw(st.sampled_from([true, other])), draw(scales))
    elif kind == "constant":
        student, teacher = torch.zeros_like(student), torch.zeros_like(teacher)
    elif kind == "equal":
        teacher = student.clone()
    elif kind == "ruled out":
        teacher = teacher.scatter(-1, other, -math.inf)
    elif kind == "true class ruled out":
        teacher = teacher.scatter(-1, true, -math.inf)
    return student.to(dtype).requires_grad_(), teacher.to(dtype), label


def check(name, batch):
    student, teacher, label = batch
    loss, step = loss_class(name)(), {}
    if loss.needs_strong_view:
        step = {"student_strong": ModelOutput(0.9 * student), "teacher_strong": ModelOutput(0.9 * teacher)}
    context = StepContext(ModelOutput(student), ModelOutput(teacher), label, torch.arange(len(label)), 50, **step)
    terms = loss(context)
    values = torch.stack([term.detach().double() for term in terms.values()])
    assert values.isfinite().all(), terms
    assert (values >= 0).all(), terms
    (gradient,) = torch.autograd.grad(sum(terms.values()), student)
    if student.dtype == torch.float16 and not gradient.isfinite().all():  # which reaches 65504
        check(name, (student.detach().float().requires_grad_(), teacher.float(), label))
        return
    assert gradient.isfinite().all()
    if name == "normkd" and teacher.isinf().any():  # in units of a deviation that is beyond all measure
        return
    if name not in KNOW_OFFSETS:
        gradient = gradient.double()
        along, size = gradient.sum(-1).abs(), gradient.abs().sum(-1)
        assert (along <= ROUNDING[student.dtype] * size + SATURATED[student.dtype]).all(), (along, size)


CHECKS = [HealthCheck.too_slow]


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", LOSSES)
@settings(max_examples=25, derandomize=True, deadline=None, database=None, suppress_health_check=CHECKS)
@given(batch=batches())
def test_any_logits(name, batch):
    check(name, batch)


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
@settings(max_examples=300, derandomize=True, deadline=None, database=None, suppress_health_check=CHECKS)
@given(batch=batches())
def test_very_many_logits(name, batch):
    check(name, batch)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("scale", [1e15, 1e30])
def test_logits_of_any_size(name, scale):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (scale * torch.randn(8, 10, generator=generator) for _ in range(2))
    label = torch.randint(10, (8,), generator=generator)
    loss, step = loss_class(name)(), {}
    student.requires_grad_()
    if loss.needs_strong_view:
        step = {"student_strong": ModelOutput(student), "teacher_strong": ModelOutput(teacher)}
    context = StepContext(ModelOutput(student), ModelOutput(teacher), label, torch.arange(8), 50, **step)
    total = sum(loss(context).values())
    assert total.isfinite()
    assert torch.autograd.grad(total, student)[0].isfinite().all()


HOT = [name for name in LOSSES if "temperature" in loss_class(name).__dataclass_fields__]


@pytest.mark.parametrize("name", HOT)
@pytest.mark.parametrize("temperature", [100, 1e3, 1e5])
def test_any_temperature(name, temperature):
    """Distributions are nearly uniform there, and the squared temperature makes much of their rounding."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(64, 100, generator=generator) for _ in range(2))
    label = torch.randint(100, (64,), generator=generator)
    loss = loss_class(name)(temperature=temperature)
    if loss.needs_strong_view:
        pytest.skip("its terms at other temperatures dominate")
    terms, exact = loss(student, teacher, label), loss(student.double(), teacher.double(), label)
    for term, value in terms.items():
        assert value.item() >= 0
        assert value.item() == pytest.approx(exact[term].item(), rel=5e-3), term
