"""Creating networks by name, and their stages."""

import sys
from collections.abc import Iterator

import pytest
import torch
import torchvision
from helpers.golden_fill import MODELS
from torch import nn

import rld_lightning.models as models
import rld_lightning.models.libraries as libraries
import rld_lightning.models.registry as model_registry
from rld_lightning.models import Stages, create_model, list_models, register_model, stages_of
from rld_lightning.models.registry import canonical_name

# The smallest of each family.
FAMILIES = ["resnet8", "resnet18", "wrn16_1", "vgg8", "mobilenetv1", "mobilenetv2", "shufflev1", "shufflev2"]


@pytest.fixture
def registry(monkeypatch) -> Iterator[dict]:
    monkeypatch.setattr(model_registry, "REGISTRY", dict(model_registry.REGISTRY))
    return model_registry.REGISTRY


def test_registered_names_are_those_of_the_golden_files():
    golden = {canonical_name(name.split("/")[1]) for name in MODELS if not name.startswith("imagenet/ResNet")}
    assert set(list_models()) == golden


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("wrn_40_2", "wrn40_2"),
        ("WRN-40-2", "wrn40_2"),
        ("resnet8X4", "resnet8x4"),
        ("ResNet50", "resnet50"),
        ("MobileNetV2", "mobilenetv2"),
        ("ShuffleV1", "shufflev1"),
        ("ResNet18@wrn_16_2", "resnet18@wrn16_2"),
        ("torchvision/ResNet18", "torchvision/ResNet18"),
        ("wrn_40_3", "wrn_40_3"),
    ],
)
def test_other_spellings_of_registered_names_are_accepted(name, expected):
    assert canonical_name(name) == expected
    if "@" not in name and expected in list_models():
        assert type(create_model(name)) is type(create_model(expected))


def test_every_name_has_one_canonical_spelling():
    assert [canonical_name(name) for name in list_models()] == list_models()
    assert not [name for name in list_models() if name != name.lower()]


def test_list_models_is_in_natural_order_and_takes_patterns():
    assert list_models("resnet?") == ["resnet8"]
    assert list_models("resnet*")[:5] == ["resnet8", "resnet8x4", "resnet14", "resnet18", "resnet20"]
    assert list_models("nothing*") == []
    assert "torchvision/resnet34" in list_models("torchvision/*")
    assert all(name.startswith("torchvision/vgg") for name in list_models("torchvision/vgg*"))


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("wrn40_22", "wrn40_2"),
        ("resnet_8_x_5", "resnet8x4"),
        ("mobilenet", "mobilenetv2"),
        ("resnet34", "torchvision/resnet34"),
        ("shufflenetv1", "shufflev1"),
        ("torchvision/resnet35", "torchvision/resnet34"),
        ("torchvison/resnet34", "torchvision/resnet34"),
    ],
)
def test_similar_names_are_suggested_for_an_unknown_one(name, meant):
    with pytest.raises(ValueError, match="unknown model") as error:
        create_model(name)
    assert repr(name) in str(error.value)
    assert repr(meant) in str(error.value)
    assert "list_models()" in str(error.value)


def test_without_a_similar_name_the_message_still_tells_how_to_list():
    with pytest.raises(ValueError, match=r"unknown model 'qqq'\. rld_lightning\.list_models\(\) lists all"):
        create_model("qqq")


@pytest.mark.parametrize("num_classes", [1, 0, -3])
@pytest.mark.parametrize("name", ["resnet8", "torchvision/resnet18"])
def test_fewer_than_two_classes_are_refused(name, num_classes):
    with pytest.raises(ValueError, match=f"num_classes={num_classes}"):
        create_model(name, num_classes=num_classes)


def test_a_name_can_be_registered_only_once(registry):
    @register_model
    def newcomer(num_classes: int = 100) -> nn.Module:
        return nn.Linear(3, num_classes)

    assert create_model("newcomer", num_classes=7).out_features == 7
    with pytest.raises(ValueError, match="'newcomer' is already registered"):
        register_model(newcomer)

    def New_Comer(num_classes: int = 100) -> nn.Module:
        return nn.Linear(3, num_classes)

    with pytest.raises(ValueError, match="'newcomer' is already registered"):
        register_model(New_Comer)


