"""The tables of a finished sweep."""

import pytest

from rld_lightning.tasks.sweep.trial_tables import headings


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
