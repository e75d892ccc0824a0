"""Rows of results tables: which runs share a row, and the rows' names."""

import math
import os
from pathlib import Path

import pytest
import yaml
from helpers.run_factory import write_comparison, write_run

from rld_lightning.reporting.chapters import Sources, make_chapter
from rld_lightning.reporting.frame import BEST, runs_frame
from rld_lightning.reporting.labels import describe, distinguishing, mean_and_std, short_value
from rld_lightning.reporting.tables import compare, sections
from rld_lightning.runs.finished import find_runs


def read(folder):
    return sections(runs_frame(find_runs([folder])))


def compared(section):
    """The comparisons by their pair of methods."""
    method = section.rows["method"]
    return {(method[line.first], method[line.second]): line for line in compare(section).itertuples()}


def test_a_row_has_mean_and_sample_deviation_over_seeds(tmp_path):
    for seed, top1 in enumerate((60.0, 61.0, 63.0)):
        write_run(tmp_path / str(seed), "rld", seed=seed, top1=top1, best=top1 + 1)
    (section,), left_out = read(tmp_path)
    (row,) = section.rows.itertuples()
    assert left_out == []
    assert (row.Index, row.n, row.seeds) == ("rld", 3, [0, 1, 2])
    assert row.top1_last_mean == pytest.approx(184 / 3)
    assert row.top1_last_std == pytest.approx(math.sqrt(7 / 3))  # (16 + 1 + 25) / 9 over n - 1 = 2
    assert (row.top1_best_mean, row.top1_best_std) == pytest.approx((187 / 3, math.sqrt(7 / 3)))
    assert section.title == "resnet20 → resnet8"
    assert mean_and_std(row.top1_last_mean, row.top1_last_std) == "61.33 ± 1.53"
    assert section.teacher_top1 == {str(Path("teachers/teacher.safetensors").absolute()): pytest.approx(68.0)}


def test_one_run_has_no_deviation(tmp_path):
    write_run(tmp_path / "one")
    (section,), _ = read(tmp_path)
    assert math.isnan(section.rows["top1_last_std"].iloc[0])
    assert compare(section).empty


def test_rows_are_labelled_by_differing_settings(tmp_path):
    for alpha in (1.0, 2.0):
        for seed in (0, 1):
            write_run(tmp_path / f"{alpha}-{seed}", seed=seed, settings={"loss.alpha": alpha})
    write_run(tmp_path / "long", seed=0, epochs=240, settings={"loss.alpha": 2.0, "loss.beta": 4.0})
    (section,), _ = read(tmp_path)
    # Only beta distinguishes the longer run, so that its epochs are not named.
    assert section.rows["n"].to_dict() == {
        "rld (alpha=1, beta=8)": 2,
        "rld (alpha=2, beta=8)": 2,
        "rld (alpha=2, beta=4)": 1,
    }


def test_labels_have_differing_epochs_and_recipes(tmp_path):
    write_run(tmp_path / "a", epochs=30)
    write_run(tmp_path / "b", epochs=240)
    write_run(tmp_path / "c", "kd", settings={"recipe.optimizer.lr": 0.1})
    (section,), _ = read(tmp_path)
    assert set(section.rows.index) == {"rld (epochs=30, lr=0.05)", "rld (epochs=240, lr=0.05)", "kd (lr=0.1)"}
    assert compare(section).empty  # no two have the same recipe
    assert all(section.gain(row, "kd") is None for row in section.rows.index)


def test_gains_are_over_baselines_with_the_same_recipe(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path / f"ce{seed}", "ce", seed=seed, top1=58.0 + seed)
        write_run(tmp_path / f"kd{seed}", "kd", seed=seed, top1=59.0 + seed)
        write_run(tmp_path / f"kd-better{seed}", "kd", seed=seed, top1=60.0 + seed, settings={"loss.weight": 0.5})
        write_run(tmp_path / f"rld{seed}", seed=seed, top1=61.5 + 2 * seed)
    write_run(tmp_path / "long", "ce", seed=0, top1=70.0, epochs=100)
    (section,), _ = read(tmp_path)
    assert section.gain("rld", "ce").mean == pytest.approx(4.0)  # 3.5 and 4.5
    assert section.gain("rld", "kd").mean == pytest.approx(2.0)  # the stronger kd: 1.5 and 2.5
    assert section.gain(section.rows.index[0], "ce") is None


