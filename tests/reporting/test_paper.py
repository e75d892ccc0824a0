"""Published numbers: lookup by our names, and their sources."""

import math

import pytest
from helpers.configs import LOSSES
from helpers.run_factory import write_run

from rld_lightning.reporting.chapters import Sources, make_chapter
from rld_lightning.reporting.frame import runs_frame
from rld_lightning.reporting.paper import (
    METHODS,
    TEACHER,
    departures,
    published_for_pair,
    published_numbers,
    published_top1,
)
from rld_lightning.reporting.report import write_report
from rld_lightning.reporting.tables import sections
from rld_lightning.runs.finished import read_run


def top1(dataset, teacher, student, method):
    return published_top1(published_for_pair(dataset, teacher, student), method)


def cell(folder, method, *, teacher="wrn40_2", student="wrn16_2", epochs=240, teacher_top1=75.61, **options):
    """The published number for a run, and whether it is comparable; None without a number."""
    options |= {"teacher": teacher, "student": student, "epochs": epochs, "teacher_top1": teacher_top1}
    folder = write_run(folder, method, **options)
    ((section,), _) = sections(runs_frame([read_run(folder)]))
    (line,) = make_chapter(section, "pair", Sources()).lines.dropna(subset="recipe").itertuples()
    return None if math.isnan(line.published_top1) else (line.published_top1, line.published_comparable)


@pytest.mark.parametrize(
    ("dataset", "teacher", "student", "method", "value", "second_hand"),
    [
        ("cifar100", "wrn40_2", "wrn16_2", "rld", 76.02, True),
        ("cifar100", "wrn40_2", "wrn16_2", "kd", 74.92, False),
        ("cifar100", "wrn40_2", "wrn16_2", "ce", 73.26, False),
        ("cifar100", "wrn40_2", "wrn16_2", TEACHER, 75.61, False),
        ("cifar100", "resnet32x4", "resnet8x4", "rld_scd", 73.55, True),
        ("cifar100", "resnet50", "mobilenetv2", "dkd", 70.35, False),
        ("imagenet", "torchvision/resnet34", "torchvision/resnet18", "rld", 71.91, True),
        ("imagenet", "torchvision/resnet50", "mobilenetv1", TEACHER, 76.16, False),
    ],
)
def test_published_numbers_are_found_by_our_names(dataset, teacher, student, method, value, second_hand):
    first = top1(dataset, teacher, student, method)[0]
    assert (first.value, first.second_hand) == (value, second_hand)
    assert first.source


def test_numbers_of_longer_training_are_not_shown_for_our_runs():
    pair = ("cifar100", "resnet32x4", "resnet8x4")
    assert top1(*pair, "kd_ls")[0].value == 76.62
    assert top1(*pair, "mlkd") == []  # 480 epochs and more
    papers = [number for number in published_numbers() if number.source_key == "LSKD-paper"]
    long = [number for number in papers if number.method.startswith("MLKD") and number.dataset == "cifar100"]
    assert long
    assert all(number.other_recipe for number in long)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("rld", {"loss.mask": "g"}),
        ("rld", {"loss.alpha": 0.0}),
        ("rld", {"loss.beta": 0}),
        ("rld", {"loss.confidence_temperature": 1.0}),
        ("kd", {"loss.logit_standardization": True}),
        ("rld_scd", {}),  # the factory's loss does not set beta to 0
    ],
)
def test_a_changed_loss_has_no_published_number(tmp_path, method, settings):
    assert cell(tmp_path, method, settings=settings) is None


@pytest.mark.parametrize(
    ("method", "settings", "value"),
    [("rld", {"loss.mask": "ge"}, 76.02), ("kd_ls", {"loss.logit_standardization": True}, 76.11)],
)
def test_explicit_default_settings_keep_the_number(tmp_path, method, settings, value):
    assert cell(tmp_path, method, settings=settings)[0] == value


@pytest.mark.parametrize(
    ("method", "options", "comparable"),
    [
        ("ce", {}, True),
        ("kd", {}, True),
        ("kd", {"settings": {"data.root": "/data", "trainer.check_val_every_n_epoch": 240}}, True),
        ("dkd", {"settings": {"loss.alpha": 99.0}}, False),
        ("kd", {"settings": {"data.augment": False}}, False),
        ("kd", {"settings": {"recipe.optimizer.lr": 0.5}}, False),
        ("kd", {"settings": {"loss.temperature": 1.0}}, False),
        ("kd", {"epochs": 30}, False),
        ("kd", {"teacher_top1": 75.4}, False),  # another teacher
        ("kd", {"model": "pair"}, False),  # with the settings of most pairs
        ("rld", {}, False),  # alpha and beta are not published
        ("wttm", {}, False),
        ("reviewkd", {}, False),  # different settings for each pair
        ("reviewkd", {"tuned": {"reviewkd": {"weight": 5.0}}}, True),
        ("ttm", {}, False),  # settings of vgg13 to vgg8
        ("ttm", {"teacher": "vgg13", "student": "vgg8", "teacher_top1": 74.64}, True),
        ("nkd", {}, False),  # settings for ImageNet
    ],
)
def test_only_runs_with_the_published_recipe_are_comparable(tmp_path, method, options, comparable):
    assert cell(tmp_path, method, **options)[1] is comparable


