"""Published accuracies (``paper_tables.json``, each with its source), and the losses they belong to."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources

from rld_lightning.runs.finished import Run
from rld_lightning.runs.settings import affects_training

TEACHER = "Teacher"

# Options of the loss group and their names in published tables. Others have no published row: our own variants
# (rld_reference, kdg...), and mlkd, whose published rows are of 480 epochs or more.
METHODS = {
    "ce": "Student (CE)",
    "kd": "KD",
    "kd_ls": "KD+LSKD",
    "dkd": "DKD",
    "dkd_ls": "DKD+LSKD",
    "rld": "RLD",
    "rld_scd": "RLD ablation: CE+SCD",
    "rld_mcd": "RLD ablation: CE+MCD(M_ge)",
    "rld_mcd_g": "RLD ablation: CE+MCD(M_g)",
    "rld_g": "RLD ablation: CE+SCD+MCD(M_g)",
    "swap": "LA (SWAP)",
    "rc": "RC",
    "revision": "LR",
    "nkd": "NKD",
    "ttm": "TTM",
    "wttm": "WTTM",
    "dist": "DIST",
    "ctkd": "CTKD",
    "ldrld": "LDRLD",
    "eakd": "EA-KD",
    "fitnet": "FitNet",
    "at": "AT",
    "nst": "NST",
    "pkt": "PKT",
    "ofd": "OFD",
    "rkd": "RKD",
    "vid": "VID",
    "sp": "SP",
    "crd": "CRD",
    "reviewkd": "ReviewKD",
    "simkd": "SimKD",
    "catkd": "CAT-KD",
}
DATASETS = {"cifar100": "cifar100", "imagenet": "imagenet1k"}
# Epochs and recipe of the published rows, by our name of the data set; exceptions are in a row's note.
EPOCHS = {"cifar100": 240, "imagenet": 100}
RECIPES = {"cifar100": "cifar240", "imagenet": "imagenet100"}
FLOAT32 = "32-true"  # the precision of the published rows, as Lightning names it
# Overrides that affect training but need no mention here: split and epochs are compared elsewhere.
_IGNORED_OVERRIDES = ("data.seed", "data.val_fraction", "recipe.epochs")
# Methods whose hyper-parameters are not published, and those with different ones for each pair.
_UNPUBLISHED_HYPERPARAMETERS = {
    "cifar100": ("rld", "rld_scd", "rld_mcd", "rld_mcd_g", "rld_g", "nkd", "wttm", "ldrld"),
    "imagenet": ("wttm", "ldrld"),
}
_TUNED_PER_PAIR = ("catkd", "reviewkd")
_ANY_PAIR = ("pair", "imagenet_pair")  # with the settings of most pairs
# Of several sources of a number, the table shows the first of these; all others come after them.
_PREFERRED = ("LSKD-paper", "RLD-note+DSKD", "RLD-note", "DSKD-readme", "DIST-readme", "NKD-readme")


@dataclass(frozen=True)
class Published:
    """A published accuracy in percent.

    ``metric`` is ``top1`` or ``top5`` as printed in a paper (the best epoch, unless stated), or has the suffix
    ``_best_epoch`` or ``_last_epoch`` if it is from a training log.
    """

    dataset: str
    teacher: str
    student: str
    method: str
    metric: str
    value: float
    source: str
    source_key: str
    note: str = ""

    @property
    def second_hand(self) -> bool:
        """Whether it was read in a third party's summary, not in the paper or its code."""
        return self.source.startswith("SECOND-HAND")

    @property
    def other_recipe(self) -> bool:
        """Whether, by its note or source, it was trained differently from most of its table."""
        text = f"{self.note} {self.source}"
        return bool(re.search(r"own training setup|training recipe|not comparable|(480|960) epochs|reproduction", text))


@cache
def published_numbers() -> tuple[Published, ...]:
    """All published numbers, preferred sources first."""
    records = json.loads((resources.files("rld_lightning.reporting") / "paper_tables.json").read_text("utf-8"))
    rank = {key: place for place, key in enumerate(_PREFERRED)}
    numbers = [Published(**record) for record in records]
    return tuple(sorted(numbers, key=lambda number: rank.get(number.source_key, len(rank) + number.second_hand)))


def published_for_pair(dataset: str, teacher: str | None, student: str) -> list[Published]:
    """The published numbers of a pair, preferred sources first.

    Args:
        dataset: our name, such as ``cifar100``.
        teacher: our name of the network, such as ``wrn40_2`` or ``torchvision/resnet34``.
    """
    if teacher is None or dataset not in DATASETS:
        return []
    wanted = [_normalised(network, dataset) for network in (teacher, student)]
    numbers = [number for number in published_numbers() if number.dataset == DATASETS[dataset]]
    return [n for n in numbers if [_normalised(network, dataset) for network in (n.teacher, n.student)] == wanted]


