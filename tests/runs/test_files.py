"""Files of a run directory."""

import csv
import os

import pytest

from rld_lightning.runs.files import read_text, text_of, write_csv


@pytest.mark.parametrize("name", ["=1+1", "@SUM(A1)", "+cmd|' /C calc'!A0", "-2+3", "\t=1"])
def test_class_names_are_not_formulas(tmp_path, name):
    write_csv(tmp_path / "classes.csv", {"class": [name, "cat", "-1.5"], "images": [1, 2, 3]})
    with (tmp_path / "classes.csv").open(newline="") as file:
        rows = list(csv.reader(file))[1:]
    assert rows == [[f"'{name}", "1"], ["cat", "2"], ["-1.5", "3"]]
    assert [text_of(cell) for cell, _ in rows] == [name, "cat", "-1.5"]


def test_text_is_read_up_to_the_size_that_runs_write(tmp_path):
    (tmp_path / "long").write_bytes(b"\xff" * 2_000_000)
    os.mkfifo(tmp_path / "pipe")
    assert read_text(tmp_path / "long") == "\ufffd" * 1_000_000
    assert read_text(tmp_path / "pipe") == ""
    with pytest.raises(FileNotFoundError):
        read_text(tmp_path / "none")
