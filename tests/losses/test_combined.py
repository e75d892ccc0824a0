import pytest
import torch
from torch import nn
from torch.testing import assert_close

from rld_lightning.losses import CELoss, CombinedLoss, KDLoss, ModelOutput, RLDLoss, StepContext
from rld_lightning.losses.features import ATLoss
from rld_lightning.models import create_model, forward_with_taps


def logits(size=6, classes=10):
    return torch.randn(size, classes), torch.randn(size, classes), torch.randint(classes, (size,))


def step(loss, teacher, student, epoch=None):
    images, label = torch.randn(4, 3, 32, 32), torch.arange(4)
    with torch.no_grad():
        theirs = ModelOutput(*forward_with_taps(teacher, images, loss.teacher_taps))
    return StepContext(ModelOutput(*forward_with_taps(student, images, loss.student_taps)), theirs, label, epoch=epoch)


def test_is_the_weighted_sum_with_one_cross_entropy():
    batch = logits()
    rld, kd = RLDLoss(alpha=2.0), KDLoss(ce_weight=0.1)
    alone, soft = rld(*batch), kd(*batch)
    terms = CombinedLoss(rld=rld, soft=kd, weights={"soft": 0.3}, ce_weight=0.7)(*batch)
    expected = {"ce": 0.7 * alone["ce"], "rld/scd": alone["scd"], "rld/mcd": alone["mcd"], "soft/kd": 0.3 * soft["kd"]}
    assert_close(terms, expected)


def test_a_term_with_the_name_of_its_loss_keeps_it():
    assert set(CombinedLoss(kd=KDLoss(), rld=RLDLoss())(*logits())) == {"ce", "kd", "rld/scd", "rld/mcd"}


def test_each_loss_has_its_own_warmup():
    combined = CombinedLoss(rld=RLDLoss(warmup_epochs=4), kd=KDLoss())
    student, teacher, label = logits()
    full = combined(student, teacher, label)
    first = combined(StepContext(ModelOutput(student), ModelOutput(teacher), label, epoch=1))
    assert_close(first, {name: term * (0.25 if name.startswith("rld") else 1) for name, term in full.items()})


def test_shared_features_are_collected_once():
    teacher, student = create_model("resnet14", 10).eval(), create_model("resnet8", 10)
    combined = CombinedLoss(rld=RLDLoss(), at=ATLoss(), twin=ATLoss(power=1.0))
    combined.connect(student, teacher, (3, 32, 32), torch.arange(10))
    assert combined.student_taps == combined.teacher_taps == ("layer1", "layer2", "layer3")
    calls = []
    handles = [student.register_forward_hook(lambda *_: calls.append("student"))]
    handles.append(teacher.register_forward_hook(lambda *_: calls.append("teacher")))
    terms = combined(step(combined, teacher, student))
    assert sorted(calls) == ["student", "teacher"]
    assert set(terms) == {"ce", "rld/scd", "rld/mcd", "at", "twin/at"}
    sum(terms.values()).backward()
    assert student.layer1[0].conv1.weight.grad.abs().sum() > 0


def test_requirements_and_parameters_are_those_of_all_losses():
    learnable = KDLoss()
    learnable.scale = nn.Parameter(torch.ones(()))
    learnable.needs_strong_view = True
    learnable.own_buffers = ("bank",)
    combined = CombinedLoss(kd=learnable, rld=RLDLoss())
    assert combined.needs_teacher
    assert combined.needs_strong_view
    assert not combined.reuses_classifier
    assert combined.own_buffers == ("losses.kd.bank",)
    assert dict(combined.named_parameters()) == {"losses.kd.scale": learnable.scale}
    assert not CombinedLoss(a=CELoss(), b=CELoss()).needs_teacher


def test_weight_zero_removes_a_loss():
    unused = KDLoss()
    unused.scale = nn.Parameter(torch.ones(()))
    combined = CombinedLoss(kd=unused, rld=RLDLoss(), weights={"kd": 0})
    assert set(combined(*logits())) == {"ce", "rld/scd", "rld/mcd"}
    assert not list(combined.parameters())


def test_describe_names_the_sum():
    text = CombinedLoss(rld=RLDLoss(), at=ATLoss(), weights={"at": 0.5}).describe()
    assert text.startswith("1 * CE + 1 * RLDLoss(")
    assert " + 0.5 * ATLoss(" in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kd": KDLoss()}, "at least two"),
        ({"kd": KDLoss(), "rld": RLDLoss(), "weights": {"rdl": 1.0}}, "rdl"),
        ({"kd": KDLoss(), "rld": RLDLoss(), "weights": {"rld": -1.0}}, "rld=-1.0"),
        ({"kd": KDLoss(), "rld": RLDLoss(), "ce_weight": -1.0}, "ce_weight=-1.0"),
    ],
)
def test_invalid_combinations_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        CombinedLoss(**arguments)


def test_a_loss_with_its_own_forward_raises():
    class Special(KDLoss):
        def forward(self, student, teacher=None, label=None):
            return super().forward(student, teacher, label)

    with pytest.raises(ValueError, match="cannot be combined"):
        CombinedLoss(special=Special(), rld=RLDLoss())


def test_refined_logits_are_those_of_the_first_loss_that_changes_them():
    teacher, label = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([1])
    assert_close(CombinedLoss(kd=KDLoss(), rld=RLDLoss()).refined(teacher, label), RLDLoss().refined(teacher, label))
    assert CombinedLoss(kd=KDLoss(), ce=CELoss()).refined(teacher, label) is None
