"""Run directories with a student, and small ONNX files, without training or exporting."""

import numpy as np
import torch
import yaml
from PIL import Image

from helpers.data import merge
from helpers.run_factory import write_run
from rld_lightning.data import DigitsDataModule
from rld_lightning.models import create_model
from rld_lightning.models.weights.save import save_weights


def digits_run(folder, name="resnet8", *, size=8, seed=0, held_out=0.0):
    """Writes the directory of a finished run on digits with an untrained student; returns the student."""
    write_run(folder, student=name, dataset="digits", held_out=held_out)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["data"] = {"_target_": "rld_lightning.data.DigitsDataModule", "image_size": size, "batch_size": 64}
    config["data"]["val_fraction"] = held_out
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    torch.manual_seed(seed)
    network = create_model(name, 10).eval()
    save_weights(network, folder / "student.safetensors", digits_facts(name, size))
    return network


def digits_facts(name, size=8):
    data = DigitsDataModule()
    return {
        "name": name,
        "dataset": "digits",
        "num_classes": 10,
        "class_names": list(data.class_names),
        "image_shape": [3, size, size],
        "resize": size,
        "interpolation": "bilinear",
        "mean": list(data.mean),
        "std": list(data.std),
    }


def write_digits(folder):
    """Writes the test images as PNG files; returns their paths and the batch that validation makes of them."""
    data = DigitsDataModule()
    data.setup()
    batch = merge(list(data.test_dataloader()))
    folder.mkdir(parents=True)
    paths = []
    for number, index in enumerate(batch.index):
        path = folder / f"{number:03}.png"
        Image.fromarray(data.splits["test"].images[index].numpy()).save(path)
        paths.append(path)
    return paths, batch


def small_onnx(facts, *, pixels=False, size=8, classes=10):
    """Builds a linear classifier in ONNX; returns the file's bytes and the weights ``(3 * size * size, classes)``."""
    onnx = __import__("onnx")
    helper, kinds = onnx.helper, onnx.TensorProto
    weights = np.random.default_rng(0).normal(size=(3 * size * size, classes)).astype(np.float32)
    shape = ["batch", size, size, 3] if pixels else ["batch", 3, size, size]
    nodes = [
        helper.make_node("Cast", ["in"], ["float"], to=kinds.FLOAT),
        helper.make_node("Flatten", ["float"], ["flat"]),
    ]
    nodes += [helper.make_node("MatMul", ["flat", "weights"], ["logits"])]
    nodes += [helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1)] if pixels else []
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("in", kinds.UINT8 if pixels else kinds.FLOAT, shape)],
        [helper.make_tensor_value_info("probabilities" if pixels else "logits", kinds.FLOAT, ["batch", classes])],
        [onnx.numpy_helper.from_array(weights, "weights")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    helper.set_model_props(model, facts)
    return model.SerializeToString(), torch.from_numpy(weights)
