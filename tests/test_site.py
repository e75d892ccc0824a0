"""The manual's site: its pages and its rendering of docstrings. ``make docs`` builds it and checks its links."""

import inspect
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from rld_lightning.losses import list_losses, loss_class, loss_options

pytest.importorskip("mkdocs")
pytest.importorskip("mkdocstrings")
pytest.importorskip("latex2mathml")

from mkdocs.commands.build import build
from mkdocs.config import load_config

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def hooks():
    before = [*sys.path]
    hooks = load_config(str(ROOT / "mkdocs.yml")).plugins["docs/site/hooks.py"]
    sys.path[:] = [*hooks.BESIDE, *before]
    yield hooks
    sys.path[:] = before


@pytest.fixture(scope="module")
def formulas(hooks):
    import formulas

    return formulas


@pytest.fixture(scope="module")
def made(hooks):
    """The generated pages."""
    return hooks.made(str(path.relative_to(ROOT / "docs")) for path in ROOT.glob("docs/**/*.md"))


def named(nav):
    for entry in nav:
        value = next(iter(entry.values())) if isinstance(entry, dict) else entry
        yield from named(value) if isinstance(value, list) else [value]


def test_the_navigation_names_each_page(hooks, made):
    nav = list(named(hooks.with_methods(load_config(str(ROOT / "mkdocs.yml")).nav)))
    pages = {*made, *(str(path.relative_to(ROOT / "docs")) for path in ROOT.glob("docs/**/*.md"))}
    sources = {page for page in pages if page.startswith("source/")}
    assert sorted(nav) == sorted(pages - sources - {"results/cifar100_resnet20_to_resnet8/report.md"})


def test_each_method_has_a_page_with_its_options(made):
    pages = {page: text for page, text in made.items() if page.startswith("methods/")}
    assert set(pages) == {f"methods/{name}.md" for name in list_losses()}
    for name in list_losses():
        page, cls = pages[f"methods/{name}.md"], loss_class(name)
        assert page.startswith(f"# {cls.method}\n")
        assert f"loss={name}\n" in page
        assert f"::: {cls.__module__}.{cls.__name__}\n" in page
        assert all(f"arxiv.org/abs/{paper}" in page for paper in cls.papers if paper[0].isdigit())
        options = re.findall(r"^\| `loss\.(\w+)` \|", page, re.MULTILINE)
        assert options == [key for key in loss_options(name) if key != "_target_"]
    assert "| `loss.beta` | `8.0` | a finite number >= 0" in pages["methods/rld.md"]
    assert "- `loss=rld_g`: `loss.mask=g`\n" in pages["methods/rld.md"]
    assert "::: rld_lightning.losses.rld.rld_loss\n" in pages["methods/rld.md"]


def test_links_out_of_docs_become_links_of_the_site(hooks, made):
    text = "[a](../examples/plain_pytorch.py) [b](../SECURITY.md#x) [c](../conf) ![d](e.png) [f](https://g.h)"
    there = "[a](../source/examples/plain_pytorch.py.md) [b](../security.md#x) `c` ![d](e.png) [f](https://g.h)"
    assert hooks.relinked(text, "docs/results.md", "methods/results.md") == there.replace("e.png", "../e.png")
    assert hooks.relinked("[a](docs/data.md#shards)", "README.md", "index.md") == "[a](data.md#shards)"
    assert "RLDLoss" in made["source/examples/plain_pytorch.py.md"]


@pytest.mark.parametrize(
    ("text", "tex"),
    [
        ("T^2 KL( P || Q )", r"T^{2} \,\operatorname{KL}( P \,\Vert\, Q )"),
        ("softmax over k not in M of t / T", r"\mathop{\mathrm{softmax}}_{k \notin  M} t / T"),
        ("sum over k != y of p_k log q_k", r"\sum_{k \ne  y} p_{k} \,\operatorname{log}\, q_{k}"),
        ("s'_y = s_y + max_k s_k", r"s'_{y} = s_{y} + \operatorname{max}_{k}\, s_{k}"),
        ("b = eta / (max_k p_k - p_y + 1)", r"b = \eta  / (\operatorname{max}_{k}\, p_{k} - p_{y} + 1)"),
        ("0 if s <= t, else 1e-8", r"0\text{ if }s \le  t,\text{ else }10^{-8}"),
        ("ce_weight * CE + (1 + sqrt 3) / 2", r"\text{ce_weight} \cdot  \operatorname{CE} + (1 + \sqrt{3}) / 2"),
        ("C^(1 - gamma) 0.05 <x, y>", r"C^{1 - \gamma } 0.05 \langle x, y\rangle "),
        ("class correlation = || P' P ||^2", r"\text{class correlation} = \,\Vert\, P' P \,\Vert\,^{2}"),
    ],
)
def test_formulas_of_docstrings_become_tex(formulas, text, tex):
    assert formulas.tex(text) == tex


def test_lines_are_aligned_at_the_defining_sign(formulas):
    shown = formulas.display("P_k = a / b,  b = 2    (a remark)\n-log c - sum over k = 1 ... K of d_k")
    rows = re.search('alttext="(.*?)"', shown)[1].split(r" \\ ")
    assert [row.split("&amp;")[0].strip() for row in rows] == [r"\begin{align*}P_{k}", "", ""]
    assert rows[1].endswith(r"b = 2 \quad \text{(a remark)}")
    assert r"\sum_{k = 1 \ldots  K} d_{k}" in rows[2]


@pytest.mark.parametrize("code", ['{"scd": alpha * SCD}', "temperature=1", "(B, C)", "loss.alpha", "None", "a[b] + c"])
def test_code_is_no_formula(formulas, code):
    assert not formulas.is_formula(code)


def test_each_formula_of_a_loss_is_well_formed(formulas):
    import docstrings

    seen = 0
    for name in list_losses():
        home = sys.modules[loss_class(name).__module__]
        for value in vars(home).values():
            if getattr(value, "__module__", None) == home.__name__ and (text := inspect.getdoc(value)):
                shown = docstrings.markdown(text)
                assert "::\n" not in shown
                assert "```" not in shown or not value.__name__.endswith("_loss")
                assert "``" not in shown.replace("```", "")
                for formula in re.findall("<math.*?</math>", shown):
                    assert not re.search(r"\\|[&^]</|<mi>_", re.sub('alttext=".*?"', "", formula)), formula
                    ElementTree.fromstring(formula)
                    seen += 1
    assert seen > 80


@pytest.mark.slow
def test_the_site_builds_without_warnings(tmp_path):
    config = load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(tmp_path))
    config.plugins.on_startup(command="build", dirty=False)
    build(config)
    method = (tmp_path / "methods" / "rld.html").read_text()
    assert method.count("<math") == 2
    assert "RowTerms" not in method  # the return type of a helper, not of rld_loss
    for page in tmp_path.glob("**/*.html"):  # nothing is loaded from other servers
        assert not re.search(r"<(?:script|link|img)[^>]+(?:src|href)=\"?https?:", page.read_text()), page
