import pytest
import torch
from helpers.loss_tester import LossTester, batch, kl, one_against_rest
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from rld_lightning.losses import ModelOutput, RLDLoss, StepContext, dkd_loss, rld_loss


class TestRLD(LossTester):
    function = staticmethod(rld_loss)
    module = RLDLoss
    settings = (
        {"alpha": 1.0, "beta": 8.0, "temperature": 4.0},
        {"alpha": 2.0, "beta": 4.0, "temperature": 4.0, "confidence_temperature": 1.0},
        {"alpha": 1.0, "beta": 0.5, "temperature": 1.0, "confidence_temperature": 3.0, "mask": "g"},
        {"alpha": 9.0, "beta": 72.0, "temperature": 2.0, "logit_standardization": True},
    )
    positive = ("temperature", "confidence_temperature")
    weights = ("alpha", "beta")
    choices = ("mask",)
    vanishes = "right"

    @staticmethod
    def naive(
        student,
        teacher,
        label,
        *,
        alpha,
        beta,
        temperature,
        confidence_temperature=None,
        mask="ge",
    ):
        cold = confidence_temperature or temperature
        values = teacher.tolist()
        top = values.index(max(values))
        kept = [k for k, v in enumerate(values) if (v < values[label] if mask == "ge" else v <= values[label])]
        scd = kl(one_against_rest(teacher / cold, top), one_against_rest(student / cold, label))
        mcd = kl(teacher[kept] / temperature, student[kept] / temperature)
        return {"scd": alpha * cold**2 * scd, "mcd": beta * temperature**2 * mcd}


def test_defaults_are_the_papers():
    loss = RLDLoss()
    assert (loss.alpha, loss.beta, loss.temperature, loss.ce_weight, loss.warmup_epochs) == (1.0, 8.0, 4.0, 1.0, 20)
    assert (loss.confidence_temperature, loss.logit_standardization, loss.mask) == (None, False, "ge")
    student, teacher, label = batch()
    plain = rld_loss(student, teacher, label)
    assert_close(RLDLoss(ce_weight=0)(student, teacher, label), plain, rtol=0, atol=0)
    # "Same T": without a confidence temperature, the temperature is used.
    assert_close(rld_loss(student, teacher, label, confidence_temperature=4.0), plain, rtol=0, atol=0)


# One sample, four classes: teacher (8, 4, 2, 1)/15, student (3, 1, 1, 3)/8, true class 1.
TEACHER = torch.tensor([[8.0, 4.0, 2.0, 1.0]], dtype=torch.float64).log()
STUDENT = torch.tensor([[3.0, 1.0, 1.0, 3.0]], dtype=torch.float64).log()
LABEL = torch.tensor([1])


@pytest.mark.parametrize(
    ("mask", "mcd"),
    [
        ("ge", 0.38357609660237457),  # classes 2, 3: (2, 1)/3 || (1, 3)/4 = 2/3 ln(8/3) + 1/3 ln(4/9)
        ("g", 0.4967934086546931),  # classes 1, 2, 3: (4, 2, 1)/7 || (1, 1, 3)/5
    ],
)
def test_hand_worked(mask, mcd):
    terms = rld_loss(STUDENT, TEACHER, LABEL, alpha=1.0, beta=1.0, temperature=1.0, mask=mask)
    # (8, 7)/15, of the teacher's largest class, against (1, 7)/8, of the true class: 8/15 ln(64/15) + 7/15 ln(8/15)
    assert terms["scd"].item() == pytest.approx(0.4804268294735382, rel=1e-12)
    assert terms["mcd"].item() == pytest.approx(mcd, rel=1e-12)


def test_hand_worked_weights_and_temperatures():
    """Logits multiplied by the temperature give the same distributions; the terms have its square as a factor."""
    terms = rld_loss(3 * STUDENT, 3 * TEACHER, LABEL, alpha=2.0, beta=5.0, temperature=3.0)
    assert terms["scd"].item() == pytest.approx(2 * 9 * 0.4804268294735382, rel=1e-12)
    assert terms["mcd"].item() == pytest.approx(5 * 9 * 0.38357609660237457, rel=1e-12)


