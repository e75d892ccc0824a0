import pytest
import torch
from helpers.loss_tester import batch
from torch.testing import assert_close

from rld_lightning.losses import (
    CELoss,
    CombinedLoss,
    DistillationLoss,
    LogitLoss,
    ModelOutput,
    RevisionLoss,
    RLDLoss,
    StepContext,
    rld_loss,
)
from rld_lightning.losses.base import cross_entropy


class Distance(DistillationLoss):
    """A minimal method, as a user would write it."""

    def __init__(self, weight=2.0, **base):
        super().__init__(**base)
        self.weight = weight
        self._scratch = "not a hyper-parameter"

    def terms(self, step):
        return {"distance": self.weight * (step.student.logits - step.teacher.logits).square().mean()}


def test_a_user_defined_method():
    student, teacher, label = batch()
    distance = 2 * (student - teacher).square().mean()
    terms = Distance(ce_weight=0.5)(student, teacher, label)
    assert_close(terms, {"ce": 0.5 * cross_entropy(student, label), "distance": distance})
    assert list(Distance(ce_weight=0)(student, teacher, label)) == ["distance"]
    assert (
        repr(Distance())
        == "Distance(ce_weight=1.0, warmup_epochs=1, ignore_index=-100, label_smoothing=0.0, weight=2.0)"
    )
    assert Distance().statistics(StepContext(ModelOutput(student), ModelOutput(teacher), label)) == {}


def test_a_method_without_terms():
    with pytest.raises(NotImplementedError, match="DistillationLoss must define terms"):
        DistillationLoss()(*batch())


def test_a_method_without_function_is_refused_when_it_is_made():
    class Forgotten(LogitLoss):
        temperature: float = 4.0

    class Later(Forgotten):
        def terms(self, step):
            return {"zero": step.student.logits.sum() * 0}

    with pytest.raises(TypeError, match=r"^Forgotten has no function: add function = staticmethod\(my_loss\)"):
        Forgotten()
    assert Later(ce_weight=0)(*batch())["zero"] == 0


def test_terms_see_the_whole_context():
    student, teacher, label = batch()
    seen = []

    class Looking(Distance):
        def terms(self, step):
            seen.append(step)
            return super().terms(step)

    index = torch.arange(8)
    step = StepContext(ModelOutput(student, {"layer": student}), ModelOutput(teacher), label, index, epoch=3)
    Looking()(step)
    assert seen == [step]
    assert seen[0].student.features["layer"] is student
    Looking()(student, teacher, label)
    assert seen[1].index is None
    assert seen[1].epoch is None


def test_warmup_factor():
    loss = Distance(warmup_epochs=4)
    assert [loss.warmup(epoch) for epoch in (1, 2, 3, 4, 5, None)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_warmup_scales_the_gradient_of_the_methods_terms_only():
    student, teacher, label = batch()
    gradients = []
    for epoch in (1, None):
        leaf = student.clone().requires_grad_()
        step = StepContext(ModelOutput(leaf), ModelOutput(teacher), label, epoch=epoch)
        terms = Distance(warmup_epochs=5)(step)
        gradients.append([torch.autograd.grad(terms[name], leaf)[0] for name in ("ce", "distance")])
    assert_close(gradients[0][0], gradients[1][0], rtol=0, atol=0)
    assert_close(gradients[0][1], gradients[1][1] / 5)


@pytest.mark.parametrize("epochs", [0, -1, float("nan")])
def test_warmup_epochs_out_of_range(epochs):
    with pytest.raises(ValueError, match=f"warmup_epochs={epochs} is not allowed; it must be >= 1"):
        Distance(warmup_epochs=epochs)


def test_terms_are_computed_outside_autocast():
    student, teacher, label = batch()
    types = []

    class Product(Distance):
        def terms(self, step):
            types.append((step.student.logits @ step.teacher.logits.T).dtype)
            return {}

    with torch.autocast("cpu", dtype=torch.bfloat16):
        Product()(student.float(), teacher.float(), label)
    assert types == [torch.float32]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_cross_entropy(dtype):
    logits, _, label = batch()
    logits = (30 * logits).to(dtype)
    expected = -logits.double().log_softmax(-1)[range(8), label].mean()
    actual = cross_entropy(logits, label)
    assert actual.dtype == torch.promote_types(dtype, torch.float32)
    assert_close(actual.double(), expected, rtol=1e-6 if dtype != torch.float64 else 1e-12, atol=0)


def test_cross_entropy_of_maps_and_ignored_positions():
    logits = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    label = torch.randint(5, (2, 3, 4))
    label[0, 0] = 255
    kept = label != 255
    expected = cross_entropy(logits.movedim(1, -1)[kept], label[kept])
    assert_close(cross_entropy(logits, label, ignore_index=255), expected)


def test_cross_entropy_without_samples():
    logits = torch.randn(2, 5, requires_grad=True)
    loss = cross_entropy(logits, torch.full((2,), -100))
    loss.backward()
    assert loss == 0
    assert (logits.grad == 0).all()
    assert cross_entropy(torch.randn(0, 5), torch.zeros(0, dtype=torch.long)) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool], ids=str)
