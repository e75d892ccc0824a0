import pytest
import torch
from helpers.feature_tester import CLASSES, IMAGE_SHAPE, FeatureTester
from torch.testing import assert_close

from rld_lightning.losses.features import CATKDLoss, catkd_loss
from rld_lightning.models import create_model, forward_with_taps
from rld_lightning.models.stages import classifier_of


class TestCATKD(FeatureTester):
    module = CATKDLoss
    settings = ({}, {"weight": 4.5, "normalize": False}, {"weight": 600.0, "pool_size": 4})
    wrong = (
        ({"weight": -1.0}, "weight=-1.0"),
        ({"pool_size": 0}, "pool_size=0"),
        ({"pool_size": 2.5}, "pool_size=2.5"),
    )
    unconnectable = (("torchvision/squeezenet1_1", "resnet8", "SqueezeNet does not declare its stages"),)

    def test_the_classifiers_are_not_the_loss_s_own(self):
        teacher, student = self.networks()
        loss = self.connected(teacher, student)
        assert list(loss.parameters()) == []
        assert loss.state_dict() == {}
        assert loss.double().teacher_classifier.dtype == torch.float64
        assert student.fc.weight.dtype == torch.float32

    def test_the_student_s_classifier_learns_what_the_maps_ask_for(self):
        teacher, student = self.networks()
        loss = self.connected(teacher, student, ce_weight=0.0)
        loss(self.step(loss, teacher, student))["catkd"].backward()
        assert student.fc.weight.grad.abs().sum() > 0
        assert student.fc.bias.grad is None
        before = loss(self.step(loss, teacher, student))["catkd"]
        with torch.no_grad():
            student.fc.weight -= 1e-4 * student.fc.weight.grad
            student.fc.bias += 1.0
        assert loss(self.step(loss, teacher, student))["catkd"] < before

    def test_a_tap_that_is_not_averaged_is_refused(self):
        teacher, student = self.networks()
        loss = self.connected(teacher, student, student_taps=["layer2"])
        with pytest.raises(ValueError, match="the classifier takes 64 features and the map has 32 channels"):
            loss(self.step(loss, teacher, student))


def maps(sizes=((8, 8), (4, 4)), classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (
        torch.randn(2, channels, *size, generator=generator, dtype=torch.float64)
        for channels, size in zip((4, 6), sizes, strict=True)
    )
    weights = (torch.randn(classes, channels, generator=generator, dtype=torch.float64) for channels in (4, 6))
    return student, teacher, *weights


def naive(student, teacher, student_weight, teacher_weight, *, size, weight, normalize):
    """From the maps at full resolution, one number at a time; every size must be a multiple of ``size``."""
    total, count = 0.0, 0
    for b in range(len(student)):
        for k in range(len(student_weight)):
            pooled = []
            for feature, classifier in ((student[b], student_weight[k]), (teacher[b], teacher_weight[k])):
                channels, rows, columns = feature.shape
                h, w = rows // size[0], columns // size[1]
                cells = [
                    [
                        sum(classifier[d] * feature[d, i * h + y, j * w + x] for d in range(channels))
                        for y in range(h)
                        for x in range(w)
                    ]
                    for i in range(size[0])
                    for j in range(size[1])
                ]
                values = torch.stack([torch.stack(cell).sum() / (h * w) for cell in cells])
                pooled.append(values / (values * values).sum().sqrt() if normalize else values)
            total = total + ((pooled[0] - pooled[1]) ** 2).sum()
            count += len(pooled[0])
    return weight * total / count


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    ("sizes", "pool_size", "size"),
    [(((8, 8), (4, 4)), 2, (2, 2)), (((2, 2), (4, 8)), 4, (2, 2)), (((4, 2), (4, 4)), 4, (4, 2))],
    ids=str,
)
def test_the_formula_position_by_position(sizes, pool_size, size, normalize):
    tensors = [tensor.requires_grad_() for tensor in maps(sizes)]
    actual = catkd_loss(*tensors, weight=7.0, pool_size=pool_size, normalize=normalize)
    expected = naive(*tensors, size=size, weight=7.0, normalize=normalize)
    assert_close(actual, {"catkd": expected})
    gradients = torch.autograd.grad(expected, [tensors[0], tensors[2]])
    actual["catkd"].backward()
    assert_close([tensors[0].grad, tensors[2].grad], list(gradients))
    assert tensors[1].grad is None
    assert tensors[3].grad is None


@pytest.mark.parametrize("name", ["resnet8", "wrn16_1", "mobilenetv2"])
def test_activation_maps_average_to_the_logits_without_bias(name):
    torch.manual_seed(0)
    model = create_model(name, CLASSES).eval()
    loss = CATKDLoss()
    loss.connect(model, model, IMAGE_SHAPE, torch.zeros(1))
    images = torch.randn(2, *IMAGE_SHAPE)
    with torch.no_grad():
        logits, features = forward_with_taps(model, images, loss.student_taps)
    classifier = classifier_of(model)
    (last_map,) = features.values()
    # Against maps of zeros, pooled to one position and not normalised: the logits remain.
    zeros = torch.zeros_like(classifier.weight)
    term = catkd_loss(last_map, last_map, classifier.weight, zeros, weight=1.0, pool_size=1, normalize=False)
    assert_close(term["catkd"], (logits - classifier.bias).square().mean())


def test_normalised_maps_are_invariant_to_scale():
    student, teacher, ours, theirs = maps()
    expected = catkd_loss(student, teacher, ours, theirs)
    scale = torch.tensor([[0.1], [3.0], [8.0]], dtype=torch.float64)
    assert_close(catkd_loss(5 * student, 0.2 * teacher, scale * ours, theirs / scale), expected)
    assert catkd_loss(student, teacher, -ours, theirs)["catkd"] != expected["catkd"]


@pytest.mark.parametrize("normalize", [True, False])
def test_maps_of_zeros_have_a_finite_loss_and_gradient(normalize):
    student, teacher, ours, theirs = (tensor.float() for tensor in maps())
    student[0], teacher[1] = 0, 0
    student.requires_grad_()
    ours.requires_grad_()
    term = catkd_loss(student, teacher, ours, theirs, normalize=normalize)["catkd"]
    term.backward()
    assert term.isfinite()
    assert 0 < student.grad[1].abs().max() < 1e3
    assert 0 < ours.grad.abs().max() < 1e3
    assert (student.grad[0].abs().max() == 0) == normalize


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student": torch.zeros(2, 5, 8, 8)}, "the classifier takes 4 features and the map has 5 channels"),
        ({"teacher": torch.zeros(2, 6)}, "teacher's feature must be a map"),
        ({"teacher": torch.zeros(3, 6, 4, 4)}, r"batch sizes \[2, 3\]"),
        ({"teacher_classifier": torch.zeros(4, 6)}, "student has 3 classes and the teacher 4"),
        ({"pool_size": 0}, "pool_size=0"),
        ({"weight": float("nan")}, "weight=nan"),
    ],
)
def test_invalid_arguments_raise(change, message):
    names = ("student", "teacher", "student_classifier", "teacher_classifier")
    with pytest.raises(ValueError, match=message):
        catkd_loss(**dict(zip(names, maps(), strict=True)) | change)
