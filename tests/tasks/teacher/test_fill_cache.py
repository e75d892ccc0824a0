"""A table filled ahead equals the one that training fills."""

import re
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from types import SimpleNamespace

import pytest
import torch
from helpers.data import epoch_of, ready
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import MixedPrecision, Precision
from torch.testing import assert_close

from rld_lightning import FrozenTeacher, create_model
from rld_lightning.data import DigitsDataModule
from rld_lightning.models.teacher.logits_table import LogitsTable
from rld_lightning.models.teacher.resident_table import ResidentTable
from rld_lightning.tasks.teacher.fill_cache import FillAhead, _missing, fill_table


class SmallDigits(DigitsDataModule):
    """Has few views, so that all are soon computed."""

    def __init__(self, **options):
        super().__init__(**{"padding": 1, "subset": 0.05} | options)


def teacher_with(path, data, dtype="float32"):
    torch.manual_seed(0)
    teacher = FrozenTeacher(create_model("resnet8", 10))
    teacher.use_table(LogitsTable(path, data.train_views, 10, dtype))
    return teacher


def trainer(precision=None, rank=0, world=1):
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    return SimpleNamespace(
        strategy=strategy, precision_plugin=precision or Precision(), global_rank=rank, world_size=world
    )


@pytest.mark.parametrize(("precision", "dtype"), [(None, "float32"), ("bf16", "float16")])
def test_filled_logits_equal_those_of_a_step(tmp_path, precision, dtype, capsys):
    precision = precision and MixedPrecision("bf16-mixed", "cpu")
    data = ready(SmallDigits(val_fraction=0.2))
    teacher = teacher_with(tmp_path / "table", data, dtype)
    fill_table(teacher, data, trainer(precision))
    assert f"{data.train_size * 9:,} views computed" in capsys.readouterr().out
    known = teacher.table.known(torch.arange(data.train_views))
    assert torch.equal(known.nonzero()[:, 0], data.views_of(slice(0, data.train_size)))
    batch = epoch_of(data.train_dataloader(), 5)[0]
    with (precision or Precision()).forward_context():
        looked_up, _ = teacher(torch.zeros_like(batch.images), view=batch.view, label=batch.label)
        live, _ = teacher(batch.images)
    # bfloat16 rounds at every layer, and sums of other batches round to the other side now and then.
    close = {"rtol": 1e-5, "atol": 1e-5} if precision is None else {"rtol": 0.02, "atol": 0.05}
    assert_close(looked_up, live, **close)


def test_filling_does_not_compile_a_compiled_teacher(tmp_path):
    def backend(graph, inputs):
        raise AssertionError("compiled")

    data = ready(SmallDigits(val_fraction=0.2))
    teacher = teacher_with(tmp_path / "table", data)
    teacher.model.compile(backend=backend)
    run = Trainer(accelerator="cpu", logger=False)
    run.datamodule = data
    FillAhead().on_fit_start(run, SimpleNamespace(teacher=teacher))
    assert teacher.table.known(data.views_of(slice(0, data.train_size))).all()


def test_filling_resumes_after_an_interruption_and_skips_known_rows(tmp_path, monkeypatch, capsys):
    computed, original = [], FrozenTeacher._compute

    def compute(self, images, paths):
        if len(computed) == 1 and not resumed:
            raise KeyboardInterrupt
        computed.append(len(images))
        return original(self, images, paths)

    monkeypatch.setattr(FrozenTeacher, "_compute", compute)
    data, resumed = ready(SmallDigits()), False
    with pytest.raises(KeyboardInterrupt):
        fill_table(teacher_with(tmp_path / "table", data), data, trainer())
    resumed = True
    teacher = teacher_with(tmp_path / "table", data)
    teacher.use_table(ResidentTable(teacher.table, torch.device("cpu")))  # as on a GPU
    fill_table(teacher, data, trainer(rank=1, world=3))
    assert type(teacher.table) is LogitsTable, "which is looked at anew where training begins"
    assert sum(computed) == data.train_size * 9, "each once"
    capsys.readouterr()
    fill_table(teacher_with(tmp_path / "table", data), data, trainer(rank=2, world=3))
    assert not capsys.readouterr().out.strip()
    assert sum(computed) == data.train_size * 9


def test_two_processes_filling_at_once_make_one_table(tmp_path):
    data = [ready(SmallDigits()) for _ in range(2)]
    teachers = [teacher_with(tmp_path / "table", own) for own in data]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(fill_table, teachers, data, [trainer(), trainer()]))
    view = data[0].views_of(slice(0, data[0].train_size))
    batch = data[0].look_at(view)
    logits, known = teachers[0].table.read(view)
    assert known.all()
    assert_close(logits, teachers[0](batch.images)[0], rtol=1e-5, atol=1e-5)


def test_two_processes_rarely_compute_the_same_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("rld_lightning.tasks.teacher.fill_cache._IMAGES", 1)
    data, asked = ready(SmallDigits()), 0
    table = LogitsTable(tmp_path / "table", data.train_views, 10)
    for pair in zip_longest(*(_missing(table, data, lambda _: None) for _ in range(2)), fillvalue=torch.empty(0)):
        for view in pair:  # each is asked for while the other is computed, and known after that
            asked += len(view)
            table.write(view.long(), torch.zeros(len(view), 10), torch.zeros(len(view), dtype=torch.int64))
    assert table.known(data.views_of(slice(0, data.train_size))).all()
    assert asked < 1.3 * data.train_size * 9


def test_full_disk_ends_the_filling(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.pwrite", full)
    monkeypatch.setattr("rld_lightning.tasks.teacher.fill_cache._BATCH", {"cpu": 9})
    data = ready(SmallDigits())
    with pytest.warns(UserWarning, match="no more of the teacher's logits are stored"):
        fill_table(teacher_with(tmp_path / "table", data), data, trainer())
    computed = int(re.search(r"([\d,]+) views computed", capsys.readouterr().out)[1].replace(",", ""))
    assert computed < data.train_size * 9 / 2
