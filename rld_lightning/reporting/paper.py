"""Published accuracies (``paper_tables.json``, each with its source), and which of our losses they belong to."""

import json
import re
from dataclasses import dataclass
from functools import cache
from importlib import resources

TEACHER = "Teacher"

# Options of conf/loss, and what the published tables call them. What is not here has no published row: variants of ours
# (rld_reference, kdg...), and mlkd_noaug, because the published MLKD trains longer and with two views.
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
    "mlkd": "MLKD",
    "nkd": "NKD",
    "ttm": "TTM",
    "wttm": "WTTM",
    "wttm+crd": "WTTM+CRD",
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
# Epochs of the published rows, by our name of the data set; other rows say so in their note.
EPOCHS = {"cifar100": 240, "imagenet": 100}
# Where several sources print a number, the first of these stands in the table; those that are not here follow.
_PREFERRED = ("LSKD-paper", "RLD-note+DSKD", "RLD-note", "DSKD-readme")


@dataclass(frozen=True)
class Published:
    """A number that somebody has published. Accuracy in percent.

    ``metric`` is ``top1`` or ``top5`` as a paper prints it (the best epoch, where it does not say), or with the suffix
    ``_best_epoch`` or ``_last_epoch`` of a training log.
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
        """Whether it was read in somebody else's summary, not in the paper or its code."""
        return self.source.startswith("SECOND-HAND")


@cache
def published_numbers() -> tuple[Published, ...]:
    """All of them, the preferred sources first."""
    records = json.loads((resources.files("rld_lightning.reporting") / "paper_tables.json").read_text("utf-8"))
    rank = {key: place for place, key in enumerate(_PREFERRED)}
    numbers = [Published(**record) for record in records]
    return tuple(sorted(numbers, key=lambda number: rank.get(number.source_key, len(rank) + number.second_hand)))


def published_for_pair(dataset: str, teacher: str | None, student: str) -> list[Published]:
    """What is published about a pair, the preferred sources first.

    Args:
        dataset: our name of it, such as ``cifar100``.
        teacher: our name of the network, such as ``wrn_40_2`` or ``torchvision/resnet34``.
        student: likewise.
    """
    if teacher is None or dataset not in DATASETS:
        return []
    wanted = (DATASETS[dataset], _plain(teacher), _plain(student))
    return [n for n in published_numbers() if (n.dataset, _plain(n.teacher), _plain(n.student)) == wanted]


def published_top1(numbers: list[Published], method: str, *, standardized: bool = False) -> list[Published]:
    """The published top-1 of one of our losses, or of :data:`TEACHER`, the preferred source first.

    Args:
        numbers: of one pair.
        method: an option of the loss group, or :data:`TEACHER`.
        standardized: whether it was run with ``loss.logit_standardization=true``, which the tables call LSKD.
    """
    name = TEACHER if method == TEACHER else METHODS.get(method, "")
    if standardized and not name.endswith("+LSKD"):
        name += "+LSKD"
    return [number for number in numbers if number.method == name and number.metric == "top1"]


def _plain(network: str) -> str:
    """``wrn402`` of ``wrn_40_2``; torchvision's networks are those of the ImageNet tables, timm's weights are not."""
    return re.sub(r"[^a-z0-9/]", "", network.lower().removeprefix("torchvision/"))
