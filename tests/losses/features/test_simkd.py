import pytest
import torch
from helpers.feature_tester import CLASSES, IMAGE_SHAPE, TRAIN_LABEL, FeatureTester
from torch import nn
from torch.testing import assert_close

from rld_lightning.losses.features import SimKDLoss, simkd_loss
from rld_lightning.models import Stages, create_model, graft


class NotAveraging(nn.Module):
    """A network whose classifier's input is the maximum of a map."""

    stages = Stages(("conv",), (), "fc:in")

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 1), nn.Linear(4, CLASSES)

    def forward(self, images):
        return self.fc(self.conv(images).amax((2, 3)))


class TestSimKD(FeatureTester):
    module = SimKDLoss
    settings = ({}, {"weight": 3.0, "ce_weight": 0.5})
    wrong = (({"weight": -1.0}, "weight=-1.0"), ({"ce_weight": -1.0}, "ce_weight=-1.0"))
    vanishes = False  # the projector is not an identity

    @staticmethod
    def networks(teacher="resnet14", student="resnet8"):
        teacher, student = FeatureTester.networks(teacher, student)
        return teacher, graft(student, teacher)

    def test_only_a_grafted_student_connects(self):
        teacher, student = FeatureTester.networks()
        with pytest.raises(ValueError, match=r"ResNet does not: student = graft\(student, teacher\)"):
            self.connected(teacher, student)

    def test_a_teacher_must_average_its_last_map(self):
        _, student = self.networks()
        with pytest.raises(ValueError, match="NotAveraging does not have the features that SimKDLoss compares"):
            self.connected(NotAveraging(), student)

    def test_labels_count_for_nothing_and_the_classifier_stays(self):
        teacher, student = self.networks()
        loss = self.connected(teacher, student)
        assert loss.reuses_classifier
        terms = loss(self.step(loss, teacher, student))
        assert list(terms) == ["simkd"]
        terms["simkd"].backward()
        trained = {name for name, parameter in student.named_parameters() if parameter.grad is not None}
        assert trained == {name for name, _ in student.named_parameters()} - {"classifier.weight", "classifier.bias"}


def test_a_student_with_loss_zero_has_the_teachers_logits():
    torch.manual_seed(0)
    teacher = create_model("wrn16_2", CLASSES).eval()
    student = graft(create_model("resnet8", CLASSES), teacher).eval()
    loss = SimKDLoss()
    loss.connect(student, teacher, IMAGE_SHAPE, TRAIN_LABEL)
    theirs = FeatureTester.step(loss, teacher, student).teacher.features["relu"]
    student.projector.register_forward_hook(lambda *_: theirs)
    step = FeatureTester.step(loss, teacher, student)
    assert loss(step)["simkd"] == 0
    assert_close(step.student.logits, step.teacher.logits)


@pytest.mark.parametrize("sizes", [((4, 6), (4, 6)), ((8, 4), (4, 4)), ((2, 3), (4, 9))], ids=str)
def test_the_formula_sample_by_sample(sizes):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(3, 5, *size, generator=generator, dtype=torch.float64) for size in sizes)
    height, width = map(min, *sizes)
    total = 0.0
    for b in range(3):
        for c in range(5):
            for i in range(height):
                for j in range(width):
                    means = []
                    for (rows, columns), one in zip(sizes, (student, teacher), strict=True):
                        h, w = rows // height, columns // width
                        means.append(one[b, c, i * h : (i + 1) * h, j * w : (j + 1) * w].mean().item())
                    total += (means[0] - means[1]) ** 2
    expected = {"simkd": torch.tensor(0.7 * total / (3 * 5 * height * width), dtype=torch.float64)}
    assert_close(simkd_loss(student, teacher, weight=0.7), expected)
    assert torch.autograd.gradcheck(lambda s: simkd_loss(s, teacher)["simkd"], student.requires_grad_())


def test_the_gradient_is_that_of_a_mean_square():
    student, teacher = torch.randn(2, 2, 3, 4, 4, dtype=torch.float64).unbind()
    student.requires_grad_()
    teacher.requires_grad_()
    simkd_loss(student, teacher, weight=5.0)["simkd"].backward()
    assert_close(student.grad, 10.0 * (student - teacher).detach() / student.numel())
    assert teacher.grad is None


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        ((2, 3, 4, 4), (2, 5, 4, 4), "map has 3 channels and the teacher's 5"),
        ((2, 3, 4, 4), (4, 3, 4, 4), r"batch sizes \[2, 4\]"),
        ((2, 3), (2, 3, 4, 4), "student's feature must be a map"),
    ],
)
def test_invalid_arguments_raise(student, teacher, message):
    with pytest.raises(ValueError, match=message):
        simkd_loss(torch.zeros(student), torch.zeros(teacher))
    with pytest.raises(ValueError, match="weight=-2"):
        simkd_loss(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), weight=-2)
