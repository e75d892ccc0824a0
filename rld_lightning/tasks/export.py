"""Exports a student to common formats, and verifies on real images that each matches PyTorch."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from rld_lightning.atomic_files import write_whole
from rld_lightning.console import print_files, print_line, print_table
from rld_lightning.data.base import ImageDataModule
from rld_lightning.data.decode import decode_image
from rld_lightning.data.in_memory import InMemoryDataModule, Split
from rld_lightning.data.streaming_module import StreamingDataModule
from rld_lightning.errors import first_line, printable, user_errors
from rld_lightning.models.imported import trust
from rld_lightning.models.onnx_file import OnnxNetwork, example_input, export_copy, quantise_onnx, to_onnx
from rld_lightning.models.preprocessing import PixelsToProbabilities
from rld_lightning.models.student import EXPORT, Student, check_numbers, load_student
from rld_lightning.models.weights.companion_files import HUB_CONFIG
from rld_lightning.models.weights.read import HUB_WEIGHTS, RUN_WEIGHTS
from rld_lightning.models.weights.save import save_weights
from rld_lightning.reporting.card import CHOSEN_ON_TEST, Exported, hub_config, model_card
from rld_lightning.runs.files import BEST, EXPORTED, write_json
from rld_lightning.runs.finished import Run, read_run
from rld_lightning.runs.folder import check_folder, check_within
from rld_lightning.runs.rebuild import build_data
from rld_lightning.tasks.run.matched_classes import first_other
from rld_lightning.tasks.run.plan import freeze

FORMATS = ("safetensors", "onnx", "onnx_int8", "torch_export")
FILES = {"safetensors": HUB_WEIGHTS, "onnx": "model.onnx", "onnx_int8": "model.int8.onnx", "torch_export": "model.pt2"}
CARD = "README.md"
_BATCH = 64


@dataclass(frozen=True)
class Export:
    """Result of an export; also written as ``export.json``."""

    folder: str  # the directory of the files
    model: str  # the exported network
    checkpoint: Literal["last", "best"]  # the epoch, `"last"` or `"best"`
    dataset: str  # the data set of the comparison
    split: str  # its split, `"test"` or `"val"`
    pixels: bool  # whether the ONNX and `.pt2` files take uint8 pixels and return probabilities
    any_size: bool  # whether these take images of any size
    files: tuple[Exported, ...]  # the files, with the comparison


def export(cfg: DictConfig) -> Export:
    """Runs the job of ``conf/export.yaml``.

    Raises:
        UserError: the run is not finished, its data are missing, a package is missing, or a format does not support
            the network.
    """
    freeze(cfg)
    with user_errors():
        trust(cfg.trust)
        return export_run(
            Path(cfg.run),
            cfg.formats,
            checkpoint=cfg.checkpoint,
            out=None if cfg.out is None else Path(cfg.out),
            val_images=cfg.val_images,
            train_images=cfg.train_images,
            pixels=cfg.pixels,
            any_size=cfg.any_size,
            root=None if cfg.root is None else Path(cfg.root),
        )


def export_run(
    run: Path,
    formats: Sequence[str] = ("safetensors", "onnx", "torch_export"),
    *,
    checkpoint: Literal["last", "best"] = "last",
    out: Path | None = None,
    val_images: int | None = 1000,
    train_images: int = 256,
    pixels: bool = False,
    any_size: bool = True,
    root: Path | None = None,
) -> Export:
    """Exports the student of a finished run, compares each file with it on validation images, and prints a table.

    The directory has the layout of models on the Hugging Face Hub: ``config.json``, ``model.safetensors``, a model card
    in ``README.md``, and also ``model.onnx``, ``model.int8.onnx``, ``model.pt2`` and ``export.json``.

    Args:
        run: the directory of a finished run: its ``student.safetensors``, ``summary.json`` and ``config.yaml`` are
            read.
        formats: of :data:`FORMATS`; the card and ``export.json`` are always written.
        checkpoint: the student of the last epoch, or that of ``best.ckpt``, selected by validation.
        out: output directory; by default ``<run>/export``, or ``<run>/export_best`` for the best epoch.
        val_images: number of the run's validation images for the comparison, classes mixed; None for all, 0 for none,
            which needs no data.
        train_images: number of training images that calibrate ``onnx_int8``.
        pixels: whether the ONNX and ``.pt2`` files take uint8 pixels ``(B, H, W, 3)`` and return probabilities.
        any_size: whether these take images of any size, which they resize and crop; else of the network's size.
        root: where the data are, if not where they were during training.

    Returns:
        what was written, and how it compares.

    Raises:
        FileNotFoundError: the run is not finished, has no such checkpoint, or its data are missing.
        ImportError: a package is missing; the message says how to install it.
        ValueError: a format is unknown or does not support the network, the run's files are invalid, or the student's
            logits are not numbers.
    """
    _check(formats, val_images)
    finished = _finished(run, checkpoint)
    student = load_student(run / (RUN_WEIGHTS if checkpoint == "last" else BEST))
    if checkpoint == "best":  # its file does not record it
        student.facts = replace(student.facts, top1=finished.summary.top1_best)
    folder = out or run / (EXPORT if checkpoint == "last" else f"{EXPORT}_{checkpoint}")
    if out is None:
        check_within(folder, run, "out=")
    check_folder(folder, "out=", written=())
    of = "" if checkpoint == "last" else f", the best epoch on {finished.summary.validated_on}"
    print_line("model", f"{student.name}, {len(student.classes)} classes, of {run}{of}")
    if checkpoint == "best" and finished.summary.split == "test":
        print_line("caution", f"{CHOSEN_ON_TEST}; data.val_fraction=0.1 holds some out to choose by")
    needs_data = val_images != 0 or "onnx_int8" in formats
    data = _data(finished, student, root) if needs_data else None
    sample = _sample(data, val_images) if data is not None and val_images != 0 else None
    expected = None if sample is None else _run(student.network, sample.images.split(_BATCH))
    if expected is not None:
        check_numbers(expected, f"the student of {run}")
    folder.mkdir(parents=True, exist_ok=True)  # an error here is earlier than that of the first file
    writer = _Writer(student, folder, pixels=pixels, any_size=any_size)
    compared = []
    for made, run_file in writer.write(formats, lambda: _calibration(data, train_images)):
        if sample is None or expected is None:
            compared.append(made)
            continue
        own = writer.program_resizes(made.format)
        batches = _pictures(data, sample.positions) if own else writer.takes(sample.images, made.format).split(_BATCH)
        compared.append(_compare(made, _run(run_file, batches), expected, sample.label, writer.pixels(made.format)))
    summary = finished.summary
    result = Export(
        folder=str(folder),
        model=student.name,
        checkpoint=checkpoint,
        dataset=summary.dataset,
        split=summary.split,
        pixels=pixels,
        any_size=pixels and any_size,
        files=tuple(compared),
    )
    card = model_card(student, finished, compared, checkpoint=checkpoint, pixels=pixels, any_size=any_size)
    write_whole(folder / CARD, printable(card).encode())
    write_json(folder / EXPORTED, asdict(result))
    _report(result)
    written = {file.file for file in compared}
    if earlier := [name for name in FILES.values() if name not in written and (folder / name).is_file()]:
        print_line(
            "caution",
            f"{', '.join(earlier)} in {folder}: of an earlier export, maybe of another student, and not in {CARD}; "
            "export again with their formats, or remove them",
        )
    return result


def _finished(run: Path, checkpoint: str) -> Run:
    if run.suffix == ".ckpt":
        which = " checkpoint=best" if run.name == BEST else ""
        raise ValueError(f"run={run} is a checkpoint; give the directory of its run: run={run.parent}{which}.")
    if checkpoint not in ("last", "best"):
        raise ValueError(f"checkpoint={checkpoint} is not known; choose last or best.")
    finished = read_run(run)
    if checkpoint == "best" and not (run / BEST).is_file():
        raise FileNotFoundError(
            f"{run} has no {BEST}: its run has kept none (callbacks.checkpoint_best). Export its last epoch, with "
            "checkpoint=last."
        )
    return finished


def missing_for_onnx() -> list[str]:
    """Returns the packages that ONNX files need and that are not installed."""
    return [package for package in ("onnx", "onnxscript", "onnxruntime") if find_spec(package) is None]


def _check(formats: Sequence[str], val_images: int | None) -> None:
    if not formats or (unknown := [name for name in formats if name not in FORMATS]):
        raise ValueError(
            f"formats={list(formats)}: {unknown[0] if formats else 'none'} is not known; "
            f"choose of {', '.join(FORMATS)}."
        )
    if val_images is not None and val_images < 0:
        raise ValueError(f"val_images={val_images} must be a number of images, 0 for none, or null for all.")
    if any(name.startswith("onnx") for name in formats) and (lacking := missing_for_onnx()):
        raise ImportError(
            f'ONNX files need {lacking[0]}: pip install "rld-lightning[onnx]", or leave them out of formats='
        )


def _data(run: Run, student: Student, root: Path | None) -> ImageDataModule:
    """Returns the run's data for evaluation, without augmentation of the training images either."""
    settings = run.config["data"] | {"augment": False, "subset": 1.0, "mixup": 0.0, "cutmix": 0.0}
    settings = {key: value for key, value in settings.items() if key in run.config["data"]}
    data = build_data(replace(run, config=run.config | {"data": settings}), root, option="root=")
    data.prepare_data()
    data.setup("fit")
    if list(data.class_names) != student.classes:
        raise ValueError(
            f"{data.name} has other classes than {run.folder / RUN_WEIGHTS} was trained on"
            f"{first_other(student.classes, list(data.class_names))}; give the data's folder with root=."
        )
    data.normalize_with(student.transform.mean, student.transform.std)
    print_line("data", data.describe())
    return data


