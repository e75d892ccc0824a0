"""Every common format is read without executing anything, and mismatches are explained."""

import argparse
import collections
import json
import os
import pathlib
import pickle
import shutil
import threading
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision
from torch import nn

from rld_lightning.models.factory import create_model
from rld_lightning.models.weights.read import Weights, WeightsError, read_metadata, read_weights
from rld_lightning.models.weights.save import save_weights
from rld_lightning.models.weights.verify import identify, load_weights


def tiny(classes=5, width=4):
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Flatten(), nn.Linear(width, classes))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return tiny()


def assert_same(state_dict, model):
    expected = model.state_dict()
    assert state_dict.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(state_dict[key], value), key


def prefixed(state_dict, prefix):
    return {prefix + key: value for key, value in state_dict.items()}


def published_checkpoint(model):
    """A checkpoint of the distillation code of 2019 to 2022: options, optimizer, numpy scalars and weights."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.zeros(2, 3, 3, 3)).sum().backward()
    optimizer.step()
    return {
        "opt": argparse.Namespace(lr=0.1, model="resnet56", milestones=[150, 180]),
        "epoch": 240,
        "model": model.state_dict(),
        "accuracy": np.float64(72.34),
        "best_acc": torch.tensor(72.4),
        "seen": np.int64(50_000),
        "loss": np.float32(0.5),
        "optimizer": optimizer.state_dict(),
    }


def lightning_checkpoint(state_dict):
    return {
        "epoch": 3,
        "global_step": 40,
        "pytorch-lightning_version": "2.6.6",
        "state_dict": state_dict,
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": torch.tensor(1.0), "dirpath": "/x"}},
        "optimizer_states": [],
        "hparams_name": "kwargs",
        "hyper_parameters": {"lr": 0.1},
    }


LAYOUTS = {
    "plain": lambda m: m.state_dict(),
    "parameters": lambda m: dict(m.state_dict(keep_vars=True)),
    "data_parallel": lambda m: prefixed(m.state_dict(), "module."),
    "compiled": lambda m: prefixed(m.state_dict(), "_orig_mod."),
    "compiled_in_data_parallel": lambda m: prefixed(m.state_dict(), "module._orig_mod."),
    "submodule_compiled": lambda m: {key.replace("0.", "0._orig_mod.", 1): v for key, v in m.state_dict().items()},
    "published": published_checkpoint,
    "published_data_parallel": lambda m: {"model": prefixed(m.state_dict(), "module."), "best_acc": 70.0},
    "state_dict": lambda m: {"state_dict": prefixed(m.state_dict(), "module."), "arch": "x"},
    "lightning_student": lambda m: lightning_checkpoint(
        prefixed(m.state_dict(), "student.") | prefixed(tiny(7).state_dict(), "teacher.") | {"loss.w": torch.ones(1)}
    ),
    "lightning_compiled_student": lambda m: lightning_checkpoint(prefixed(m.state_dict(), "student._orig_mod.")),
    "lightning_model": lambda m: lightning_checkpoint(prefixed(m.state_dict(), "model.")),
    "lightning_net": lambda m: lightning_checkpoint(prefixed(m.state_dict(), "net.module.")),
    "lightning_bare": lambda m: lightning_checkpoint(m.state_dict()),
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_reads_every_layout(model, tmp_path, layout, zipped):
    content = LAYOUTS[layout](model)
    torch.save(content, path := tmp_path / "student_best", _use_new_zipfile_serialization=zipped)
    weights = read_weights(path)
    assert_same(weights.state_dict, model)
    assert weights.metadata == ({"lr": "0.1"} if "hyper_parameters" in content else {})
    assert weights.source == path


def test_reads_numpy_scalars_pickled_before_numpy_2(model, tmp_path):
    torch.save(published_checkpoint(model), path := tmp_path / "new.pth", _use_new_zipfile_serialization=False)
    old = path.read_bytes().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
    (tmp_path / "old.pth").write_bytes(old)
    assert_same(read_weights(tmp_path / "old.pth").state_dict, model)


@pytest.mark.parametrize("file_name", ["weights.safetensors", "weights.pth"])
def test_safetensors_are_recognised_by_content(model, tmp_path, file_name):
    save_weights(model, path := tmp_path / file_name, {"name": "tiny"})
    weights = read_weights(str(path))
    assert_same(weights.state_dict, model)
    assert weights.metadata == {"name": "tiny"}


def averaged(state_dict):
    return {key: 0.5 * value if value.is_floating_point() else value for key, value in state_dict.items()}


# Content and account; the weights of the model are the only ones that are not halved.
SHAPES = {
    "model_state_dict": (
        lambda sd: {"epoch": 1, "model_state_dict": sd, "optimizer_state_dict": {}},
        "taken from 'model_state_dict'; left: epoch, optimizer_state_dict",
    ),
    "net": (lambda sd: {"net": sd, "acc": 93.1}, "taken from 'net'; left: acc"),
    "teacher": (lambda sd: {"teacher": sd}, "taken from 'teacher'"),
    "student_and_teacher": (
        lambda sd: {"teacher": averaged(sd), "student": sd},
        "taken from 'student', not from 'teacher': for those write x.pth::teacher",
    ),
    "ema_alone": (lambda sd: {"state_dict_ema": sd}, "taken from 'state_dict_ema'"),
    "raw_and_ema": (
        lambda sd: {"state_dict_ema": averaged(sd), "state_dict": sd, "epoch": 3},
        "taken from 'state_dict', not from 'state_dict_ema': for those write x.pth::state_dict_ema; left: epoch",
    ),
    "averaged_model": (
        lambda sd: {"state_dict": {**prefixed(sd, "module."), "n_averaged": torch.tensor(3)}},
        "taken from 'state_dict.module'; left: n_averaged",
    ),
    "mdistiller": (lambda sd: {"model": prefixed(sd, "module.student.")}, "taken from 'model.module.student'"),
    "beside_a_loss": (
        lambda sd: {"state_dict": {**prefixed(sd, "net."), "criterion.weight": torch.ones(10)}},
        "taken from 'state_dict.net'; left: criterion.weight",
    ),
    "beside_a_teacher_of_its_kind": (
        lambda sd: {**prefixed(averaged(sd), "teacher."), **prefixed(sd, "learner.")},
        "taken from 'learner', not from 'teacher': for those write x.pth::teacher",
    ),
    "backbone": (lambda sd: {"state_dict": prefixed(sd, "backbone.")}, "taken from 'state_dict.backbone'"),
    "any_name": (
        lambda sd: {"my_network": sd, "my_metrics": {"acc": torch.ones(1)}},
        "taken from 'my_network'; left: my_m",
    ),
    "two_deep": (lambda sd: {"model": {"state_dict": sd, "name": "x"}}, "taken from 'model.state_dict'"),
    "beside_paths": (
        lambda sd: {
            "model": sd,
            "args": argparse.Namespace(out=pathlib.PosixPath("/x"), data=pathlib.PureWindowsPath("c:/x")),
            "history": collections.defaultdict(list, {"acc": [np.float64(1), np.bool_(True)]}),
            "more": types.SimpleNamespace(a=1),
        },
        "taken from 'model'; left: args, history, more",
    ),
    "plain": (lambda sd: sd, ""),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_model_is_found_in_any_layout(tmp_path, shape):
    torch.manual_seed(0)
    model, other = create_model("resnet8", 10), create_model("resnet8", 10)
    make, account = SHAPES[shape]
    torch.save(make(model.state_dict()), path := tmp_path / "x.pth")
    found = load_weights(other, path)
    assert_same(other.state_dict(), model)
    assert found.account.startswith(account)
    assert bool(found.account) == bool(account)


@pytest.mark.parametrize("part", ["state_dict_ema", "teacher", "state_dict.ema", "ema"])
def test_a_part_of_a_file_can_be_selected(tmp_path, part):
    torch.manual_seed(0)
    model, other = create_model("resnet8", 10), create_model("resnet8", 10)
    sd = model.state_dict()
    content = {"state_dict": sd, part: averaged(sd)}
    if part.endswith("ema") and part != "state_dict_ema":
        content = {"state_dict": {**prefixed(sd, "net."), **prefixed(averaged(sd), "ema.")}}
    torch.save(content, tmp_path / "x.pth")
    if part == "state_dict.ema":
        part = "ema"
    load_weights(other, f"{tmp_path / 'x.pth'}::{part}")
    assert torch.equal(other.conv1.weight, 0.5 * model.conv1.weight)
    with pytest.raises(WeightsError, match=r"x\.pth has no weights under 'emma'; it has 'state_dict'"):
        read_weights(f"{tmp_path / 'x.pth'}::emma")
    with pytest.raises(FileNotFoundError, match=r"y\.pth"):
        read_weights(f"{tmp_path / 'y.pth'}::ema")


def test_the_weights_of_a_deeper_network_do_not_match_a_shallower_one(tmp_path):
    torch.save(create_model("resnet32", 10).state_dict(), path := tmp_path / "x.pth")
    with pytest.raises(WeightsError, match="the file looks like resnet32"):
        load_weights(create_model("resnet20", 10), path)


class Exploit:
    """Creates a file when unpickled."""

    def __init__(self, how, marker):
        self._how, self._marker = how, marker

    def __reduce__(self):
        if self._how == "system":
            return os.system, (f"touch {self._marker}",)
        if self._how == "exec":
            return exec, (f"open({str(self._marker)!r}, 'w')",)
        return shutil.copyfile, (__file__, self._marker)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("hidden", ["plain", "model", "metadata", "history"])
@pytest.mark.parametrize(("how", "named"), [("system", "system"), ("exec", "exec"), ("copy", r"shutil\.copyfile")])
def test_refuses_code(model, tmp_path, how, named, hidden, zipped):
    exploit = Exploit(how, marker := tmp_path / "executed")
    content = {
        "plain": exploit,
        "model": {"model": {**model.state_dict(), "extra": exploit}},
        "metadata": {"model": model.state_dict(), "opt": exploit},
        "history": {"model": model.state_dict(), "history": collections.defaultdict(list, {"acc": [exploit]})},
    }[hidden]
    torch.save(content, path := tmp_path / "evil.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(WeightsError, match=named) as caught:
        read_weights(path)
    assert not marker.exists()
    for expected in (str(path), "nothing of it was executed", "safetensors"):
        assert expected in str(caught.value)
    torch.load(path, weights_only=False)
    assert marker.exists(), "the exploit would not have worked anyway"


def test_refuses_a_pickled_module_and_a_bare_pickle(model, tmp_path):
    torch.save(model, path := tmp_path / "whole.pt")
    with pytest.raises(WeightsError, match=r"torch\.nn\.modules\.container\.Sequential"):
        read_weights(path)
    (bare := tmp_path / "bare.pkl").write_bytes(
        pickle.dumps(Exploit("exec", marker := tmp_path / "executed"), protocol=2)
    )
    with pytest.raises(WeightsError):
        read_weights(bare)
    assert not marker.exists()


def test_the_allow_list_is_restored_after_the_call(model, tmp_path):
    torch.save(published_checkpoint(model), path := tmp_path / "published.pth")
    read_weights(path)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    with torch.serialization.safe_globals([argparse.Namespace]):
        read_weights(path)
        assert argparse.Namespace in torch.serialization.get_safe_globals()


def write_other_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hello.txt", "hello")


BROKEN = {
    "empty.pth": lambda p: p.touch(),
    "empty.safetensors": lambda p: p.touch(),
    "text.pth": lambda p: p.write_text("<html>not found</html>"),
    "text.safetensors": lambda p: p.write_text("<html>not found</html>"),
    "other.zip": write_other_zip,
    "cut.pth": lambda p: cut(p, lambda q: torch.save(tiny().state_dict(), q)),
    "legacy.pth": lambda p: cut(p, lambda q: torch.save(tiny().state_dict(), q, _use_new_zipfile_serialization=False)),
    "cut.safetensors": lambda p: cut(p, lambda q: save_weights(tiny(), q)),
    "none.pth": lambda p: torch.save({"epoch": 1, "model": {"a": 1}}, p),
    "nothing.pth": lambda p: torch.save({}, p),
    "list.pth": lambda p: torch.save([torch.ones(1)], p),
    "none.safetensors": lambda p: safetensors.torch.save_file({}, p),
    "long.safetensors": lambda p: p.write_bytes((20_000).to_bytes(8, "little") + b'{"a": "%s"}' % (b"x" * 19_991)),
}


def cut(path, write):
    write(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


@pytest.mark.parametrize("file_name", BROKEN)
def test_broken_files_are_reported_in_one_sentence(tmp_path, file_name):
    BROKEN[file_name](path := tmp_path / file_name)
    with pytest.raises(WeightsError) as caught:
        read_weights(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    assert len(message) < len(str(path)) + 200


def test_a_missing_file_is_reported_as_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no weights file at .*gone\.pth"):
        read_weights(tmp_path / "gone.pth")
    with pytest.raises(FileNotFoundError, match=r"holds neither student\.safetensors, .* name its best\.ckpt"):
        read_weights(tmp_path)


@pytest.mark.parametrize("file_name", ["student.safetensors", "model.safetensors"])
def test_a_folder_may_be_a_run_or_an_export(model, tmp_path, file_name):
    save_weights(model, tmp_path / file_name)
    weights = read_weights(tmp_path)
    assert_same(weights.state_dict, model)
    assert weights.source == tmp_path / file_name
    assert read_weights(f"{tmp_path}::0").state_dict.keys() == {"weight", "bias"}


def test_load_fills_the_model_and_converts(model, tmp_path):
    save_weights(model, path := tmp_path / "tiny.safetensors", {"top1": 70.5})
    target = tiny().double()
    weights = load_weights(target, path)
    assert weights.metadata == {"top1": "70.5"}
    assert target[0].weight.dtype is torch.float64
    assert_same({key: value.to(model.state_dict()[key].dtype) for key, value in target.state_dict().items()}, model)


def test_complex_numbers_are_not_cut_to_real_ones(model):
    weights = Weights({key: value.to(torch.complex64) for key, value in model.state_dict().items()}, {}, Path("a"))
    with pytest.raises(WeightsError, match=r"has complex numbers in 0\.weight, 0\.bias"):
        load_weights(tiny(), weights)


def test_load_fills_the_model_inside_a_wrapper(model):
    target = torch.compile(tiny())
    load_weights(target, Weights(model.state_dict(), {}, Path("memory")))
    assert_same(target._orig_mod.state_dict(), model)


def test_counters_may_be_absent_as_before_torch_0_4_1(model):
    old = {key: value for key, value in model.state_dict().items() if not key.endswith("num_batches_tracked")}
    target = tiny()
    load_weights(target, Weights(old, {}, Path("old.pth")))
    assert_same(target.state_dict(), model)


def refusal(model, state_dict, **kwargs):
    """Returns the error message, after checking that the model is unchanged."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(WeightsError) as caught:
        load_weights(model, Weights(dict(state_dict), {}, Path("some.pth")), **kwargs)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    return str(caught.value)


