from copy import deepcopy

import pytest
import torch
from helpers.feature_tester import TRAIN_LABEL, FeatureTester
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from rld_lightning.losses import ModelOutput, StepContext
from rld_lightning.losses.features import DHKDLoss, dhkd_loss
from rld_lightning.losses.features.dhkd import align
from rld_lightning.models.stages import Stages


class TestDHKD(FeatureTester):
    module = DHKDLoss
    settings = ({}, {"head": "linear", "align_gradients": False, "weight": 0.1})
    wrong = (
        ({"weight": -1.0}, "weight=-1.0"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"head": "deep"}, "head='deep' is unknown; choose one of nonlinear, linear"),
    )
    vanishes = False


# The loss


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_equals_the_divergence_of_bernoulli_distributions(temperature):
    auxiliary, teacher = 5 * torch.randn(2, 6, 7, dtype=torch.float64)
    expected = 0
    for i in range(6):
        for k in range(7):
            q = 1 / (1 + torch.exp(-(auxiliary[i, k] - teacher[i, k]) / temperature))
            expected = expected + 0.5 * torch.log(0.5 / q) + 0.5 * torch.log(0.5 / (1 - q))
    actual = dhkd_loss(auxiliary, teacher, temperature=temperature, weight=0.3)["dhkd"]
    assert_close(actual, 0.3 * temperature**2 * expected / 6, rtol=1e-10, atol=0)
    by_cosh = ((auxiliary - teacher) / (2 * temperature)).cosh().log().sum() / 6
    assert_close(actual, 0.3 * temperature**2 * by_cosh, rtol=1e-12, atol=0)


def test_gradient():
    auxiliary, teacher = torch.randn(2, 3, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a: dhkd_loss(a, teacher)["dhkd"], auxiliary.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_equal_logits_have_no_loss_and_no_gradient(dtype):
    teacher = torch.randn(4, 5).to(dtype)
    auxiliary = teacher.clone().requires_grad_()
    loss = dhkd_loss(auxiliary, teacher)["dhkd"]
    loss.backward()
    assert loss == 0
    assert (auxiliary.grad == 0).all()


@pytest.mark.parametrize("distance", [50.0, 1e4])
def test_logits_far_apart_keep_their_gradient(distance):
    auxiliary, teacher = torch.tensor([[0.0, distance]], requires_grad=True), torch.tensor([[distance, 0.0]])
    loss = dhkd_loss(auxiliary, teacher, temperature=2.0)["dhkd"]
    loss.backward()
    # T^2 log cosh(x / (2 T)) -> T |x| / 2 - T^2 log 2
    assert_close(loss.detach(), torch.tensor(2 * (distance - 4 * 0.6931472)))
    assert_close(auxiliary.grad, torch.tensor([[-1.0, 1.0]]))


# The alignment


class Tiny(nn.Module):
    """Maps ``(B, 6)`` to four logits."""

    stages = Stages((), (), pooled="fc:in")

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 5), nn.Tanh())
        self.fc = nn.Linear(5, 4)

    def forward(self, images):
        return self.fc(self.body(images))


def tiny(opposed, **options):
    """A student, its loss, images, labels, and teacher logits that agree with the labels or oppose them."""
    torch.manual_seed(0)
    student = Tiny().double()
    loss = DHKDLoss(head="linear", ce_weight=0.7, weight=0.4, **options)
    loss.connect(student, None, (6,), TRAIN_LABEL)
    loss.double().auxiliary.load_state_dict(student.fc.state_dict())
    images, label = torch.randn(8, 6, dtype=torch.float64), torch.arange(8) % 4
    teacher = (-9.0 if opposed else 9.0) * nn.functional.one_hot(label, 4).double()
    return student, loss, images, label, teacher


def step(student, loss, images, label, teacher, epoch=None):
    pooled = student.body(images)
    student_output = ModelOutput(student.fc(pooled), {"fc:in": pooled})
    return StepContext(student_output, ModelOutput(teacher), label, epoch=epoch)


def named(student, loss):
    return [*student.named_parameters(), *loss.named_parameters()]


def parameters(student, loss):
    return [parameter for _, parameter in named(student, loss)]


def backward(student, loss, *data, factor=1.0, **options):
    """The gradient of every parameter after ``backward`` of the sum."""
    for parameter in parameters(student, loss):
        parameter.grad = None
    terms = loss(step(student, loss, *data, **options))
    (factor * sum(terms.values())).backward()
    return [parameter.grad for parameter in parameters(student, loss)]


