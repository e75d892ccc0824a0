"""Names in any script: figures would show characters that matplotlib's own font lacks as boxes."""

import io
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, findSystemFonts, fontManager, get_font
from matplotlib.ft2font import FT2Font
from matplotlib.text import Text

_UNUSABLE = ("lastresort", "color")  # parts of file names: a font of boxes, and pictures that are not drawn
_SECOND = ("bold", "italic", "oblique", "light", "thin", "mono", "serif")  # taken only if no other font has as much


def add_fonts(figure: Figure) -> None:
    """Adds installed fonts to a figure's text for the characters that its own font lacks."""
    texts = figure.findobj(Text)
    if characters := _lacking(text.get_text() for text in texts if isinstance(text, Text)):
        families, _ = _found(characters)
        for text in texts:
            if isinstance(text, Text):
                text.set_fontfamily([*text.get_fontfamily(), *families])


def class_labels(names: Sequence[str]) -> list[str]:
    """Class names for a figure: the class's number in place of a name with characters that no installed font has.

    All names are kept in a page's figures, whose text has the fonts of the reader.
    """
    if matplotlib.rcParams["svg.fonttype"] == "none":
        return list(names)
    _, without_font = _found(_lacking(names))
    return [str(number) if without_font & {*name} else name for number, name in enumerate(names)]


def _lacking(texts: Iterable[str]) -> frozenset[str]:
    own = get_font(findfont(FontProperties()))
    characters = {character for text in texts for character in text}
    return frozenset(c for c in characters if c.isprintable() and not own.get_char_index(ord(c)))


@cache
def _found(characters: frozenset[str]) -> tuple[tuple[str, ...], frozenset[str]]:
    """Returns the families of installed fonts that have some characters, and the characters that no font has."""
    left, families = set(characters), []
    covered = {path: _covered(path, characters) for path in _installed()} if characters else {}
    while covered and (best := max(covered, key=lambda path: len(covered[path] & left))) and covered[best] & left:
        left -= covered[best]
        family = FT2Font(best).family_name
        if family not in {entry.name for entry in fontManager.ttflist}:  # installed since matplotlib listed the fonts
            fontManager.addfont(best)
        families.append(family)
    return tuple(families), frozenset(left)


def _installed() -> list[str]:
    paths = {*findSystemFonts(), *(entry.fname for entry in fontManager.ttflist)}
    usable = [path for path in paths if not any(part in Path(path).name.lower() for part in _UNUSABLE)]
    return sorted(usable, key=lambda path: (any(part in Path(path).name.lower() for part in _SECOND), path))


def _covered(path: str, characters: Iterable[str]) -> set[str]:
    try:
        font = FT2Font(io.BytesIO(Path(path).read_bytes()))
        return {c for c in characters if font.get_char_index(ord(c))} if font.scalable else set()
    except (OSError, RuntimeError):  # no font, or of a kind that is not read
        return set()
