"""Logit standardization (LSKD) with every logit method."""

import pytest
import torch
from helpers.loss_tester import batch, zscore
from torch.testing import assert_close

import rld_lightning.losses
from rld_lightning.losses import ATKDLoss, LogitLoss, MLKDNoAugLoss, RevisionLoss

# These also use the raw logits, or always standardize; their own tests check it.
SPECIAL = (LogitLoss, ATKDLoss, MLKDNoAugLoss, RevisionLoss)
METHODS = [
    value
    for value in vars(rld_lightning.losses).values()
    if isinstance(value, type) and issubclass(value, LogitLoss) and value not in SPECIAL
]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
def test_terms_use_z_scores_and_cross_entropy_uses_raw_logits(method):
    student, teacher, label = batch()
    terms = method(ce_weight=1.0, logit_standardization=True)(student, teacher, label)
    expected = method(ce_weight=1.0)(torch.stack([*map(zscore, student)]), torch.stack([*map(zscore, teacher)]), label)
    expected["ce"] = torch.nn.functional.cross_entropy(student, label)
    # Standardizing twice changes nothing, up to the 1e-7 added to the deviation.
    assert_close(terms, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
def test_maps_are_standardized_over_their_classes(method):
    student, teacher = torch.randn(2, 4, 6, 2, 2, dtype=torch.float64)
    label = torch.randint(6, (4, 2, 2))
    loss = method(logit_standardization=True)
    flat = [logits.permute(0, 2, 3, 1).reshape(16, 6) for logits in (student, teacher)]
    assert_close(loss(student, teacher, label), loss(*flat, label.flatten()), rtol=1e-9, atol=1e-12)
