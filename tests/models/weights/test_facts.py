"""A file's metadata is numbers and texts in range, or the file is refused; nothing in it is ever executed."""

import json

import pytest
import torch

from rld_lightning.models.weights.facts import WeightsFacts, facts_of, read_facts
from rld_lightning.models.weights.read import WeightsError, read_weights
from rld_lightning.models.weights.save import save_weights

GOOD = {
    "name": "resnet8",
    "dataset": "cifar100",
    "source": "fit",
    "num_classes": 100,
    "class_names": ["apple", "a\nb", "", "caf\udce9"],  # the last from a folder whose name is not UTF-8
    "image_shape": [3, 32, 32],
    "mean": [0.5, 0, 0.5],
    "std": [0.25, 1, 0.25],
    "data_seed": 4294967295,
    "val_fraction": 0.1,
    "test_fraction": 0,
    "top1": 70,
    "epochs": 240,
}
TARGET = {"_target_": "builtins.print", "_args_": ["it ran"]}
OTHER_KINDS = {
    "text": [{"value": 1}, ["a"]],
    "whole": [TARGET, [TARGET], "1", 1.5, -1, True, 1 << 40, float("nan"), float("inf"), "${oc.env:HOME}"],
    "share": [TARGET, [0.1], "0.1", -0.1, 1, True, float("nan"), float("-inf"), "${oc.env:HOME}"],
    "list": [TARGET, "abc", [TARGET] * 3, 3, float("nan")],
}
KINDS = {
    **dict.fromkeys(("num_classes", "data_seed", "epochs"), "whole"),
    **dict.fromkeys(("val_fraction", "test_fraction"), "share"),
    **dict.fromkeys(("class_names", "image_shape", "mean", "std"), "list"),
}
PAYLOADS = [(key, value) for key, kind in KINDS.items() for value in OTHER_KINDS[kind]] + [
    ("top1", 100.5), ("top1", -1), ("top1", TARGET), ("top1", float("nan")), ("top1", False),
    ("num_classes", 1),
    ("image_shape", [3, 32]), ("image_shape", [3, 32, 0]), ("image_shape", [3, 32.5, 32]),
    ("image_shape", [3, 99999, 3]),
    ("mean", [0.5, 0.5, float("inf")]), ("mean", [[0.5]] * 3), ("std", [0.5, 0, 0.5]), ("std", [0.5, -1, 0.5]),
]  # fmt: skip


def in_safetensors(path, key, value):
    save_weights({"w": torch.zeros(1)}, path / "w.safetensors", {key: json.dumps(value)})
    return path / "w.safetensors"


def in_checkpoint(path, key, value):
    content = {"state_dict": {"student.w": torch.zeros(1)}, "hyper_parameters": {key: json.dumps(value)}}
    torch.save(content, path / "w.ckpt")
    return path / "w.ckpt"


def test_a_run_s_metadata_is_read_as_written():
    read = read_facts({key: value if isinstance(value, str) else json.dumps(value) for key, value in GOOD.items()}, "w")
    triples = {key: tuple(GOOD[key]) for key in ("image_shape", "mean", "std")}
    assert read == WeightsFacts(**GOOD | triples)


def test_a_file_may_have_no_metadata():
    assert read_facts({}, "w") == WeightsFacts()
    assert read_facts({"val_fraction": "None", "top1": "null", "format": "pt", "lr": "{}"}, "w") == WeightsFacts()


def test_the_name_in_checkpoints_is_called_student():
    assert read_facts({"student": "resnet8@resnet20"}, "w").name == "resnet8@resnet20"
    assert read_facts({"student": "resnet8", "name": "resnet20"}, "w").name == "resnet20"


@pytest.mark.parametrize(("key", "text"), [("class_names", json.dumps(["a", "\ud800"])), ("name", "\ud800")])
def test_halves_of_characters_which_no_file_can_hold_are_refused(key, text):
    with pytest.raises(WeightsError, match=f"says {key}="):
        read_facts({key: text}, "w")


@pytest.mark.parametrize("write", [in_safetensors, in_checkpoint])
@pytest.mark.parametrize(("key", "value"), PAYLOADS, ids=str)
def test_invalid_values_are_refused_by_name(tmp_path, capsys, write, key, value):
    path = write(tmp_path, key, value)
    with pytest.raises(WeightsError) as refused:
        facts_of(read_weights(path))
    sentence = str(refused.value)
    assert sentence.startswith(f"{path} says {key}=")
    assert "save its state_dict alone" in sentence
    assert json.dumps(value)[:20] in sentence.replace("\\'", "'")
    assert "it ran" not in capsys.readouterr().out


@pytest.mark.parametrize("key", ["num_classes", "data_seed", "val_fraction", "test_fraction"])
@pytest.mark.parametrize(
    "value", [TARGET, ["a"], {"_partial_": True}, "lambda: 1", "${now:}", "[" * 100_000, "1" * 5000]
)
def test_objects_in_a_checkpoint_are_refused_for_strict_keys(tmp_path, key, value):
    torch.save({"state_dict": {"student.w": torch.zeros(1)}, "hyper_parameters": {key: value}}, tmp_path / "w.ckpt")
    with pytest.raises(WeightsError, match=f"says {key}=") as refused:
        facts_of(read_weights(tmp_path / "w.ckpt"))
    assert len(str(refused.value)) < 500


@pytest.mark.parametrize("key", ["class_names", "image_shape", "mean", "std", "top1", "epochs"])
def test_other_programs_values_are_ignored_for_descriptive_keys(key):
    for text in ("['a']", "(0.5, 0.5, 0.5)", str(TARGET), "tensor(0.5)", "[" * 100_000):
        assert read_facts({key: text}, "w") == WeightsFacts()


@pytest.mark.parametrize("key", ["name", "dataset", "source"])
@pytest.mark.parametrize("text", ["", "a\nb", "\x1b[2J", "x" * 400])
def test_texts_are_one_line(key, text):
    with pytest.raises(WeightsError, match=f"w says {key}="):
        read_facts({key: text}, "w")
