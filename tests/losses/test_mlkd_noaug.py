import pytest
import torch
from helpers.loss_tester import LossTester, batch, kl, zscore
from torch.testing import assert_close

from rld_lightning.losses import MLKDNoAugLoss, kd_loss, mlkd_noaug_loss
from rld_lightning.losses.mlkd_noaug import unsure


def lower_half(values):
    """Fraction of numbers that are at most their median (the mean of the middle two)."""
    ordered = sorted(values)
    median = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
    return sum(value <= median for value in values) / len(values)


class TestMLKDNoAug(LossTester):
    function = staticmethod(mlkd_noaug_loss)
    module = MLKDNoAugLoss
    settings = (
        {"temperature": 4.0, "weight": 0.9},
        {"temperature": 1.0, "weight": 0.5},
        {"temperature": 2.0, "weight": 9.0, "logit_standardization": True},
    )
    weights = ("weight",)
    per_sample = False

    def naive_batch(self, student, teacher, label, *, temperature, weight, logit_standardization=False):
        (size, classes), logs = teacher.shape, teacher.log_softmax(-1)
        # Odds instead of probabilities, because many probabilities of a confident batch are 1.
        odds = [row.max() - torch.cat([row[: row.argmax()], row[row.argmax() + 1 :]]).logsumexp(-1) for row in teacher]
        samples = lower_half([value.item() for value in odds])
        of_class = lower_half([logs[:, k].logsumexp(-1).item() for k in range(classes)])
        terms = dict.fromkeys(("kd", "class_correlation", "batch_correlation"), 0.0)
        for T in (temperature, 3, 5, 2, 6):
            divergences = []
            for s, t in zip(student, teacher, strict=True):
                z = (zscore(s), zscore(t)) if logit_standardization else (s, t)
                divergences.append(kl(z[1] / T, z[0] / T))
            terms["kd"] += weight * samples * T**2 * torch.stack(divergences).mean()
            p, q = (teacher / T).softmax(-1), (student / T).softmax(-1)
            by_class = torch.einsum("nj,nk->jk", p, p) - torch.einsum("nj,nk->jk", q, q)
            by_sample = torch.einsum("mk,nk->mn", p, p) - torch.einsum("mk,nk->mn", q, q)
            terms["class_correlation"] += weight * of_class * (by_class**2).sum() / classes
            terms["batch_correlation"] += weight * samples * (by_sample**2).sum() / size
        return terms


def test_defaults_are_those_of_the_public_code():
    loss = MLKDNoAugLoss()
    assert (loss.temperature, loss.weight, loss.ce_weight, loss.warmup_epochs) == (4.0, 0.9, 0.1, 1)


@pytest.mark.parametrize("standardize", [False, True])
def test_kd_is_plain_kd_scaled_by_the_fraction_of_unsure_samples(standardize):
    student, teacher, label = batch()
    options = {"logit_standardization": standardize}
    plain = sum(kd_loss(student, teacher, temperature=T, **options)["kd"] for T in (4.0, 3.0, 5.0, 2.0, 6.0))
    terms = mlkd_noaug_loss(student, teacher, label, temperature=4.0, weight=1.0, **options)
    assert_close(terms["kd"], plain / 2)  # four of the eight samples are at most the median


def test_a_repeated_temperature_counts_twice():
    student, teacher, _ = batch()
    three = mlkd_noaug_loss(student, teacher, temperature=3.0)["kd"]
    five = mlkd_noaug_loss(student, teacher, temperature=5.0)["kd"]
    difference = [kd_loss(student, teacher, temperature=T)["kd"] for T in (3.0, 5.0)]
    assert_close(five - three, 0.9 / 2 * (difference[1] - difference[0]))


def test_correlations_use_raw_logits():
    student, teacher, _ = batch()
    plain = mlkd_noaug_loss(student, teacher)
    standardized = mlkd_noaug_loss(student, teacher, logit_standardization=True)
    assert_close(standardized["class_correlation"], plain["class_correlation"], rtol=0, atol=0)
    assert_close(standardized["batch_correlation"], plain["batch_correlation"], rtol=0, atol=0)
    assert (standardized["kd"] - plain["kd"]).abs() > 0.1


def test_unsure_samples_and_classes():
    everything = torch.ones(4, dtype=torch.bool)
    # Confidence rises with the rows; class 0 leads in all, 1 and 2 share the rest.
    teacher = torch.tensor([[1.0, 0, 0], [2.0, 0, 0], [3.0, 0, 0], [4.0, 0, 0]])
    samples, classes = unsure(teacher, everything)
    assert samples.tolist() == [True, True, False, False]
    assert classes.tolist() == [False, True, True]
    # Of an odd number, the middle one is unsure.
    assert unsure(teacher[:3], everything[:3])[0].tolist() == [True, True, False]
    # All equal: all are unsure, except ignored samples.
    assert all(kept.all() for kept in unsure(torch.zeros(4, 3), everything))
    without_last = torch.tensor([True, True, True, False])
    assert unsure(teacher, without_last)[0].tolist() == [True, True, False, False]
    # In float32, the confidence of each of these rounds to 1.
    assert unsure(100 * teacher, everything)[0].tolist() == [True, True, False, False]


def test_hand_worked_correlations():
    """Two samples, two classes; the teacher is certain of one class each, the student is uniform."""
    teacher = torch.tensor([[1e4, -1e4], [-1e4, 1e4]])
    terms = mlkd_noaug_loss(torch.zeros(2, 2), teacher, weight=1.0)
    # P'P = PP' = identity, Q'Q = QQ' = all 1/2: four squares of 1/2, over 2, at five temperatures; all are unsure.
    assert terms["class_correlation"].item() == pytest.approx(2.5)
    assert terms["batch_correlation"].item() == pytest.approx(2.5)
