"""The pages of the site that no file holds: one a method, the library's names, and the files that pages link to."""

import inspect
import json
import sys
from types import ModuleType

from tables import looks_at, papers, presets, table

import rld_lightning
from rld_lightning.losses import list_losses, loss_class, loss_options
from rld_lightning.losses.features import FeatureLoss
from rld_lightning.losses.ranges import ranges_of

# Of what is public, the names that somebody needs who writes a loss, a network or a data set.
BASES = {
    "Losses": [
        "rld_lightning.losses.base.DistillationLoss",
        "rld_lightning.losses.base.LogitLoss",
        "rld_lightning.losses.features.base.FeatureLoss",
        "rld_lightning.losses.base.StepContext",
        "rld_lightning.losses.base.ModelOutput",
        "rld_lightning.losses.combined.CombinedLoss",
        "rld_lightning.losses.registry.register_loss",
        "rld_lightning.losses.registry.list_losses",
        "rld_lightning.losses.registry.loss_class",
    ],
    "Networks": ["rld_lightning.models.registry.register_model", "rld_lightning.models.taps.forward_with_taps"],
    "Data": ["rld_lightning.data.base.ImageDataModule", "rld_lightning.data.base.Batch"],
}


def methods() -> dict[str, list[str]]:
    """Names of all losses: on logits, RLD first, and on features."""
    names = sorted(list_losses(), key=lambda name: name != "rld")
    on_features = [name for name in names if issubclass(loss_class(name), FeatureLoss)]
    return {"On logits": [name for name in names if name not in on_features], "On features": on_features}


def method_page(name: str) -> str:
    """A method: paper, command, options with their defaults and ranges, and the docstrings, formulas typeset."""
    cls = loss_class(name)
    home = sys.modules[cls.__module__]
    ranges = ranges_of(inspect.get_annotations(cls.__init__, eval_str=True))
    options = [
        (f"`loss.{key}`", _yaml(value), _rule(ranges.get(key)))
        for key, value in loss_options(name).items()
        if key != "_target_"
    ]
    others = [f"- `loss={preset.strip('`')}`: {values}\n" for preset, of, values in presets() if of == f"`{name}`"]
    formula = "".join(f"\n::: {home.__name__}.{function}\n" for function in _functions(home))
    return f"""# {cls.method}

`loss={name}` · source: {papers(cls) or "the textbook"} · looks at: {looks_at(cls)}

```bash
python scripts/fit.py model=wrn40_2_to_wrn16_2 loss={name}
```

::: {home.__name__}
    options: {{members: false, show_root_heading: false, show_root_toc_entry: false}}

{"## Formula" if formula else ""}
{formula}

## Module

::: {home.__name__}.{cls.__name__}
    options: {{merge_init_into_class: false}}

## Options

{table(("option", "default", "range"), options)}
{"The same with other values:" if others else ""}

{"".join(others)}
"""


def _functions(home: ModuleType) -> list[str]:
    return [
        name
        for name, value in vars(home).items()
        if name.endswith("_loss") and inspect.isfunction(value) and value.__module__ == home.__name__
    ]


def _yaml(value: object) -> str:
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def _rule(range_: object) -> str:
    return str(range_ or "").removeprefix("it must be ").removeprefix("choose ")


def api_page() -> str:
    """What ``rld_lightning`` exports, and the base classes."""
    of_methods = {loss_class(name) for name in list_losses()}
    pages = {cls.__module__: name for name in list_losses() if (cls := loss_class(name)) in of_methods}
    sections: dict[str, list[str]] = {"Training": [], **{title: list(paths) for title, paths in BASES.items()}}
    links = []
    for name in rld_lightning.__all__:
        home = getattr(rld_lightning, name).__module__
        if home in pages:
            links.append(f"- [`{name}`](methods/{pages[home]}.md)")
            continue
        title = {"losses": "Losses", "models": "Networks", "data": "Data"}.get(home.split(".")[1], "Training")
        if f"{home}.{name}" not in sections[title]:
            sections[title].append(f"{home}.{name}")
    sections["Networks"].sort(key=lambda path: path.rpartition(".")[2])
    text = (
        "# Names and base classes\n\nEverything here can be imported from `rld_lightning`, or from the folder that its"
    )
    text += " path names: `from rld_lightning.losses import LogitLoss`.\n\n## Methods\n\n" + "\n".join(links)
    text += "\n\nAll methods: [Losses](losses.md).\n"
    for title, paths in sections.items():
        text += f"\n## {title}\n" + "".join(f"\n::: {path}\n    options: {{heading_level: 3}}\n" for path in paths)
    return text


def source_page(path: str, text: str) -> str:
    """A file of the checkout that a page links to."""
    fence = "````"
    language = {"py": "python", "yaml": "yaml", "sh": "bash", "md": "markdown"}.get(path.rpartition(".")[2], "text")
    return (
        f"---\nsearch: {{exclude: true}}\nhide: [toc]\n---\n# {path}\n\n{fence}{language}\n{text.rstrip()}\n{fence}\n"
    )
