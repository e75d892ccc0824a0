"""External networks: imported if the user names them, never because a file does."""

import json
import sys
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from rld_lightning.models import create_model, imported, trust
from rld_lightning.models.factory import blueprint
from rld_lightning.models.imported import is_external, logits_of, with_logits
from rld_lightning.models.onnx_file import example_input, export_copy
from rld_lightning.models.student import load_student
from rld_lightning.models.weights.save import save_weights

MODULE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.fc = nn.Linear(3, num_classes)

    def forward(self, images):
        return {"features": images, "logits": self.fc(images.mean((2, 3)))}

class zoo:
    build = Net

def number(num_classes):
    return num_classes

def other(classes):
    return Net(classes)

def loads(num_classes):
    network = Net(num_classes)
    network.fc.load_state_dict({"weight": torch.eye(num_classes, 3), "bias": torch.zeros(num_classes)})
    network.rates = [rate.item() for rate in torch.linspace(0, 0.1, 3)]
    return network
"""
IMAGES = torch.ones(2, 3, 4, 4)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Writes a module into the working directory that records its import."""
    (tmp_path / "my_nets.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w')\n{MODULE}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr("rld_lightning.models.imported._named", set())
    monkeypatch.delitem(sys.modules, "my_nets", raising=False)
    yield tmp_path / "imported"
    sys.modules.pop("my_nets", None)


def test_a_network_named_by_a_file_is_not_imported(elsewhere):
    trust("my_nets:zoo.build", "resnet8", None)
    with pytest.raises(ValueError, match="named by a file and not by you: nothing was imported"):
        create_model("my_nets:Net", 4)
    with pytest.raises(ValueError, match="nothing was imported or fetched"):
        create_model("transformers/google/vit-base-patch16-224", 4)
    assert not elsewhere.exists()


def test_a_network_named_by_the_user_is_imported(elsewhere):
    trust("my_nets:Net", "my_nets:zoo.build")
    for name in ("my_nets:Net", "my_nets:zoo.build"):
        network = create_model(name, 4)
        assert elsewhere.exists()
        assert network(IMAGES).shape == (2, 4)
        assert set(network.state_dict()) == {"fc.weight", "fc.bias"}


def test_an_external_student_is_loaded_only_if_it_is_named_or_trusted(elsewhere, tmp_path):
    trust("my_nets:Net")
    facts = {"name": "my_nets:Net", "num_classes": 4, "image_shape": [3, 4, 4], "mean": [0.5] * 3, "std": [0.5] * 3}
    save_weights(create_model("my_nets:Net", 4), tmp_path / "own.safetensors", facts)
    assert load_student(tmp_path / "own.safetensors").name == "my_nets:Net"  # like scripts with trust=
    imported._named.clear()
    sys.modules.pop("my_nets")
    elsewhere.unlink()
    with pytest.raises(ValueError, match="nothing was imported"):
        load_student(tmp_path / "own.safetensors")
    assert not elsewhere.exists()
    assert load_student(tmp_path / "own.safetensors", name="my_nets:Net")(IMAGES).shape == (2, 4)


@pytest.mark.filterwarnings("error:.*no-op")
def test_a_builder_that_loads_weights_and_computes_is_checked_too(elsewhere):
    trust("my_nets:loads")
    for name in ("my_nets:loads", "my_nets:loads@8"):
        assert blueprint(name, 4).fc.weight[0].tolist() == [1, 0, 0]
    assert blueprint("resnet8", 4).fc.weight.is_meta
    assert not blueprint("torchvision/regnet_y_400mf", 4).fc.weight.is_meta  # computes widths with tensors


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("my_nest:Net", r"my_nest:Net cannot be imported \(No module named 'my_nest'\); run this in the folder"),
        ("my_nets:Nets", r"my_nets has no Nets\. Did you mean 'Net'"),
        ("my_nets:number", r"builds a int, which is not a torch\.nn\.Module"),
        ("my_nets:other", "does not build a network from num_classes=4"),
    ],
)
def test_an_import_that_is_no_network_is_reported(elsewhere, name, words):
    trust(name)
    with pytest.raises(ValueError, match=words):
        create_model(name, 4)


