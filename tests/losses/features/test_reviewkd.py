import pytest
import torch
from helpers.feature_tester import CLASSES, IMAGE_SHAPE, PAIRS, TRAIN_LABEL, FeatureTester
from torch.testing import assert_close

from rld_lightning.losses.features import ATLoss, ReviewKDLoss, reviewkd_loss
from rld_lightning.models import create_model, list_models, stages_of
from rld_lightning.models.taps import feature_shapes

OUR_NAMES = {"conv1": "narrow", "att_conv": "attention", "conv2": "widen"}


class TestReviewKD(FeatureTester):
    module = ReviewKDLoss
    settings = ({}, {"weight": 5.0})
    golden_method = "reviewkd"
    pairs = (*PAIRS, ("mobilenetv2", "resnet8"))

    def golden(self, case, tensors):
        if "student_maps" in tensors:
            student, teacher = tensors["student_maps"], tensors["teacher_maps"]
        else:
            student = [*tensors["student_feats"], tensors["student_pooled"]]
            teacher = [*tensors["teacher_preact"], tensors["teacher_pooled"]]
            loss = ReviewKDLoss()
            loss.build([one.shape for one in student], [one.shape for one in teacher])
            parts = {key.split(".", 2)[1]: None for key in tensors["connector"]}
            assert set(parts) == set(OUR_NAMES)
            renamed = {
                ".".join(OUR_NAMES.get(part, part) for part in key.split(".")): value
                for key, value in tensors["connector"].items()
            }
            _, unexpected = loss.fusions.load_state_dict(renamed, strict=False)
            assert not unexpected
            student, teacher = loss.to(student[0].dtype).align(student, teacher)
        return {"feature": reviewkd_loss(student, teacher, weight=case.hyper["feat_weight"])["reviewkd"]}


def naive(student, teacher):
    """One stage, by level, sample, channel and cell."""
    size = student.shape[-1]
    levels = [size, *(level for level in (4, 2, 1) if level < size)]
    total, norm = 0.0, 0.0
    for i, level in enumerate(levels):
        cell = size // level
        errors = []
        for b in range(student.shape[0]):
            for c in range(student.shape[1]):
                for y in range(0, size, cell):
                    for x in range(0, size, cell):
                        window = (b, c, slice(y, y + cell), slice(x, x + cell))
                        errors.append((student[window].mean() - teacher[window].mean()) ** 2)
        total, norm = total + 0.5**i * torch.stack(errors).mean(), norm + 0.5**i
    return total / norm


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_naive_formula(dtype):
    torch.manual_seed(0)
    student, teacher = ([torch.randn(2, 3, size, size).to(dtype) for size in (8, 4, 2, 1)] for _ in range(2))
    expected = sum(naive(s.double(), t.double()) for s, t in zip(student, teacher, strict=True))
    actual = reviewkd_loss(student, teacher, weight=3.0)["reviewkd"]
    assert actual.dtype == dtype
    assert_close(actual.double(), 3 * expected, rtol=1e-12 if dtype == torch.float64 else 1e-5, atol=0)


def test_the_teacher_gets_no_gradient():
    student, teacher = torch.randn(2, 2, 2, 5, 5, dtype=torch.float64)
    teacher.requires_grad_()
    student.requires_grad_()
    reviewkd_loss([student], [teacher])["reviewkd"].backward()
    assert teacher.grad is None


def test_a_constant_difference_has_the_same_loss_at_all_levels():
    maps = [torch.randn(2, 3, size, size, dtype=torch.float64) for size in (32, 7, 3, 1)]
    loss = reviewkd_loss([one + 0.5 for one in maps], maps)["reviewkd"]
    assert_close(loss, torch.tensor(4 * 0.25, dtype=torch.float64))


def test_invalid_shapes_raise():
    with pytest.raises(ValueError, match="same shape"):
        reviewkd_loss([torch.randn(2, 3, 4, 4)], [torch.randn(2, 3, 8, 8)])
    with pytest.raises(ValueError, match="vectors"):
        ReviewKDLoss().build([torch.Size((2, 16, 8))], [torch.Size((2, 16, 8, 8))])


def connected(teacher, student, **hyper):
    teacher, student = create_model(teacher, CLASSES).eval(), create_model(student, CLASSES)
    loss = ReviewKDLoss(**hyper)
    loss.connect(student, teacher, IMAGE_SHAPE, TRAIN_LABEL)
    return loss


def test_taps_and_width():
    loss = connected("resnet14", "resnet8")
    assert loss.student_taps == ("layer1", "layer2", "layer3", "fc:in")
    assert loss.teacher_taps == ("layer1.1.relu:in", "layer2.1.relu:in", "layer3.1.relu:in", "fc:in")
    assert [fusion.narrow[0].out_channels for fusion in loss.fusions] == [64] * 4
    assert [fusion.widen[0].out_channels for fusion in loss.fusions] == [64, 64, 32, 16]
    assert [fusion.attention is None for fusion in loss.fusions] == [True, False, False, False]
    assert connected("vgg8", "mobilenetv2").fusions[0].narrow[0].out_channels == 512


def test_given_taps_still_need_connect():
    loss = ReviewKDLoss(student_taps=["layer1"], teacher_taps=["layer1"])
    with pytest.raises(RuntimeError, match="ReviewKDLoss does not know the networks yet"):
        loss(torch.randn(2, 4), torch.randn(2, 4), torch.arange(2))