def test_class_counts_are_named_when_only_the_classifier_differs():
    message = refusal(tiny(classes=10), tiny(classes=100).state_dict(), name="resnet8x4")
    for expected in ("some.pth", "resnet8x4", "the file has 100 classes, the model 10", "num_classes=100"):
        assert expected in message


def test_other_differences_are_counted_with_examples():
    message = refusal(tiny(width=4), tiny(width=6).state_dict())
    assert "model Sequential" in message
    assert "7 of another shape: 0.weight (file [6, 3, 3, 3], model [4, 3, 3, 3]), 0.bias" in message
    assert message.count("file [") == 3
    assert "matches no known model" in message

    message = refusal(tiny(), prefixed(tiny().state_dict(), "features."))
    assert "8 missing from the file: 0.weight [4, 3, 3, 3], 0.bias [4], 1.weight [4], ..." in message
    assert "9 not in the model: features.0.weight [4, 3, 3, 3]" in message


def test_the_file_s_actual_model_is_named():
    with torch.device("meta"):
        other = create_model("resnet14", 100).state_dict()
    message = refusal(create_model("resnet8", 100), other, name="resnet8")
    assert "not in the model: layer1.1.conv1.weight [16, 16, 3, 3]" in message
    assert "looks like resnet14: choose that model" in message