def test_ties_with_the_true_class_are_masked_by_ge_only():
    teacher = torch.tensor([[2.0, 1.0, 1.0, 0.0]], dtype=torch.float64)
    student = torch.tensor([[3.0, 1.0, 1.0, 3.0]], dtype=torch.float64).log()
    options = {"alpha": 0.0, "beta": 1.0, "temperature": 1.0}
    # Only class 3 is left.
    assert rld_loss(student, teacher, LABEL, mask="ge", **options)["mcd"] == 0
    # Classes 1, 2, 3 are left: (e, e, 1)/(2e + 1) against (1, 1, 3)/5.
    terms = rld_loss(student, teacher, LABEL, mask="g", **options)
    assert terms["mcd"].item() == pytest.approx(0.4213976592001081, rel=1e-12)


@pytest.mark.parametrize("standardize", [False, True])
def test_equals_dkd_if_the_teacher_is_always_right(standardize):
    options = {"alpha": 1.5, "beta": 6.0, "temperature": 3.0, "logit_standardization": standardize}
    student, teacher, label = batch("teacher_right")
    rld, rld_gradient = LossTester.value_and_gradient(rld_loss, student, teacher, label, **options)
    dkd, dkd_gradient = LossTester.value_and_gradient(dkd_loss, student, teacher, label, **options)
    assert_close(rld["scd"], dkd["tckd"])
    assert_close(rld["mcd"], dkd["nckd"])
    assert_close(rld_gradient, dkd_gradient)

    wrong = batch("teacher_wrong")
    assert (rld_loss(*wrong, **options)["mcd"] - dkd_loss(*wrong, **options)["nckd"]).abs() > 0.1


