"""What a finished run came to."""

import json
from dataclasses import asdict, dataclass
from math import isnan
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from rld_lightning.models.registry import canonical_name
from rld_lightning.runs.files import SUMMARY, read_text, write_json


@dataclass(frozen=True)
class Summary:
    """What a finished run came to; written as ``summary.json``. Accuracy in percent.

    ``top1`` is the last epoch's, ``top1_best`` the best epoch's; tables in the literature print the best epoch on the
    test split.
    """

    model: str
    loss: str
    dataset: str
    split: str  # what it was validated on, `"test"` or `"val"`
    images: int  # how many images the accuracy is of
    val_fraction: float  # share of the training split that was held out for it; 0 where `split` is the data set's own
    data_seed: int  # seed of what was held out
    epochs: int
    seed: int
    top1: float
    top1_best: float
    top5: float | None
    ce: float
    teacher: str | None
    teacher_top1: float | None
    agreement: float | None
    parameters: int
    macs: int
    images_per_s: float | None  # of training steps, the median of the epochs
    run: str
    split_images: int  # how many there were to evaluate, unreadable ones aside
    steps: int  # how many steps of the optimizer were taken
    scheduled_steps: int | None  # how many the recipe's epochs take on all batches; None where nobody knows
    fast_dev_run: bool = False  # whether it was only to show that everything works, which is no result
    teacher_sha256: str | None = None  # of the file of the teacher; None without one
    seconds: float | None = None  # how long training took, validation included, over all attempts
    # The most memory that the first process had in use, of its GPU where it has one
    peak_memory_gb: float | None = None

    @property
    def validated_on(self) -> str:
        """What it was validated on, in words, the same with every seed."""
        if not self.evaluated_whole:
            split = {"test": "the test split", "val": "the validation split"}[self.split]
            return f"{self.images:,} of the {self.split_images:,} images of {split}"
        if self.split == "test":
            return "the test split"
        if self.val_fraction > 0:
            return f"{self.images:,} held-out training images (stratified)"
        return f"the {self.images:,} images of the data set's own validation split"

    @property
    def evaluated_whole(self) -> bool:
        """Whether the accuracy is of all images of the split."""
        return self.images >= self.split_images

    @property
    def trained_whole(self) -> bool:
        """Whether it was trained to the end of its schedule on all batches."""
        return self.scheduled_steps is None or self.steps >= self.scheduled_steps

    @property
    def complete(self) -> bool:
        """Whether it may stand beside other runs: trained to the end, and evaluated on the whole split."""
        return self.trained_whole and self.evaluated_whole and not self.fast_dev_run

    def write(self, run: Path) -> None:
        """Leaves it in the run's folder."""
        write_json(run / SUMMARY, asdict(self))


def read_summary(run: Path) -> Summary:
    """Reads a run's summary; what other versions of this package have written beside is left out.

    Raises:
        ValueError: it is not a summary.
    """
    try:
        values = json.loads(read_text(run / SUMMARY))
        for role in ("model", "teacher"):  # which a command may spell otherwise
            if isinstance(values[role], str):
                values[role] = canonical_name(values[role])
        found = Summary(**{name: value for name, value in values.items() if name in _KINDS})
        if wrong := [name for name, kind in _KINDS.items() if not _is_value(kind, getattr(found, name))]:
            raise TypeError(f"{wrong[0]} is of another kind")
        if wrong := [name for name in _PERCENT if not _is_percent(getattr(found, name))]:
            raise ValueError(f"{wrong[0]} is not in percent")
        return found
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise ValueError(f"{run / SUMMARY} is not the summary of a run: {error!r}. Move it away.") from error


_KINDS: dict[str, Any] = get_type_hints(Summary) | {"split": Literal["test", "val"]}
_LARGEST = 1 << 62
_PERCENT = ("top1", "top1_best", "top5", "teacher_top1", "agreement")


def _is_percent(value: float | None) -> bool:
    """Whether it is an accuracy, or none; a student whose logits are no numbers has NaN."""
    return value is None or isnan(value) or 0 <= value <= 100


def _is_value(kind: Any, value: object) -> bool:
    """Whether a value is of a field's kind; the file may be a stranger's, and what reads it takes that for granted."""
    kinds = get_args(kind) or (kind,)
    if isinstance(value, int) and not isinstance(value, bool):
        return bool({int, float} & {*kinds}) and 0 <= value < _LARGEST
    return value in kinds if get_origin(kind) is Literal else type(value) in kinds
