"""Properties of every loss for any logits: finite, non-negative, no gradient along a common offset."""

import math

import pytest
import torch
from helpers.loss_tester import LossTester, batch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from rld_lightning.losses import ModelOutput, StepContext, dist_loss, mlkd_noaug_loss, revision_loss
from rld_lightning.losses.features import (
    at_loss,
    catkd_loss,
    dhkd_loss,
    fitnet_loss,
    kdg_feature_loss,
    kdsvd_loss,
    nst_loss,
    ofd_loss,
    pkt_loss,
    reviewkd_loss,
    rkd_loss,
    simkd_loss,
    sp_loss,
    vid_loss,
)
from rld_lightning.losses.registry import list_losses, loss_class

LOSSES = [name for name in list_losses() if ".features." not in loss_class(name).__module__]
# These depend on a common offset of the logits: they copy logits, or compute temperatures from the largest.
KNOW_OFFSETS = {"revision", "dtkd"}
# Tolerances of the gradient along a common offset, relative to a sample's gradient and absolute (saturated logits).
# The largest gradients are some tens.
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
    if student.dtype == torch.float16 and not gradient.isfinite().all():  # float16's largest number is 65504
        check(name, (student.detach().float().requires_grad_(), teacher.float(), label))
        return
    assert gradient.isfinite().all()
    if name == "normkd" and teacher.isinf().any():  # divides by an infinite deviation
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


# RC corrects the student's probabilities by their logits' values.
@pytest.mark.parametrize("name", sorted(set(LOSSES) - KNOW_OFFSETS - {"rc"}))
def test_a_constant_added_to_a_sample_changes_nothing(name):
    student, teacher, label = batch()
    shift = torch.arange(8.0).unsqueeze(-1)
    loss = loss_class(name)(ce_weight=0)
    terms = []
    for own, theirs in ((student, teacher), (student + shift, teacher - 3 * shift)):
        own, theirs = ModelOutput(own), ModelOutput(theirs)
        terms.append(loss(StepContext(own, theirs, label, student_strong=own, teacher_strong=theirs)))
    assert_close(*terms)


OF_WHOLE_BATCH = pytest.mark.parametrize("loss", [dist_loss, mlkd_noaug_loss, revision_loss])


@OF_WHOLE_BATCH
def test_ignored_samples_have_no_effect_on_losses_of_whole_batches(loss):
    student, teacher, label = batch()
    label[0] = teacher[0].argmax()
    ignored = torch.tensor([0, 1, 0, 1, 0, 0, 0, 1]).bool()
    label[ignored] = 255
    student[1], student[3], teacher[7] = torch.nan, 1e30, torch.nan
    actual = LossTester.value_and_gradient(loss, student, teacher, label, ignore_index=255)
    expected = LossTester.value_and_gradient(loss, student[~ignored], teacher[~ignored], label[~ignored])
    LossTester.assert_same((actual[0], actual[1][~ignored]), expected)
    assert (actual[1][ignored] == 0).all()
    terms, gradient = LossTester.value_and_gradient(loss, *batch()[:2], label.fill_(-100))
    assert all(term == 0 for term in terms.values())
    assert (gradient == 0).all()


@OF_WHOLE_BATCH
def test_maps_are_batches_of_pixels_for_losses_of_whole_batches(loss):
    student, teacher = torch.randn(2, 3, 7, 2, 4, dtype=torch.float64)
    label = torch.where(torch.rand(3, 2, 4) < 0.5, teacher.argmax(1), torch.randint(7, (3, 2, 4)))
    flat = (logits.movedim(1, -1).flatten(0, -2) for logits in (student, teacher))
    assert_close(loss(student, teacher, label), loss(*flat, label.flatten()))


HOT = [name for name in LOSSES if "temperature" in loss_class(name).__dataclass_fields__]


@pytest.mark.parametrize("name", HOT)
@pytest.mark.parametrize("temperature", [100, 1e3, 1e5])
def test_any_temperature(name, temperature):
    """At high temperatures, distributions are nearly uniform and the squared temperature amplifies their rounding."""
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


def draws(count):
    """Student and teacher: maps, vectors and logits of a batch each, and labels."""
    generator = torch.Generator().manual_seed(0)
    shapes = (count, 6, 4, 4), (count, 6), (count, 6)
    drawn = [torch.randn(2, *shape, generator=generator, dtype=torch.float64) for shape in shapes]
    label = torch.randint(6, (count,), generator=generator)
    label[: count // 3] = drawn[2][1, : count // 3].argmax(1)  # the teacher is right on the first third
    return *drawn, label


ONES, SQUARE = torch.ones(6, dtype=torch.float64), torch.eye(6, dtype=torch.float64)
# From maps (student, teacher), vectors and logits; without connectors.
ON_FEATURES = {
    "at": lambda maps, vectors, logits: at_loss([maps[0]], [maps[1]]),
    "catkd": lambda maps, vectors, logits: catkd_loss(*maps, SQUARE, SQUARE),
    "dhkd": lambda maps, vectors, logits: dhkd_loss(*logits),
    "fitnet": lambda maps, vectors, logits: fitnet_loss(*maps),
    "kdg": lambda maps, vectors, logits: kdg_feature_loss(*vectors, logits[1], SQUARE),
    "kdsvd": lambda maps, vectors, logits: kdsvd_loss([maps[0], maps[1]], [maps[1], maps[0]]),
    "nst": lambda maps, vectors, logits: nst_loss([maps[0]], [maps[1]]),
    "ofd": lambda maps, vectors, logits: ofd_loss([maps[0]], [maps[1]], [-ONES]),
    "pkt": lambda maps, vectors, logits: pkt_loss(*vectors),
    "reviewkd": lambda maps, vectors, logits: reviewkd_loss([maps[0]], [maps[1]]),
    "rkd": lambda maps, vectors, logits: rkd_loss(*vectors),
    "simkd": lambda maps, vectors, logits: simkd_loss(*maps),
    "sp": lambda maps, vectors, logits: sp_loss(*maps),
    "vid": lambda maps, vectors, logits: vid_loss([maps[0]], [maps[1]], [ONES]),
}


@pytest.mark.parametrize("name", sorted(set(list_losses()) - {"crd"}))  # draws new negatives for each batch
def test_a_batch_is_the_mean_of_its_parts_unless_of_whole_batch(name):
    def value(rows):
        own = [both[:, rows] for both in drawn[:3]]
        if name in ON_FEATURES:
            return sum(ON_FEATURES[name](*own).values())
        student, teacher = map(ModelOutput, own[2])
        step = StepContext(student, teacher, drawn[3][rows], student_strong=student, teacher_strong=teacher)
        return sum(loss_class(name)().double()(step).values())

    drawn = draws(12)
    parts = (value(slice(0, 6)) + value(slice(6, 12))) / 2
    assert torch.isclose(parts, value(slice(0, 12)), rtol=1e-9) != loss_class(name)().of_whole_batch
