import pytest
import torch
from helpers.feature_tester import CLASSES, IMAGE_SHAPE, TRAIN_LABEL, FeatureTester
from helpers.golden import golden_cases
from torch.testing import assert_close

from rld_lightning.losses.features import OFDLoss, ofd_loss
from rld_lightning.losses.features.ofd import batch_norm_margin
from rld_lightning.models import create_model


def maps(channels=3, size=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, 2, channels, size, size, generator=generator, dtype=torch.float64)
    return student, teacher, -torch.rand(channels, generator=generator, dtype=torch.float64)


class TestOFD(FeatureTester):
    module = OFDLoss
    settings = ({}, {"weight": 0.01, "kernel_size": 3})
    wrong = (({"weight": -1.0}, "weight=-1.0"), ({"kernel_size": 2}, "kernel_size=2"), ({"kernel_size": 3.0}, "odd"))
    golden_method = "ofd"
    pairs = (("resnet14", "resnet8"), ("wrn16_2", "wrn16_1"), ("vgg8", "shufflev1"), ("resnet18", "resnet8x4"))
    unconnectable = (
        ("vgg8", "mobilenetv2", "MobileNetV2 does not have the features that OFDLoss compares"),
        ("shufflev1", "resnet8", "ShuffleV1 has no single batch norm"),
    )

    def golden(self, case, tensors):
        student, teacher = tensors["student_preact"], tensors["teacher_preact"]
        loss = OFDLoss(kernel_size=case.hyper["connector_kernel"])
        loss.build([one.shape for one in student], [one.shape for one in teacher])
        loss.connectors.load_state_dict(tensors["connector"], strict=False)
        aligned, _ = loss.to(teacher[0].dtype).align(student, teacher)
        terms = ofd_loss(aligned, teacher, tensors["margin"], weight=case.hyper["feat_weight"])
        return {"feature": terms["ofd"]}


def naive(student, teacher, margin):
    """One stage and one sample, position by position, with three cases."""
    total = torch.zeros((), dtype=torch.float64)
    for c in range(len(margin)):
        low = margin[c]
        for s, t in zip(student[c].flatten(), teacher[c].flatten(), strict=True):
            if t > 0 or (low < t <= 0 and s > t):
                total = total + (s - t) ** 2
            elif t <= low and s > low:
                total = total + (s - low) ** 2
    return total


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_naive_formula(dtype):
    stages = [maps(seed=seed) for seed in range(3)]
    student, teacher, margin = ([stage[i].to(dtype) for stage in stages] for i in range(3))
    expected = sum(
        naive(*(one.double() for one in (s[b], t[b], m))) / 2 * share
        for s, t, m, share in zip(student, teacher, margin, (0.25, 0.5, 1.0), strict=True)
        for b in range(2)
    )
    actual = ofd_loss(student, teacher, margin, weight=0.1)["ofd"]
    assert actual.dtype == dtype
    assert_close(actual.double(), 0.1 * expected, rtol=1e-12 if dtype == torch.float64 else 1e-5, atol=0)


def test_the_teacher_gets_no_gradient():
    student, teacher, margin = maps()
    teacher.requires_grad_()
    student.requires_grad_()
    ofd_loss([student], [teacher], [margin])["ofd"].backward()
    assert teacher.grad is None


def test_a_student_below_a_negative_teacher_has_no_loss():
    """After the ReLU both are 0."""
    _, teacher, margin = maps()
    teacher = -teacher.abs()
    student = (torch.maximum(teacher, margin.view(-1, 1, 1)) - torch.rand(teacher.shape)).requires_grad_()
    loss = ofd_loss([student], [teacher], [margin])["ofd"]
    loss.backward()
    assert loss == 0
    assert (student.grad == 0).all()


def test_a_larger_map_of_either_network_is_pooled():
    student, teacher, margin = maps()
    large = student.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert_close(ofd_loss([large], [teacher], [margin]), ofd_loss([student], [teacher], [margin]))
    large = teacher.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert_close(ofd_loss([student], [large], [margin]), ofd_loss([student], [teacher], [margin]))


def test_invalid_maps_raise():
    student, teacher, margin = maps()
    with pytest.raises(ValueError, match="same channels"):
        ofd_loss([student[:, :2]], [teacher], [margin])
    with pytest.raises(ValueError, match="same channels"):
        ofd_loss([student], [teacher], [margin[:1]])


# Margins


@pytest.mark.parametrize("case", golden_cases("ofd"), ids=str)
def test_golden_margin(case):
    tensors = case.tensors(torch.float32)
    for scale, shift, margin in zip(
        tensors["teacher_bn_weight"], tensors["teacher_bn_bias"], tensors["margin"], strict=True
    ):
        assert_close(batch_norm_margin(scale, shift), margin, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (-0.5, 0.7), (2.0, -1.0), (0.3, -5.0), (1.0, 3.0)])
def test_margin_is_the_mean_of_the_negative_part(scale, shift):
    x = torch.linspace(shift - 12 * abs(scale), min(shift + 12 * abs(scale), 0), 200_001, dtype=torch.float64)
    density = (-(((x - shift) / scale) ** 2) / 2).exp()
    expected = torch.trapezoid(x * density, x) / torch.trapezoid(density, x)
    margin = batch_norm_margin(torch.tensor([scale], dtype=torch.float64), torch.tensor([shift], dtype=torch.float64))
    assert_close(margin, expected.unsqueeze(0), rtol=1e-6, atol=0)


def test_margin_if_almost_nothing_is_negative():
    margin = batch_norm_margin(torch.tensor([0.5, -0.5, 1.0]), torch.tensor([2.0, 50.0, 3.1]))
    assert_close(margin, torch.tensor([-1.5, -1.5, -3.0]))


def test_margin_of_a_constant():
    margin = batch_norm_margin(torch.zeros(3), torch.tensor([-2.0, 0.0, 2.0]))
    assert_close(margin, torch.tensor([-2.0, 0.0, 0.0]))


def test_margins_come_from_the_teacher_and_are_not_in_checkpoints():
    teacher, student = create_model("resnet14", CLASSES).eval(), create_model("resnet8", CLASSES)
    norm = teacher.layer2[-1].bn2
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    loss = OFDLoss()
    loss.connect(student, teacher, IMAGE_SHAPE, TRAIN_LABEL)
    assert loss.teacher_norms == ("layer1.1.bn2", "layer2.1.bn2", "layer3.1.bn2")
    assert_close(loss.margin1, batch_norm_margin(norm.weight, norm.bias))
    assert not [name for name in loss.state_dict() if "margin" in name]


def test_norms_of_given_taps():
    teacher, student = create_model("resnet14", CLASSES).eval(), create_model("resnet8", CLASSES)
    taps = {"student_taps": ["layer1.0.relu:in"], "teacher_taps": ["layer2.0.relu:in"]}
    loss = OFDLoss(teacher_norms=["layer2.0.bn2"], **taps)
    loss.connect(student, teacher, IMAGE_SHAPE, TRAIN_LABEL)
    assert loss.teacher_norms == ("layer2.0.bn2",)
    for norm in ("layer3.0.bn2", "layer2.0.conv2"):
        with pytest.raises(ValueError, match=f"{norm} is not a batch norm with 32 scales"):
            OFDLoss(teacher_norms=[norm], **taps).connect(student, teacher, IMAGE_SHAPE, TRAIN_LABEL)
