"""A table on the device equals its file, and a complete one causes no synchronisation."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rld_lightning.models.teacher.frozen import FrozenTeacher
from rld_lightning.models.teacher.logits_table import LogitsTable
from rld_lightning.models.teacher.resident_table import ResidentTable, resident


def filled(path, rows, classes=5, dtype="float16"):
    table = LogitsTable(path, 40, classes, dtype)
    table.write(rows, torch.randn(len(rows), classes), rows % classes)
    return table


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_it_reads_and_writes_the_file(tmp_path, dtype):
    some = torch.arange(0, 40, 3)
    file = filled(tmp_path / "t", some, dtype=dtype)
    table = ResidentTable(file, torch.device("cpu"))
    assert not table.complete
    rows = torch.tensor([3, 4, 9, 38])
    for ours, theirs in zip(table.read(rows), file.read(rows), strict=True):
        assert torch.equal(ours, theirs)
    new = torch.tensor([4, 38])
    said = table.write(new, torch.randn(2, 5), new % 5)
    for one in (table, file, LogitsTable(tmp_path / "t", 40, 5, dtype)):
        logits, known = one.read(new)
        assert known.all()
        assert torch.equal(logits, said)


def test_the_holes_of_an_empty_file_are_not_read(tmp_path):
    file = LogitsTable(tmp_path / "t", 40, 5)
    assert file.is_empty
    table = ResidentTable(file, torch.device("cpu"))
    assert torch.equal(table.table, file.table)
    assert not table.complete
    view = torch.tensor([7, 30])
    said = table.write(view, torch.randn(2, 5), view % 5)
    assert not file.is_empty
    assert torch.equal(table.read_known(view), said)
    assert torch.equal(ResidentTable(file, torch.device("cpu")).read_known(view), said)


def test_a_complete_table_only_looks_up_rows(tmp_path):
    every = torch.arange(40)
    file = filled(tmp_path / "t", every)
    table = ResidentTable(file, torch.device("cpu"))
    assert table.complete

    class Never(torch.nn.Module):
        def forward(self, images):
            raise AssertionError("the teacher was run")

    teacher = FrozenTeacher(Never())
    teacher.use_table(table)
    view = torch.tensor([7, 30, 7])
    with Operations() as operations:
        logits, _ = teacher(torch.zeros(3, 3, 8, 8), view=view, label=view % 5)
    assert torch.equal(logits, file.read(view)[0])
    assert not operations.names & {"_local_scalar_dense", "nonzero", "is_nonzero", "all"}


def test_on_a_cpu_the_mapped_file_is_used(tmp_path):
    file = filled(tmp_path / "t", torch.arange(3))
    assert resident(file, torch.device("cpu")) is file


@pytest.mark.cuda
def test_on_a_gpu_rows_are_on_the_device(tmp_path):
    every = torch.arange(40)
    file = filled(tmp_path / "t", every)
    table = resident(file, torch.device("cuda"))
    assert table.complete
    view = torch.tensor([7, 30, 7])
    logits, _ = table.read(view.cuda())
    assert logits.is_cuda
    assert torch.equal(logits.cpu(), file.read(view)[0])
