"""Finding and reading finished runs."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from helpers.run_factory import write_run
from omegaconf import OmegaConf

from rld_lightning.runs.finished import find_all, find_runs, read_run
from rld_lightning.runs.summary import Summary

SUMMARY = Summary(
    model="resnet8", loss="RLD", dataset="cifar100", split="test", images=10_000, val_fraction=0.0,
    data_seed=1, epochs=3, seed=1, top1=50.0,
    top1_best=51.0, top5=80.0, ce=2.0, teacher="resnet20", teacher_top1=60.0, agreement=55.0, parameters=10, macs=20,
    images_per_s=None, run="x", split_images=10_000, steps=2346, scheduled_steps=2346,
)  # fmt: skip


def make(folder, *, seed=0, alpha=1.0, finished=True, choice="rld_ls", lr=0.1):
    (folder / ".hydra").mkdir(parents=True)
    config = {
        "model": {"label": "resnet20_to_resnet8", "tuned": None}
        | {role: {"name": name, "weights": None} for role, name in (("teacher", "resnet20"), ("student", "resnet8"))},
        "loss": {"_target_": "rld_lightning.losses.RLDLoss", "alpha": alpha},
        "recipe": {"optimizer": {"lr": lr}},
        "data": {"seed": seed, "root": str(folder), "batch_size": 64},
        "trainer": {"default_root_dir": str(folder)},
        "seed": seed,
        "paths": {"run": str(folder)},
    }
    OmegaConf.save(OmegaConf.create(config), folder / "config.yaml")
    OmegaConf.save(
        OmegaConf.create({"hydra": {"runtime": {"choices": {"loss": choice}}}}), folder / ".hydra" / "hydra.yaml"
    )
    OmegaConf.save(OmegaConf.create(["loss=rld_ls", f"seed={seed}"]), folder / ".hydra" / "overrides.yaml")
    if finished:
        SUMMARY.write(folder)


def test_finds_finished_and_unfinished_runs_once(tmp_path):
    make(tmp_path / "a" / "1")
    make(tmp_path / "a" / "1" / "teacher")
    make(tmp_path / "a" / "2", finished=False)
    runs = find_runs([tmp_path, tmp_path / "a"])
    assert [run.folder for run in runs] == [tmp_path / "a" / "1", tmp_path / "a" / "1" / "teacher"]
    assert runs[0].summary == SUMMARY
    assert find_all([tmp_path]).unfinished == [tmp_path / "a" / "2"]


def test_properties_of_a_run(tmp_path):
    make(tmp_path / "run", seed=3)
    run = read_run(tmp_path / "run")
    assert (run.pair, run.method) == ("resnet20_to_resnet8", "rld_ls")
    assert run.overrides == ["loss=rld_ls", "seed=3"]


def test_network_names_are_normalised(tmp_path):
    old, new = (
        read_run(write_run(tmp_path / teacher, teacher=teacher, student=student))
        for teacher, student in (("wrn_40_2", "MobileNetV2"), ("wrn40_2", "mobilenetv2"))
    )
    assert old.config["model"]["student"] == new.config["model"]["student"]
    assert (old.summary.teacher, old.summary.model) == (new.summary.teacher, new.summary.model)
    assert (new.summary.teacher, new.summary.model) == ("wrn40_2", "mobilenetv2")


def test_repetitions_have_equal_settings_and_other_runs_do_not(tmp_path):
    make(tmp_path / "a", seed=0)
    make(tmp_path / "b", seed=1)
    make(tmp_path / "c", seed=0, alpha=2.0)
    first, again, other = (read_run(tmp_path / name).settings for name in "abc")
    assert first == again
    assert {key for key in first if first[key] != other[key]} == {"loss.alpha"}


def test_integers_are_equal_with_and_without_a_decimal_point(tmp_path):
    make(tmp_path / "a", alpha=2.0)
    make(tmp_path / "b", alpha=2)
    assert read_run(tmp_path / "a").settings == read_run(tmp_path / "b").settings


def test_file_paths_are_equal_however_they_are_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, weights in (("a", "teachers/t.pth"), ("b", f"{tmp_path}/teachers/t.pth"), ("c", "auto")):
        write_run(Path(name), weights=weights)
    first, again, other = (read_run(Path(name)).settings["model.teacher.weights"] for name in "abc")
    assert (first, other) == (again, "auto")
    lines = ["paths.data=/mnt/data", f"model.teacher.weights={tmp_path}/teachers/t.pth"]
    Path("a/.hydra/overrides.yaml").write_text(json.dumps(lines))
    assert read_run(Path("a")).overrides == ["paths.data=/mnt/data", "model.teacher.weights=teachers/t.pth"]


def test_wandb_directories_are_not_runs(tmp_path):
    make(tmp_path / "run")
    (tmp_path / "run" / "wandb" / "run-1" / "files").mkdir(parents=True)
    (tmp_path / "run" / "wandb" / "run-1" / "files" / "config.yaml").write_text("loss: {}")
    runs, unfinished, _ = find_all([tmp_path])
    assert ([run.folder.name for run in runs], unfinished) == (["run"], [])


def test_loss_gives_the_method_without_hydra_records(tmp_path):
    make(tmp_path / "run")
    (tmp_path / "run" / ".hydra" / "hydra.yaml").unlink()
    assert read_run(tmp_path / "run").method == "rld"


def test_partial_runs_are_distinguished_from_complete_ones():
    whole = replace(SUMMARY, images=10_000, split_images=10_000, steps=782, scheduled_steps=782)
    assert whole.complete
    assert whole.validated_on == "the test split"
    few_images = replace(whole, images=250)
    assert few_images.validated_on == "250 of the 10,000 images of the test split"
    assert (few_images.trained_whole, few_images.complete) == (True, False)
    few_held_out = replace(few_images, split="val", val_fraction=0.1, split_images=5_000)
    assert few_held_out.validated_on == "250 of the 5,000 images of the validation split"
    few_steps = replace(whole, steps=60)
    assert (few_steps.trained_whole, few_steps.complete) == (False, False)
    assert few_steps.validated_on == "the test split"
    assert replace(whole, steps=800).complete


def test_unknown_fields_of_a_summary_are_ignored(tmp_path):
    make(tmp_path / "run")
    (tmp_path / "run" / "summary.json").write_text(json.dumps(asdict(SUMMARY) | {"new": 1}))
    assert read_run(tmp_path / "run").summary == SUMMARY


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", r"Expecting value"),
        ("{}", r"it has no 'model'"),
        (json.dumps({key: value for key, value in asdict(SUMMARY).items() if key != "steps"}), r"it has no 'steps'"),
        ("[1]", r"its values are of another kind"),
    ],
)
def test_broken_summary_is_named(tmp_path, text, reason):
    make(tmp_path / "run")
    (tmp_path / "run" / "summary.json").write_text(text)
    with pytest.raises(ValueError, match=rf"run/summary\.json is not the summary of a run: {reason}"):
        read_run(tmp_path / "run")


@pytest.mark.parametrize(
    "value",
    [
        *({"images": "<b>9</b>"}, {"epochs": 1.5}, {"seed": True}, {"steps": 10**30}, {"split": "all"}, {"top1": None}),
        *({"teacher_top1": [1]}, {"model": 3}, {"fast_dev_run": 0}, {"images": -3}),
        *({"top1": 1e308}, {"top1_best": -1.0}, {"agreement": float("inf")}),
        *({"seconds": -1.0}, {"images_per_s": float("inf")}, {"peak_memory_gb": -2}, {"val_fraction": 7.0}),
        {"ce": -1.0},
    ],
)
def test_value_of_another_type_is_refused(tmp_path, value):
    make(tmp_path / "run")
    (tmp_path / "run" / "summary.json").write_text(json.dumps(asdict(SUMMARY) | value))
    with pytest.raises(ValueError, match=r"is not the summary of a run"):
        read_run(tmp_path / "run")


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("config.yaml", {"loss": None}),
        ("config.yaml", {"data": ["digits"]}),
        ("config.yaml", {"model": {"label": "x", "student": "resnet8"}}),
        (
            "config.yaml",
            {"model": {"label": "x", "student": {"name": "a"}, "teacher": {"name": "b", "weights": "c"}, "tuned": 5}},
        ),
        (".hydra/overrides.yaml", 5),
        (".hydra/hydra.yaml", {"hydra": 1}),
        ("environment.json", ["torch"]),
    ],
)
def test_files_of_another_form_are_refused(tmp_path, file, change):
    make(tmp_path / "run")
    path = tmp_path / "run" / file
    before = OmegaConf.to_container(OmegaConf.load(path)) if file == "config.yaml" else {}
    path.write_text(json.dumps(before | change if isinstance(change, dict) else change))  # JSON is YAML
    with pytest.raises(ValueError, match=r"run is not a run directory: .*\. Move it away\."):
        read_run(tmp_path / "run")


def test_missing_directories_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        find_runs([tmp_path / "nowhere"])
    with pytest.raises(FileNotFoundError, match=r"has no summary\.json"):
        read_run(tmp_path)
