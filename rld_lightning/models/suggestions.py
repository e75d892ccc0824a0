"""The end of an error message about an unknown name: what was probably meant."""

from collections.abc import Iterable
from difflib import get_close_matches


def did_you_mean(value: str, choices: Iterable[str], limit: int = 3) -> str:
    """``" Did you mean 'a', 'b'?"`` with the nearest choices, or ``""`` when none is near.

    Upper and lower case, ``-``, ``_`` and a library before a slash make no difference: ``wrn40_2`` is near
    ``wrn_40_2``, and ``resnet34`` is near ``torchvision/resnet34``.
    """
    by_plain_name: dict[str, list[str]] = {}
    for choice in choices:
        by_plain_name.setdefault(_plain(choice), []).append(choice)
    plain = _plain(value)
    # Names that differ in spelling only are what was meant; others beside them would be noise.
    near = [plain] if plain in by_plain_name else get_close_matches(plain, by_plain_name, n=limit)
    names = [choice for key in near for choice in by_plain_name[key]][:limit]
    return f" Did you mean {', '.join(map(repr, names))}?" if names else ""


def _plain(name: str) -> str:
    return name.rpartition("/")[2].casefold().replace("_", "").replace("-", "")