@pytest.mark.parametrize("name", ["resnet8", "resnet8x4", "wrn16_2", "vgg8", "mobilenetv2", "torchvision/resnet18"])
@pytest.mark.parametrize("classes", [10, 100])
def test_identify(name, classes):
    with torch.device("meta"):
        state_dict = create_model(name, classes).state_dict()
    assert identify(state_dict) == [name]
    state_dict["extra"] = torch.ones(1)
    assert identify(state_dict) == []


def test_save_accepts_shared_memory(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 4), nn.Linear(4, 4)).to(memory_format=torch.channels_last)
    model[2].weight = model[1].weight
    compiled = torch.compile(model)
    metadata = {
        "name": "tiny",
        "top1": np.float32(70.5),
        "classes": 10,
        "path": Path("a/b"),
        "config": {"lr": 0.1, "steps": [1, 2], "from": Path("c")},
        "mean": torch.tensor(2),
    }
    save_weights(compiled, path := tmp_path / "deep" / "er" / "w.safetensors", metadata)
    weights = read_weights(path)
    assert weights.metadata.keys() == metadata.keys()
    assert weights.metadata["name"] == "tiny"
    assert {key: json.loads(value) for key, value in weights.metadata.items() if key != "name"} == {
        "top1": 70.5,
        "classes": 10,
        "path": "a/b",
        "config": {"lr": 0.1, "steps": [1, 2], "from": "c"},
        "mean": 2,
    }
    assert read_metadata(path) == weights.metadata
    assert_same(safetensors.torch.load_file(path), model)
    assert load_weights(compiled, path)


