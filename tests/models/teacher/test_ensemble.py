"""An ensemble: the mean of its members' outputs, each with the normalisation of its training."""

import pytest
import torch
from torch import nn

from rld_lightning.losses import KDLoss, RLDLoss
from rld_lightning.models.factory import create_model
from rld_lightning.models.normalisation import Normalisation, Renormalise
from rld_lightning.models.stages import stages_of
from rld_lightning.models.teacher.ensemble import Ensemble
from rld_lightning.models.teacher.frozen import FrozenTeacher
from rld_lightning.models.teacher.full_precision_linear import FullPrecisionLinear


class Says(nn.Module):
    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, images):
        return self.logits.expand(len(images), -1)


IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_the_mean_is_of_logits_or_of_probabilities():
    one, other = torch.tensor([2.0, 0.0, -1.0]), torch.tensor([0.0, 300.0, 1.0])
    members = [Says(one.tolist()), Says(other.tolist())]
    torch.testing.assert_close(Ensemble(members)(IMAGES)[0], (one + other) / 2)
    logits = Ensemble(members, "probabilities")(IMAGES)[0]
    torch.testing.assert_close(logits.exp(), (one.softmax(0) + other.softmax(0)) / 2)
    assert logits.isfinite().all()
    torch.testing.assert_close(Ensemble([Says([1.0, 2.0])] * 3)(IMAGES)[0], torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(
        Ensemble([Says([1.0, 2.0])] * 3, "probabilities")(IMAGES)[0], torch.tensor([1.0, 2.0]).log_softmax(0)
    )
    for bad in (([], "logits"), (members, "votes")):
        with pytest.raises(ValueError, match=r"at least one|choose logits or probabilities"):
            Ensemble(*bad)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_each_member_gets_its_own_normalisation_and_size(dtype):
    given, own = Normalisation((0.5,) * 3, (0.5,) * 3), Normalisation((0.0,) * 3, (1.0,) * 3)
    members = [create_model("resnet8", 10).eval() for _ in range(2)]
    renormalises = [None, Renormalise(given, own, (16, 16))]
    with torch.no_grad():
        seen = nn.functional.interpolate(IMAGES, (16, 16), mode="bilinear", antialias=True) * 0.5 + 0.5
        expected = (members[0](IMAGES) + members[1](seen)) / 2
    teacher = FrozenTeacher(Ensemble(members, renormalises=renormalises), dtype=dtype)
    assert teacher.exact_logits == (dtype is None)
    assert all((type(member.fc) is FullPrecisionLinear) == (dtype is None) for member in members)
    found, _ = teacher(IMAGES)
    assert found.dtype is torch.float32
    rounding = 1e-4 if dtype is None else 0.1
    torch.testing.assert_close(found, expected, rtol=rounding, atol=rounding)


def test_only_losses_of_logits_accept_it():
    teacher = FrozenTeacher(Ensemble([create_model("resnet8", 5) for _ in range(2)], "probabilities"))
    student = torch.randn(2, 5, requires_grad=True)
    for loss in (RLDLoss(), KDLoss()):
        sum(loss(student, teacher(IMAGES)[0], torch.tensor([0, 3])).values()).backward()
    assert student.grad.isfinite().all()
    with pytest.raises(ValueError, match=r"several teachers .* choose a loss of logits"):
        stages_of(teacher.model)
