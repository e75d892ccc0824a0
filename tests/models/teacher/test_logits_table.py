import multiprocessing
import os

import pytest
import torch
from torch.testing import assert_close

from rld_lightning import rld_loss
from rld_lightning.models.teacher.logits_table import LogitsTable, round_beside_label, table_bytes, table_key

EPS = 2**-11


def logits_and_labels(size=64, classes=100, scale=5.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(size, classes, generator=generator)
    return logits, torch.randint(classes, (size,), generator=generator)


@pytest.mark.parametrize(("dtype", "rounding"), [("float16", 3 * EPS), ("float32", 0.0)])
def test_a_row_is_unknown_until_written_and_then_read_as_written(tmp_path, dtype, rounding):
    logits, label = logits_and_labels()
    rows = torch.randperm(1000)[:64]
    table = LogitsTable(tmp_path / "sub" / "table", 1000, 100, dtype)
    assert not table.read(rows)[1].any()
    said = table.write(rows, logits, label)
    found, known = table.read(rows)
    assert known.all()
    assert torch.equal(said, found)
    assert found.dtype == torch.float32
    assert_close(found, logits, rtol=rounding, atol=2**-24)
    others = torch.tensor(sorted(set(range(1000)) - set(rows.tolist())))
    assert not table.read(others)[1].any()
    again = LogitsTable(tmp_path / "sub" / "table", 1000, 100, dtype)
    assert torch.equal(again.read(rows)[0], found)
    assert (tmp_path / "sub" / "table").stat().st_size == table_bytes(1000, 100, dtype)


def test_rounding_keeps_each_class_above_or_below_the_label():
    # Weak teachers: many logits within one rounding of each other.
    for scale, offset in ((1e-3, 8.0), (1e-3, -8.0), (1e-7, 0.0), (3.0, 0.0)):
        logits, label = logits_and_labels(scale=scale)
        logits += offset
        true = logits.gather(1, label[:, None])
        rounded = round_beside_label(logits, label)
        other = rounded.gather(1, label[:, None])
        assert torch.equal(rounded < other, logits < true)
        assert torch.equal(rounded > other, logits > true)
        assert_close(rounded.float(), logits, rtol=3 * EPS, atol=3 * 2**-25)
        untied = logits.half() != other
        assert_close(rounded[untied].float(), logits[untied], rtol=EPS, atol=2**-25)
    equal = torch.tensor([[0.0, 0.0, -0.0, 1.0]])
    assert torch.equal(round_beside_label(equal, torch.tensor([0])).float(), equal)


def test_rlds_mask_is_that_of_the_unrounded_logits(tmp_path):
    logits, label = logits_and_labels(scale=1e-3)
    logits += 4
    student = torch.randn(64, 100)
    table = LogitsTable(tmp_path / "table", 64, 100)
    found = table.write(torch.arange(64), logits, label)
    masked = [(t >= t.gather(1, label[:, None])) for t in (found, logits)]
    assert torch.equal(*masked)
    assert not torch.equal(masked[1], (logits.half() >= logits.half().gather(1, label[:, None])))
    expected, terms = (rld_loss(student, t, label) for t in (logits, found))
    assert_close(terms, expected, rtol=5e-3, atol=1e-5)


def test_incomplete_or_damaged_rows_are_unknown(tmp_path):
    logits, label = logits_and_labels()
    table = LogitsTable(tmp_path / "table", 64, 100)
    rows = torch.arange(64)
    table.write(rows, logits, label)
    whole = table.table.clone()
    seen = 0
    generator = torch.Generator().manual_seed(0)
    for bit in range(16):
        table.table.copy_(whole)
        table.table[rows, torch.randint(101, (64,), generator=generator)] ^= -(1 << 15) if bit == 15 else 1 << bit
        seen += int((~table.read(rows)[1]).sum())
    assert seen == 16 * 64
    table.table.copy_(whole)
    table.table[:, 40:] = whole[torch.arange(63, -1, -1), 40:]  # half of another row
    assert not table.read(rows)[1].any()
    table.table.copy_(whole)
    table.table[:, 60:] = 0  # the second half has not reached the disk
    assert not table.read(rows)[1].any()
    table.table.copy_(whole)
    table.table[:32, 5] = torch.tensor(float("nan")).half().view(torch.int16)  # a copied file may hold anything
    table.table[:, -1] = table._checksum(table.table[:, :-1])
    assert table.read(rows)[1].tolist() == [False] * 32 + [True] * 32


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e5])
def test_logits_out_of_range_are_not_stored(tmp_path, value):
    logits, label = logits_and_labels(size=4)
    logits[1, 7] = value
    table = LogitsTable(tmp_path / "table", 4, 100)
    said = table.write(torch.arange(4), logits, label)
    assert_close(said[1], logits[1], rtol=0, atol=0, equal_nan=True)
    assert table.read(torch.arange(4))[1].tolist() == [True, False, True, True]
    assert_close(table.write(torch.arange(1, 2), logits[1:2], label[1:2]), said[1:2], rtol=0, atol=0, equal_nan=True)


