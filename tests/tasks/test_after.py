"""Steps after a run: the student alone, and all networks side by side."""

import copy
import csv
import json
import re
from types import SimpleNamespace

import pytest
import torch
from helpers.configs import compose
from helpers.photos import grow
from torch import nn

from rld_lightning import FrozenTeacher, create_model
from rld_lightning.models.normalisation import Renormalise
from rld_lightning.runs.files import NETWORKS, NETWORKS_CLASSES, SPLIT, SUMMARY
from rld_lightning.tasks.after import _as_timed, _foreign_override, _Logits, _networks, no_gain_note
from rld_lightning.tasks.fit import fit
from rld_lightning.tasks.teacher.weights import is_reusable


def small(run, root, *overrides):
    return compose(
        *("experiment=folder", f"data.root={root}", "data.image_size=16", "data.num_workers=0", "trainer=cpu"),
        *("model.teacher.name=resnet8", "model.student.name=resnet8", "model.student.weights=null"),
        *("model.teacher.start=null", "recipe.epochs=1", f"paths.run={run}", f"paths.teachers={run}/teachers"),
        *overrides,
        resolve=False,
    )


def test_experiment_is_complete():
    cfg = compose("experiment=folder", "data.root=/photos")
    assert (cfg.model.teacher.weights, cfg.model.teacher.start) == ("fit", "pretrained")
    assert (cfg.recipe.batch_size, cfg.data.batch_size, cfg.data.val_fraction) == ("auto", "auto", 0.1)
    assert {"average", "early_stopping", "checkpoint_best"} <= cfg.callbacks.keys()
    assert cfg.callbacks.early_stopping.patience < cfg.recipe.epochs
    assert cfg.data.split_file == "/run/split.csv"
    assert compose("recipe=patient").data.mixup == 1
    assert compose("recipe=patient", "data.mixup=0.2").data.mixup == 0.2


@pytest.mark.slow
def test_from_a_folder_to_three_networks_side_by_side(tmp_path, capsys):
    grow(tmp_path / "photos", ("cat", "dog", "owl"))
    run = tmp_path / "run"
    fit(small(run, tmp_path / "photos"))
    found = json.loads((run / NETWORKS).read_text())
    assert [network["role"] for network in found] == ["teacher", "student alone", "distilled student"]
    assert {network["images"] for network in found} == {6}
    assert found[1]["parameters"] == found[2]["parameters"]
    rows = list(csv.DictReader((run / NETWORKS_CLASSES).open()))
    assert {row["class"] for row in rows} == {"cat", "dog", "owl"}
    for network in found:  # classes have two images each
        assert sum(float(row[network["role"]]) for row in rows) / 3 == pytest.approx(network["top1"])
    assert not list((run / "alone").glob(SPLIT))  # it is shared out as the run is
    assert not list((run / "alone").glob("networks*"))
    assert "| network | resnet8 | resnet8 | resnet8 |" in (run / "export" / "README.md").read_text()
    # Once more: what is finished is only read, and what is missing is made up for.
    (run / NETWORKS).unlink()
    capsys.readouterr()
    before = (run / "alone" / SUMMARY).stat().st_mtime_ns
    fit(small(run, tmp_path / "photos", f"resume={run}"))
    assert json.loads((run / NETWORKS).read_text())[2]["top1"] == found[2]["top1"]
    assert (run / "alone" / SUMMARY).stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("scores", "said"),
    [
        ({"teacher": 90.0, "student alone": 70.0, "distilled student": 71.0}, ""),
        ({"teacher": 90.0, "student alone": 70.0}, ""),
        ({"student alone": 70.0, "distilled student": 70.0}, "has 70.00 % and the student alone 70.00 %"),
        (
            {"teacher": 90.0, "student alone": 84.9, "distilled student": 83.6},
            "has 83.60 % and .* alone 84.90 %",
        ),
    ],
)
def test_teacher_without_gain_is_reported(scores, said):
    found = no_gain_note([SimpleNamespace(role=role, top1=top1) for role, top1 in scores.items()])
    assert re.search(said, found) if said else not found


@pytest.mark.parametrize(
    ("name", "weights", "shown"),
    [("resnet20", "a", "resnet20"), ("resnet20", ("a", "b"), "resnet20+resnet20"), ("vgg8+vgg11", ("a", "b"), None)],
)
def test_ensemble_members_are_listed_separately(tmp_path, monkeypatch, name, weights, shown):
    teacher = SimpleNamespace(name=name, weights=weights)
    module = SimpleNamespace(teacher=nn.Linear(2, 2))
    module.teacher.shard = False
    finished = SimpleNamespace(plan=SimpleNamespace(teacher=teacher), module=module)
    _, called, _, size = next(_networks(finished))
    assert (called, size) == (shown or name, 24)
    monkeypatch.chdir(tmp_path)
    for folder in weights:  # the folders of their runs
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "student.safetensors").write_bytes(b"0" * 100)
    assert next(_networks(finished))[3] == 100 * len(weights)


@pytest.mark.parametrize("fused", [False, True])  # with a loss of features, and of logits
def test_networks_are_timed_on_equal_terms(fused):
    """A teacher and a student of one architecture and weights run the same operations."""
    network, images = create_model("resnet8", 10), torch.randn(2, 3, 16, 16)
    wanted = network.eval()(images)
    teacher = FrozenTeacher(copy.deepcopy(network), channels_last=True, fuse=fused)
    shape = (3, 16, 16)
    for timed, taken in (
        _as_timed(network.train(), shape, torch.channels_last),
        _as_timed(_Logits(teacher), shape, torch.channels_last),
    ):
        assert taken == shape
        assert not any(isinstance(part, nn.BatchNorm2d) for part in timed.modules())
        convolutions = [part for part in timed.modules() if isinstance(part, nn.Conv2d) and part.weight.shape[2] > 1]
        assert all(part.weight.is_contiguous(memory_format=torch.channels_last) for part in convolutions)
        torch.testing.assert_close(timed(images), wanted, rtol=1e-4, atol=1e-4)
    resized = FrozenTeacher(network, renormalise=Renormalise(*2 * [((0.5,) * 3, (0.2,) * 3)], size=(8, 8)))
    assert _as_timed(_Logits(resized), shape, torch.channels_last)[1] == (3, 8, 8), "as the teacher sees them"


@pytest.mark.parametrize(("name", "told"), [("resnet8@32", ""), ("my.nets:small@32", " name=my.nets:small@32")])
def test_commands_name_external_networks(name, told):
    assert _foreign_override("name", name) == told


def test_teacher_with_initial_weights_is_not_reusable():
    class Data:
        val_fraction, subset = 0.0, 1.0

    assert is_reusable(Data(), None)
    assert not is_reusable(Data(), "pretrained")
