"""Names in scripts that matplotlib's own font lacks."""

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
from matplotlib import get_data_path, rc_context
from matplotlib.figure import Figure
from PIL import Image

from rld_lightning.reporting import fonts
from rld_lightning.reporting.style import saved

CAT, GOTHIC, BOXES = "\N{CJK UNIFIED IDEOGRAPH-732B}", "\N{GOTHIC LETTER AHSA}", "LastResort"
OWN = Path(get_data_path(), "fonts", "ttf")


@pytest.fixture
def installed(monkeypatch):
    def use(*paths):
        monkeypatch.setattr(fonts, "_installed", lambda: [str(path) for path in paths])
        fonts._found.cache_clear()

    yield use
    fonts._found.cache_clear()


def drawn(text, fonttype="path"):
    figure = Figure(figsize=(2, 0.5))
    figure.text(0.1, 0.3, text)
    with rc_context({"svg.fonttype": fonttype}):
        return np.asarray(Image.open(io.BytesIO(saved(figure, format="png", dpi=100))))


def test_a_font_that_has_the_characters_is_used_without_a_warning(installed, tmp_path, recwarn):
    """A watch, which DejaVu Sans lacks and STIX has, stands for any script."""
    installed()
    boxes = drawn("a\N{WATCH}")
    assert fonts.class_labels(["cat", "a\N{WATCH}"]) == ["cat", "1"]
    installed(shutil.copy(OWN / "STIXGeneral.ttf", tmp_path))
    assert not np.array_equal(boxes, drawn("a\N{WATCH}"))
    assert fonts.class_labels(["cat", "a\N{WATCH}"]) == ["cat", "a\N{WATCH}"]
    assert [str(warning.message) for warning in recwarn if "Glyph" in str(warning.message)] == []


def test_without_a_font_a_class_is_its_number_except_in_a_page(installed, tmp_path):
    (broken := tmp_path / "broken.ttf").write_bytes(b"no font")
    installed(broken, tmp_path / "gone.ttf")
    names = ["dog", f"{CAT} {GOTHIC}", "\N{CYRILLIC SMALL LETTER KA}\N{CYRILLIC SMALL LETTER O}"]
    assert fonts.class_labels(names) == ["dog", "1", names[2]]
    with rc_context({"svg.fonttype": "none"}):  # the reader's fonts
        assert fonts.class_labels(names) == names


def test_fonts_of_boxes_and_of_coloured_pictures_are_left_out(monkeypatch):
    paths = ["/f/NotoColorEmoji.ttf", "/f/A-Bold.ttf", "/f/Z.ttc"]
    monkeypatch.setattr(fonts, "findSystemFonts", lambda: paths)
    found = fonts._installed()
    assert [path for path in found if path in paths] == ["/f/Z.ttc", "/f/A-Bold.ttf"]
    assert not [path for path in found if BOXES in path]