def test_a_full_disk_stops_storing_but_not_the_run(tmp_path, monkeypatch, recwarn):
    logits, label = logits_and_labels(size=8)
    table = LogitsTable(tmp_path / "table", 16, 100)
    table.write(torch.arange(4), logits[:4], label[:4])

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.pwrite", full)
    said = table.write(torch.arange(4, 8), logits[4:], label[4:])
    table.write(torch.arange(8, 16), logits, label)
    assert [str(w.message).partition(" in ")[0] for w in recwarn] == ["no more of the teacher's logits are stored"]
    assert_close(said, logits[4:], rtol=3 * EPS, atol=2**-24)
    assert table.read(torch.arange(16))[1].tolist() == [True] * 4 + [False] * 12


def fill(path, seed):
    table = LogitsTable(path, 400, 100)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(200):
        rows = torch.randperm(400, generator=generator)[:32]
        table.write(rows, rows[:, None] + 0.01 * seed + torch.zeros(32, 100), torch.zeros(32, dtype=torch.long))


def test_concurrent_processes_write_one_table_correctly(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=fill, args=(tmp_path / "table", seed)) for seed in (1, 2)]
    for process in processes:
        process.start()
    table = LogitsTable(tmp_path / "table", 400, 100)
    mixed = 0
    while any(process.is_alive() for process in processes):
        logits, known = table.read(torch.arange(400))
        mixed += int((logits[known].amax(1) != logits[known].amin(1)).sum())
    assert mixed == 0
    assert [process.exitcode for process in processes] == [0, 0]
    logits, known = table.read(torch.arange(400))
    assert known.all()
    assert_close(logits[:, 0], torch.arange(400).float(), rtol=1e-3, atol=0.05)


def test_a_file_of_another_size_or_type_is_refused(tmp_path):
    LogitsTable(tmp_path / "table", 10, 5)
    with pytest.raises(ValueError, match=r"has 120 bytes, not the 132 of this table; move it away"):
        LogitsTable(tmp_path / "table", 11, 5)
    with pytest.raises(ValueError, match="stored in float16 or float32, not in 'int8'"):
        LogitsTable(tmp_path / "other", 10, 5, "int8")


def test_links_and_pipes_of_others_are_not_written_to(tmp_path):
    (tmp_path / "mine").touch()
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="symbolic link"):
        LogitsTable(tmp_path / "link", 10, 5)
    with pytest.raises(ValueError, match="move it away"):  # without waiting for a reader
        LogitsTable(tmp_path / "pipe", 10, 5)
    assert (tmp_path / "mine").stat().st_size == 0


def test_the_key_depends_on_every_weight_and_fact():
    weights = {"a": torch.zeros(3), "b": torch.ones(2, 2)}
    facts = {"data": "digits", "padding": 4}
    keys = [
        table_key(weights, facts),
        table_key(weights, facts | {"padding": 2}),
        table_key({**weights, "a": torch.tensor([0.0, 0.0, 1e-30])}, facts),
        table_key({"b": weights["b"], "c": weights["a"]}, facts),
        table_key({**weights, "b": torch.ones(4)}, facts),
    ]
    assert len(set(keys)) == len(keys)
    assert table_key(dict(reversed(weights.items())), dict(reversed(facts.items()))) == keys[0]
