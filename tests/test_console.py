"""A run's output is also written to a file in its folder."""

import logging
import re
import signal
import sys
import warnings
from io import StringIO
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from rich.console import Console

import rld_lightning
from rld_lightning.callbacks import Diverged
from rld_lightning.console import (
    copy_output_to,
    print_config,
    print_error,
    print_files,
    print_line,
    print_messages_as_lines,
    print_table,
    quiet_lightning,
)
from rld_lightning.data.bad_images import BadImage, BadImageReport
from rld_lightning.distributed import Stopped
from rld_lightning.errors import UserError


def test_output_is_appended_to_the_file(tmp_path, capsys):
    log, inner = tmp_path / "fit.log", tmp_path / "teacher.log"
    log.write_text("an earlier attempt\n")
    long = "a/" * 100
    with copy_output_to(log):
        print_config(OmegaConf.create({"paths": {"run": long}}))
        print_line("data", f"[{long}] with password=abcdef")
        print_table("results", ("", "student"), [("top-1", 12.5)])
        logging.getLogger("lightning.pytorch.callbacks").warning("a caution")
        with copy_output_to(inner):
            print_line("teacher", "is trained")
    print_line("after", "it")
    printed, text = capsys.readouterr().out, log.read_text()
    assert text.startswith("an earlier attempt\n")
    assert [line for line in printed.splitlines() if "after" not in line] == [
        line for line in text.splitlines()[1:] if "a caution" not in line
    ]
    assert text.count("a caution") == 1
    assert f"    data  [{long}] with password=REDACTED\n" in text
    assert inner.read_text() == " teacher  is trained\n"


def test_lines_are_wrapped_between_words_in_a_terminal(tmp_path, monkeypatch):
    screen = StringIO()
    monkeypatch.setattr(
        "rld_lightning.console.console", Console(file=screen, force_terminal=True, width=40, no_color=True)
    )
    path = "/photos/" + "a" * 40
    with copy_output_to(tmp_path / "fit.log"):
        print_line("teacher", f"resnet20 of [{path}] the teacher's own, resume='{path} b' and resume=c")
        print_line("next", "python scripts/fit.py model=wrn40_2_to_wrn16_2 loss=rld", pasted=True)
        print_error("one\n  two of several words, which are more than a line")
    lines = re.sub(r"\x1b\[[0-9;]*m", "", screen.getvalue()).splitlines()
    assert lines == [
        " teacher  resnet20 of",
        f"          [{path}]",
        "          the teacher's own,",
        f"          resume='{path} b'",
        "          and resume=c",
        "    next  python scripts/fit.py model=wrn40_2_to_wrn16_2 loss=rld",
        "error: one",
        "  two of several words, which are more",
        "than a line",
    ]
    assert len((tmp_path / "fit.log").read_text().splitlines()) == 4


@pytest.mark.parametrize(
    ("error", "written"),
    [
        (UserError("a sentence"), "error: a sentence\n"),
        (Diverged("training diverged"), "error: training diverged\n"),
        (KeyboardInterrupt(), "KeyboardInterrupt\n"),
        (Stopped(signal.SIGINT), "ended by SIGINT\n"),
        (RuntimeError("out of memory"), "RuntimeError: out of memory\n"),
    ],
)
def test_the_final_error_is_in_the_file(tmp_path, error, written):
    with pytest.raises(type(error)), copy_output_to(tmp_path / "fit.log"):
        raise error
    text = (tmp_path / "fit.log").read_text()
    assert text.endswith(written)
    assert ("Traceback" in text) is isinstance(error, RuntimeError)


def test_other_ranks_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("rld_lightning.console.rank_zero_only.rank", 1)
    with copy_output_to(tmp_path / "fit.log"):
        print_line("data", "of rank 1")
    assert not (tmp_path / "fit.log").exists()