class _Sample(NamedTuple):
    """Validation images ``(N, 3, H, W)``, their classes, and their positions in the split."""

    images: Tensor
    label: Tensor
    positions: Tensor


def _sample(data: ImageDataModule, number: int | None) -> _Sample:
    """Returns the first validation images in an order that mixes the classes."""
    batches, count = [], 0
    for batch in data.val_sample(_BATCH):
        batches.append((batch.images, batch.label, batch.index))
        count += len(batch.label)
        if number is not None and count >= number:
            break
    return _Sample(*(torch.cat(parts)[:number] for parts in zip(*batches, strict=True)))


def _pictures(data: ImageDataModule | None, positions: Tensor) -> Iterator[Tensor]:
    """Yields the same images before resizing, uint8 ``(B, H, W, 3)``, consecutive images of one size together."""
    assert isinstance(data, StreamingDataModule | InMemoryDataModule)
    split, together = data.splits[data.val_split], list[Tensor]()
    decoder = "pil" if getattr(data, "decode", None) == "pil" else "auto"
    for position in positions.tolist():
        if isinstance(split, Split):
            picture = split.images[position]
        else:
            picture = decode_image(split.read(position), decoder).permute(1, 2, 0)
        if together and (len(together) == _BATCH or together[0].shape != picture.shape):
            yield torch.stack(together)
            together = []
        together.append(picture)
    yield torch.stack(together)