def separate(student, loss, images, label, teacher):
    """The gradients of cross-entropy and distillation as two vectors, written out."""
    vectors = []
    for name in ("ce", "dhkd"):
        pooled = torch.tanh(images @ student.body[0].weight.T + student.body[0].bias)
        if name == "ce":
            logits = pooled @ student.fc.weight.T + student.fc.bias
            value = -0.7 * sum(logits[i].log_softmax(-1)[label[i]] for i in range(8)) / 8
        else:
            logits = pooled @ loss.auxiliary.weight.T + loss.auxiliary.bias
            value = 0.4 * 4 * ((logits - teacher) / 4).cosh().log().sum() / 8
        vector = []
        for parameter in (p for p in parameters(student, loss) if p.requires_grad):
            (gradient,) = torch.autograd.grad(value, parameter, retain_graph=True, allow_unused=True)
            vector += (torch.zeros_like(parameter) if gradient is None else gradient).flatten().tolist()
        vectors.append(torch.tensor(vector, dtype=torch.float64))
    return vectors


@pytest.mark.parametrize("opposed", [True, False])
def test_opposing_gradients_are_aligned(opposed):
    everything = tiny(opposed)
    ce, dhkd = separate(*everything)
    overlap = ce @ dhkd
    assert (overlap < 0) == opposed
    if opposed:
        dhkd = dhkd - overlap / (ce @ ce) * ce
        assert abs(ce @ dhkd) < 1e-12
    actual = torch.cat([gradient.flatten() for gradient in backward(*everything)])
    assert_close(actual, ce + dhkd, rtol=1e-10, atol=1e-13)


def test_alignment_does_not_change_the_values():
    for opposed in (True, False):
        student, aligned, *data = tiny(opposed)
        _, plain, *_ = tiny(opposed, align_gradients=False)
        expected = plain(step(student, plain, *data))
        assert_close(aligned(step(student, aligned, *data)), expected, rtol=0, atol=0)
        assert list(expected) == ["ce", "dhkd"]


def test_alignment_changes_the_gradient_only_if_they_conflict():
    for opposed in (True, False):
        aligned = backward(*tiny(opposed))
        plain = backward(*tiny(opposed, align_gradients=False))
        differences = [(a - b).abs().max() for a, b in zip(aligned, plain, strict=True)]
        assert (max(differences) > 1e-3) == opposed
        assert opposed or max(differences) < 1e-14


@pytest.mark.parametrize("opposed", [True, False])
def test_a_loss_scale_scales_the_gradients(opposed):
    everything = tiny(opposed)
    expected = [1024 * gradient for gradient in backward(*everything)]
    assert_close(backward(*everything, factor=1024.0), expected, rtol=1e-12, atol=0)


class Half(nn.Module):
    """Casts through float16, so that the gradient is rounded to float16."""

    def forward(self, tensor):
        return tensor.half().double()


def test_a_loss_scale_keeps_half_gradients_from_vanishing():
    student, loss, *data = tiny(True)
    loss.weight, loss.ce_weight = 1e-7 * loss.weight, 1e-7 * loss.ce_weight
    expected = backward(student, loss, *data)[0]
    student.body.append(Half())
    assert (backward(student, loss, *data)[0] == 0).all()
    scaled = backward(student, loss, *data, factor=2.0**24)[0] / 2.0**24
    assert_close(scaled, expected, rtol=0, atol=1e-2 * expected.abs().max().item())


def test_accumulated_batches_are_aligned_separately():
    student, loss, images, label, teacher = tiny(True)
    halves = [(images[rows], label[rows], teacher[rows]) for rows in (slice(0, 4), slice(4, 8))]
    expected = [sum(pair) / 2 for pair in zip(*(backward(student, loss, *half) for half in halves), strict=True)]
    for parameter in parameters(student, loss):
        parameter.grad = None
    for half in halves:
        (sum(loss(step(student, loss, *half)).values()) / 2).backward()
    assert_close([p.grad for p in parameters(student, loss)], expected, rtol=1e-12, atol=1e-15)


def test_warmup_and_alignment():
    student, loss, *data = tiny(True, warmup_epochs=4)
    ce, dhkd = separate(student, loss, *data)
    actual = torch.cat([g.flatten() for g in backward(student, loss, *data, epoch=1)])
    assert_close(actual, ce + align(dhkd / 4, ce), rtol=1e-10, atol=1e-13)


def test_align():
    reference = torch.tensor([3.0, 4.0])
    assert_close(align(torch.tensor([-5.0, 0.0]), reference), torch.tensor([-3.2, 2.4]))
    for unchanged in (torch.tensor([1.0, 1.0]), torch.tensor([-4.0, 3.0]), torch.zeros(2)):
        assert_close(align(unchanged, reference), unchanged, rtol=0, atol=0)
    gradient = torch.tensor([1.0, -2.0])
    assert_close(align(gradient, torch.zeros(2)), gradient, rtol=0, atol=0)
    assert_close(align(gradient, torch.tensor([-1e-25, 0.0])), gradient, rtol=0, atol=1e-6)


