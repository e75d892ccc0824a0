import inspect
from dataclasses import replace

import pytest
import torch
from helpers.loss_tester import LossTester, batch, kl, zscore
from torch.testing import assert_close

from rld_lightning.losses import MLKDLoss, MLKDNoAugLoss, ModelOutput, StepContext, mlkd_loss, mlkd_noaug_loss

TEMPERATURES = (4.0, 3.0, 5.0, 2.0, 6.0)
MODES = pytest.mark.parametrize("mode", ["reference", "clean"])


def other_view(logits):
    """A second view that differs from the first, and is exact in every type."""
    return 0.5 * logits.roll(1, 0)


def two_views(student, teacher, label, **options):
    return mlkd_loss(student, teacher, other_view(student), other_view(teacher), label, **options)


two_views.__signature__ = inspect.signature(mlkd_loss)


class TwoViews(MLKDLoss):
    """Creates the second view, so that the loss can be called like any other."""

    def terms(self, step):
        strong = (ModelOutput(other_view(view.logits)) for view in (step.student, step.teacher))
        return super().terms(replace(step, **dict(zip(("student_strong", "teacher_strong"), strong, strict=True))))


def lower_half(values):
    """Positions of the numbers that are at most their median (the mean of the middle two)."""
    ordered = sorted(values)
    median = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
    return [i for i, value in enumerate(values) if value <= median]


def naive(weak, strong, *, temperature, weight, mode, logit_standardization=False):
    """The terms from the formulas; each view is a pair of student and teacher logits ``(B, C)``."""
    (student, teacher), (size, classes) = weak, weak[0].shape

    def divergence(view, i, T):
        s, t = (zscore(x[i]) if logit_standardization else x[i] for x in view)
        return T**2 * kl(t / T, s / T)

    # Odds instead of probabilities, because many probabilities of a confident batch are 1.
    odds = [row.max() - torch.cat([row[: row.argmax()], row[row.argmax() + 1 :]]).logsumexp(-1) for row in teacher]
    samples = lower_half([value.item() for value in odds])
    of_class = lower_half([teacher.log_softmax(-1)[:, k].logsumexp(-1).item() for k in range(classes)])
    terms = dict.fromkeys(("kd", "kd_strong", "class_correlation", "batch_correlation"), 0.0)
    for number, T in enumerate((temperature, 3, 5, 2, 6)):
        p, q = (teacher / T).softmax(-1), (student / T).softmax(-1)
        all_weak = sum(divergence(weak, i, T) for i in range(size)) / size
        all_strong = sum(divergence(strong, i, T) for i in range(size)) / size
        if mode == "reference":
            f, g = len(samples) / size, len(of_class) / classes
            terms["kd"] += weight * f * all_weak
            terms["kd_strong"] += weight * (all_weak if number >= 3 else all_strong)
            by_class = torch.einsum("nj,nk->jk", p, p) - torch.einsum("nj,nk->jk", q, q)
            by_sample = torch.einsum("mk,nk->mn", p, p) - torch.einsum("mk,nk->mn", q, q)
            terms["class_correlation"] += weight * g * (by_class**2).sum() / classes
            terms["batch_correlation"] += weight * f * (by_sample**2).sum() / size
        else:
            terms["kd"] += weight * sum(divergence(weak, i, T) for i in samples) / len(samples)
            terms["kd_strong"] += weight * all_strong
            by_class, by_sample = (p.T @ p - q.T @ q)[of_class], (p @ p.T - q @ q.T)[samples]
            terms["class_correlation"] += weight * (by_class[:, of_class] ** 2).sum() / len(of_class)
            terms["batch_correlation"] += weight * (by_sample[:, samples] ** 2).sum() / len(samples)
    return terms