def test_cross_entropy_requires_class_indices(dtype):
    with pytest.raises(ValueError, match=r"label must hold class indices \(integers\)"):
        cross_entropy(torch.randn(3, 2), torch.tensor([0, 1, 1], dtype=dtype))


@pytest.mark.parametrize("loss", [rld_loss, RLDLoss(), CELoss()], ids=["function", "module", "ce"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, y: (s, y[:, None]), r"\(8, 1\); use label\.squeeze\(-1\)\."),
        (lambda s, y: (s, y.double()), r"float64 \(8,\); use label\.long\(\)\."),
        (lambda s, y: (s, s.softmax(1)), r"float32 \(8, 10\); for soft or one-hot labels use label\.argmax\(1\)\."),
        (lambda s, y: (s.reshape(2, 4, 10), y.reshape(2, 4)), r"for \(B, L, C\) use logits\.transpose\(1, 2\)\."),
        (lambda s, y: (s, y.tolist()), r"label must be a tensor, got a list; pass torch\.as_tensor\(label\)\."),
        (lambda s, y: ((s,), y), r"student_logits must be a tensor, got a tuple; pass the logits of a model's output"),
    ],
    ids=["column", "float", "soft", "tokens", "list", "tuple"],
)
def test_invalid_arguments_raise_with_a_hint(loss, change, message):
    student, label = change(torch.randn(8, 10), torch.arange(8))
    teacher = student if isinstance(student, torch.Tensor) else student[0]
    with pytest.raises(ValueError, match=message):
        loss(student, teacher, label)


@pytest.mark.parametrize("make", [Distance, lambda **base: CombinedLoss(a=Distance(), b=Distance(), **base)])
def test_label_smoothing_is_pytorchs_and_affects_only_the_cross_entropy(make):
    student, teacher, label = batch()
    plain, smooth = (make(label_smoothing=share)(student, teacher, label) for share in (0.0, 0.1))
    theirs = torch.nn.CrossEntropyLoss(label_smoothing=0.1)(student, label)
    assert_close(smooth.pop("ce"), theirs)
    assert plain.pop("ce") != theirs
    assert_close(plain, smooth)
    with pytest.raises(ValueError, match=r"label_smoothing=0\.1 .* which ce_weight=0 removes"):
        RevisionLoss(label_smoothing=0.1)
    with pytest.raises(ValueError, match=r"label_smoothing=1.0 is not allowed; it must be in \[0, 1\)"):
        Distance(label_smoothing=1.0)


def test_label_smoothing_with_ignored_labels_and_of_pixels():
    student, label = torch.randn(2, 5, 3, 4, dtype=torch.float64), torch.randint(5, (2, 3, 4))
    label[0, 0] = -100
    expected = torch.nn.functional.cross_entropy(student, label, label_smoothing=0.2)
    assert_close(cross_entropy(student, label, label_smoothing=0.2), expected)