def test_a_file_dropped_into_the_folder_registers_itself(registry, monkeypatch, tmp_path):
    (tmp_path / "dropped_family.py").write_text(
        "from torch import nn\n"
        "from rld_lightning.models.registry import register_model\n"
        "@register_model\n"
        "def dropped(num_classes=100):\n"
        "    return nn.Linear(3, num_classes)\n"
    )
    monkeypatch.setattr(models.cifar, "__path__", [*models.cifar.__path__, str(tmp_path)])
    try:
        models._import_families()
        assert "dropped" in list_models()
        assert create_model("dropped", num_classes=5).out_features == 5
    finally:
        sys.modules.pop("rld_lightning.models.cifar.dropped_family", None)
        vars(models.cifar).pop("dropped_family", None)


@pytest.mark.parametrize("depth", [7, 2, -4])
def test_invalid_depths_are_refused(depth):
    from rld_lightning.models.cifar.resnet import ResNet
    from rld_lightning.models.cifar.wrn import WideResNet

    for build in (lambda: ResNet(depth), lambda: WideResNet(depth, width=1)):
        with pytest.raises(ValueError, match=f"depth={depth}"):
            build()


@pytest.mark.parametrize("name", FAMILIES)
def test_any_image_size_and_every_parameter_gets_a_gradient(name):
    torch.manual_seed(0)
    model = create_model(name, num_classes=5)
    logits = model(torch.randn(2, 3, 48, 80))
    assert logits.shape == (2, 5)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert any(p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("name", FAMILIES)
def test_each_batch_norm_runs_once_per_forward(name):
    model = create_model(name)
    model(torch.randn(2, 3, 32, 32))
    counts = {key: value.item() for key, value in model.state_dict().items() if key.endswith("num_batches_tracked")}
    assert counts
    assert set(counts.values()) == {1}


@pytest.mark.parametrize("name", FAMILIES)
@torch.inference_mode()
def test_channels_last_gives_the_same_logits(name):
    torch.manual_seed(0)
    model = create_model(name).eval()
    images = torch.randn(2, 3, 32, 32)
    expected = model(images)
    actual = model.to(memory_format=torch.channels_last)(images.to(memory_format=torch.channels_last))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.thinned(4)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_forward_is_one_graph(name):
    torch.compiler.reset()
    model = create_model(name).eval()
    images = torch.randn(2, 3, 32, 32)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), model(images))


@pytest.mark.parametrize("name", FAMILIES)
def test_no_activation_is_in_place(name):
    assert not any(getattr(module, "inplace", False) for module in create_model(name).modules())


def test_initialisation_is_that_of_the_published_code():
    torch.manual_seed(0)
    wrn = create_model("wrn16_4")
    # Variance 2 / fan-out.
    assert wrn.block3.layer[1].conv1.weight.std().item() == pytest.approx((2 / (9 * 256)) ** 0.5, rel=0.01)
    assert not wrn.fc.bias.any()
    vgg = create_model("vgg8")
    assert vgg.classifier.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert not any(bias.any() for key, bias in vgg.named_parameters() if key.endswith("bias"))
    mobile = create_model("mobilenetv2")
    assert mobile.blocks[6][0].conv[3].weight.std().item() == pytest.approx((2 / (9 * 480)) ** 0.5, rel=0.05)
    assert mobile.classifier[0].weight.std().item() == pytest.approx(0.01, rel=0.02)


def test_vgg_halves_large_images_once_more():
    model = create_model("vgg8").eval()
    with models.FeatureTaps(model, ["block4"]) as taps, torch.inference_mode():
        model(torch.zeros(1, 3, 64, 64))
        assert taps.features["block4"].shape[2:] == (4, 4)
        model(torch.zeros(1, 3, 48, 48))
        assert taps.features["block4"].shape[2:] == (6, 6)