@pytest.mark.parametrize(
    ("name", "found"),
    [("a.b:c.d", True), ("transformers/x", True), ("resnet8@wrn16_2", False), ("a:b c", False), ("/x/y:z", False),
     ("timm/vit", False), (":a", False), ("a:", False), ("a::b", False)],
)  # fmt: skip
def test_import_paths_are_recognised_by_their_form(name, found):
    assert is_external(name) == found


@dataclass
class Output:
    loss: None
    logits: Tensor


def test_logits_are_found_in_any_kind_of_output():
    logits = torch.zeros(2, 3)
    for output in (logits, (logits, 1), [logits], {"logits": logits}, Output(None, logits), ((logits,), 2)):
        assert logits_of(output) is logits
    for output in ((), {"output": logits}, "logits", None):
        with pytest.raises(ValueError, match="without logits"):
            logits_of(output)


def test_with_logits_does_not_change_a_network_that_returns_logits():
    plain = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
    expected = plain(IMAGES)
    same = with_logits(plain)
    assert isinstance(same, nn.Sequential)
    assert type(same).__name__ == "Sequential"
    torch.testing.assert_close(same(IMAGES), expected)
    exported = torch.export.export(same, (IMAGES,))
    torch.testing.assert_close(exported.module()(IMAGES), expected)


def test_a_classifier_of_transformers_from_a_folder(tmp_path):
    transformers = pytest.importorskip("transformers")
    from rld_lightning.models.libraries import published_classes, published_input

    sizes = {"image_size": 8, "patch_size": 4, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.ViTConfig(**sizes, intermediate_size=8, id2label={0: "owl", 1: "cat", 2: "dog"})
    whole = transformers.ViTForImageClassification(config).eval()
    whole.save_pretrained(tmp_path)
    looks = '"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25], "size": {"height": 8, "width": 8}'
    (tmp_path / "preprocessor_config.json").write_text(f'{{"do_normalize": true, {looks}}}')
    name = f"transformers/{tmp_path}"
    trust(name)
    network, images = create_model(name, 3, pretrained=True).eval(), torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(network(images), whole(images).logits)
    assert create_model(name, 5)(images).shape == (2, 5)
    assert published_input(name) == ((0.5,) * 3, (0.25,) * 3, 8)
    assert published_classes(name) == ["owl", "cat", "dog"]
    trust("transformers//there/is/none")
    with pytest.raises(ConnectionError, match=r"weights of transformers//there/is/none are not in"):
        create_model("transformers//there/is/none", 3, pretrained=True)


def test_a_failed_download_of_weights_is_reported_in_one_sentence(monkeypatch, tmp_path):
    from urllib.error import URLError

    def offline(*_, **__):
        raise URLError("Name or service not known")

    monkeypatch.setattr("torch.hub.download_url_to_file", offline)
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    with pytest.raises(ConnectionError, match=r"weights of torchvision/resnet18 are not in .*cannot be"):
        create_model("torchvision/resnet18", 10, pretrained=True)


def test_remote_code_is_not_run_and_no_question_is_asked(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    ran = tmp_path / "ran"
    (tmp_path / "own.py").write_text(f"open({str(ran)!r}, 'w')\nfrom transformers import ViTConfig as Config\n")
    config = {"auto_map": {"AutoConfig": "own.Config"}, "model_type": "own"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    name = f"transformers/{tmp_path}"
    trust(name)
    for pretrained in (False, True):
        with pytest.raises((ValueError, OSError)):
            create_model(name, 3, pretrained=pretrained)
    assert not ran.exists()


def test_missing_transformers_are_reported_in_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)  # as if it were not installed
    trust("transformers/some/model")
    with pytest.raises(ImportError, match=r'need transformers: pip install "rld-lightning\[transformers\]"'):
        create_model("transformers/some/model", 4)


@pytest.mark.parametrize("name", ["my_nets:zoo.build", "my_nets:zoo.build@6"])
def test_networks_that_return_more_than_logits_are_exported_for_any_batch_size(elsewhere, name):
    trust(name)
    network = export_copy(create_model(name, 4))
    example, free = example_input(network, (3, 4, 4))
    program = torch.export.export(network, (example,), dynamic_shapes=free)
    images = torch.randn(5, 3, 4, 4)
    torch.testing.assert_close(program.module()(images), network(images))