def test_the_baseline_is_the_plain_row_with_the_most_common_seeds(tmp_path):
    for seed in (0, 1, 2):
        write_run(tmp_path / f"kd{seed}", "kd", seed=seed, top1=59.0 + seed, best=62.0)
        write_run(tmp_path / f"rld{seed}", seed=seed, top1=61.0 + seed)
    write_run(tmp_path / "odd", "kd", seed=7, top1=80.0, settings={"loss.temperature": 9.0})
    for seed in (0, 1, 2):
        settings = {"loss.logit_standardization": True}
        write_run(tmp_path / f"ls{seed}", "kd", seed=seed, top1=90.0, settings=settings)
    (section,), _ = read(tmp_path)
    assert section.rows.at[section.baseline("rld", "kd"), "seeds"] == [0, 1, 2]
    assert (section.gain("rld", "kd").n, section.gain("rld", "kd").mean) == (3, pytest.approx(2.0))


def test_the_strongest_baseline_depends_on_the_metric(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path / f"a{seed}", "kd", seed=seed, top1=60.0, best=61.0, settings={"loss.weight": 0.1})
        write_run(tmp_path / f"b{seed}", "kd", seed=seed, top1=59.0, best=63.0, settings={"loss.weight": 0.5})
        write_run(tmp_path / f"rld{seed}", seed=seed, top1=64.0, best=64.0)
    (section,), _ = read(tmp_path)
    assert section.gain("rld", "kd").mean == pytest.approx(4.0)
    assert section.gain("rld", "kd", BEST).mean == pytest.approx(1.0)


def test_cells_name_the_baseline_and_the_number_of_seeds(tmp_path):
    for seed in (0, 1):
        for weight in (0.1, 0.5):
            write_run(tmp_path / f"{weight}{seed}", "kd", seed=seed, settings={"loss.weight": weight}, top1=50 + weight)
    for seed in (0, 1, 2):
        write_run(tmp_path / f"ce{seed}", "ce", seed=seed, top1=45.0)
        write_run(tmp_path / f"rld{seed}", seed=seed, top1=60.0)
    (section,), _ = read(tmp_path)
    line = make_chapter(section, "pair", Sources()).lines.set_index("method").loc["rld"]
    assert (line["kd_seeds"], line["kd_base"]) == ("n = 2", "kd (weight=0.5)")
    assert (line["ce_seeds"], line["ce_base"]) == ("", "")


def test_each_teacher_has_its_own_accuracy(tmp_path):
    for name, top1 in (("a", 60.0), ("b", 70.0)):
        weights = str(tmp_path / name / "student.safetensors")
        for seed in (0, 1):
            write_run(tmp_path / f"rld-{name}{seed}", seed=seed, teacher_top1=top1, weights=weights)
    (section,), _ = read(tmp_path)
    assert sorted(section.teacher_top1.values()) == [60.0, 70.0]
    lines = make_chapter(section, "pair", Sources()).lines.query("role == 'teacher'")
    assert lines["last_mean"].tolist() == [60.0, 70.0]
    assert lines["last_std"].isna().all()


def test_a_run_of_the_teachers_network_with_other_weights_is_not_the_teacher(tmp_path):
    # One pair's student is the same network as the other's teacher, whose weights are from elsewhere.
    write_run(tmp_path / "first", "ce", teacher="resnet56", student="resnet20", top1=69.0)
    write_run(tmp_path / "first-rld", teacher="resnet56", student="resnet20", top1=71.0)
    write_run(tmp_path / "second", teacher="resnet20", student="resnet8")
    write_run(tmp_path / "stray", "ce", teacher=None, student="resnet56", top1=72.0)
    found, _ = read(tmp_path)
    assert [section.title for section in found] == ["resnet20 → resnet8", "resnet56 → resnet20", "resnet56"]
    assert all(section.teacher_runs.empty for section in found)


def test_a_teacher_trained_and_stored_by_its_students_run_is_found(tmp_path):
    write_run(tmp_path / "run", weights="/somewhere/teachers/cifar100/resnet20.safetensors")
    write_run(tmp_path / "run" / "teacher", "ce", teacher=None, student="resnet20", top1=66.0)
    (section,), _ = read(tmp_path)
    assert section.teacher_runs["top1_last"].tolist() == [66.0]


def test_the_student_alone_may_be_from_a_pair_or_a_single_model(tmp_path):
    write_run(tmp_path / "pair", "ce", seed=0)
    write_run(tmp_path / "single", "ce", seed=1, teacher=None)
    write_run(tmp_path / "teacher", "ce", teacher=None, student="resnet20", top1=68.5)
    write_run(tmp_path / "rld", weights=str(tmp_path / "teacher" / "student.safetensors"))
    (section,), _ = read(tmp_path)
    assert section.rows["n"].to_dict() == {"ce": 2, "rld": 1}
    assert section.teacher_runs[["student", "top1_last"]].to_numpy().tolist() == [["resnet20", 68.5]]