def _calibration(data: ImageDataModule | None, number: int) -> Iterator[Tensor]:
    """Yields training images, preprocessed as for validation, in batches."""
    assert data is not None
    count = 0
    for batch in data.train_dataloader():
        yield batch.images[: number - count]
        count += len(batch.images)
        if count >= number:
            return


class _Writer:
    """Writes the files of an export, each atomically."""

    def __init__(self, student: Student, folder: Path, *, pixels: bool, any_size: bool) -> None:
        self.student = student
        self.folder = folder
        self._pixels = pixels
        self.shape = (3, *student.transform.size)
        self._resize = pixels and any_size
        network = student.network
        if pixels:
            network = PixelsToProbabilities(network, student.transform, resize=any_size)
        self.network = export_copy(network)
        self._onnx: bytes | None = None

    def pixels(self, format: str) -> bool:
        """Whether a format takes pixels; safetensors contain only weights."""
        return self._pixels and format != "safetensors"

    def program_resizes(self, format: str) -> bool:
        """Whether a format takes images of any size."""
        return self._resize and self.pixels(format)

    def takes(self, images: Tensor, format: str) -> Tensor:
        """Converts normalised images to a format's input."""
        if not self.pixels(format):
            return images
        look = self.student.transform
        pixels = look.denormalize(images)
        return (look.pad_for_resize(pixels) if self._resize else pixels).permute(0, 2, 3, 1).contiguous()

    def write(
        self, formats: Iterable[str], calibration: Callable[[], Iterator[Tensor]]
    ) -> Iterator[tuple[Exported, Callable[[Tensor], Tensor]]]:
        """Writes the formats in turn; yields each result, and a function that runs the written file."""
        for format in dict.fromkeys(formats):
            print_line("export", f"{format}: {self.folder / FILES[format]}")
            path = self.folder / FILES[format]
            if format == "safetensors":
                save_weights(self.student.network, path, self.facts)
                write_json(self.folder / HUB_CONFIG, hub_config(self.student))
                runs: Callable[[Tensor], Tensor] = load_student(self.folder)
            elif format == "torch_export":
                write_whole(path, self._exported_program())
                runs = torch.export.load(path).module()
            else:
                content = self._onnx_file()
                if format == "onnx_int8":
                    content = quantise_onnx(content, (self.takes(batch, format) for batch in calibration()))
                write_whole(path, content)
                runs = OnnxNetwork(path)
            content = path.read_bytes()
            yield Exported(format, path.name, len(content), hashlib.sha256(content).hexdigest(), 0), runs

    @property
    def facts(self) -> Mapping[str, object]:
        """Returns the facts stored in each file."""
        look, known = self.student.transform, asdict(self.student.facts)
        return {key: value for key, value in known.items() if value is not None} | {
            "name": self.student.name,
            "num_classes": len(self.student.classes),
            "class_names": self.student.classes,
            "image_shape": list(self.shape),
            "resize": look.resize,
            "interpolation": look.interpolation,
            "mean": list(look.mean),
            "std": list(look.std),
        }

    def _onnx_file(self) -> bytes:
        if self._onnx is None:
            self._onnx = to_onnx(self.network, self.shape, self.facts)
        return self._onnx

    def _exported_program(self) -> bytes:
        example, free = example_input(self.network, self.shape)
        try:
            program = torch.export.export(self.network, (example,), dynamic_shapes=free)
        except Exception as error:  # each stage has its own exceptions
            reason = first_line(error)
            raise ValueError(
                f"torch.export cannot trace {self.student.name} ({reason}); leave torch_export out of formats=."
            ) from error
        torch.export.save(program, file := BytesIO(), extra_files={"facts.json": json.dumps(self.facts)})
        return file.getvalue()


