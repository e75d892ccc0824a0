"""A frozen teacher stays frozen, keeps its own precision, and is not registered in the module that holds it."""

import copy
import pickle

import pytest
import torch
from lightning import LightningModule
from torch import nn

from rld_lightning.models.complexity import count_parameters
from rld_lightning.models.factory import create_model, list_models
from rld_lightning.models.hold_outside import hold_outside
from rld_lightning.models.normalisation import Normalisation, Renormalise
from rld_lightning.models.teacher.fold import fuse_conv_bn
from rld_lightning.models.teacher.frozen import FrozenTeacher
from rld_lightning.models.teacher.full_precision_linear import last_linear


def trained(name="resnet8", classes=10):
    """Returns a model with non-trivial BatchNorm statistics and scales."""
    torch.manual_seed(0)
    model = create_model(name, classes)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.2)
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


@pytest.fixture
def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def assert_frozen(teacher):
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def snapshot(teacher):
    return {key: value.clone() for key, value in teacher.model.state_dict().items()}


def assert_unchanged(teacher, before):
    after = teacher.model.state_dict()
    assert after.keys() == before.keys()
    for key, value in before.items():
        assert after[key].dtype == value.dtype
        assert torch.equal(after[key], value), key


@pytest.mark.parametrize("fuse", [False, True])
def test_stays_frozen_whatever_is_called(images, fuse):
    teacher = FrozenTeacher(trained(), fuse=fuse)
    before = snapshot(teacher)
    assert_frozen(teacher)
    assert teacher.train() is teacher
    assert teacher.train(True) is teacher
    assert teacher.requires_grad_(True) is teacher
    assert_frozen(teacher)
    for _ in range(3):
        teacher.model.train()  # bypasses the teacher's own method
        teacher(images + 5)
    assert_frozen(teacher)
    assert_unchanged(teacher, before)


def test_outputs_carry_no_gradient_but_can_be_saved_for_backward(images):
    teacher, student = FrozenTeacher(trained()), trained("resnet8")
    logits, features = teacher(images.requires_grad_(), ["layer1", "fc:in"])
    assert list(features) == ["layer1", "fc:in"]
    assert features["layer1"].shape == (2, 16, 32, 32)
    assert not any(out.requires_grad or out.is_inference() for out in (logits, *features.values()))
    (student(images) * logits).sum().backward()
    assert student.fc.weight.grad is not None
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_logits_equal_the_models(images):
    model = trained().eval()
    with torch.no_grad():
        expected = model(images)
    logits, features = FrozenTeacher(model)(images)
    assert torch.equal(logits, expected)
    assert features == {}


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))], ids=["copy", "pickle"])
def test_copies_are_teachers_too(images, duplicate, fuse):
    teacher = FrozenTeacher(trained(), dtype="float64", fuse=fuse)
    twin = duplicate(teacher)
    assert_frozen(twin.train().requires_grad_())
    assert torch.equal(twin(images)[0], teacher(images)[0])
    assert twin.half()(images)[0].dtype is torch.float64