class TestTorchvision:
    def test_activations_are_not_in_place(self):
        model = create_model("torchvision/mobilenet_v3_small", num_classes=10)
        assert not any(getattr(module, "inplace", False) for module in model.modules())
        assert model.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 10)

    @pytest.mark.parametrize(("num_classes", "same_classifier"), [(1000, True), (10, False)])
    def test_pretrained_weights_with_a_fresh_classifier_for_other_classes(
        self, monkeypatch, num_classes, same_classifier
    ):
        published = torchvision.models.resnet18().state_dict()
        asked = []

        def load(url, **_):
            asked.append(url)
            return published

        monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", load)
        model = create_model("torchvision/resnet18", num_classes=num_classes, pretrained=True)
        assert asked == [torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url]
        assert torch.equal(model.layer4[1].conv2.weight, published["layer4.1.conv2.weight"])
        assert model.fc.out_features == num_classes
        assert torch.equal(model.fc.bias, published["fc.bias"]) == same_classifier

    @pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
    def test_auxiliary_classifiers_are_left_out(self, monkeypatch, name):
        with torch.device("meta"):
            model = create_model(f"torchvision/{name}", num_classes=7)
            logits = model(torch.empty(2, 3, 96, 96))
            plain = getattr(torchvision.models, name)(init_weights=False)
        assert model.training
        assert logits.shape == (2, 7)

        published = {key: torch.ones(value.shape, dtype=value.dtype) for key, value in plain.state_dict().items()}
        monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: published)
        monkeypatch.setattr(libraries, "_INCEPTION_OPTIONS", libraries._INCEPTION_OPTIONS | {"init_weights": False})
        for num_classes in (1000, 7):
            pretrained = create_model(f"torchvision/{name}", num_classes=num_classes, pretrained=True)
            state = pretrained.state_dict()
            assert not [key for key in state if "aux" in key.casefold()]
            fresh = {key for key, value in state.items() if not (value == 1).all()}
            assert fresh == (set() if num_classes == 1000 else {"fc.weight", "fc.bias"})
            # Fine-tuned weights are loaded into a network that was not created as pretrained.
            assert pretrained.transform_input
            assert model.transform_input

    def test_resnets_have_stages(self):
        with torch.device("meta"):
            basic, bottleneck = create_model("torchvision/resnet34"), create_model("torchvision/resnet50")
        assert stages_of(basic).norms == ("layer1.2.bn2", "layer2.3.bn2", "layer3.5.bn2", "layer4.2.bn2")
        assert stages_of(bottleneck).preactivations[-1] == "layer4.2.relu:in"


class TestTimm:
    @pytest.fixture(autouse=True)
    def _timm(self):
        pytest.importorskip("timm")

    def test_create_list_and_suggest_names(self):
        model = create_model("timm/resnet10t", num_classes=7)
        assert model.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 7)
        assert not any(getattr(module, "inplace", False) for module in model.modules())
        assert "timm/resnet18" in list_models("timm/resnet1*")
        with pytest.raises(ValueError, match="'timm/resnet18'"):
            create_model("timm/resnet_18")

    @pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "vit_tiny_patch16_224", "efficientnet_b0"])
    def test_stages_can_be_tapped(self, name):
        with torch.device("meta"):
            model = create_model(f"timm/{name}", num_classes=10).eval()
            images = torch.empty(1, 3, 224, 224)
        stages = stages_of(model)
        _, features = models.forward_with_taps(model, images, (*stages.features, stages.pooled))
        assert len(stages.features) >= 4
        assert features[stages.pooled].ndim == 2

    def test_missing_pretrained_weights_are_not_replaced_by_random_ones(self, monkeypatch):
        monkeypatch.setattr("timm.is_model_pretrained", lambda name: False)
        with pytest.raises(ValueError, match="timm has no pretrained weights of resnet10t"):
            create_model("timm/resnet10t", pretrained=True)

    def test_a_network_with_several_classifiers_has_no_stages(self):
        with torch.device("meta"):
            model = create_model("timm/deit_tiny_distilled_patch16_224")
        with pytest.raises(ValueError, match="name the module paths explicitly"):
            stages_of(model)


def test_missing_timm_is_reported_in_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r'pip install "rld-lightning\[timm\]"'):
        create_model("timm/resnet18")


def test_stages_of_an_unknown_network():
    with pytest.raises(ValueError, match="Linear does not declare its stages"):
        stages_of(nn.Linear(2, 2))


def test_a_network_declares_its_own_stages():
    class Own(nn.Module):
        stages = Stages(("a",), (), "b:in")

    assert stages_of(Own()) is Own.stages
    assert stages_of(torch.compile(Own())) is Own.stages
