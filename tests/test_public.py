"""The public API: every name exists, has a docstring, and is visible to editors."""

import ast
from importlib import import_module
from pathlib import Path

import pytest

import rld_lightning

PACKAGES = ("losses", "losses.features", "models", "data", "callbacks")


@pytest.mark.parametrize("package", ["", *PACKAGES])
def test_every_public_name_exists_and_has_a_docstring(package):
    module = import_module(f"rld_lightning.{package}".rstrip("."))
    assert list(module.__all__) == sorted(set(module.__all__))
    for name in module.__all__:
        assert getattr(module, name).__doc__


def test_editors_see_lazily_imported_names():
    tree = ast.parse(Path(rld_lightning.__file__).read_text())
    (type_checking,) = [node for node in tree.body if isinstance(node, ast.If)]
    names = {alias.name for node in type_checking.body for alias in node.names}
    assert names == set(rld_lightning.__all__) <= set(dir(rld_lightning))


def test_the_changelog_has_the_version():
    changes = (Path(__file__).parents[1] / "CHANGELOG.md").read_text()
    assert f"\n## {rld_lightning.__version__}\n" in changes