def test_weights_keep_their_keys():
    model = trained()
    keys = list(model.state_dict())
    assert list(FrozenTeacher(model).model.state_dict()) == keys


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64", torch.bfloat16, torch.float64])
def test_computes_in_its_own_dtype(images, dtype):
    expected, _ = FrozenTeacher(trained())(images)
    own = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    teacher = FrozenTeacher(trained(), dtype=dtype)
    logits, features = teacher(images, ["layer3"])
    assert {p.dtype for p in teacher.parameters()} == {features["layer3"].dtype} == {own}
    assert logits.dtype is (torch.float64 if own is torch.float64 else torch.float32)
    tolerance = 1e-5 if own in (torch.float32, torch.float64) else 0.05
    torch.testing.assert_close(logits.float(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", ["int8", "half-ish", torch.int64, torch.complex64])
def test_an_unknown_dtype_is_refused(dtype):
    with pytest.raises(ValueError, match="float32, bfloat16, float16, float64"):
        FrozenTeacher(trained(), dtype=dtype)


@pytest.mark.parametrize(
    "convert",
    [
        lambda t: t.half(),
        lambda t: t.double(),
        lambda t: t.bfloat16(),
        lambda t: t.to(torch.float64),
        lambda t: t.type(torch.float16),
        lambda t: t.to("cpu", torch.float16),
    ],
)
def test_conversions_do_not_change_an_own_dtype(convert):
    teacher = FrozenTeacher(trained(), dtype=torch.float32)
    before = snapshot(teacher)
    assert convert(teacher) is teacher
    assert_unchanged(teacher, before)
    assert {p.dtype for p in convert(FrozenTeacher(trained())).parameters()} != {torch.float32}


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_moves_to_a_device(dtype):
    teacher = FrozenTeacher(trained(), dtype=dtype, channels_last=True)
    assert {t.device.type for t in teacher.to("meta").state_dict().values()} == {"meta"}
    assert {p.dtype for p in teacher.to("meta", torch.float16).parameters()} == {teacher.dtype or torch.float16}


def test_autocast_affects_only_a_teacher_without_own_dtype(images):
    expected, _ = FrozenTeacher(trained())(images)
    with torch.autocast("cpu", torch.bfloat16):
        own, _ = FrozenTeacher(trained(), dtype="float32")(images.bfloat16().float())
        following, features = FrozenTeacher(trained())(images, ["layer1.0.conv1"])
    plain, _ = FrozenTeacher(trained(), dtype="float32")(images.bfloat16().float())
    assert torch.equal(own, plain)
    assert features["layer1.0.conv1"].dtype is torch.bfloat16
    assert following.dtype is torch.float32
    assert not torch.equal(following, expected)


@pytest.mark.parametrize("fuse", [False, True])
def test_logits_under_autocast_are_not_rounded_to_bfloat16(images, fuse):
    images = images.repeat(24, 1, 1, 1) + 0.1 * torch.randn(48, 3, 32, 32)
    model = trained("wrn16_1", 100).eval()
    expected, _ = FrozenTeacher(copy.deepcopy(model), dtype="float32")(images)
    ties = {}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        rounded = copy.deepcopy(model)(images).float()
        logits, _ = FrozenTeacher(model, fuse=fuse)(images)
    for name, values in {"rounded": rounded, "teacher": logits}.items():
        ties[name] = sum(len(row) - len(row.unique()) for row in values)
    assert ties["rounded"] > 100
    assert ties["teacher"] <= 2
    assert (logits - expected).abs().mean() < 0.9 * (rounded - expected).abs().mean()
    assert list(model.state_dict()) == list(trained("wrn16_1", 100).state_dict())
    assert torch.equal(FrozenTeacher(copy.deepcopy(model))(images)[0], copy.deepcopy(model)(images))


@pytest.mark.parametrize("name", [*list_models(), "torchvision/efficientnet_b0", "torchvision/swin_t"])
def test_the_last_linear_layer_computes_the_logits(name):
    with torch.device("meta"):
        layer = last_linear(create_model(name, 7))
    assert layer.out_features == 7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_images_are_converted_to_the_model(images, dtype):
    logits, _ = FrozenTeacher(trained())(images.to(dtype))
    torch.testing.assert_close(logits, FrozenTeacher(trained())(images)[0], rtol=0.05, atol=0.05)


def test_channels_last_applies_to_weights_and_images(images):
    teacher = FrozenTeacher(trained(), channels_last=True)
    assert teacher.model.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    logits, features = teacher(images, ["conv1:in"])
    assert features["conv1:in"].is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(logits, FrozenTeacher(trained())(images)[0], rtol=1e-5, atol=1e-5)


def norms(model):
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@pytest.mark.parametrize(("name", "left"), [("resnet8", 0), ("wrn16_1", 7), ("shufflev2", 0)])
def test_fused_logits_are_the_same(images, name, left):
    model = trained(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expected, _ = FrozenTeacher(model)(images)
    teacher = FrozenTeacher(model, fuse=True)
    logits, _ = teacher(images)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5 * expected.std().item())
    assert norms(teacher) == left
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with pytest.raises(ValueError, match=r"fuse=True has no features to tap \(layer1\)"):
        teacher(images, ["layer1"])


class Unfusable(nn.Module):
    """Two convolutions that a BatchNorm must not be folded into: one called twice, one also used without it."""

    def __init__(self):
        super().__init__()
        self.twice, self.branches = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3)
        self.norm, self.norm2 = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        nn.init.uniform_(self.norm.running_var, 2, 3)
        nn.init.uniform_(self.norm2.running_mean, 2, 3)

    def forward(self, x):
        x = self.branches(self.twice(self.norm(self.twice(x))))
        return (x + self.norm2(x)).mean((2, 3))


def test_only_exact_folds_are_made(images):
    model = Unfusable().eval()
    fused = fuse_conv_bn(model)
    assert norms(fused) == 2
    torch.testing.assert_close(fused(images), model(images))


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, x):
        x = x.mean((2, 3))
        return self.fc(x) if x.sum() > 0 else self.fc(-x)


