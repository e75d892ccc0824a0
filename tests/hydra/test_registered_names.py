"""The registered names, cached between commands."""

import json
import os
import sys

import pytest

from rld_lightning.hydra import registered_names
from rld_lightning.hydra.registered_names import Known, known
from rld_lightning.losses import list_losses, loss_options
from rld_lightning.models import list_models

ANY = Known(["a"], {"b": {"_target_": "c", "alpha": 1.0}}, {"b": "B"}, [], {})


def test_registered_names_survive_the_cache():
    found = known()
    assert found.models == list_models()
    assert found.losses == {name: loss_options(name) for name in list_losses()}
    assert all(found.methods.values())
    assert sorted(name for names in found.families.values() for name in names) == sorted(found.models)
    assert {"at", "crd"} <= set(found.on_features) <= set(list_losses()) - {"rld", "kd"}
    saved = json.loads(json.dumps(found.losses))  # lists instead of tuples, as on a command line
    assert saved == {
        name: {k: list(v) if isinstance(v, tuple) else v for k, v in o.items()} for name, o in found.losses.items()
    }


@pytest.fixture
def reads(monkeypatch, tmp_path):
    """Counts how often the registries are read, as in a process that has not imported them."""
    package, count = tmp_path / "package", []
    for room in ("losses", "models"):
        (package / room).mkdir(parents=True)
        (package / room / "a.py").touch()
    monkeypatch.setattr(registered_names, "_PACKAGE", package)
    monkeypatch.setattr(registered_names, "_registered", lambda: count.append(1) or ANY)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("losses", "models"):
        monkeypatch.delitem(sys.modules, f"rld_lightning.{name}.registry")
    return count


def ask():
    registered_names._cached.cache_clear()  # as in another process
    try:
        return known()
    finally:
        registered_names._cached.cache_clear()


def test_the_registries_are_read_again_if_a_file_has_changed(reads, tmp_path):
    assert ask() == ask() == ANY
    assert len(reads) == 1
    os.utime(tmp_path / "package" / "losses" / "a.py", (1, 1))
    assert ask() == ask() == ANY
    assert len(reads) == 2
    (tmp_path / "package" / "models" / "b.py").touch()
    assert ask() == ANY
    assert len(reads) == 3


@pytest.mark.parametrize("text", ["", "{", "[]", '{"state": 1}'])
def test_a_broken_cache_is_rewritten(reads, tmp_path, text):
    ask()
    (file,) = (tmp_path / "cache" / "rld-lightning").glob("*.json")
    file.write_text(text)
    assert ask() == ask() == ANY
    assert len(reads) == 2


def test_works_without_a_cache_folder(reads, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert ask() == ask() == ANY
    assert len(reads) == 2


def test_later_registrations_are_known(reads, monkeypatch):
    ask()
    monkeypatch.setitem(sys.modules, "rld_lightning.losses.registry", registered_names)
    assert ask() == ANY
    assert len(reads) == 2