class TestMLKD(LossTester):
    function = staticmethod(two_views)
    module = TwoViews
    settings = (
        {"temperature": 4.0, "weight": 0.9, "mode": "reference"},
        {"temperature": 1.0, "weight": 0.5, "mode": "clean"},
        {"temperature": 1.0, "weight": 9.0, "mode": "reference", "logit_standardization": True},
    )
    weights = ("weight",)
    choices = ("mode",)
    per_sample = False

    def naive_batch(self, student, teacher, label, **hyper):
        return naive((student, teacher), (other_view(student), other_view(teacher)), **hyper)

    def test_module_is_the_function_and_cross_entropy(self, hyper):
        student, teacher, label = batch()
        ce, strong = (torch.nn.functional.cross_entropy(view, label) for view in (student, other_view(student)))
        expected = self.call(student, teacher, label, **hyper)
        terms = self.module(**hyper, ce_weight=0.3)(student, teacher, label)
        assert list(terms) == ["ce", *expected, "ce_strong"]
        assert_close(terms, {"ce": 0.3 * ce} | expected | {"ce_strong": 0.3 * strong})
        assert_close(self.module(**hyper, ce_weight=0)(student, teacher, label), expected, rtol=0, atol=0)


def views(seed=0):
    """Two unrelated views: student and teacher of each, and labels."""
    weak, strong = batch(seed=seed), batch(seed=seed + 1)
    return weak[:2], strong[:2], weak[2]


def context(weak, strong, label, **others):
    outputs = [ModelOutput(logits) for logits in (*weak, *strong)]
    return StepContext(*outputs[:2], label, student_strong=outputs[2], teacher_strong=outputs[3], **others)


@MODES
@pytest.mark.parametrize("logit_standardization", [False, True])
def test_value_and_gradients_of_both_views(mode, logit_standardization):
    weak, strong, label = views()
    hyper = {"temperature": 4.0, "weight": 0.9, "mode": mode, "logit_standardization": logit_standardization}
    leaves = [view[0].clone().requires_grad_() for view in (weak, strong)]
    weak, strong = (leaves[0], weak[1].requires_grad_()), (leaves[1], strong[1].requires_grad_())
    terms = MLKDLoss(**hyper)(context(weak, strong, label))
    expected = naive(weak, strong, **hyper)
    expected |= {
        name: 0.1 * torch.nn.functional.cross_entropy(leaf, label)
        for name, leaf in zip(("ce", "ce_strong"), leaves, strict=True)
    }
    assert_close(terms, {name: expected[name] for name in terms}, rtol=1e-9, atol=1e-11)
    assert set(terms) == set(expected)
    *actual, of_weak, of_strong = torch.autograd.grad(
        sum(terms.values()), [*leaves, weak[1], strong[1]], allow_unused=True
    )
    assert of_weak is of_strong is None  # the teacher's
    expected_gradients = torch.autograd.grad(sum(expected.values()), leaves)
    assert_close(actual, list(expected_gradients), rtol=1e-7, atol=1e-11)


def test_defaults_are_those_of_the_public_code():
    loss = MLKDLoss()
    assert (loss.temperature, loss.weight, loss.ce_weight, loss.warmup_epochs) == (4.0, 0.9, 0.1, 1)
    assert loss.mode == "reference"
    assert loss.needs_strong_view


def test_reference_mode_of_the_weak_view_equals_mlkd_noaug():
    weak, strong, label = views()
    terms = MLKDLoss()(context(weak, strong, label))
    one_view = MLKDNoAugLoss()(*weak, label)
    assert_close({name: terms[name] for name in one_view}, one_view, rtol=0, atol=0)


def test_reference_mode_uses_the_weak_view_for_the_last_two_strong_temperatures():
    weak, strong, _ = views()
    (student, teacher), kd = weak, lambda T, s, t: T**2 * sum(map(kl, t / T, s / T)) / 8
    expected = sum(kd(T, *strong) for T in (4.0, 3.0, 5.0)) + sum(kd(T, student, teacher) for T in (2.0, 6.0))
    assert_close(mlkd_loss(*weak, *strong, weight=1.0)["kd_strong"], expected)
    clean = mlkd_loss(*weak, *strong, weight=1.0, mode="clean")["kd_strong"]
    assert_close(clean, sum(kd(T, *strong) for T in TEMPERATURES))


