import pytest
import torch
import torch.nn.functional as F
from helpers.loss_tester import batch
from torch.testing import assert_close

from rld_lightning.losses import CELoss, ModelOutput, StepContext


def test_is_cross_entropy_and_needs_no_teacher():
    student, teacher, label = batch()
    loss = CELoss()
    assert not loss.needs_teacher
    expected = {"ce": F.cross_entropy(student, label)}
    assert_close(loss(student, None, label), expected)
    assert_close(loss(student, label=label), expected)
    assert_close(loss(student, teacher, label), expected)
    assert_close(loss(StepContext(ModelOutput(student), None, label, epoch=1)), expected)
    assert_close(CELoss(ce_weight=0.5)(student, None, label)["ce"], expected["ce"] / 2)


def test_ignored_samples():
    student, _, label = batch()
    label[:3] = 7
    kept = label != 7
    assert_close(CELoss(ignore_index=7)(student, None, label), CELoss()(student[kept], None, label[kept]))


def test_invalid_arguments_raise():
    student, _, label = batch()
    with pytest.raises(ValueError, match="call the loss with"):
        CELoss()(student)
    with pytest.raises(ValueError, match=r"ce_weight=-1\.0 is not allowed"):
        CELoss(ce_weight=-1.0)
    with pytest.raises(ValueError, match="label must hold class indices"):
        CELoss()(student, None, label.double())
    with pytest.raises(ValueError, match=r"label 10 is outside \[0, 10\)"):
        CELoss()(student, None, torch.full((8,), 10))
    with pytest.raises(ValueError, match=r"label -3 is outside \[0, 10\)"):
        CELoss(label_smoothing=0.1)(student[..., None], None, torch.full((8, 1), -3))


def test_prints_its_hyperparameters():
    assert (
        repr(CELoss(ce_weight=0.5)) == "CELoss(ce_weight=0.5, warmup_epochs=1, ignore_index=-100, label_smoothing=0.0)"
    )
