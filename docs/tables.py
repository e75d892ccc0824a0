"""Writes the tables of losses in docs/losses.md from the code: `make docs-tables`."""

import inspect
import json
import re
from collections.abc import Sequence
from functools import cache

import torch
from omegaconf import OmegaConf

from rld_lightning.hydra.compose import compose
from rld_lightning.hydra.options import CONF, list_options
from rld_lightning.losses import DistillationLoss, LogitLoss, list_losses, loss_class, loss_options
from rld_lightning.losses.features import DHKDLoss, FeatureLoss
from rld_lightning.models import create_model
from rld_lightning.models.graft import graft
from rld_lightning.models.stages import Stages

PAGE = CONF.parent / "docs" / "losses.md"
GOLDEN = CONF.parent / "tests" / "golden" / "losses.json"
# Feature losses say where they look in terms of a network's stages; these stages answer in words.
WORDS = Stages(
    features=("the stem", *["stages"] * 2, "last stage"),
    preactivations=("the stem", *["stages before the ReLU"] * 3),
    pooled="pooled feature",
    last_map="last map",
)


def losses_table() -> str:
    """Every registered loss, those on features last; what it trains is counted for wide ResNets of unequal width."""
    golden = {case["method"] for case in json.loads(GOLDEN.read_text())["cases"]}
    teacher, plain = create_model("wrn40_2", 100), create_model("wrn40_1", 100)
    rows = []
    for name in sorted(list_losses(), key=lambda name: issubclass(loss_class(name), FeatureLoss)):
        loss = loss_class(name)()
        student = graft(create_model("wrn40_1", 100), teacher) if loss.reuses_classifier else plain
        loss.connect(student, teacher, (3, 32, 32), torch.arange(100))
        trained = sum(parameter.numel() for parameter in loss.parameters())
        tested = "public code" if name in golden else "second formula"
        rows.append(
            (
                f"`{name}`",
                loss.method,
                papers(type(loss)),
                looks_at(type(loss)),
                f"{trained:,}" if trained else "",
                tested,
            )
        )
    return table(("`loss=`", "method", "source", "looks at", "trains", "tested against"), rows)


def papers(cls: type[DistillationLoss]) -> str:
    """Where a method comes from, with links to what is on arXiv."""
    return ", ".join(re.sub(r"^\d{4}\.\d{4,5}$", r"[\g<0>](https://arxiv.org/abs/\g<0>)", p) for p in cls.papers)


def looks_at(cls: type[DistillationLoss]) -> str:
    """In words: logits, labels, a second view, features."""
    if not cls.needs_teacher:
        return "label"
    if issubclass(cls, FeatureLoss):
        loss = cls()
        places = dict.fromkeys([*loss.student_paths(WORDS), *loss.teacher_paths(WORDS)])
        if "stages" in places:  # all of them
            places.pop("last stage", None)
        return ", ".join(places)
    words = ["logits"]
    if issubclass(cls, LogitLoss) and inspect.signature(cls.function).parameters["label"].default is inspect._empty:
        words.append("label")
    if issubclass(cls, DHKDLoss):
        words.append(WORDS.pooled)
    if cls.needs_strong_view:
        words.append("strong view")
    return ", ".join(words)


def presets_table() -> str:
    """Every other option of ``loss=``: a registered loss with other values."""
    return table(("`loss=`", "is", "with"), presets())


@cache
def presets() -> list[tuple[str, str, str]]:
    """The rows of that table."""
    classes = {loss_options(name)["_target_"]: name for name in list_losses()}
    names = sorted({*list_options("loss")} - {*list_losses(), "combined"})
    networks = ("model=pair", "model.teacher.name=resnet20", "model.student.name=resnet8")  # with nothing tuned
    cfg = compose([*networks, *(f"+loss@presets.{name}={name}" for name in names)])  # all at once: each takes a while
    rows = []
    for preset in names:
        loss = OmegaConf.to_container(cfg.presets[preset], resolve=True)
        name = classes[loss["_target_"]]
        defaults = OmegaConf.create(loss_options(name))
        changed = {key: value for key, value in loss.items() if defaults[key] != value}
        values = " ".join(f"loss.{key}={str(value).lower()}" for key, value in changed.items())
        rows.append((f"`{preset}`", f"`{name}`", f"`{values}`"))
    return rows


def table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Rows of a Markdown table."""
    lines = [header, ("---",) * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def filled(page: str) -> str:
    """The page with its tables written anew, each between the two comments that carry its name."""
    for name, make in (("losses", losses_table), ("presets", presets_table)):
        begin, end = f"<!-- {name}: written by make docs-tables -->\n", f"<!-- end of {name} -->"
        before, after = page.split(begin)[0], page.split(end)[1]
        page = f"{before}{begin}{make()}{end}{after}"
    return page


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text()))