@pytest.mark.parametrize(("temperature", "confidence_temperature"), [(4.0, None), (4.0, 1.0), (1.0, 5.0)])
def test_a_constant_added_to_a_sample_changes_nothing(temperature, confidence_temperature):
    options = {"temperature": temperature, "confidence_temperature": confidence_temperature}
    student, teacher, label = batch()
    shift = torch.arange(8.0).unsqueeze(-1)
    expected = LossTester.value_and_gradient(rld_loss, student, teacher, label, **options)
    shifted = LossTester.value_and_gradient(rld_loss, student + shift, teacher - 3 * shift, label, **options)
    LossTester.assert_same(shifted, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scenario", ["all_masked", "one_unmasked"])
def test_fewer_than_two_unmasked_classes_give_exactly_zero(scenario, dtype):
    student, teacher, label = batch(scenario)
    student = student.to(dtype).requires_grad_()
    term = rld_loss(student, teacher.to(dtype), label)["mcd"]
    term.backward()
    assert term == 0
    assert (student.grad == 0).all()


def test_fully_masked_samples_count_in_the_average():
    student, teacher, label = batch("teacher_right")
    alone = rld_loss(student[:4], teacher[:4], label[:4])["mcd"]
    teacher[4:] = batch("all_masked")[1][4:]
    label[4:] = batch("all_masked")[2][4:]
    assert_close(rld_loss(student, teacher, label)["mcd"], alone / 2)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_gradient_of_sample_confidence(temperature):
    """Tc (q - b) at the true class, -Tc (q - b) p_k / (1 - q) at the others; their sum is 0."""
    student, teacher, label = batch()
    leaf = student.clone().requires_grad_()
    rld_loss(leaf, teacher, label, beta=0.0, temperature=temperature, reduction="sum")["scd"].backward()
    p = (student / temperature).softmax(-1)
    b = (teacher / temperature).softmax(-1).amax(-1, keepdim=True)
    q = p.gather(-1, label.unsqueeze(-1))
    expected = (-temperature * (q - b) * p / (1 - q)).scatter(-1, label.unsqueeze(-1), temperature * (q - b))
    assert_close(leaf.grad, expected)
    assert leaf.grad.sum(-1).abs().max() < 1e-12


def test_sample_confidence_vanishes_at_the_teachers_confidence():
    """The student's confidence in the true class equals the teacher's in its (wrong) one: no loss, no gradient."""
    teacher = torch.tensor([[3.0, 0.0, 1.0, -1.0]], dtype=torch.float64)
    student = torch.tensor([[1.0, 3.0, -1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    term = rld_loss(student, teacher, torch.tensor([1]))["scd"]
    term.backward()
    assert term.abs() < 1e-14
    assert student.grad.abs().max() < 1e-14


def test_masked_correlation_has_no_gradient_for_masked_classes():
    """Classes that the teacher ranks at or above the true one get no gradient from it, at any logit."""
    student, teacher, label = batch()
    dropped = teacher >= teacher.gather(-1, label.unsqueeze(-1))
    leaf = student.clone().requires_grad_()
    term = rld_loss(leaf, teacher, label)["mcd"]
    term.backward()
    assert (leaf.grad[dropped] == 0).all()
    assert (leaf.grad[~dropped] != 0).any()
    assert_close(rld_loss(student + 50 * dropped, teacher, label)["mcd"], term.detach())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_one_logit_far_above_the_rest(dtype):
    """The published code gives an infinite loss and NaN gradients here."""
    student = torch.zeros(1, 10, dtype=dtype)
    student[0, 0] = 120.0
    student.requires_grad_()
    teacher = torch.arange(10.0, dtype=dtype).unsqueeze(0)
    terms = rld_loss(student, teacher, torch.tensor([9]), temperature=1.0)
    sum(terms.values()).backward()
    b = teacher.softmax(-1).amax()
    assert_close(terms["scd"].detach(), b * (b.log() + 120) + (1 - b) * (1 - b).log(), rtol=1e-5, atol=0)
    assert student.grad.isfinite().all()


def test_statistics_hand_worked():
    teacher = torch.tensor(
        [
            [3.0, 2.0, 1.0, 0.0],  # true class 0: right; masked: 0
            [3.0, 2.0, 1.0, 0.0],  # true class 2: wrong; masked: 0, 1, 2
            [1.0, 2.0, 2.0, 0.0],  # true class 2: tied, the lower class counts as the largest; masked: 1, 2
            [9.0, 9.0, 9.0, 9.0],  # ignored
        ]
    )
    label = torch.tensor([0, 2, 2, -100])
    student = torch.zeros(4, 4, requires_grad=True)
    step = StepContext(ModelOutput(student), ModelOutput(teacher), label)
    statistics = RLDLoss().statistics(step)
    assert {k: v.item() for k, v in statistics.items()} == pytest.approx(
        {"teacher_wrong": 200 / 3, "masked_classes": 50.0}
    )
    # Strictly above the true class: none, two, none.
    assert RLDLoss(mask="g").statistics(step)["masked_classes"].item() == pytest.approx(100 / 6)
    assert not any(value.requires_grad for value in statistics.values())


def test_statistics_of_maps():
    teacher = torch.tensor([[2.0, 0.0], [1.0, 1.0], [0.0, 2.0]]).T.reshape(1, 2, 3)  # one sample, three positions
    step = StepContext(ModelOutput(torch.zeros(1, 2, 3)), ModelOutput(teacher), torch.tensor([[0, 0, 0]]))
    statistics = RLDLoss().statistics(step)
    assert statistics["teacher_wrong"].item() == pytest.approx(100 / 3)
    assert statistics["masked_classes"].item() == pytest.approx(100 * (1 / 2 + 1 + 1) / 3)


def test_refined_logits_mask_the_classes_at_or_above_the_true_one():
    teacher = torch.tensor([[3.0, 1.0, 2.0, 1.0], [3.0, 1.0, 2.0, 1.0]])
    label = torch.tensor([2, 0])
    gone = -torch.inf
    expected = torch.tensor([[gone, 1.0, gone, 1.0], [gone, 1.0, 2.0, 1.0]])
    assert_close(RLDLoss().refined(teacher, label), expected)
    assert_close(RLDLoss(mask="g").refined(teacher, label)[1], teacher[1])
    # It is the distribution that MCD distils: MCD of a student with this distribution is 0.
    terms = rld_loss(expected.nan_to_num(neginf=-50.0), teacher, label)
    assert_close(terms["mcd"], torch.tensor(0.0))


class Operations(TorchDispatchMode):
    """Counts the operations that are executed, without views."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def test_a_step_has_few_operations():
    """A small network's step is bound by their number; a change that adds some knowingly raises the bound."""
    student, teacher = torch.randn(2, 8, 10, generator=torch.Generator().manual_seed(0))
    step = StepContext(ModelOutput(student.requires_grad_()), ModelOutput(teacher), torch.arange(8))
    loss = RLDLoss()
    with Operations() as operations:
        loss(step)
        with torch.no_grad():
            loss.statistics(step)
    assert operations.count <= 120