def test_another_or_unknown_recipe_is_not_comparable(tmp_path):
    choices = tmp_path / ".hydra" / "hydra.yaml"
    write_run(tmp_path, "kd", teacher="wrn40_2", student="wrn16_2", epochs=240, teacher_top1=75.61)
    assert departures(read_run(tmp_path)) == []
    choices.write_text(choices.read_text().replace("cifar240", "quick"))
    assert departures(read_run(tmp_path)) == ["another recipe"]
    choices.unlink()
    assert departures(read_run(tmp_path)) == ["recipe not known"]


EMA = {"ema": {"_target_": "lightning.pytorch.callbacks.EMAWeightAveraging", "decay": 0.99}}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, []),
        ({"settings": {"trainer.precision": "32-true"}}, []),  # the default, set explicitly
        ({"settings": {"trainer.precision": 32}}, []),
        ({"settings": {"trainer.precision": "bf16-mixed"}}, ["bf16-mixed, not float32"]),
        ({"settings": {"trainer.precision": "16-mixed"}}, ["16-mixed, not float32"]),
        ({"settings": {"trainer.precision": "bf16"}}, ["bf16-mixed, not float32"]),
        ({"settings": {"model.teacher.dtype": "bfloat16"}}, ["teacher in bfloat16"]),
        ({"callbacks": EMA}, ["EMAWeightAveraging(decay=0.99)"]),
        ({"callbacks": {"lr": {"_target_": "lightning.pytorch.callbacks.LearningRateMonitor"}}}, []),
        ({"summary": {"steps": 60, "scheduled_steps": 782 * 240}}, ["not trained to the end"]),
        ({"summary": {"images": 250, "split_images": 10_000}}, ["not measured on all of the test split"]),
        (
            {"epochs": 30, "settings": {"loss.temperature": 2}},
            ["30 epochs, not 240", "another recipe", "other loss.temperature"],
        ),
        ({"settings": {"experiment": "mine"}}, ["other experiment"]),
    ],
)
def test_departures_are_described(tmp_path, options, words):
    options = {"teacher": "wrn40_2", "student": "wrn16_2", "epochs": 240, "teacher_top1": 75.61} | options
    assert departures(read_run(write_run(tmp_path, "kd", **options))) == words


def test_bf16_without_an_override_is_marked(tmp_path):
    folder = write_run(tmp_path, "kd", teacher="wrn40_2", student="wrn16_2", epochs=240, teacher_top1=75.61)
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("precision: 32-true", "precision: bf16-mixed"))
    files = write_report([tmp_path], tmp_path / "out")
    (line,) = [line for line in files.markdown.read_text().splitlines() if line.startswith("| kd |")]
    assert line.endswith("‡</sup> (bf16-mixed, not float32) |")
    assert '‡</sup><span class="role">bf16-mixed, not float32</span>' in files.html.read_text()


def test_numbers_with_other_recipes_do_not_disagree():
    numbers = top1("imagenet", "torchvision/resnet34", "torchvision/resnet18", "kd")
    assert {70.83, 71.37} <= {number.value for number in numbers if number.other_recipe}  # CTKD's, torchdistill's
    assert not numbers[0].other_recipe
    first = top1("cifar100", "wrn40_2", "wrn40_1", "dist")[0]
    assert (first.value, first.source_key) == (74.43, "DIST-readme")  # not the number in TTM's paper


def test_unpublished_pairs_have_no_numbers():
    assert published_for_pair("cifar100", "resnet20", "resnet8") == []
    assert published_for_pair("digits", "wrn40_2", "wrn16_2") == []
    assert published_for_pair("imagenet", "timm/resnet34", "torchvision/resnet18") == []  # other weights
    assert published_for_pair("cifar100", "torchvision/resnet50", "vgg8") == []  # not CIFAR's resnet50
    assert published_for_pair("cifar100", "resnet50", "vgg8")
    assert top1("cifar100", "wrn40_2", "wrn16_2", "rld_reference") == []


def test_every_number_has_a_source_and_every_name_a_number():
    numbers = published_numbers()
    assert len(numbers) == 1000
    assert all(number.source and number.source_key for number in numbers)
    assert set(METHODS.values()) <= {number.method for number in numbers}
    assert {method for method in METHODS if "+" not in method} <= set(LOSSES)