def test_a_student_before_its_relu():
    loss = connected("resnet14", "resnet8", student_preactivations=True)
    assert loss.student_taps == ("layer1.0.relu:in", "layer2.0.relu:in", "layer3.0.relu:in", "fc:in")
    assert loss.teacher_taps == connected("resnet14", "resnet8").teacher_taps
    # As for a teacher: networks without preactivations use their stages.
    assert connected("vgg8", "mobilenetv2", student_preactivations=True).student_taps[0] == "blocks.1"


IMAGENET = {
    ("torchvision/resnet50", "mobilenetv1"): (
        ("model.3.4", "model.5.4", "model.11.4", "model.13.4", "fc:in"),
        ("layer1.2.relu:in", "layer2.3.relu:in", "layer3.5.relu:in", "layer4.2.relu:in", "fc:in"),
        ([128, 256, 512, 1024, 1024], [256, 512, 1024, 2048, 2048]),
    ),
    ("torchvision/resnet34", "torchvision/resnet18"): (
        ("layer1.1.relu:in", "layer2.1.relu:in", "layer3.1.relu:in", "layer4.1.relu:in", "fc:in"),
        ("layer1.2.relu:in", "layer2.3.relu:in", "layer3.5.relu:in", "layer4.2.relu:in", "fc:in"),
        ([64, 128, 256, 512, 512], [64, 128, 256, 512, 512]),
    ),
}


@pytest.mark.parametrize("pair", IMAGENET, ids=" > ".join)
def test_imagenet_pairs_compare_the_taps_of_the_published_code(pair):
    """mdistiller's configs/imagenet/{r50_mv1,r34_r18}/reviewkd.yaml: STU_PREACT, SHAPES, IN_CHANNELS, OUT_CHANNELS."""
    student_taps, teacher_taps, channels = IMAGENET[pair]
    with torch.device("meta"):
        teacher, student = (create_model(name, 1000).eval() for name in pair)
        loss = ReviewKDLoss(weight=8.0, student_preactivations=True)
        loss.connect(student, teacher, (3, 224, 224), TRAIN_LABEL)
    assert (loss.student_taps, loss.teacher_taps) == (student_taps, teacher_taps)
    for network, taps, widths in zip((student, teacher), (student_taps, teacher_taps), channels, strict=True):
        shapes = feature_shapes(network, (3, 224, 224), taps).values()
        assert [list(shape[1:]) for shape in shapes] == [
            *([width, size, size] for width, size in zip(widths, (56, 28, 14, 7), strict=False)),
            [widths[-1]],
        ]
    assert [fusion.narrow[0].in_channels for fusion in loss.fusions] == channels[0][::-1]
    assert [fusion.widen[0].out_channels for fusion in loss.fusions] == channels[1][::-1]
    assert {fusion.narrow[0].out_channels for fusion in loss.fusions} == {512}


@pytest.mark.parametrize("name", list_models())
def test_only_mobilenetv1_has_no_stem(name):
    with torch.device("meta"):
        stages = stages_of(create_model(name))
    expected = stages.features[0 if name == "mobilenetv1" else 1 :]
    assert ReviewKDLoss().student_paths(stages) == (*expected, stages.pooled)
    assert ATLoss().paths(stages) == stages.features[1:]  # MobileNetV1's too, as in the published code


def test_a_teacher_without_preactivations_uses_its_stages():
    assert connected("mobilenetv2", "resnet8").teacher_taps == ("blocks.2", "blocks.4", "blocks.6", "classifier:in")


def test_fused_maps_have_the_teachers_shapes():
    """All maps of ShuffleNets are half as large as their teachers'."""
    loss = connected("resnet8x4", "shufflev1")
    student = [torch.randn(2, channels, size, size) for channels, size in ((240, 16), (480, 8), (960, 4))]
    teacher = [torch.randn(2, channels, size, size) for channels, size in ((64, 32), (128, 16), (256, 8))]
    student, teacher = loss.align([*student, torch.randn(2, 960)], [*teacher, torch.randn(2, 256)])
    assert [one.shape for one in student] == [one.shape for one in teacher]
    assert teacher[-1].shape == (2, 256, 1, 1)


def test_deeper_features_affect_shallower_maps_only():
    loss = connected("resnet14", "resnet8").double().eval()
    student = [torch.randn(2, channels, size, size) for channels, size in ((16, 32), (32, 16), (64, 8))]
    teacher = [*student, torch.randn(2, 64)]
    features = [one.double().requires_grad_() for one in (*student, torch.randn(2, 64))]
    fused, _ = loss.align(features, teacher)
    for i, one in enumerate(fused):
        gradients = torch.autograd.grad(one.square().sum(), features, retain_graph=True, allow_unused=True)
        assert [gradient is not None for gradient in gradients] == [j >= i for j in range(4)]


def test_a_batch_of_one():
    loss = connected("resnet14", "resnet8")
    student = [torch.randn(1, channels, size, size) for channels, size in ((16, 32), (32, 16), (64, 8))]
    fused, _ = loss.align([*student, torch.randn(1, 64)], [*student, torch.randn(1, 64)])
    sum(one.square().sum() for one in fused).backward()
    assert all(parameter.grad.isfinite().all() for parameter in loss.parameters())


def test_defaults_are_the_published_codes():
    loss = ReviewKDLoss()
    assert (loss.weight, loss.ce_weight, loss.warmup_epochs) == (1.0, 1.0, 20)
    assert loss.student_preactivations is False
