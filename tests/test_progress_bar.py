"""The progress of long work outside training."""

import io
import re

import pytest
from rich.console import Console

from rld_lightning import console, progress_bar


@pytest.fixture
def screen(monkeypatch):
    def use(*, terminal):
        found = Console(file=io.StringIO(), force_terminal=terminal, width=80, color_system=None, highlight=False)
        for module in (console, progress_bar):
            monkeypatch.setattr(module, "console", found)
        return found.file

    return use


def test_a_terminal_has_one_line_that_disappears(screen):
    shown = screen(terminal=True)
    with progress_bar.progress_bar("predict", "images classified", 300) as advance:
        advance(100)
        advance(200)
    text = shown.getvalue()
    assert re.search(r"images classified ━{12} 300/300 0 s left", text)
    assert text.endswith("\x1b[1A\x1b[2K")
    assert "%" not in text


def test_without_a_terminal_a_line_a_minute(screen, monkeypatch):
    shown, clock = screen(terminal=False), [0.0]
    monkeypatch.setattr(progress_bar.time, "monotonic", lambda: clock[0])
    with progress_bar.progress_bar("predict", "images classified", 300) as advance:
        for seconds in (30, 60, 90, 119, 121):
            clock[0] = float(seconds)
            advance(30)
    assert shown.getvalue().splitlines() == [
        " predict  images classified: 20 %, 4 min left",
        " predict  images classified: 50 %, 2 min left",
    ]