@torch.inference_mode()
def _run(network: Callable[[Tensor], Tensor] | nn.Module, batches: Iterable[Tensor]) -> Tensor:
    return torch.cat([network(batch) for batch in batches])


def _compare(made: Exported, found: Tensor, expected: Tensor, label: Tensor, pixels: bool) -> Exported:
    wanted, best = (expected.softmax(1) if pixels else expected), expected.argmax(1)
    return replace(
        made,
        images=len(label),
        top1=_percent(found.argmax(1) == label),
        torch_top1=_percent(best == label),
        agreement=_percent(found.argmax(1) == best),
        max_difference=float((found - wanted).abs().max()),
    )


def _percent(right: Tensor) -> float:
    return 100 * float(right.double().mean())


def _report(result: Export) -> None:
    images = max((file.images for file in result.files), default=0)
    on = f", compared with PyTorch on {images:,} {result.split} images of {result.dataset}" if images else ""
    rows = [
        (
            file.file,
            f"{file.size / 1e6:.2f}",
            file.top1,
            file.torch_top1,
            file.agreement,
            None if file.max_difference is None else f"{file.max_difference:.1e}",
        )
        for file in result.files
    ]
    columns = ("file", "MB", "top-1 %", "PyTorch", "agree %", "max diff")
    print_table(f"{result.model}{on}", columns, rows)
    print_files(Path(result.folder), {CARD: "the model card", EXPORTED: "these numbers"})
