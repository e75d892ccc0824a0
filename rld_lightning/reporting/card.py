"""The model card of an exported student, with its description, accuracy and usage, for the Hugging Face Hub."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Literal

import yaml

from rld_lightning.models.complexity import count_macs, count_parameters
from rld_lightning.models.input_size import split_size
from rld_lightning.models.student import Student
from rld_lightning.models.weights.read import HUB_WEIGHTS
from rld_lightning.reporting.networks import read_networks, table_of
from rld_lightning.runs.finished import Run

CHOSEN_ON_TEST = (
    "the epoch was chosen on the test split itself, so its accuracy there is somewhat higher than on other images"
)
# Of held-out training images.
TEACHER_MAY_KNOW = "The teacher's accuracy is too high if it was trained on these images, too."
_MOST_CLASSES = 20


@dataclass(frozen=True)
class Exported:
    """One file of an export, and its comparison with the student in PyTorch on the same images."""

    format: str  # such as `"onnx"`
    file: str  # its name in the export folder
    size: int  # in bytes
    sha256: str  # of the file, as hexadecimal digits
    images: int  # number of compared images; if 0, the fields below are None
    top1: float | None = None  # its accuracy on them, in percent
    torch_top1: float | None = None  # the student's, in percent
    agreement: float | None = None  # percentage of images with the same predicted class
    max_difference: float | None = None  # largest difference of a logit, or of a probability if the file returns these


def model_card(
    student: Student,
    run: Run,
    exported: Sequence[Exported],
    *,
    checkpoint: Literal["last", "best"] = "last",
    pixels: bool,
    any_size: bool = False,
) -> str:
    """The text of ``README.md``, in Markdown with a header in YAML.

    Args:
        checkpoint: the student's epoch.
        pixels: whether the ONNX and ``.pt2`` files map pixels to probabilities.
        any_size: whether they accept images of any size.
    """
    summary, in_timm = run.summary, student.name.startswith("timm/")
    is_last = checkpoint == "last"
    top1 = summary.top1 if is_last else summary.top1_best
    data_id = re.sub(r"[^\w.-]+", "-", summary.dataset, flags=re.ASCII).strip("-") or "images"  # as the Hub's names
    header = {
        "library_name": "timm" if in_timm else "rld-lightning",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", *(["timm"] if in_timm else []), "rld-lightning"]
        + (["knowledge-distillation"] if summary.teacher else []),
        "model-index": [
            {
                "name": student.name,
                "results": [
                    {
                        "task": {"type": "image-classification"},
                        "dataset": {"name": summary.dataset, "type": data_id, "split": summary.split},
                        "metrics": [{"type": "accuracy", "name": "top-1 (%)", "value": round(top1, 2)}],
                    }
                ],
            }
        ],
    }
    distilled_from = f", distilled from {summary.teacher}" if summary.teacher else ""
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
        f"# {_text(student.name)} on {_text(summary.dataset)}",
        f"An image classifier for {len(student.classes)} classes{_text(distilled_from)}, trained with "
        "[rld-lightning](https://arxiv.org/abs/2408.07703).",
        "## Results",
        _table(("", "student", "teacher"), _results(student, run, top1, is_last=is_last)),
        f"Accuracy is that of the {checkpoint} epoch on {_text(summary.validation_images)}."
        + ("" if is_last else f" {_selection_note(run)}")
        + (f" {TEACHER_MAY_KNOW}" if summary.teacher_top1 is not None and summary.val_fraction > 0 else ""),
        *(_comparison(run) if is_last else ()),  # the comparison is of the last epoch
        "## Training",
        _table(("", ""), _training(run)),
        "## Input",
        f"RGB images: {student.transform.describe()}. Classes: {_classes(student.classes)}.",
        "## Use",
        _usage(student, exported, pixels=pixels, any_size=any_size),
    ]
    if rows := [_file_row(file) for file in exported]:
        columns = ("file", "MB", "top-1 %", "PyTorch's %", "agreement %", "largest difference", "images")
        parts += ["## Files", _table(columns, rows)]
    return "\n\n".join(parts) + "\n"


def _selection_note(run: Run) -> str:
    """The caveat on an accuracy that the epoch was chosen by."""
    if run.summary.split == "test":
        return f"Note that {CHOSEN_ON_TEST}."
    return "The epoch was chosen by it, so it is somewhat higher than on other images."


def _results(student: Student, run: Run, top1: float, *, is_last: bool) -> list[tuple[str, str, str]]:
    summary, size = run.summary, (3, *student.transform.size)
    rows = [("top-1 %", _number(top1), _number(summary.teacher_top1))]
    if is_last:  # not recorded for other epochs
        rows.append(("top-5 %", _number(summary.top5), "-"))
        rows.append(("agreement with the teacher %", _number(summary.agreement), "-"))
    rows.append(("parameters", f"{count_parameters(student.network):,}", "-"))
    rows.append(("multiply-accumulates an image", f"{count_macs(student.network, size):,}", "-"))
    return [row for row in rows if row[1] != "-"]


def _comparison(run: Run) -> list[str]:
    """The comparison of teacher, student alone and distilled student, if the run has measured them."""
    if not (networks := read_networks(run.folder)):
        return []
    return [
        "## Comparison",
        _table(*table_of(networks)),
        f"Measured once on the {networks[-1].images:,} images of the {_text(networks[-1].split)} split. ECE is the "
        "expected calibration error in 15 bins, NLL the negative log-likelihood in nats; time is the fastest of one "
        f"image at a time, in float32 with batch norms folded, on {_text(networks[-1].device)}.",
    ]


def _training(run: Run) -> list[tuple[str, str]]:
    summary, environment = run.summary, run.environment
    rows: Mapping[str, object] = {
        "data": summary.dataset,
        "teacher": summary.teacher,
        "teacher's file, SHA-256": summary.teacher_sha256,
        "loss": f"{run.method} ({summary.loss})",
        "epochs": summary.epochs,
        "seed": summary.seed,
        "options": " ".join(map(_without_folders, run.overrides)),
        "commit": environment.get("commit"),
        "versions": ", ".join(
            f"{name} {environment[name]}" for name in ("rld_lightning", "torch") if name in environment
        ),
    }
    return [(name, str(value)) for name, value in rows.items() if value not in (None, "")]


def _without_folders(override: str) -> str:
    """An override without local folders, since cards are published."""
    key, equals, value = override.partition("=")
    return f"{key}=.../{PurePath(value).name}" if equals and value.startswith(("/", "~")) else override


def _usage(student: Student, exported: Sequence[Exported], *, pixels: bool, any_size: bool) -> str:
    files = {file.format: file.file for file in exported}
    blocks = []
    if "safetensors" in files:
        blocks.append(
            'from rld_lightning import load_student\n\nstudent = load_student(".")  # this folder\n'
            'student.predict("photo.jpg")  # [[Prediction(name=..., probability=...), ...]]'
        )
        if student.name.startswith("timm/"):
            blocks.append('import timm\n\nmodel = timm.create_model("local-dir:.", pretrained=True).eval()')
    if onnx := files.get("onnx", files.get("onnx_int8")):
        height, width = student.transform.size
        shape = "(B, H, W, 3), upright and of any size," if any_size else f"(B, {height}, {width}, 3), upright,"
        takes = (
            f'{{"pixels": pixels}})  # uint8 {shape} to probabilities'
            if pixels
            else f'{{"images": images}})  # normalised float32 (B, 3, {height}, {width}) to logits'
        )
        session = f'import onnxruntime\n\nsession = onnxruntime.InferenceSession("{onnx}")\n'
        blocks.append(f"{session}(found,) = session.run(None, {takes}")
    if "torch_export" in files:
        blocks.append(f'import torch\n\nmodel = torch.export.load("{files["torch_export"]}").module()')
    return "\n\n".join(f"```python\n{block}\n```" for block in blocks)


class _Code(str):
    """Trusted text in backticks, which is not escaped."""


def _file_row(file: Exported) -> tuple[str, ...]:
    difference = "-" if file.max_difference is None else f"{file.max_difference:.2g}"
    return (
        _Code(f"`{file.file}`"),
        f"{file.size / 1e6:.2f}",
        *map(_number, (file.top1, file.torch_top1, file.agreement)),
        difference,
        str(file.images or "-"),
    )


def _classes(names: Sequence[str]) -> str:
    shown = ", ".join(map(_text, names[:_MOST_CLASSES]))
    more = f" and {len(names) - _MOST_CLASSES} more, in `config.json`" if len(names) > _MOST_CLASSES else ""
    return shown + more


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = [columns, ["---"] * len(columns), *rows]
    return "\n".join(
        f"| {' | '.join(cell if isinstance(cell, _Code) else _text(cell) for cell in row)} |" for row in cells
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _text(value: object) -> str:
    """A value escaped for Markdown, on one line: no HTML, links or table cells."""
    line = " ".join(str(value).split())
    return re.sub(r"([\\`|\[\]<>*])", r"\\\1", line)


def hub_config(student: Student) -> dict[str, object]:
    """The contents of ``config.json`` in timm's format, with our own settings under ``rld_lightning``.

    ``architecture`` is timm's name of a ``timm/`` network; other networks have a name under ``rld_lightning`` only, so
    that timm does not load them as its own. For a network that resizes its images to a size of its own, ``input_size``
    is that size: timm resizes the picture to it directly.
    """
    plain, side = split_size(student.name)
    transform, library = student.transform, plain.partition("/")
    shared: dict[str, object] = {
        "num_classes": len(student.classes),
        "input_size": [3, *(transform.size if side is None else (side, side))],
        "interpolation": transform.interpolation,
        "crop_pct": min(transform.size) / transform.resize,
        "crop_mode": "center",
        "mean": list(transform.mean),
        "std": list(transform.std),
    }
    own = {"name": student.name, "weights": HUB_WEIGHTS, "resize": transform.resize}
    config: dict[str, object] = {"architecture": library[2]} if library[0] == "timm" else {}
    return config | {
        "num_classes": len(student.classes),
        "label_names": student.classes,
        "pretrained_cfg": shared | _timm_layers(student),
        "rld_lightning": own,
    }


def _timm_layers(student: Student) -> dict[str, object]:
    """The names of a timm network's first and last layer, and its input constraints, from timm's own config."""
    config = getattr(student.network, "pretrained_cfg", None)
    layers = (
        {key: config.get(key) for key in ("first_conv", "classifier", "pool_size", "fixed_input_size")}
        if config
        else {}
    )
    return {key: list(value) if isinstance(value, tuple) else value for key, value in layers.items() if value}
