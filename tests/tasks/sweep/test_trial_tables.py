"""The tables of a finished sweep."""

import pandas as pd
import pytest

from rld_lightning.tasks.sweep.trial_tables import best_setting, headings


@pytest.mark.parametrize(
    ("rows", "repeated", "best"),
    [
        ([(60.0, 3, True), (61.0, 3, True)], True, 1),
        ([(62.0, 1, True), (61.0, 3, True)], True, 1),  # two of its seeds have failed
        ([(62.0, 1, True), (61.0, 3, True)], False, 0),
        ([(62.0, 3, False), (61.0, 2, True)], True, 1),  # trained in part
        ([(62.0, 3, False), (61.0, 3, False)], True, 0),
    ],
)
def test_best_setting_was_trained_to_the_end_with_all_seeds(rows, repeated, best):
    assert best_setting(pd.DataFrame(rows, columns=["mean", "n", "complete"]), repeated=repeated) == best


@pytest.mark.parametrize(
    ("keys", "shown"),
    [
        (["loss.alpha", "recipe.optimizer.lr"], ["alpha", "lr"]),
        (["model.teacher.name", "model.student.name"], ["teacher name", "student name"]),
        (["seed", "data.seed"], ["seed", "data.seed"]),  # both would be seed
    ],
)
def test_columns_have_short_names_if_these_are_distinct(keys, shown):
    assert headings(keys) == shown
