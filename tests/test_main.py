"""The command ``rld-lightning``: its subcommands, its help, and how it runs scripts. (In a wheel: test_wheel.py.)"""

import ast
import os
import re
import sys
from pathlib import Path

import pytest

from rld_lightning import __main__ as command
from rld_lightning import __version__
from rld_lightning.package_files import invocation, package_folder, script_command

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture
def called(monkeypatch):
    """Calls the command, and restores what it changes in this process."""
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(Path.cwd())])
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["rld-lightning", *words])
        command.main()

    return call


def test_every_script_is_a_command_with_its_first_words_as_help(called, capsys):
    called("--help")
    text = capsys.readouterr().out
    for script in (REPOSITORY / "scripts").glob("*.py"):
        assert f"\n  {script.stem:12}" in text
    assert "\n  fit         Train a student\n" in text


@pytest.mark.parametrize("words", [("--version",), ("-V",), ("fit", "--version"), ("report", "-V")])
def test_every_command_tells_the_version(called, capsys, words):
    called(*words)
    assert capsys.readouterr().out == f"rld-lightning {__version__}\n"


def test_an_unknown_command_ends_in_a_sentence(called, capsys):
    with pytest.raises(SystemExit) as stopped:
        called("fti")
    assert stopped.value.code == 2
    assert capsys.readouterr().out.startswith("error: fti is not a command. Did you mean 'fit'? Choose one of bench, ")


def test_a_script_runs_as_with_python_and_imports_from_the_current_folder_last(called, tmp_path, monkeypatch, capsys):
    script = tmp_path / "scripts" / "mine.py"
    script.parent.mkdir()
    script.write_text("if __name__ == '__main__':\n    import sys\n    print(__file__, sys.argv, __spec__)\n")
    monkeypatch.setattr(command, "package_folder", tmp_path.joinpath)
    monkeypatch.chdir(tmp_path)
    called("mine", "--flag")
    assert capsys.readouterr().out.strip() == f"{script} {[str(script), '--flag']} None"
    assert sys.path[-1] == str(tmp_path)
    assert os.environ["PYTHONPATH"] == f"/elsewhere{os.pathsep}{tmp_path}"


def test_help_names_the_command_that_was_called(called, tmp_path, monkeypatch, capsys):
    script = tmp_path / "scripts" / "mine.py"
    script.parent.mkdir()
    script.write_text(
        'print("usage: python /my-place/scripts/mine.py; `python\\nscripts/mine.py`, what mine.py takes, a/b.py")'
    )
    monkeypatch.setattr(command, "package_folder", tmp_path.joinpath)
    monkeypatch.chdir(tmp_path)
    called("mine", "-h")
    ours = "rld-lightning mine"
    assert capsys.readouterr().out == f"usage: {ours}; `{ours}`, what {ours} takes, a/b.py\n"
    called("mine", "run=x")
    assert "python /my-place/scripts/mine.py" in capsys.readouterr().out


def test_completion_offers_commands_and_skips_scripts_without_hydra(called, monkeypatch, capsys):
    for line, words in {"rld-lightning re": " ".join(command.commands()), "rld-lightning report ru": ""}.items():
        monkeypatch.setenv("COMP_LINE", line)
        called("-sc", "query=bash")
        assert capsys.readouterr().out.strip() == words


def test_shipped_files_are_found_in_a_wheel_and_a_checkout(monkeypatch, tmp_path):
    assert package_folder("conf") == REPOSITORY / "conf"
    monkeypatch.setattr("rld_lightning.package_files._PACKAGE", tmp_path / "package")
    (tmp_path / "package" / "conf").mkdir(parents=True)
    assert package_folder("conf") == tmp_path / "package" / "conf"
    assert invocation(str(tmp_path / "package/scripts/fit.py")) == ["rld-lightning", "fit"]
    assert invocation("scripts/fit.py") == ["python", "scripts/fit.py"]


def test_script_commands_can_be_run_from_here(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["/somewhere/pytest"])
    assert script_command("predict") == "python scripts/predict.py"
    (tmp_path / "my checkout").symlink_to(REPOSITORY)
    monkeypatch.setattr(sys, "argv", ["my checkout/scripts/fit.py"])
    assert script_command("predict") == "python 'my checkout/scripts/predict.py'"
    wheel = tmp_path / "package"
    (wheel / "scripts").mkdir(parents=True)
    monkeypatch.setattr("rld_lightning.package_files._PACKAGE", wheel)
    monkeypatch.setattr(sys, "argv", [str(wheel / "scripts" / "fit.py")])
    assert script_command("predict") == "rld-lightning predict"


def test_texts_use_script_command():
    """A wheel has no folder ``scripts``: texts use :func:`rld_lightning.package_files.script_command`."""
    package = REPOSITORY / "rld_lightning"
    for path in {*package.rglob("*.py")} - {package / "__main__.py", package / "package_files.py"}:
        if "scripts/" not in path.read_text():
            continue
        nodes = list(ast.walk(ast.parse(path.read_bytes())))
        docs = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        texts = [node.value for node in nodes if isinstance(node, ast.Constant) and id(node) not in docs]
        said = [text for text in texts if isinstance(text, str) and re.search(r"scripts/\w+\.py", text)]
        assert not said, f"{path}: {said}"