def test_single_models_without_a_pair_have_separate_sections(tmp_path):
    write_run(tmp_path / "a", "ce", teacher=None, student="wrn16_2")
    write_run(tmp_path / "b", dataset="digits")
    found, _ = read(tmp_path)
    assert [(section.dataset, section.title) for section in found] == [
        ("cifar100", "wrn16_2"),
        ("digits", "resnet20 → resnet8"),
    ]


def test_held_out_accuracies_are_separate_from_the_test_splits(tmp_path):
    write_run(tmp_path / "test", seed=0, top1=60.0)
    write_run(tmp_path / "held0", seed=0, top1=70.0, held_out=0.1)
    write_run(tmp_path / "held1", seed=1, top1=71.0, held_out=0.1)
    found, _ = read(tmp_path)
    assert [(s.on_test, s.split, s.rows["n"].iloc[0]) for s in found] == [
        (True, "the test split", 1),
        (False, "5,000 held-out training images (stratified)", 2),  # one split, for any seed
    ]
    caveat = "The teacher's accuracy is too high if it was trained on these images, too."
    assert [caveat in make_chapter(section, "pair", Sources()).notes for section in found] == [False, True]


def test_of_repeated_runs_the_last_finished_counts(tmp_path):
    for name, top1, time in (("a-new", 61.0, 2000), ("z-old", 60.0, 1000)):
        os.utime(write_run(tmp_path / name, seed=0, top1=top1) / "summary.json", (time, time))
    (section,), left_out = read(tmp_path)
    assert section.values("rld").to_dict() == {0: 61.0}
    assert [Path(folder).name for folder, _ in left_out] == ["z-old"]


def test_rld_with_few_seeds_is_compared_with_ce_and_kd_only(tmp_path):
    write_comparison(tmp_path, {"kd": 59.0, "rld": 61.0, "at": 58.0}, seeds=2)
    (section,), _ = read(tmp_path)
    assert set(compared(section)) == {("rld", "kd"), ("at", "kd")}


def test_ignored_runs_are_listed_with_a_reason(tmp_path):
    write_run(tmp_path / "a", seed=0, top1=60.0)
    write_run(tmp_path / "b", seed=0, top1=61.0)
    write_run(tmp_path / "c", seed=1, top1=math.nan)
    (section,), left_out = read(tmp_path)
    assert section.values("rld").to_dict() == {0: 61.0}
    assert {Path(folder).name: reason.split(" in ")[0] for folder, reason in left_out} == {
        "a": "repeated with the same settings and seed",
        "c": "its accuracy is not a number",
    }


def test_runs_that_differ_only_in_data_seed_get_a_hint(tmp_path):
    for seed in range(2):
        write_run(tmp_path / str(seed), settings={"data.seed": seed}, summary={"data_seed": seed})
    _, ((_, reason),) = read(tmp_path)
    assert reason.endswith("though data.seed differs: only seed= distinguishes repetitions")


def test_a_setting_that_only_newer_runs_have_does_not_split_a_row(tmp_path):
    write_run(tmp_path / "old", seed=0)
    new = write_run(tmp_path / "new", seed=1)
    text = (new / "config.yaml").read_text().replace("trainer:\n", "trainer:\n  new_option: 3\n")
    (new / "config.yaml").write_text(text)
    (section,), _ = read(tmp_path)
    assert section.rows["n"].tolist() == [2]
    (note,) = [note for note in make_chapter(section, "pair", Sources()).notes if "not all have" in note]
    assert note.startswith("rld contains runs that do not all have trainer.new_option=3:")  # merged, with a note
    write_run(tmp_path / "asked", seed=0, settings={"trainer.gradient_clip_val": 1.0})
    (section,), _ = read(tmp_path)
    assert sorted(section.rows["n"]) == [1, 2]


def rows(folder):
    ((section,), left_out) = read(folder)
    assert left_out == []
    return sorted(section.rows.index)


def test_an_override_with_a_mapping_splits_a_row(tmp_path):
    write_run(tmp_path / "a")
    folder = write_run(tmp_path / "b", settings={"loss.x.y": 1})
    (folder / ".hydra" / "overrides.yaml").write_text("['loss=rld', 'recipe.epochs=30', '+loss.x={y: 1}']")
    assert rows(tmp_path) == ["rld", "rld (y=1)"]


@pytest.mark.parametrize(
    ("chosen", "key"),
    [
        ("experiment", "recipe.x"),
        ("experiment", "loss.x"),
        ("recipe", "recipe.x"),
        ("my/group", "recipe.x"),
        ("my/group@loss", "loss.x"),
        ("callbacks@_global_", "data.x"),
    ],
)
def test_settings_of_a_custom_option_split_a_row(tmp_path, chosen, key):
    for name, option, settings in (("a", None, {}), ("b", "mine", {key: 1})):
        folder = write_run(tmp_path / name, settings=settings)
        (folder / ".hydra" / "overrides.yaml").write_text("[]")
        choices = yaml.safe_load((folder / ".hydra" / "hydra.yaml").read_text())
        choices["hydra"]["runtime"]["choices"] |= {chosen: option} if option else {}
        (folder / ".hydra" / "hydra.yaml").write_text(yaml.safe_dump(choices))
    assert rows(tmp_path) == ["rld", "rld (x=1)"]


