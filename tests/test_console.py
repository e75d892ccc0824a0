"""What a run prints is in its folder as well."""

import logging

import pytest
from omegaconf import OmegaConf

from rld_lightning.console import print_config, print_line, print_table, printed_to
from rld_lightning.errors import UserError


def test_what_is_printed_is_added_to_the_file(tmp_path, capsys):
    log, inner = tmp_path / "fit.log", tmp_path / "teacher.log"
    log.write_text("an earlier attempt\n")
    long = "a/" * 100
    with printed_to(log):
        print_config(OmegaConf.create({"paths": {"run": long}}))
        print_line("data", f"[{long}] with password=abcdef")
        print_table("results", ("", "student"), [("top-1", 12.5)])
        logging.getLogger("lightning.pytorch.callbacks").warning("a caution")
        with printed_to(inner):
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


@pytest.mark.parametrize(
    ("error", "written"),
    [
        (UserError("a sentence"), "error: a sentence\n"),
        (KeyboardInterrupt(), "KeyboardInterrupt\n"),
        (RuntimeError("out of memory"), "RuntimeError: out of memory\n"),
    ],
)
def test_what_ends_it_is_in_the_file(tmp_path, error, written):
    with pytest.raises(type(error)), printed_to(tmp_path / "fit.log"):
        raise error
    text = (tmp_path / "fit.log").read_text()
    assert text.endswith(written)
    assert ("Traceback" in text) is isinstance(error, RuntimeError)


def test_other_ranks_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("rld_lightning.console.rank_zero_only.rank", 1)
    with printed_to(tmp_path / "fit.log"):
        print_line("data", "of rank 1")
    assert not (tmp_path / "fit.log").exists()
