"""Students with their teacher's classifier, and the last map that they need."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from rld_lightning.models import (
    GraftedStudent,
    Stages,
    count_macs,
    count_parameters,
    create_model,
    forward_with_taps,
    graft,
    list_models,
    stages_of,
)
from rld_lightning.models.stages import classifier_of
from rld_lightning.models.weights.read import WeightsError
from rld_lightning.models.weights.save import save_weights
from rld_lightning.models.weights.verify import load_weights

CLASSES = 7
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def grafted(student="resnet8", teacher="wrn16_2"):
    """Returns a grafted student with non-initial statistics, and its teacher."""
    torch.manual_seed(0)
    network = create_model(teacher, CLASSES).eval()
    model = graft(create_model(student, CLASSES), network)
    with torch.no_grad():
        for _ in range(3):
            model.train()(IMAGES)
    return model, network


@pytest.mark.thinned(4)
@pytest.mark.parametrize("name", list_models())
@torch.inference_mode()
def test_the_classifier_s_input_is_the_average_of_the_last_map(name):
    assert_averages(create_model(name, CLASSES).eval(), IMAGES)


@pytest.mark.parametrize(
    "name", ["torchvision/resnet18", "torchvision/resnet50", "timm/resnet10t", "timm/efficientnet_b0"]
)
@torch.inference_mode()
def test_the_classifier_s_input_is_the_average_of_the_last_map_in_library_networks(name):
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    assert_averages(create_model(name, CLASSES).eval(), torch.randn(2, 3, 64, 64))


def assert_averages(model, images):
    stages = stages_of(model)
    _, features = forward_with_taps(model, images, [stages.last_map, stages.pooled])
    last_map, pooled = features[stages.last_map], features[stages.pooled]
    assert last_map.shape[:2] == (2, classifier_of(model).in_features)
    assert_close(last_map.mean((2, 3)), pooled, rtol=1e-5, atol=1e-5)


def test_a_network_that_widens_the_average_has_no_last_map():
    pytest.importorskip("timm")
    with torch.device("meta"):
        assert stages_of(create_model("timm/mobilenetv3_small_050")).last_map == ""


@pytest.mark.parametrize(("student", "teacher"), [("resnet8", "wrn16_2"), ("mobilenetv2", "vgg8")])
def test_logits_match_the_formula(student, teacher):
    model, network = grafted(student, teacher)
    model.eval()
    last_map = "layer3" if student == "resnet8" else "blocks"  # MobileNetV2 without its last convolution
    _, features = forward_with_taps(model.backbone, IMAGES, [last_map])
    x = features[last_map]
    weights = model.projector.state_dict()
    for index, padding in ((0, 0), (3, 1), (6, 0)):
        x = F.conv2d(x, weights[f"{index}.weight"], padding=padding)
        mean, var, scale, shift = (
            weights[f"{index + 1}.{name}"][:, None, None] for name in ("running_mean", "running_var", "weight", "bias")
        )
        x = ((x - mean) / (var + 1e-5).sqrt() * scale + shift).clamp(min=0)
    layer = classifier_of(network)
    expected = x.sum((2, 3)) / x[0, 0].numel() @ layer.weight.T + layer.bias
    assert_close(model(IMAGES), expected, rtol=1e-4, atol=1e-5)
    width = layer.in_features
    convolutions = [tuple(m.weight.shape) for m in model.projector if isinstance(m, nn.Conv2d)]
    channels = features[last_map].shape[1]
    assert convolutions == [(width // 2, channels, 1, 1), (width // 2, width // 2, 3, 3), (width, width // 2, 1, 1)]


def test_everything_but_the_classifier_trains():
    model, teacher = grafted()
    assert all(module.training for module in model.modules())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    model.train()(IMAGES).square().sum().backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == name.startswith("classifier.")
        assert torch.equal(parameter, before[name]) == name.startswith("classifier.")
    assert torch.equal(model.classifier.weight, teacher.fc.weight)
    assert model.classifier is not teacher.fc
    assert teacher.fc.weight.requires_grad


def test_the_student_s_own_classifier_is_removed():
    student = create_model("mobilenetv2", CLASSES)
    names = set(student.state_dict())
    model = graft(student, create_model("resnet8", CLASSES))
    assert model.backbone is student
    left_out = {name for name in names if name.startswith("conv2.")}
    assert len(left_out) == 6  # the last convolution and its batch norm, as in the authors' code
    assert names - set(student.state_dict()) == {"classifier.0.weight", "classifier.0.bias"} | left_out


@pytest.mark.parametrize(
    ("student", "teacher", "parameters"),
    [
        ("shufflev2", "resnet32x4", 1_042_184),
        ("mobilenetv2", "resnet32x4", 704_804),
        ("mobilenetv2", "vgg13", 1_292_580),
    ],
)
def test_the_size_matches_the_authors_code(student, teacher, parameters):
    """The authors graft behind the deepest stage, without the 1x1 convolution after it."""
    assert count_parameters(create_model(f"{student}@{teacher}", 100)) == parameters


def test_stages_can_be_tapped():
    model, _ = grafted()
    stages = stages_of(model)
    assert stages.features == ("backbone.relu", "backbone.layer1", "backbone.layer2", "backbone.layer3")
    paths = (*stages.features, *stages.preactivations, *stages.norms, stages.last_map, stages.pooled)
    logits, features = forward_with_taps(model.eval(), IMAGES, paths)
    assert features[stages.last_map].shape == (2, 128, 8, 8)
    assert_close(features[stages.last_map].mean((2, 3)), features[stages.pooled])
    assert_close(logits, model(IMAGES))
    assert classifier_of(model) is model.classifier


@pytest.mark.thinned(3)
@pytest.mark.parametrize(
    ("student", "teacher"), [("resnet8", "resnet8x4"), ("mobilenetv2", "resnet18"), ("vgg8", "torchvision/resnet18")]
)
def test_a_grafted_student_is_rebuilt_by_name(student, teacher, tmp_path):
    model, _ = grafted(student, teacher)
    save_weights(model, path := tmp_path / "student.safetensors")
    again = create_model(f"{student}@{teacher}", CLASSES)
    assert isinstance(again, GraftedStudent)
    again.load_state_dict(model.state_dict(), strict=True)
    from_file = create_model(f"{student}@{teacher}", CLASSES)
    load_weights(from_file, path, name=f"{student}@{teacher}")
    for other in (again, from_file):
        assert_close(other.eval()(IMAGES), model.eval()(IMAGES), rtol=0, atol=0)
        assert not any(parameter.requires_grad for parameter in other.classifier.parameters())
    with pytest.raises(WeightsError, match=f"does not fit the model {student}"):
        load_weights(create_model(student, CLASSES), path, name=student)


def test_the_size_counts_projector_and_classifier():
    model, plain = create_model("resnet8@resnet8x4", 100), create_model("resnet8", 100)
    convolutions = 64 * 128 + 128 * 128 * 9 + 128 * 256
    head = 256 * 100
    assert count_macs(model) == count_macs(plain) - 64 * 100 + 8 * 8 * convolutions + head
    norms = 2 * (128 + 128 + 256)
    assert count_parameters(model) == count_parameters(plain) - 65 * 100 + convolutions + norms + head + 100


@pytest.mark.parametrize(
    ("name", "wrong", "meant"),
    [
        ("resnet8@resnet32x5", "resnet32x5", "resnet32x4"),
        ("wrn16_22@resnet8", "wrn16_22", "wrn16_2"),
        ("resnet8@torchvision/resnet17", "torchvision/resnet17", "torchvision/resnet18"),
    ],
)
def test_similar_names_are_suggested_for_unknown_parts(name, wrong, meant):
    with pytest.raises(ValueError, match=f"unknown model '{wrong}'") as error:
        create_model(name)
    assert repr(meant) in str(error.value)


def test_only_networks_that_average_a_map_can_be_grafted():
    class Tokens(nn.Module):
        stages = Stages(("stem",), (), "head:in")

        def __init__(self):
            super().__init__()
            self.stem, self.head = nn.Linear(4, 4), nn.Linear(4, CLASSES)

    model = Tokens()
    with pytest.raises(ValueError, match="Tokens does not classify the average of a map"):
        graft(model, create_model("resnet8", CLASSES))
    assert isinstance(model.head, nn.Linear)
    with pytest.raises(ValueError, match="already ends in another network's classifier"):
        graft(create_model("resnet8@vgg8"), create_model("resnet8"))


def test_a_grafted_student_can_be_a_teacher():
    teacher = create_model("resnet8@wrn16_2", CLASSES)
    model = graft(create_model("vgg8", CLASSES), teacher)
    assert torch.equal(model.classifier.weight, teacher.classifier.weight)
    create_model("vgg8@resnet8@wrn16_2", CLASSES).load_state_dict(model.state_dict())


def test_the_dtype_is_the_student_s_not_the_teacher_s():
    teacher = create_model("resnet8", CLASSES).bfloat16()
    assert graft(create_model("resnet8", CLASSES), teacher)(IMAGES).dtype == torch.float32
    assert classifier_of(teacher).weight.dtype == torch.bfloat16


def test_compiling_does_not_change_the_logits():
    torch.compiler.reset()
    model, _ = grafted()
    model.eval()
    compiled = torch.compile(model, backend="eager")
    for images in (IMAGES, IMAGES.flip(0)):
        assert_close(compiled(images), model(images))
