"""What MkDocs does besides showing docs/: pages made from the code, and links that lead out of docs/."""

import re
import sys
from collections.abc import Iterable
from pathlib import Path
from posixpath import normpath, relpath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

DOCS = Path(__file__).parents[1]
ROOT = DOCS.parent
BESIDE = [str(ROOT), str(DOCS), str(DOCS / "site")]  # the package, its tables, and the files beside this one
sys.path[:0] = BESIDE

from pages import api_page, method_page, methods, source_page  # noqa: E402

# Pages that lie at the top of the checkout, where people look for them.
AT_THE_TOP = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
}
LINK = re.compile(r"(?s:```.*?```)|(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<to>[^)#\s:]+)(?P<anchor>#[^)]*)?\)")


def on_config(config: MkDocsConfig) -> None:
    """For docstrings.py, which is loaded later: MkDocs restores the path after it has loaded this file."""
    sys.path[:0] = BESIDE


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that no file holds, and the methods to the navigation."""
    for target, content in made([file.src_uri for file in files.documentation_pages()]).items():
        files.append(File.generated(config, target, content=content))
    config.nav = with_methods(config.nav or [])
    return files


def made(docs: Iterable[str]) -> dict[str, str]:
    """The pages that no file of docs/ holds, by their place on the site, given those that files hold."""
    pages = {"api.md": api_page()}
    pages |= {f"methods/{name}.md": method_page(name) for names in methods().values() for name in names}
    pages |= {target: relinked((ROOT / path).read_text(), path, target) for path, target in AT_THE_TOP.items()}
    for path in (*AT_THE_TOP, *(f"docs/{page}" for page in docs)):
        for target in links((ROOT / path).read_text(), path):
            if at(target).startswith("source/") and (ROOT / target).is_file():
                pages[at(target)] = source_page(target, (ROOT / target).read_text())
    return pages


def with_methods(nav: list[Any]) -> list[Any]:
    """The navigation of mkdocs.yml with the methods under their heading."""
    pages = [{title: [{name: f"methods/{name}.md"} for name in names]} for title, names in methods().items()]
    return [{"Methods": [*entry["Methods"], *pages]} if "Methods" in entry else entry for entry in nav]


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files, **_: Any) -> str:
    """Lets links of docs/ lead to the site's pages, and names in the table of losses to theirs."""
    if page.file.generated_by is not None:
        return markdown
    if page.file.src_uri == "losses.md":
        markdown = re.sub(r"^\| `(\w+)` (?=\|.*\|.*\|.*\|)", _method, markdown, flags=re.MULTILINE)
    return relinked(markdown, f"docs/{page.file.src_uri}", page.file.src_uri)


def _method(row: re.Match[str]) -> str:
    known = any(row[1] in names for names in methods().values())
    return f"| [`{row[1]}`](methods/{row[1]}.md) " if known else row[0]


def at(path: str) -> str:
    """Where the site has a file of the checkout."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return AT_THE_TOP.get(path) or f"source/{path}.md"


def links(text: str, path: str) -> list[str]:
    """The files and folders, from the top of the checkout, that a page links to."""
    return [normpath(f"{path}/../{match['to']}") for match in LINK.finditer(text) if match["to"]]


def relinked(text: str, path: str, target: str) -> str:
    """A page of the checkout with links for its place on the site; folders are named only."""

    def link(match: re.Match[str]) -> str:
        if not match["to"] or match["to"].startswith(("methods/", "http")):
            return match[0]
        to = normpath(f"{path}/../{match['to']}")
        if (ROOT / to).is_dir():
            return match["text"] if match["text"].startswith("`") else f"`{match['text']}`"
        there = relpath(at(to), f"{target}/..")
        return f"{match['image']}[{match['text']}]({there}{match['anchor'] or ''})"

    return LINK.sub(link, text)
