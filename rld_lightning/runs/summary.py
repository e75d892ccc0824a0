"""Results of a finished run."""

import json
from dataclasses import MISSING, asdict, dataclass, fields
from math import inf, isnan
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from rld_lightning.errors import malformed
from rld_lightning.models.registry import canonical_name
from rld_lightning.runs.files import SUMMARY, read_text, write_json


@dataclass(frozen=True)
class Summary:
    """Results of a finished run, written as ``summary.json``. Accuracy in percent.

    ``top1`` is the last epoch's, ``top1_best`` the best epoch's; tables in the literature print the best epoch on the
    test split.
    """

    model: str
    loss: str
    dataset: str
    split: str  # validation data, `"test"` or `"val"`
    images: int  # number of evaluated images
    val_fraction: float  # fraction of the training split that was held out for it; 0 if `split` is the data set's own
    data_seed: int  # seed of the held-out part
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
    images_per_s: float | None  # of training steps, the median over the epochs
    run: str
    split_images: int  # number of images in the split, without unreadable ones
    steps: int  # optimizer steps taken
    scheduled_steps: int | None  # steps of the recipe's epochs on all batches; None if unknown
    fast_dev_run: bool = False  # whether it was a smoke test, which is not a result
    teacher_sha256: str | None = None  # of the teacher's file; None without one
    seconds: float | None = None  # training time, validation included, over all resumes
    # Peak memory of rank 0, on its GPU if it has one.
    peak_memory_gb: float | None = None

    @property
    def validated_on(self) -> str:
        """The validation data in words, the same for every seed."""
        if not self.evaluated_whole:
            split = {"test": "the test split", "val": "the validation split"}[self.split]
            return f"{self.images:,} of the {self.split_images:,} images of {split}"
        if self.split == "test":
            return "the test split"
        if self.val_fraction > 0:
            return f"{self.images:,} held-out training images (stratified)"
        return f"the {self.images:,} images of the data set's own validation split"

    @property
    def validation_images(self) -> str:
        """The validation data in words, with the number of images."""
        number = f"{self.images:,} images"
        return f"{self.validated_on} ({number})" if self.validated_on == "the test split" else self.validated_on

    @property
    def evaluated_whole(self) -> bool:
        """Whether all images of the split were evaluated."""
        return self.images >= self.split_images

    @property
    def trained_whole(self) -> bool:
        """Whether it was trained to the end of its schedule on all batches."""
        return self.scheduled_steps is None or self.steps >= self.scheduled_steps

    @property
    def complete(self) -> bool:
        """Whether it is comparable to other runs: trained to the end, and evaluated on the whole split."""
        return self.trained_whole and self.evaluated_whole and not self.fast_dev_run

    def write(self, run: Path) -> None:
        """Writes the summary to the run's directory."""
        write_json(run / SUMMARY, asdict(self))


def read_summary(run: Path) -> Summary:
    """Reads a run's summary; ignores fields that other versions of this package have added.

    Raises:
        ValueError: it is not a summary.
    """
    try:
        values = json.loads(read_text(run / SUMMARY))
        for role in ("model", "teacher"):  # a command may spell it otherwise
            if isinstance(values[role], str):
                values[role] = canonical_name(values[role])
        required = {field.name: values[field.name] for field in fields(Summary) if field.default is MISSING}
        found = Summary(**required | {name: value for name, value in values.items() if name in _KINDS})
        if wrong := [name for name, kind in _KINDS.items() if not _is_value(kind, getattr(found, name))]:
            raise ValueError(f"{wrong[0]} is of another kind")
        if wrong := [name for name in _MOST if not _is_in_range(getattr(found, name), _MOST[name])]:
            raise ValueError(f"{wrong[0]} is not from 0 to {_MOST[wrong[0]]:g}")
        return found
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise ValueError(f"{run / SUMMARY} is not the summary of a run: {malformed(error)}. Move it away.") from error


_KINDS: dict[str, Any] = get_type_hints(Summary) | {"split": Literal["test", "val"]}
_LARGEST = 1 << 62
# Largest values; the smallest is 0.
_MOST = {
    **dict.fromkeys(("top1", "top1_best", "top5", "teacher_top1", "agreement"), 100.0),
    **dict.fromkeys(("images_per_s", "seconds", "peak_memory_gb"), 1e18),
    "val_fraction": 1.0,
    "ce": inf,
}


def _is_in_range(value: float | None, most: float) -> bool:
    """Whether it is missing or a valid measurement; a student with non-finite logits has NaN."""
    return value is None or isnan(value) or 0 <= value <= most


def _is_value(kind: Any, value: object) -> bool:
    """Whether a value has a field's type; the file may be untrusted, and readers rely on the types."""
    kinds = get_args(kind) or (kind,)
    if isinstance(value, int) and not isinstance(value, bool):
        return bool({int, float} & {*kinds}) and 0 <= value < _LARGEST
    return value in kinds if get_origin(kind) is Literal else type(value) in kinds