def test_a_file_replaced_while_being_read_is_read_consistently(tmp_path):
    path, ended = tmp_path / "teacher.safetensors", threading.Event()
    models = [nn.Linear(50, 50) for _ in range(2)]
    save_weights(models[0], path)

    def replace_it():
        while not ended.is_set():
            for model in models:
                save_weights(model, path)

    thread = threading.Thread(target=replace_it)
    thread.start()
    try:
        found = [read_weights(path).state_dict for _ in range(100)]
    finally:
        ended.set()
        thread.join()
    for state_dict in found:
        assert any(all(torch.equal(state_dict[key], value) for key, value in m.state_dict().items()) for m in models)


def test_a_file_written_to_while_being_read_is_refused(model, tmp_path, monkeypatch):
    save_weights(model, path := tmp_path / "tiny.safetensors")
    look = os.fstat

    def written_to(descriptor):
        os.utime(path, ns=(0, look(descriptor).st_mtime_ns + 1000))
        return look(descriptor)

    monkeypatch.setattr(os, "fstat", written_to)
    with pytest.raises(WeightsError, match=r"tiny\.safetensors is being written to; wait until it is complete"):
        read_weights(path)


def test_save_is_atomic(model, tmp_path, monkeypatch):
    save_weights(model, path := tmp_path / "tiny.safetensors", {})
    before = path.read_bytes()
    reference = tmp_path / "reference"
    reference.touch()
    assert path.stat().st_mode == reference.stat().st_mode, "others may read what they may read elsewhere"

    def interrupted(descriptor):
        os.truncate(descriptor, 100)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_weights(tiny(), path, {})
    assert path.read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["reference", "tiny.safetensors"]


def test_torchvisions_files_with_auxiliary_classifiers_fit():
    whole = torchvision.models.googlenet(num_classes=10, aux_logits=True, init_weights=False)
    weights = Weights(whole.state_dict(), {}, Path("googlenet.pth"))
    model = create_model("torchvision/googlenet", 10)
    load_weights(model, weights)
    assert torch.equal(model.fc.weight, whole.fc.weight)
