"""Teachers that do not fit the data are refused in one sentence; classes beyond the data's are ignored."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.plans import make_plan
from torch import nn

from rld_lightning.models.complexity import count_macs, count_parameters
from rld_lightning.models.factory import create_model
from rld_lightning.models.libraries import published_classes
from rld_lightning.models.normalisation import Normalisation
from rld_lightning.models.weights.facts import WeightsFacts
from rld_lightning.models.weights.save import save_weights
from rld_lightning.tasks.teacher import network as teacher_network
from rld_lightning.tasks.teacher.network import _known, build_teacher, load_network

LOOK = Normalisation((0.5,) * 3, (0.5,) * 3)


def data_of(*names, size=32):
    looks = {"mean": LOOK.mean, "std": LOOK.std, "image_shape": (3, size, size)}
    return SimpleNamespace(name="photos", class_names=list(names), num_classes=len(names), **looks)


@pytest.fixture
def built(monkeypatch):
    """Builds networks without a download, and records their arguments."""
    calls = []

    def without_a_download(name, num_classes, pretrained=False):
        calls.append((name, num_classes, pretrained))
        torch.manual_seed(0)
        return create_model("resnet8", num_classes)

    monkeypatch.setattr(teacher_network, "create_model", without_a_download)
    monkeypatch.setattr(
        teacher_network, "select_classes", lambda network, name, places, count: nn.Sequential(network, Only(places))
    )
    return calls


class Only(nn.Module):
    def __init__(self, places):
        super().__init__()
        self.places = places

    def forward(self, logits):
        return logits[:, self.places]


def teacher_of(tmp_path, **values):
    return replace(make_plan(tmp_path).teacher, name="torchvision/resnet18", weights="pretrained", **values)


def test_pretrained_teacher_keeps_its_own_number_of_classes(tmp_path, built):
    names = [str(number) for number in range(10)]
    with pytest.raises(ValueError, match=r"torchvision/resnet18 knows 1,000 classes and the data has 10.*class_map="):
        load_network(teacher_of(tmp_path), "pretrained", data_of(*names), LOOK)
    assert built == [("torchvision/resnet18", 10, True)]


def test_classes_of_the_data_are_selected_from_a_pretrained_teacher(tmp_path, built, capsys):
    found = load_network(teacher_of(tmp_path), "pretrained", data_of("tabby", "golden retriever"), LOOK)
    assert built == [("torchvision/resnet18", 1000, True)]
    names = published_classes("torchvision/resnet18")
    assert found.network[1].places == [names.index("tabby"), 207]
    output = " ".join(capsys.readouterr().out.split())
    assert (
        "2 of its 1,000 classes are used, matched to the data's by name: tabby is tabby, golden retriever is" in output
    )
    assert "sees images resized to 224x224 from 32x32" in output
    assert found.renormalise.size == (224, 224)
    found = load_network(teacher_of(tmp_path, class_map={"dog": 207, "cat": "tabby"}, image_size=None), "pretrained",
                         data_of("cat", "dog"), LOOK)  # fmt: skip
    assert (found.network[1].places, found.renormalise.size) == ([names.index("tabby"), 207], None)


def test_file_with_more_classes_is_restricted_and_ensembles_average(tmp_path, capsys):
    files = []
    for seed, names in enumerate((["owl", "dog", "cat"], ["cat", "dog"])):
        torch.manual_seed(seed)
        network = create_model("resnet8", len(names)).eval()
        path = tmp_path / f"{seed}.safetensors"
        facts = {"class_names": names, "num_classes": len(names), "image_shape": [3, 16 << seed, 16 << seed]}
        files.append((network, path, names))
        save_weights(network, path, {"name": "resnet8", "mean": [0.5] * 3, "std": [0.5] * 3, **facts})
    data = data_of("cat", "dog")
    paths = tuple(str(path) for _, path, _ in files)
    teacher = replace(make_plan(tmp_path).teacher, name="resnet8", weights=paths, mean_of="probabilities")
    frozen, facts, sha256 = build_teacher(teacher, data, LOOK)
    images = torch.randn(2, 3, 32, 32)
    small = nn.functional.interpolate(images, (16, 16), mode="bilinear", antialias=True)
    with torch.no_grad():
        expected = (files[0][0](small)[:, [2, 1]].softmax(1) + files[1][0](images).softmax(1)) / 2
    torch.testing.assert_close(frozen(images)[0].exp(), expected)
    assert len(sha256) == 64
    said = " ".join(capsys.readouterr().out.split())
    assert "the mean of the probabilities of 2 resnet8" in said
    assert facts.top1 is None
    with pytest.raises(ValueError, match=r"no class for 'dog' \('fox'\).*class_map=\{dog:"):
        load_network(replace(teacher, class_map={"dog": "fox"}), paths[0], data, LOOK)
    # The shapes of a file without names give the number of classes.
    save_weights(files[0][0], tmp_path / "plain.safetensors")
    plain = load_network(
        replace(teacher, class_map={"cat": 2, "dog": 1}), str(tmp_path / "plain.safetensors"), data, LOOK
    )
    with torch.no_grad():
        torch.testing.assert_close(plain.network.eval()(images), files[0][0](images)[:, [2, 1]])


def test_different_networks_form_an_ensemble(tmp_path, capsys):
    names, looks = ("resnet8", "mobilenetv2"), ([0.5] * 3, [0.25] * 3)
    networks, paths = [], []
    for name, std in zip(names, looks, strict=True):
        networks.append(create_model(name, 2).eval())
        paths.append(str(tmp_path / f"{name}.safetensors"))
        save_weights(networks[-1], Path(paths[-1]), {"name": name, "mean": [0.5] * 3, "std": std, "num_classes": 2})
    data = data_of("cat", "dog")
    teacher = replace(make_plan(tmp_path).teacher, name="resnet8+mobilenet_v2", weights=tuple(paths))
    frozen, _, _ = build_teacher(teacher, data, LOOK)
    images = torch.randn(2, 3, 32, 32)
    pixels = images * torch.tensor(data.std)[:, None, None] + torch.tensor(data.mean)[:, None, None]
    with torch.no_grad():
        expected = sum(net((pixels - 0.5) / std[0]) for net, std in zip(networks, looks, strict=True)) / 2
    torch.testing.assert_close(frozen(images)[0], expected, rtol=1e-4, atol=1e-4)
    said = " ".join(capsys.readouterr().out.split())
    parameters, macs = (sum(map(count, networks)) / 1e6 for count in (count_parameters, count_macs))
    assert "the mean of the logits of resnet8 and mobilenet_v2" in said
    assert f"{parameters:.2f} M parameters, {macs:.1f} M MACs" in said
    with pytest.raises(ValueError, match="mobilenetv2"):
        build_teacher(replace(teacher, weights=tuple(reversed(paths))), data, LOOK)
    with pytest.raises(ValueError, match=r"names 2 networks, and model.teacher.weights 1 file\(s\)"):
        build_teacher(replace(teacher, weights=paths[0]), data, LOOK)


NAMES = [str(digit) for digit in range(10)]


def halves(data):
    data.normalize_with(*LOOK)
    return next(iter(data.val_dataloader())).images


def build(tmp_path, path, data, **values):
    usual = Normalisation(data.mean, data.std)
    return build_teacher(
        replace(make_plan(tmp_path).teacher, name="resnet8", weights=str(path), **values), data, usual
    )[0]


@pytest.mark.parametrize("said_by", ["file", "hand"])
def test_teacher_gets_images_as_in_its_training(tmp_path, data, file, capsys, said_by):
    images = next(iter(data.val_dataloader())).images
    plain, _ = build(tmp_path, file(), data)(images)
    assert "sees images" not in capsys.readouterr().out
    facts = {"mean": [0.5] * 3, "std": [0.5] * 3} if said_by == "file" else {"mean": [0.1] * 3, "std": [0.1] * 3}
    teacher = build(tmp_path, file(**facts), data, normalisation=None if said_by == "file" else LOOK)
    own, _ = teacher(images)
    said = "its file says so" if said_by == "file" else "model.teacher.mean and std"
    output = capsys.readouterr().out
    assert f"its own mean [0.5, 0.5, 0.5] and std [0.5, 0.5, 0.5] ({said})" in output
    expected = teacher.model(halves(data))
    torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-4)
    assert (own - plain).abs().max() > 0.01


def test_classes_of_a_teacher_are_matched_by_name(tmp_path, data, file, capsys):
    images = next(iter(data.val_dataloader())).images
    expected, _ = build(tmp_path, file(class_names=NAMES), data)(images)
    turned, _ = build(tmp_path, file(class_names=NAMES[::-1]), data)(images)
    torch.testing.assert_close(turned, expected.flip(1))
    said = "its classes are matched to those of digits by name (class 0 is '9' there and '0' here)"
    assert capsys.readouterr().out.count(said) == 1
    with pytest.raises(
        ValueError, match=r"other classes.*class 0 is 'owl' there and '0' here.*model\.teacher\.weights="
    ):
        build(tmp_path, file(class_names=["owl", *NAMES[1:]]), data)


def test_images_have_the_size_of_the_training_of_the_teacher(tmp_path, data, file, capsys):
    assert build(tmp_path, file(image_shape=[3, 8, 8]), data).renormalise is None
    for own, size in (("auto", 32), (16, 16)):
        assert build(tmp_path, file(image_shape=[3, 32, 32]), data, image_size=own).renormalise.size == (size, size)
        said = f"sees images resized to {size}x{size} from 8x8"
        assert said in " ".join(capsys.readouterr().out.split())
    assert build(tmp_path, file(image_shape=[3, 32, 32]), data, image_size=None).renormalise is None


@pytest.mark.parametrize(("share", "images"), [(None, ""), (0.0, ""), (0.2, " on held-out images")])
def test_accuracy_of_a_file_tells_whether_images_were_held_out(share, images):
    facts = WeightsFacts(top1=73.611, epochs=2, val_fraction=share, source="fit")
    assert _known(facts) == f" (top-1 73.61 %{images}, after 2 epoch(s), fit)"
