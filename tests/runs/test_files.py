"""Files of a run folder."""

import csv

import pytest

from rld_lightning.runs.files import text_of, write_csv


@pytest.mark.parametrize("name", ["=1+1", "@SUM(A1)", "+cmd|' /C calc'!A0", "-2+3", "\t=1"])
def test_no_name_of_a_class_is_a_formula(tmp_path, name):
    write_csv(tmp_path / "classes.csv", {"class": [name, "cat", "-1.5"], "images": [1, 2, 3]})
    with (tmp_path / "classes.csv").open(newline="") as file:
        rows = list(csv.reader(file))[1:]
    assert rows == [[f"'{name}", "1"], ["cat", "2"], ["-1.5", "3"]]
    assert [text_of(cell) for cell, _ in rows] == [name, "cat", "-1.5"]