def published_top1(numbers: list[Published], method: str) -> list[Published]:
    """The published top-1 of one of our losses, or of :data:`TEACHER`, preferred sources first.

    Args:
        method: an option of the loss group, or :data:`TEACHER`.
    """
    name = TEACHER if method == TEACHER else METHODS.get(method, "")
    return [number for number in numbers if number.method == name and number.metric == "top1"]


def is_published_method(method: str, settings: Mapping[str, str]) -> bool:
    """Whether a loss is still the published method: RLD with another mask, for example, is not."""
    mask, standardized = "g" if method.endswith("_g") else "ge", str(method.endswith("_ls"))
    return (
        settings.get("loss.mask", mask) == mask
        and settings.get("loss.logit_standardization", standardized) == standardized
        and settings.get("loss.confidence_temperature", "None") == "None"
        and (settings.get("loss.alpha") == "0") == method.startswith("rld_mcd")
        and (settings.get("loss.beta") == "0") == (method == "rld_scd")
    )


def is_published_teacher(numbers: list[Published], top1: float | None) -> bool:
    """Whether a teacher's accuracy is within 0.1 points of the published one's, which retrained ones rarely are.

    Args:
        top1: measured on the test split, in percent.
    """
    return top1 is not None and any(abs(number.value - top1) < 0.1 for number in published_top1(numbers, TEACHER))


def departures(run: Run) -> list[str]:
    """How a run differs, or may differ, from the published rows, in a few words each; empty if it does not.

    Published rows are of float32, the whole schedule, all images of the test split, and the teacher, the recipe and the
    hyper-parameters of their papers.
    """
    summary, settings, dataset = run.summary, run.settings, run.summary.dataset
    precision, teacher_type = settings["trainer.precision"], settings.get("model.teacher.dtype", "None")
    checks = {
        f"{summary.epochs} epochs, not {EPOCHS.get(dataset)}": summary.epochs != EPOCHS.get(dataset),
        "another recipe" if "recipe" in run.choices else "recipe not known": (
            run.choices.get("recipe") not in (RECIPES.get(dataset), run.method)  # LDRLD has its own recipe
        ),
        f"{precision}, not float32": precision != FLOAT32,
        f"teacher in {teacher_type}": teacher_type not in ("None", "float32"),
        settings["callbacks"]: settings["callbacks"] != "None",
        "not trained to the end": not summary.trained_whole,
        "not measured on all of the test split": summary.split != "test" or not summary.evaluated_whole,
    }
    words = [words for words, differs in checks.items() if differs]
    if summary.teacher is not None:
        words += _distillation_departures(run)
    return [*words, *_other_settings(run)]


def _distillation_departures(run: Run) -> list[str]:
    """The differences in the teacher and in settings that depend on the pair."""
    dataset, networks = run.summary.dataset, run.config["model"]
    names = networks["teacher"]["name"], networks["student"]["name"]
    by_pair = run.method in _TUNED_PER_PAIR and run.method not in (networks.get("tuned") or {})
    checks = {
        "another teacher": not is_published_teacher(published_for_pair(dataset, *names), run.summary.teacher_top1),
        "hyper-parameters not published": run.method in _UNPUBLISHED_HYPERPARAMETERS.get(dataset, ()),
        "hyper-parameters of another pair": by_pair or (run.method == "ttm" and names != ("vgg13", "vgg8")),
        "settings of most pairs": run.choices.get("model") in _ANY_PAIR,
    }
    return [words for words, differs in checks.items() if differs]


def _other_settings(run: Run) -> list[str]:
    """Keys set on the command line, for which the published rows have the option's values."""
    keys = dict.fromkeys(override.lstrip("+~").split("=")[0] for override in run.overrides)
    prefixes = ("loss.", "recipe.", "data.", "trainer.", "model.tuned", "model.student.weights", "experiment")
    known = {*_IGNORED_OVERRIDES, "trainer.precision"}
    return [f"other {key}" for key in keys if key not in known and key.startswith(prefixes) and affects_training(key)]


def _normalised(network: str, dataset: str) -> str:
    """``wrn402`` for ``wrn40_2``; only the ImageNet tables have torchvision's networks, and none has timm's."""
    name = network.lower()
    return re.sub(r"[^a-z0-9/]", "", name.removeprefix("torchvision/") if dataset == "imagenet" else name)
