"""The recorded provenance of a run."""

import json
import subprocess
import sys

import torch
import torchvision
from omegaconf import OmegaConf

from rld_lightning.runs import provenance


def test_command_commit_and_versions_are_recorded_without_secrets(tmp_path, monkeypatch):
    monkeypatch.delenv("RLD_LIGHTNING_COMMAND", raising=False)
    monkeypatch.setattr(sys, "argv", ["scripts/fit.py", "data.root=/my photos", "+store.secret=abcdef"])
    provenance.write_provenance(tmp_path, OmegaConf.create({"seed": 0}))
    found = json.loads((tmp_path / "environment.json").read_text())
    assert found["command"] == "python scripts/fit.py 'data.root=/my photos' +store.secret=REDACTED"
    assert found["torch"] == torch.__version__
    assert torchvision.__version__.startswith(found["torchvision"])
    assert {"rld_lightning", "lightning", "cuda", "commit", "python", "processor"} <= found.keys()
    monkeypatch.setattr(sys, "argv", ["-m", "of a process that was started for the run"])
    assert provenance.command() == found["command"]


def test_commit_is_that_of_the_checkout_and_marks_changed_files(tmp_path):
    assert provenance._commit(tmp_path) is None
    git = ("git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b")
    (tmp_path / "a.py").write_text("1")
    for arguments in (("init", "-q"), ("add", "a.py"), ("commit", "-qm", "a")):
        subprocess.run((*git, *arguments), check=True)
    head = subprocess.run((*git, "rev-parse", "HEAD"), check=True, capture_output=True, text=True).stdout.strip()
    assert provenance._commit(tmp_path) == head
    (tmp_path / "a.py").write_text("2")
    assert provenance._commit(tmp_path) == f"{head}+"