def test_frozen_and_unused_parameters_have_no_gradient():
    student, loss, *data = tiny(True)
    student.body[0].bias.requires_grad_(False)
    student.spare = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    ce, dhkd = separate(student, loss, *data)
    gradients = backward(student, loss, *data)
    without = [name for (name, _), g in zip(named(student, loss), gradients, strict=True) if g is None]
    assert sorted(without) == ["body.0.bias", "spare"]
    pairs = zip(gradients, parameters(student, loss), strict=True)
    actual = torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs if p.requires_grad])
    assert_close(actual, ce + align(dhkd, ce), rtol=1e-9, atol=1e-12)


def test_without_grad_only_values_are_computed():
    student, loss, *data = tiny(True)
    expected = {name: term.detach() for name, term in loss(step(student, loss, *data)).items()}
    with torch.no_grad():
        terms = loss(step(student, loss, *data))
    assert_close(terms, expected, rtol=0, atol=0)
    assert not any(term.requires_grad for term in terms.values())
    with torch.inference_mode():
        assert_close(loss(step(student, loss, *data)), expected, rtol=0, atol=0)


def test_without_cross_entropy_nothing_is_aligned():
    student, loss, *data = tiny(True)
    loss.ce_weight = 0.0
    expected = 0.4 * 4 * ((loss.auxiliary(student.body(data[0])) - data[2]) / 4).cosh().log().sum() / 8
    terms = loss(step(student, loss, *data))
    assert list(terms) == ["dhkd"]
    trained = [*student.body.parameters(), *loss.parameters()]
    assert_close(torch.autograd.grad(terms["dhkd"], trained), torch.autograd.grad(expected, trained))


def test_second_derivatives_raise():
    student, loss, *data = tiny(True)
    total = sum(loss(step(student, loss, *data)).values())
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(total, student.fc.weight, create_graph=True)


def test_a_different_student_raises():
    student, loss, *data = tiny(True)
    terms = loss(step(deepcopy(student), loss, *data))
    with pytest.raises(RuntimeError, match="connect the loss to that student"):
        sum(terms.values()).backward()


def test_under_distributed_data_parallel(tmp_path):
    student, loss, *data = tiny(True)
    expected = backward(student, loss, *data)

    class Together(nn.Module):
        def __init__(self):
            super().__init__()
            self.student, self.loss = student, loss

        def forward(self, *data):
            return sum(self.loss(step(self.student, self.loss, *data)).values())

    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(Together())
        for _ in range(2):  # the second forward raises if a parameter of the first was not reduced
            for parameter in wrapped.parameters():
                parameter.grad = None
            wrapped(*data).backward()
            assert_close([p.grad for p in parameters(student, loss)], expected, rtol=1e-12, atol=1e-15)
    finally:
        torch.distributed.destroy_process_group()


# The module


def test_heads_on_the_students_feature():
    teacher, student = TestDHKD.networks("wrn16_2", "wrn16_1")
    nonlinear = TestDHKD().connected(teacher, student)
    kinds = (nn.Linear, nn.Dropout, nn.BatchNorm1d, nn.ReLU, nn.Linear)
    assert all(map(isinstance, nonlinear.auxiliary, kinds))
    assert [tuple(p.shape) for p in nonlinear.parameters()] == [(200, 64), (200,), (200,), (200,), (10, 200), (10,)]
    linear = TestDHKD().connected(teacher, student, head="linear")
    assert {name: tuple(p.shape) for name, p in linear.named_parameters()} == {
        "auxiliary.weight": (10, 64),
        "auxiliary.bias": (10,),
    }
    # The student is not a submodule of the loss: it would be saved, and passed to the optimiser, twice.
    assert set(linear.state_dict()) == {"auxiliary.weight", "auxiliary.bias"}
    assert linear.teacher_taps == ()


def test_without_conflict_each_head_learns_from_one_term():
    student, loss, *data = tiny(False)
    ce, dhkd = separate(student, loss, *data)
    sizes = [p.numel() for p in parameters(student, loss)]
    by_name = {
        name: (a, b) for (name, _), a, b in zip(named(student, loss), ce.split(sizes), dhkd.split(sizes), strict=True)
    }
    assert (by_name["fc.weight"][1] == 0).all()
    assert (by_name["auxiliary.weight"][0] == 0).all()
    assert_close(dict(zip(by_name, backward(student, loss, *data), strict=True))["fc.bias"], by_name["fc.bias"][0])
