"""Which example images are selected, and how they are drawn."""

import subprocess
import sys

import pytest
import torch

from rld_lightning import KDLoss, RLDLoss
from rld_lightning.data.base import Batch
from rld_lightning.tracking import WandbExamples, WandbLogger
from rld_lightning.tracking.examples import Examples, choose_examples, distributions
from rld_lightning.tracking.pictures import draw


class Stage:
    """The parts of a trainer and its module that the selection uses: logits are the images."""

    def __init__(self, teacher_right, student_right, size=4):
        self.label = torch.arange(len(teacher_right)) % 3
        self.answers = [self.logits(right) for right in (student_right, teacher_right)]
        self.student = torch.nn.Identity()
        self.teacher = lambda images: (self.answers[1][images.long().flatten()], {})
        self.student.forward = lambda images: self.answers[0][images.long().flatten()]
        self.datamodule = self.precision_plugin = self
        self.class_names, self.mean, self.std, self.loss = ["a", "b", "c"], (0.5,) * 3, (0.5,) * 3, KDLoss()
        self.size = size

    def logits(self, right):
        guess = (self.label + (~torch.tensor(right)).long()) % 3
        return 5.0 * torch.nn.functional.one_hot(guess, 3)

    def val_dataloader(self):
        images = torch.arange(len(self.label), dtype=torch.float)[:, None, None, None]
        for i in range(0, len(self.label), self.size):
            yield Batch(images[i : i + self.size], self.label[i : i + self.size], None)

    def forward_context(self):
        return torch.no_grad()

    def choose(self, count):
        return choose_examples(self, self, self.val_dataloader(), count).images.flatten().tolist()


def test_half_are_the_first_that_the_teacher_gets_wrong():
    stage = Stage([True, False, True, True, False, True, False, False], [True] * 8)
    assert stage.choose(4) == [1, 4, 0, 2]
    assert stage.choose(2) == [1, 0]
    assert stage.student.training  # as it was


def test_other_kind_fills_up_if_there_are_too_few():
    assert Stage([True] * 6 + [False], [True] * 7).choose(4) == [6, 0, 1, 2]
    assert Stage([False] * 7, [True] * 7).choose(4) == [0, 1, 2, 3]
    assert Stage([True] * 3, [True] * 3).choose(4) == [0, 1, 2]


def test_without_a_teacher_the_errors_of_the_student_are_shown():
    stage = Stage([True] * 6, [True, True, False, True, False, True])
    stage.teacher = None
    assert stage.choose(4) == [2, 4, 0, 1]


def examples(teacher):
    return Examples(torch.zeros(1, 3, 8, 8), torch.tensor([1]), torch.zeros(1, 3), torch.tensor([teacher]))


def test_distributions_of_teacher_student_and_refined_teacher():
    views = distributions(examples([2.0, 1.0, 0.0]), RLDLoss())
    assert list(views) == ["teacher", "refined", "student"]
    assert views["teacher"][0].tolist() == pytest.approx(torch.tensor([2.0, 1.0, 0.0]).softmax(0).tolist())
    assert views["refined"][0].tolist() == [0.0, 0.0, 1.0]
    assert views["student"][0].tolist() == pytest.approx([1 / 3] * 3)
    assert list(distributions(examples([2.0, 1.0, 0.0]), KDLoss())) == ["teacher", "student"]


def test_dropped_sample_has_a_zero_distribution_and_can_be_drawn():
    views = distributions(examples([2.0, 1.0, 1.0]), RLDLoss())
    assert views["refined"][0].tolist() == [0.0, 0.0, 0.0]
    picture = draw({name: view[0] for name, view in views.items()}, 1, ["a", "b" * 40, "c"])
    assert picture.mode == "RGB"
    assert picture.width > picture.height > 50


def test_without_matplotlib_the_table_is_skipped_with_a_reason(monkeypatch, tmp_path, capsys):
    stage = Stage([True] * 3, [True] * 3)
    stage.teacher, stage.is_global_zero = None, True
    stage.loggers = [WandbLogger(save_dir=tmp_path, mode="disabled")]
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "rld_lightning.tracking.pictures")
    WandbExamples().on_train_end(stage, stage)
    message = " ".join(capsys.readouterr().out.split())
    assert "continues without its table of examples: ImportError: pictures need matplotlib" in message
    assert "pip install 'rld-lightning[report]'" in message
    assert not stage.loggers[0].broken


@pytest.mark.slow
def test_importing_the_package_imports_neither_wandb_nor_pandas_nor_pictures():
    rooms = "{'wandb', 'pandas', 'rld_lightning.reporting', 'rld_lightning.tracking.pictures'}"
    code = f"import sys, rld_lightning.tracking; print({rooms} & set(sys.modules))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "set()"
