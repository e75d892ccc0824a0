"""A network with a size in its name resizes images to it, wherever it is used."""

import pytest
import torch
from torch.nn import functional as F

from rld_lightning.models.complexity import count_macs
from rld_lightning.models.factory import check_name, create_model
from rld_lightning.models.input_size import split_size
from rld_lightning.models.normalisation import published_normalisation
from rld_lightning.models.onnx_file import OnnxNetwork, example_input, export_copy, to_onnx
from rld_lightning.models.student import load_student
from rld_lightning.models.taps import feature_shapes, forward_with_taps
from rld_lightning.models.teacher.fold import fuse_conv_bn
from rld_lightning.models.weights.save import save_weights


def images():
    return torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def resized():
    return F.interpolate(images(), (16, 16), mode="bilinear", antialias=True)


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    sized, plain = create_model("resnet8@16", 10).eval(), create_model("resnet8", 10).eval()
    plain.load_state_dict(sized.state_dict())  # the keys are the same
    return sized.requires_grad_(False), plain.requires_grad_(False)


def test_it_equals_the_plain_network_on_resized_images(pair):
    sized, plain = pair
    expected, features = forward_with_taps(plain, resized(), ["layer1"])
    found, own = forward_with_taps(sized, images(), ["layer1"])
    assert torch.equal(found, expected)
    assert torch.equal(own["layer1"], features["layer1"])
    assert feature_shapes(sized, (3, 8, 8), ["layer1"])["layer1"][2:] == (16, 16)
    assert count_macs(sized, (3, 8, 8)) == count_macs(plain, (3, 16, 16))
    folded = fuse_conv_bn(sized)
    assert folded is not sized
    torch.testing.assert_close(folded(images()), expected)
    assert create_model("resnet8@16", 10).bfloat16()(images().bfloat16()).dtype is torch.bfloat16


def test_a_grafted_student_may_have_a_size_and_its_teacher_another():
    grafted, plain = create_model("resnet8@16@resnet14@24", 10), create_model("resnet8@resnet14", 10)
    assert count_macs(grafted, (3, 8, 8)) == count_macs(plain, (3, 16, 16))
    check_name("resnet8@16@resnet14@24")


def test_names_are_split_from_sizes():
    assert split_size("timm/resnet18@224") == ("timm/resnet18", 224)
    assert split_size("resnet8@resnet14") == ("resnet8@resnet14", None)
    assert published_normalisation("torchvision/resnet18@64") == published_normalisation("torchvision/resnet18")
    for size in ("0", "4097", "9" * 5000):
        with pytest.raises(ValueError, match="give 1 to 4096, such as resnet8@224"):
            create_model(f"resnet8@{size}")


def test_weights_files_keep_the_size(pair, tmp_path):
    sized, _ = pair
    facts = {"name": "resnet8@16", "num_classes": 10, "image_shape": [3, 8, 8], "resize": 8}
    facts |= {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "dataset": "digits"}
    save_weights(sized, tmp_path / "student.safetensors", facts)
    student = load_student(tmp_path)
    assert student.transform.size == (8, 8)
    with torch.no_grad():
        expected = sized(images())
        assert torch.equal(student(images()), expected)
        copy = export_copy(student.network)
        example, free = example_input(copy, (3, 8, 8))
        program = torch.export.export(copy, (example,), dynamic_shapes=free)
        torch.testing.assert_close(program.module()(images()), expected)


@pytest.mark.slow
def test_an_onnx_file_resizes_as_the_network_does(pair, tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    sized, _ = pair
    (tmp_path / "model.onnx").write_bytes(to_onnx(export_copy(sized), (3, 8, 8), {"name": "resnet8@16"}))
    torch.testing.assert_close(OnnxNetwork(tmp_path / "model.onnx")(images()), sized(images()), rtol=1e-4, atol=1e-5)
