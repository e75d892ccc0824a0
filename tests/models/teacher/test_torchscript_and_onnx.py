"""Teachers from TorchScript and ONNX files."""

from dataclasses import replace

import pytest
import torch
from helpers.plans import make_plan
from torch import nn

from rld_lightning.data import DigitsDataModule
from rld_lightning.models.factory import create_model
from rld_lightning.models.normalisation import Normalisation
from rld_lightning.models.stages import stages_of
from rld_lightning.models.teacher.torchscript_and_onnx import Columns, OnnxTeacher, ScriptedNetwork, load_foreign
from rld_lightning.tasks.teacher.network import build_teacher

LOOK = Normalisation((0.5,) * 3, (0.5,) * 3)
IMAGES = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Pair(nn.Module):
    """Returns a tuple."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images):
        logits = self.network(images)
        return logits, logits.argmax(1)


@pytest.fixture(scope="module")
def whole():
    torch.manual_seed(0)
    return create_model("resnet8", 12).eval()


def write(kind, whole, folder, batch=None):
    path = folder / f"teacher.{kind}"
    if kind == "torchscript":
        torch.jit.trace(Pair(whole), IMAGES).save(str(path))
        return path
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    shape = [batch or "batch", 3, 8, 8]
    weight = whole.fc.weight.detach().numpy()[:, :3]  # by hand: an exporter would take seconds
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    nodes = [
        helper.make_node("GlobalAveragePool", ["images"], ["mean"]),
        helper.make_node("Flatten", ["mean"], ["flat"]),
        helper.make_node("Gemm", ["flat", "weight"], ["logits"], transB=1),
    ]
    graph = helper.make_graph(
        nodes, "teacher",
        [helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, [shape[0], 12])],
        [numpy_helper.from_array(weight.copy(), "weight")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, str(path))
    return path


@pytest.mark.parametrize(("kind", "batch"), [("torchscript", None), ("onnx", None), ("onnx", 2)])
def test_a_program_returns_its_network_s_logits(kind, batch, whole, tmp_path):
    network = load_foreign(kind, write(kind, whole, tmp_path, batch))
    with torch.no_grad():
        expected = whole(IMAGES) if kind == "torchscript" else IMAGES.mean((2, 3)) @ whole.fc.weight[:, :3].T
        torch.testing.assert_close(network(IMAGES), expected, rtol=1e-4, atol=1e-5)
    assert network.size == ((8, 8) if kind == "onnx" else None)


@pytest.mark.parametrize("kind", ["torchscript", "onnx"])
def test_a_program_teaches_a_subset_of_its_classes(kind, whole, tmp_path):
    path = write(kind, whole, tmp_path)
    (data := DigitsDataModule()).setup()
    teacher = replace(make_plan(tmp_path).teacher, name=kind, weights=str(path))
    with pytest.raises(ValueError, match=r"no class for '0' \('0'\).*which of its 12, which has no names"):
        build_teacher(teacher, data, LOOK)
    places = {str(digit): 11 - digit for digit in range(10)}
    frozen, _, sha256 = build_teacher(
        replace(teacher, class_map=places, normalisation=Normalisation(data.mean, data.std)), data, LOOK
    )
    images = next(iter(data.val_dataloader())).images[:4]
    with torch.no_grad():
        expected = load_foreign(kind, path)(images)[:, list(places.values())]
    torch.testing.assert_close(frozen(images)[0], expected, rtol=1e-4, atol=1e-4)
    assert len(sha256) == 64


@pytest.mark.parametrize("kind", ["torchscript", "onnx"])
def test_other_files_are_refused(kind, tmp_path):
    if kind == "onnx":
        pytest.importorskip("onnxruntime")
    (tmp_path / "x").write_bytes(b"no program")
    with pytest.raises(ValueError, match=r"x is not (a TorchScript|an ONNX) file"):
        load_foreign(kind, tmp_path / "x")


@pytest.mark.parametrize("kind", [ScriptedNetwork, OnnxTeacher, Columns])
def test_a_feature_loss_reports_that_there_are_no_features(kind):
    network = kind.__new__(kind)
    nn.Module.__init__(network)
    with pytest.raises(ValueError, match="choose a loss of logits"):
        stages_of(network)