def test_reference_mode_scales_the_weak_kd_of_clean_mode_by_the_fraction_of_unsure_samples():
    """Exactly, if all samples have the same divergence, at any confidence of the teacher."""
    generator = torch.Generator().manual_seed(2)
    scale = torch.linspace(0.5, 3, 7, dtype=torch.float64).unsqueeze(-1)
    teacher = scale * torch.randn(7, 10, generator=generator, dtype=torch.float64)
    direction = torch.randn(7, 10, generator=generator, dtype=torch.float64)

    def divergence(step):
        logs = [
            ((teacher / T).log_softmax(-1), ((teacher + step * direction) / T).log_softmax(-1)) for T in TEMPERATURES
        ]
        return sum(
            T**2 * (p.exp() * (p - q)).sum(-1, keepdim=True) for T, (p, q) in zip(TEMPERATURES, logs, strict=True)
        )

    low, high = torch.zeros(7, 1, dtype=torch.float64), torch.full((7, 1), 20.0, dtype=torch.float64)
    for _ in range(60):
        middle = (low + high) / 2
        below = divergence(middle) < 2.5
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    student = teacher + low * direction

    reference, clean = (
        mlkd_loss(*(student, teacher) * 2, weight=1.0, mode=mode)["kd"] for mode in ("reference", "clean")
    )
    assert clean.item() == pytest.approx(2.5)
    assert reference.item() == pytest.approx(4 / 7 * clean.item())  # the middle one is unsure too


def test_clean_mode_ignores_sure_samples_of_the_weak_view():
    (student, teacher), _, label = views()
    teacher[1::2, 0] += 100  # sure
    leaf = student.requires_grad_()
    for name, sure_learn in (("kd", False), ("batch_correlation", False), ("class_correlation", True)):
        term = mlkd_loss(leaf, teacher, leaf.detach(), teacher, label, mode="clean")[name]
        (gradient,) = torch.autograd.grad(term, leaf)
        assert (gradient[0::2] != 0).any()
        assert (gradient[1::2] != 0).any() == sure_learn


@MODES
def test_ignored_samples_have_no_effect(mode):
    weak, strong, label = views()
    ignored = torch.tensor([0, 1, 0, 1, 0, 0, 0, 1]).bool()
    label[ignored] = 255
    weak[0][1], strong[0][3], weak[1][7], strong[1][7] = torch.nan, 1e30, torch.nan, torch.nan

    def value_and_gradient(rows):
        leaves = [view[0][rows].clone().requires_grad_() for view in (weak, strong)]
        step = context((leaves[0], weak[1][rows]), (leaves[1], strong[1][rows]), label[rows])
        terms = MLKDLoss(mode=mode, ignore_index=255)(step)
        return terms, torch.autograd.grad(sum(terms.values()), leaves)

    terms, gradients = value_and_gradient(slice(None))
    expected, expected_gradients = value_and_gradient(~ignored)
    assert_close(terms, expected)
    assert_close([gradient[~ignored] for gradient in gradients], list(expected_gradients))
    label.fill_(255)
    terms, gradients = value_and_gradient(slice(4, 7))
    assert all(term == 0 for term in terms.values())
    assert all((gradient == 0).all() for gradient in gradients)


@MODES
def test_without_labels_every_sample_counts(mode):
    weak, strong, label = views()
    assert_close(mlkd_loss(*weak, *strong, mode=mode), mlkd_loss(*weak, *strong, label, mode=mode), rtol=0, atol=0)


def test_correlations_use_raw_logits_of_the_weak_view():
    weak, strong, _ = views()
    plain = mlkd_loss(*weak, *strong)
    changed = mlkd_loss(*weak, *(2 * view for view in strong), logit_standardization=True)
    for name in ("class_correlation", "batch_correlation"):
        assert_close(changed[name], plain[name], rtol=0, atol=0)
        assert_close(plain[name], mlkd_noaug_loss(*weak)[name], rtol=0, atol=0)


def test_missing_or_mismatched_strong_view():
    weak, strong, label = views()
    message = "MLKDLoss needs a second, strongly augmented view.*strong_view=True.*or use MLKDNoAugLoss"
    step = context(weak, strong, label)
    with pytest.raises(ValueError, match=message):
        MLKDLoss()(*weak, label)
    for missing in ("student_strong", "teacher_strong"):
        with pytest.raises(ValueError, match=message):
            MLKDLoss()(replace(step, **{missing: None}))
    with pytest.raises(ValueError, match=r"student_strong \(7, 10\) must have the shape of student_logits \(8, 10\)"):
        MLKDLoss()(context(weak, [view[:7] for view in strong], label))
    with pytest.raises(ValueError, match="the student has 10 classes and the teacher 9"):
        MLKDLoss()(context(weak, (strong[0], strong[1][:, :9]), label))
