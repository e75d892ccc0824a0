"""ONNX files, run by ONNX Runtime."""

import pytest
import torch
from helpers.exports import small_onnx
from torch import nn

from rld_lightning.models import create_model, onnx_file
from rld_lightning.models.onnx_file import OnnxNetwork, export_copy, quantise_onnx, to_onnx
from rld_lightning.models.preprocessing import PixelsToProbabilities, Preprocessing
from rld_lightning.models.weights.read import WeightsError

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


def test_a_file_is_run_and_has_metadata(tmp_path):
    content, weights = small_onnx({"name": "linear", "class_names": '["a", "b"]'})
    (tmp_path / "m.onnx").write_bytes(content)
    network = OnnxNetwork(tmp_path / "m.onnx")
    assert (network.num_classes, network.image_size, network.takes_pixels) == (10, 8, False)
    assert (network.facts.name, network.facts.class_names) == ("linear", ["a", "b"])
    images = torch.randn(3, 3, 8, 8).to(memory_format=torch.channels_last)
    torch.testing.assert_close(network(images), images.flatten(1) @ weights, rtol=1e-4, atol=1e-4)
    assert OnnxNetwork(small_onnx({}, pixels=True)[0]).takes_pixels


def test_invalid_files_are_refused(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"no")
    with pytest.raises(WeightsError, match=r"m\.onnx is not an ONNX file that can be run"):
        OnnxNetwork(tmp_path / "m.onnx")
    with pytest.raises(WeightsError, match=r"says mean='\[1\]' about itself, which is not a list of three numbers"):
        OnnxNetwork(small_onnx({"mean": "[1]", "name": "x"})[0]).facts  # noqa: B018


@pytest.mark.parametrize("place", ["initializer", "sparse initializer", "sparse value"])
def test_weights_in_other_files_are_not_read(tmp_path, monkeypatch, place):
    onnx = pytest.importorskip("onnx")
    monkeypatch.chdir(tmp_path)
    content, weights = small_onnx({})
    (tmp_path / "secret").write_bytes(weights.numpy().tobytes())
    model = onnx.load_from_string(content)
    (tensor,) = model.graph.initializer
    onnx.external_data_helper.set_external_data(tensor, "secret")
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    if place != "initializer":  # only the values of sparse tensors may be external
        everywhere = onnx.numpy_helper.from_array(torch.arange(weights.numel()).numpy(), "places")
        sparse = onnx.helper.make_sparse_tensor(tensor, everywhere, weights.shape)
        del sparse.values.dims[:], model.graph.initializer[:]
        sparse.values.dims.append(weights.numel())
        if place == "sparse initializer":
            model.graph.sparse_initializer.append(sparse)
        else:
            constant = onnx.helper.make_node("Constant", [], [tensor.name], sparse_value=sparse)
            model.graph.node.insert(0, constant)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(WeightsError, match="weights in other files"):
        OnnxNetwork(tmp_path / "m.onnx")


def test_int8_is_close_and_a_quarter_of_the_size():
    content, weights = small_onnx({"name": "linear"}, size=32)
    images = torch.rand(64, 3, 32, 32)
    small = quantise_onnx(content, [images[:32], images[32:]])
    assert len(small) < 0.3 * len(content)
    network, expected = OnnxNetwork(small), images.flatten(1) @ weights
    assert network.metadata == {"name": "linear", "quantised": "int8"}
    assert (network(images) - expected).abs().max() < 0.02 * expected.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet8", "wrn16_1", "mobilenetv2", "shufflev1", "shufflev2", "vgg8"])
def test_networks_of_the_package_have_the_same_logits_in_onnx(name):
    network = export_copy(create_model(name, 10))
    onnx = OnnxNetwork(to_onnx(network, (3, 32, 32), {"name": name}))
    for batch in (1, 5):
        images = torch.randn(batch, 3, 32, 32)
        torch.testing.assert_close(onnx(images), network(images), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_pixels_in_and_probabilities_out():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()
    transform = Preprocessing((8, 8), 8, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    inside = export_copy(PixelsToProbabilities(network, transform))
    onnx = OnnxNetwork(to_onnx(inside, (3, 8, 8), {}))
    pixels = torch.randint(256, (5, 8, 8, 3), dtype=torch.uint8)
    expected = network(transform.normalize(pixels.permute(0, 3, 1, 2))).softmax(1)
    torch.testing.assert_close(onnx(pixels), expected)
    assert (onnx.session.get_inputs()[0].name, onnx.output.name) == ("pixels", "probabilities")


@pytest.mark.slow
@pytest.mark.parametrize(("resize", "interpolation"), [(8, "bilinear"), (11, "bilinear"), (11, "bicubic")])
def test_pictures_of_any_size_are_accepted(resize, interpolation):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()
    transform = Preprocessing((8, 8), resize, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4), interpolation)
    onnx = OnnxNetwork(to_onnx(export_copy(PixelsToProbabilities(network, transform, resize=True)), (3, 8, 8), {}))
    assert onnx.resizes
    for size in ((1, 8, 8), (3, 40, 27), (2, 9, 100), (1, 5, 4)):
        smooth = nn.functional.interpolate(torch.rand(size[0], 3, 3, 3), size[1:], mode="bilinear")
        pixels = smooth.mul(255).byte()
        expected = network(transform.normalize(transform.crop(pixels))).softmax(1)
        torch.testing.assert_close(onnx(pixels.permute(0, 2, 3, 1)), expected, atol=0.01, rtol=0)


def test_an_exporter_s_error_is_shortened_to_its_reason():
    error = RuntimeError(
        "Failed.\n- Modify it.\n\n## Exception summary\n\n<class 'A'>: no such shape\nMore.\n(Refer to it.)"
    )
    assert onnx_file._reason(error) == "<class 'A'>: no such shape"
    assert onnx_file._reason(RuntimeError("one\ntwo\n")) == "two"