@pytest.mark.parametrize("imported_first", [False, True])
def test_lightnings_messages_are_printed_once(monkeypatch, imported_first):
    """Lightning's handler prints it; Hydra's root handler would print and write it again.

    Imported before any handler is configured, Lightning gives ``lightning.pytorch`` its own, and it does not propagate.
    """
    quiet_lightning()
    own, root = StringIO(), StringIO()
    with monkeypatch.context() as patch:
        for name, stream in (("", root), ("lightning", own), ("lightning.pytorch", own if imported_first else None)):
            handlers = [] if stream is None else [logging.StreamHandler(stream)]
            patch.setattr(logging.getLogger(name), "handlers", handlers)
        patch.setattr(logging.getLogger("lightning.pytorch"), "propagate", not imported_first)
        messages = logging.getLogger("lightning.pytorch.utilities.rank_zero")
        messages.warning("Restoring states from the checkpoint path at last.ckpt")  # a line of the run says it
        messages.warning("something new")
    assert own.getvalue() == "something new\n"
    assert not root.getvalue()


@pytest.mark.parametrize("hydras_file", [False, True])
def test_messages_and_warnings_are_lines_of_any_rank(tmp_path, monkeypatch, capsys, hydras_file):
    monkeypatch.setattr("rld_lightning.console.rank_zero_only.rank", 1)
    root, log = logging.getLogger(), tmp_path / "fit.log"
    file = logging.FileHandler(tmp_path / "hydras.log")
    file.setFormatter(logging.Formatter("[%(name)s][%(levelname)s] - %(message)s"))
    monkeypatch.setattr(root, "handlers", [logging.StreamHandler(sys.stdout), *([file] if hydras_file else [])])
    monkeypatch.setattr(warnings, "showwarning", None)
    print_messages_as_lines()
    print_messages_as_lines()  # again, in each job of a sweep
    with log.open("w") as opened, warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr("rld_lightning.console._log_files", [opened])
        logging.getLogger("rld_lightning.data").warning("a.jpg cannot be read")
        warnings.warn_explicit(
            "rounds", UserWarning, str(Path(rld_lightning.__file__).parent / "models" / "fold.py"), 3
        )
        warnings.warn_explicit("is old", UserWarning, "/lib/torch/nn.py", 7)
    lines = "caution  a.jpg cannot be read\n caution  rounds\n caution  is old (torch/nn.py:7)"
    assert capsys.readouterr().out.strip() == lines
    assert log.read_text().strip() == ("" if hydras_file else lines)  # once in a run's log
    if hydras_file:
        assert (tmp_path / "hydras.log").read_text().splitlines() == [
            "[rld_lightning.data][WARNING] - a.jpg cannot be read",
            "[py.warnings][WARNING] - rounds",
            "[py.warnings][WARNING] - is old (torch/nn.py:7)",
        ]
    file.close()


def test_control_characters_in_names_are_escaped(tmp_path, capsys):
    """Names of classes, files and runs are untrusted: control characters could clear the screen or send input."""
    name = "\x1b]0;title\x07\x9bcat\u202etac\udcff"
    with copy_output_to(tmp_path / "fit.log"):
        print_config(OmegaConf.create({"name": name, name: 1}))
        print_line("data", name)
        print_error(name)
        print_table(name, ("", name), [(name, 1)])
        print_files(tmp_path / "run", {name: "a file"})
    shown = r"\x1b]0;title\x07\x9bcat\u202etac\udcff"
    for text in (capsys.readouterr().out, (tmp_path / "fit.log").read_text()):
        assert text.count(shown) >= 6
        assert not re.search("[\x1b\x07\x9b\u202e]", text)


def test_a_name_with_line_breaks_prints_one_line(capsys):
    print_line("data", "a\n    done  in full")
    assert capsys.readouterr().out == "    data  a\\n    done  in full\n"


def test_a_file_of_bad_images_has_a_line_for_each(tmp_path, caplog):
    BadImageReport(tmp_path / "bad.txt").add([BadImage("a\n/b\x1b[2J.jpg", "is\x1b[2J no\nimage")], "so what")
    assert (tmp_path / "bad.txt").read_text() == "a\\n/b\\x1b[2J.jpg\tis\\x1b[2J no image\n"
    assert "\x1b" not in caplog.text


def test_an_error_with_a_huge_value_keeps_its_beginning_and_its_way_out(capsys):
    print_error(f"f.json says {'x' * 100_000}: make it again.")
    found = capsys.readouterr()
    text = found.out + found.err
    assert text.startswith("error: f.json says x")
    assert text.endswith("x: make it again.\n")
    assert len(text) < 5100