def test_an_untraceable_model_is_not_fused(images):
    with pytest.warns(UserWarning, match="Untraceable cannot be traced and is not fused"):
        teacher = FrozenTeacher(Untraceable(), fuse=True)
    assert isinstance(teacher.model, Untraceable)
    assert list(teacher(images, ["fc"])[1]) == ["fc"]


def test_compiles(images):
    teacher = FrozenTeacher(trained(), dtype="float32")
    expected, _ = teacher(images)
    keys = list(teacher.state_dict())
    teacher.compile(backend="eager")
    torch.testing.assert_close(teacher(images)[0], expected)
    assert list(teacher.state_dict()) == keys


class Owner(LightningModule):
    def __init__(self):
        super().__init__()
        self.student = trained()
        hold_outside(self, "teacher", FrozenTeacher(trained()))


def test_a_teacher_held_outside_is_not_registered_in_its_owner(images):
    owner = Owner()
    before = snapshot(owner.teacher)
    alone = [name for name, _ in trained().named_parameters(prefix="student")]
    assert [name for name, _ in owner.named_parameters()] == alone
    assert all(key.startswith("student.") for key in owner.state_dict())
    assert all(name.startswith("student.") for name, _ in owner.named_buffers())
    assert owner.teacher not in owner.modules()
    owner.double().train().requires_grad_()
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(owner)
    assert any(isinstance(module, nn.SyncBatchNorm) for module in converted.student.modules())
    assert norms(converted.teacher) == norms(trained())
    assert_frozen(owner.teacher)
    owner.teacher(images)
    assert_unchanged(owner.teacher, before)
    assert_frozen(copy.deepcopy(owner).teacher)


def test_tapped_batch_norms_use_the_batch_and_do_not_update_their_statistics():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5))
    images = torch.randn(6, 3, 8, 8)
    model(images)  # updates the statistics
    training = copy.deepcopy(model).train()
    before = copy.deepcopy(model.state_dict())
    teacher = FrozenTeacher(model, batch_statistics=True)
    logits, features = teacher(images, ("1",))
    torch.testing.assert_close(features["1"], training[1](training[0](images)))
    torch.testing.assert_close(logits, training(images))
    torch.testing.assert_close(teacher(images)[0], copy.deepcopy(model).eval()(images))
    assert not teacher(images, ("1",))[0].equal(teacher(images)[0])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match=r"set model\.teacher\.fuse=false, or model"):
        FrozenTeacher(model, fuse=True, batch_statistics=True)


def test_the_parameter_count_is_that_of_the_unfolded_model():
    model = create_model("resnet8")
    expected = count_parameters(model)
    teacher = FrozenTeacher(model)
    assert teacher.fold((3, 32, 32)) > 0
    assert teacher.parameter_count == expected > count_parameters(teacher)
    assert FrozenTeacher(create_model("resnet8"), fuse=True).parameter_count == expected


@pytest.mark.parametrize("size", [None, (16, 24)])
def test_the_shape_of_the_model_s_input_is_known(size):
    given = Normalisation((0.5,) * 3, (0.5,) * 3)
    teacher = FrozenTeacher(create_model("resnet8", 10), renormalise=Renormalise(given, given, size))
    got = []
    teacher.model.register_forward_pre_hook(lambda _, inputs: got.append(inputs[0].shape[1:]))
    teacher(torch.zeros(1, 3, 8, 8))
    assert got == [torch.Size(teacher.input_shape((3, 8, 8)))]
