"""Docstrings as mkdocstrings shows them: roles become links, formulas MathML, and blocks of code are marked as such."""

import re
from html import escape
from textwrap import dedent
from typing import Any

import griffe
from formulas import display, inline, is_formula, is_formulas

BLOCK = re.compile(r"::\n\n((?:    .*\n|\n)+)")
CODE = re.compile(r"(?s:```.*?```)|(?::\w+:`(?P<role>~?[\w.]+)`)|``(?P<code>.+?)``")


def markdown(text: str, obj: griffe.Object | None = None) -> str:
    """A docstring of this package as Markdown; names are looked up from where the object stands.

    Only losses have formulas. Elsewhere what looks like one is left as code.
    """
    of_a_loss = obj is None or obj.path.startswith("rld_lightning.losses")

    def block(match: re.Match[str]) -> str:
        lines = dedent(match[1]).strip("\n")
        if of_a_loss and is_formulas(lines):
            return f":\n\n{display(lines)}\n\n"
        return f":\n\n```python\n{lines}\n```\n\n"

    def code(match: re.Match[str]) -> str:
        if match["role"]:
            return _link(match["role"], obj)
        if match["code"] is None:
            return match.group()
        if of_a_loss and is_formula(match["code"]):
            return inline(match["code"])
        # Under "Returns:" what stands before a colon would be read as a type.
        if ": " in match["code"]:
            return f"<code>{escape(match['code']).replace(':', '&#58;')}</code>"
        return f"`{match['code']}`"

    return CODE.sub(code, BLOCK.sub(block, text + "\n")).rstrip()


def _link(role: str, obj: griffe.Object | None) -> str:
    name = role.rpartition(".")[2] if role.startswith("~") else role
    path = role.removeprefix("~")
    if "." not in path and obj is not None:
        try:
            path = obj.resolve(path)
        except griffe.NameResolutionError:
            return f"`{name}`"
    # Optional, for not every object has a place on the site.
    return f'<autoref identifier="{path}" optional><code>{name}</code></autoref>'


class Docstrings(griffe.Extension):
    """Rewrites what mkdocstrings reads."""

    def on_object(self, *, obj: griffe.Object, loader: griffe.GriffeLoader, **kwargs: Any) -> None:
        """Called for every module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value, obj)
        # The decorator makes a loss of batches from what is written down for rows.
        if obj.is_function and any(str(decorator.value) == "row_loss" for decorator in obj.decorators):
            obj.returns = "dict[str, Tensor]"
