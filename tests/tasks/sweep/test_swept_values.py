"""Settings of a sweep recorded in a directory are read as plain text."""

import pytest

from rld_lightning.errors import UserError
from rld_lightning.runs.files import SWEEP
from rld_lightning.tasks.sweep.swept_values import refuse_another_sweep


def test_recorded_settings_of_a_sweep_are_not_resolved_or_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("OF_MINE", "a secret")
    (tmp_path / SWEEP).write_text("- loss.alpha\n- notes=${oc.env:OF_MINE}\n")
    with pytest.raises(UserError, match=r"they differ in notes=\$\{oc.env:OF_MINE\}, seed=1"):
        refuse_another_sweep(tmp_path, {"loss.alpha": "loss.alpha=1,2"}, {"seed": "seed=1"}, values_too=False)
    bomb = "- &a [x, x]\n- &b [*a, *a]\n- [*b, *b]\n"
    (tmp_path / SWEEP).write_text(bomb)
    with pytest.raises(UserError, match="has YAML aliases"):
        refuse_another_sweep(tmp_path, {}, {}, values_too=False)
    (tmp_path / SWEEP).write_text("5")
    with pytest.raises(UserError, match="is not a list of overrides"):
        refuse_another_sweep(tmp_path, {}, {}, values_too=False)