def test_replacing_a_run_with_other_keys_is_noted(tmp_path):
    os.utime(write_run(tmp_path / "old") / "summary.json", (1000, 1000))
    config = write_run(tmp_path / "new") / "config.yaml"
    config.write_text(config.read_text().replace("trainer:\n", "trainer:\n  new_option: 3\n"))
    _, ((folder, reason),) = read(tmp_path)
    assert Path(folder).name == "old"
    assert reason.endswith("though not both have trainer.new_option=3")


def test_callbacks_that_affect_training_are_named(tmp_path):
    write_run(tmp_path / "plain")
    ema = {"_target_": "lightning.pytorch.callbacks.EMAWeightAveraging", "decay": 0.99}
    write_run(tmp_path / "ema", callbacks={"ema": ema})
    write_run(tmp_path / "watched", callbacks={"watch": {"_target_": "rld_lightning.callbacks.GradientNorm"}}, seed=1)
    assert rows(tmp_path) == ["rld", "rld (callbacks=EMAWeightAveraging(decay=0.99))"]


def test_settings_of_a_class_count_among_runs_with_other_classes(tmp_path):
    def write(name, seed, milestones):
        scheduler = {"_target_": "torch.optim.lr_scheduler.MultiStepLR", "milestones": milestones}
        settings = {f"recipe.scheduler.{key}": value for key, value in scheduler.items()}
        folder = write_run(tmp_path / name, "kd", seed=seed, settings=settings)
        (folder / ".hydra" / "overrides.yaml").write_text("[]")  # as from a user's recipe

    write("early", 0, [30, 60])
    write("late", 1, [150, 180])
    write_run(tmp_path / "other", settings={"recipe.scheduler._target_": "torch.optim.lr_scheduler.OneCycleLR"})
    (section,), _ = read(tmp_path)
    assert sorted(zip(section.rows["method"], section.rows["n"], strict=True)) == [("kd", 1), ("kd", 1), ("rld", 1)]


def test_p_values_are_corrected_for_the_number_of_comparisons(tmp_path):
    write_comparison(tmp_path, {"ce": 57.0, "kd": 59.0, "dkd": 60.0, "rld": 61.0}, seeds=4)
    (section,), _ = read(tmp_path)
    found = compared(section)
    assert set(found) == {
        *(("rld", "dkd"), ("rld", "kd"), ("rld", "ce"), ("dkd", "kd"), ("dkd", "ce"), ("kd", "ce")),
    }
    smallest = min(found.values(), key=lambda line: line.p)
    assert smallest.p_holm == pytest.approx(min(1, 6 * smallest.p))
    assert found["rld", "ce"].verdict == "ahead"


def test_other_methods_are_not_compared_with_each_other(tmp_path):
    write_comparison(tmp_path, {"ce": 57.0, "kd": 59.0, "rld": 61.0, "at": 58.0, "crd": 58.5}, seeds=3)
    (section,), _ = read(tmp_path)
    pairs = set(map(frozenset, compared(section)))
    assert len(pairs) == 9
    assert frozenset(("at", "crd")) not in pairs


def test_labels_are_minimal():
    settings = [
        {"loss.alpha": "1", "recipe.epochs": "30", "trainer.max_epochs": "30"},
        {"loss.alpha": "1", "recipe.epochs": "60", "trainer.max_epochs": "60"},
    ]
    assert distinguishing(settings) == ["recipe.epochs"]
    assert distinguishing(settings, known=["30", "60"]) == []
    fewer_images = [{**settings[0], "data.subset": "0.3"}, settings[1] | {"data.subset": "1.0"}]
    assert distinguishing(fewer_images, known=["30", "60"]) == ["data.subset"]
    values = {
        "loss.alpha": "2.0",
        "recipe.scheduler._target_": "torch.optim.lr_scheduler.OneCycleLR",
        "model.teacher.weights": "/a/b/runs/teacher/best.safetensors",
    }
    assert describe(values, values) == ("alpha=2, scheduler=OneCycleLR, teacher weights=runs/teacher/best.safetensors")


@pytest.mark.parametrize(
    ("value", "text"),
    [(2.0, "2"), (1 / 3, "0.3333"), ("4.0", "4"), (16384, "16384"), ("1e-05", "1e-05"), ("True", "True"), ("-", "-")],
)
def test_numbers_are_shortened(value, text):
    assert short_value(value) == text
