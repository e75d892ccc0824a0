"""Networks, files and data that do not fit together."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.plans import make_plan
from omegaconf import OmegaConf
from torch import nn

from rld_lightning.data.base import ImageDataModule
from rld_lightning.models.weights.read import Weights
from rld_lightning.tasks.run import checks
from rld_lightning.tasks.run.matched_classes import reorder_to_data


class Toy(ImageDataModule):
    split_options = ImageDataModule.split_options | {"test_fraction": "test_fraction"}
    name, num_classes, class_names, image_shape = "toy", 3, ["a", "b", "c"], (3, 8, 8)
    test_fraction = 0.2


def data(name="toy", **options):
    toy = Toy(**{"seed": 1, "val_fraction": 0.1} | options)
    toy.name = name
    return toy


def weights(**facts):
    return Weights({}, {"dataset": "toy"} | {key: json.dumps(value) for key, value in facts.items()}, Path("w"))


@pytest.mark.parametrize(
    ("name", "other_sizes", "sentence"),
    [
        ("torchvision/alexnet", True, r"cannot take images of 3x8x8 \(.*another size with data\.im"),
        ("torchvision/alexnet", False, r"alexnet cannot take images of 3x8x8 \(.*; choose torchvision/alexnet@224, .*"),
    ],
)
def test_images_that_a_network_does_not_accept(name, other_sizes, sentence):
    with pytest.raises(ValueError, match=sentence):
        checks.check_network(name, data(), other_sizes=other_sizes)


def test_transformers_have_a_fixed_image_size():
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match=r"vit_tiny_patch16_224 cannot take images of 3x8x8 \(Input height"):
        checks.check_network("timm/vit_tiny_patch16_224", data())


class Tuple(nn.Module):
    def forward(self, images):
        return images, images


@pytest.mark.parametrize(
    ("network", "found"), [(Tuple(), "a tuple"), (nn.Flatten(), r"\(2, 192\)"), (nn.Identity(), r"\(2, 3, 8, 8\)")]
)
def test_outputs_that_are_not_logits_are_refused(network, found):
    with pytest.raises(ValueError, match=rf"net makes {found} of two images of 3x8x8, not logits \(2, 3\)"):
        checks.check_network("net", data(), network)


def test_network_is_not_modified():
    network = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(192, 3))
    state, random = {key: value.clone() for key, value in network.state_dict().items()}, torch.get_rng_state()
    checks.check_network("net", data(), network)
    assert network.training
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


def test_facts_of_foreign_files_are_not_trusted():
    theirs = Weights({}, {"dataset": "toy", "class_names": "['a']", "val_fraction": "None"}, Path("w"))
    reorder_to_data(nn.Identity(), "resnet8", theirs, data(), "student")
    checks.check_split(theirs, data(), "val")


@pytest.mark.parametrize(
    ("facts", "seed", "val_fraction"),
    [({"data_seed": 3, "val_fraction": 0.2}, 3, 0.2), ({}, 0, 0.0), ({"val_fraction": 0.2}, 0, 0.2)],
)
def test_held_out_split_follows_the_file_if_left_open(facts, seed, val_fraction):
    settings = OmegaConf.create({"seed": None, "val_fraction": None})
    found = checks.split_to_measure(settings, weights(**facts))
    assert found == {"seed": seed, "val_fraction": val_fraction}
    assert settings == {"seed": None, "val_fraction": None}
    chosen = OmegaConf.create({"seed": 5, "val_fraction": None})
    assert checks.split_to_measure(chosen, weights(**facts)) == {"val_fraction": val_fraction}


@pytest.mark.parametrize(
    ("split", "facts", "options", "refused"),
    [
        ("val", {}, {}, None),
        ("val", {"data_seed": 1, "val_fraction": 0.1}, {}, None),
        ("val", {"data_seed": 0, "val_fraction": 0.1}, {}, r"data\.seed=0, and with data\.seed=1"),
        ("val", {"data_seed": 1, "val_fraction": 0.2}, {}, r"val_fraction=0\.2, and with data\.val_fraction=0\.1"),
        # A folder's own validation split does not depend on the seed, nor does the test split.
        ("val", {"data_seed": 0, "val_fraction": 0.0}, {"val_fraction": 0.0}, None),
        ("test", {"data_seed": 0, "val_fraction": 0.2}, {}, None),
        ("test", {"test_fraction": 0.3}, {}, r"data\.test_fraction=0\.3, and with"),
        ("test", {"test_fraction": 0.3}, {"name": "another"}, None),
    ],
)
def test_training_images_of_a_model_are_refused(split, facts, options, refused):
    if refused is None:
        checks.check_split(weights(**facts), data(**options), split)
        return
    with pytest.raises(ValueError, match=refused):
        checks.check_split(weights(**facts), data(**options), split)


@pytest.mark.parametrize("weights", ["/my/teacher.pth", ("/a.pth", "/b.pth"), "published"])
def test_start_of_an_existing_teacher_does_not_matter(tmp_path, weights):
    plan = make_plan(tmp_path)
    checks.check_names(plan.student, replace(plan.teacher, weights=weights, start="pretrained"))


@pytest.mark.parametrize("weights", ["fit", "auto"])
def test_teacher_to_be_trained_needs_existing_initial_weights(tmp_path, weights):
    plan = make_plan(tmp_path)
    with pytest.raises(ValueError, match=r"model\.teacher\.start=pretrained is for torchvision/.*give a file, or null"):
        checks.check_names(plan.student, replace(plan.teacher, weights=weights, start="pretrained"))
