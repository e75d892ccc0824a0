"""Classifies images with any student, checkpoint, export or ONNX file, after the preprocessing of validation."""

import csv
import glob
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from rld_lightning.atomic_files import write_whole
from rld_lightning.console import print_files, print_line, print_table
from rld_lightning.data.augment import Normalize
from rld_lightning.data.bad_images import BadImage, BadImageReport
from rld_lightning.data.crops import CentreCrop
from rld_lightning.data.image_list import ImageList
from rld_lightning.data.sampler import EpochSampler
from rld_lightning.data.streaming import StreamedImages, StreamingLoader
from rld_lightning.distributed import Stopped
from rld_lightning.errors import UserError, user_errors
from rld_lightning.models.classes import read_class_names
from rld_lightning.models.onnx_file import OnnxNetwork
from rld_lightning.models.preprocessing import Preprocessing, preprocessing_of
from rld_lightning.models.student import Prediction, load_student
from rld_lightning.progress_bar import progress_bar
from rld_lightning.runs.files import plain_cell
from rld_lightning.runs.folder import check_folder
from rld_lightning.tasks.run.make import device_of
from rld_lightning.tasks.run.plan import freeze

STDIN = STDOUT = "-"
MOST_ROWS_SHOWN = 40
_FEW = 64  # number of images for which starting a reader process does not pay off


class Classifier(NamedTuple):
    """A network with its preprocessing and classes."""

    probabilities: Callable[[Tensor], Tensor]  # maps normalised images `(B, 3, H, W)` to `(B, C)`
    classes: Sequence[str]  # the C names
    transform: Preprocessing  # its preprocessing
    name: str  # its name
    device: torch.device  # device of its input


class Answer(NamedTuple):
    """The most likely classes of an image, in order; or why it cannot be read."""

    image: str
    predictions: list[Prediction]
    error: str = ""


def predict(cfg: DictConfig) -> int:
    """Runs the job of ``conf/predict.yaml``.

    Returns:
        the number of images that could not be read.

    Raises:
        UserError: the weights cannot be used, there are no images, none of them can be read, or the answers cannot be
            written.
    """
    freeze(cfg)
    with user_errors():
        path = None if cfg.out == STDOUT else _file_of(cfg)
        if path is not None:
            check_folder(path.parent, "out=", written=())
        sources = [cfg.images] if isinstance(cfg.images, str) else list(cfg.images)
        paths = find_images(sources)
        classifier = load_classifier(cfg)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)  # an error here is earlier than the answers'
    print_line("model", f"{classifier.name}, {len(classifier.classes)} classes, {cfg.weights}")
    print_line("images", f"{len(paths):,}: {classifier.transform.describe()}")
    answers = answer(classifier, paths, top=cfg.top, batch_size=cfg.batch_size, num_workers=cfg.num_workers)
    encode = {"csv": _csv, "jsonl": _json_lines, "table": _csv}[cfg.format]
    finished: list[Answer] = []

    def write(path: Path) -> None:
        with user_errors():
            write_whole(path, b"".join(encode(finished, min(cfg.top, len(classifier.classes)))))

    try:
        if path is None and cfg.format != "table":
            for lines in encode(_recorded(answers, finished), min(cfg.top, len(classifier.classes))):
                sys.stdout.buffer.write(lines)
                sys.stdout.flush()
        else:
            finished.extend(answers)  # contains those before an interruption
    except (KeyboardInterrupt, Stopped):
        if path is not None and finished:  # not replacing a complete file of an earlier command
            write(part := path.with_name(f"{path.stem}.partial{path.suffix}"))
            print_line("answered", f"{len(finished):,} of {len(paths):,} images: {part}")
        raise
    if cfg.format == "table":
        _print(finished, classifier)
    broken = [result for result in finished if result.error]
    for result in broken[:MOST_ROWS_SHOWN]:
        print_line("broken", f"{result.image}: {result.error}")
    if broken:
        print_line("broken", f"{len(broken):,} of {len(finished):,} images could not be read")
    if path is not None:
        write(path)
        print_files(path.parent, {path.name: "each image"})
    return len(broken)


def _file_of(cfg: DictConfig) -> Path:
    """Returns the output file."""
    path = Path(cfg.out or Path(cfg.paths.run) / f"predictions.{'jsonl' if cfg.format == 'jsonl' else 'csv'}")
    if path.is_dir():
        raise UserError(f"out={path} is a directory; name a file in it.")
    return path


def find_images(sources: Iterable[str]) -> list[str]:
    """Returns the files of the sources, in order, each once.

    Args:
        sources: files, folders (including everything below), patterns such as ``photos/**/*.jpg``, and ``-`` for a list
            on standard input, one per line.

    Raises:
        FileNotFoundError: a source does not exist, or there is no image at all.
    """
    found: dict[str, None] = {}
    for source in sources:
        if source == STDIN:
            lines = (os.fsdecode(line.rstrip(b"\r\n")) for line in sys.stdin.buffer)
            found |= dict.fromkeys(line for line in lines if line)
            continue
        path = os.path.expanduser(source)  # noqa: PTH111 -- a pattern is not a path
        if os.path.lexists(path):
            matches = [path]
        elif matches := sorted(_matching(path)):
            pass
        else:
            raise FileNotFoundError(f"images={source}: there is no such file or folder, and nothing matches it.")
        for match in matches:
            found |= dict.fromkeys(_below(match) if Path(match).is_dir() else [match])
    if not found:
        raise FileNotFoundError(
            f"images={', '.join(sources)}: there is no image in it; files that end in {', '.join(IMG_EXTENSIONS)} are "
            "looked for."
        )
    return list(found)


def _matching(pattern: str) -> Iterator[str]:
    """Like :mod:`glob`, but ``**`` follows no links to folders: two that lead back would double all, 40 times."""
    above, stars, rest = f"/{pattern}".partition("/**")  # the leading slash is removed again
    if not stars or not (rest.startswith("/") or not rest):
        yield from glob.glob(pattern)  # noqa: PTH207 -- patterns with a root
        return
    within = rest[1:] if rest else "*"
    for top in _matching(above[1:] or "/") if above else ["."]:
        for folder, inner, _ in os.walk(top):
            inner[:] = [name for name in inner if not name.startswith(".")]
            found = _matching(f"{glob.escape(folder)}/{within}")
            yield from found if above else map(os.path.normpath, found)


def _below(folder: str) -> Iterator[str]:
    for path, inner, files in os.walk(folder):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        shown = (name for name in sorted(files) if not name.startswith("."))
        yield from (str(Path(path, name)) for name in shown if name.lower().endswith(IMG_EXTENSIONS))


def load_classifier(cfg: DictConfig) -> Classifier:
    """Loads the network of ``weights=``; options of the command override the file's facts.

    Raises:
        WeightsError: it cannot be used, or its file lacks facts.
    """
    device = device_of(cfg.device)
    options = {key: cfg[key] for key in ("image_size", "resize", "mean", "std", "interpolation")}
    options = {key: list(v) if OmegaConf.is_list(v) else v for key, v in options.items() if v is not None}
    names = None if cfg.class_names is None else _names(cfg.class_names)
    if str(cfg.weights).endswith(".onnx"):
        return _of_onnx(OnnxNetwork(cfg.weights, device=device.type), cfg.name, names, options)
    student = load_student(cfg.weights, name=cfg.name, class_names=names, **options).to(device)

    def probabilities(images: Tensor) -> Tensor:
        return student(images).float().softmax(1)

    return Classifier(probabilities, student.classes, student.transform, student.name, device)


def _of_onnx(network: OnnxNetwork, name: str | None, names: list[str] | None, options: dict[str, object]) -> Classifier:
    facts = network.facts
    if facts.image_shape is None and network.image_size is not None:
        options = {"image_size": network.image_size} | options
    name = name or facts.name or network.source.name
    transform = preprocessing_of(facts, name, network.source, **options)  # type: ignore[arg-type]  # checked by Hydra
    classes = names or facts.class_names or [str(index) for index in range(network.num_classes or 0)]
    if network.num_classes is not None and len(classes) != network.num_classes:
        raise ValueError(
            f"{network.source} has {network.num_classes} classes, and there are {len(classes)} class names; "
            "give class_names=."
        )

    def probabilities(images: Tensor) -> Tensor:
        if network.takes_pixels:
            pixels = transform.denormalize(images)
            return network((transform.pad_for_resize(pixels) if network.resizes else pixels).permute(0, 2, 3, 1))
        return network(images).softmax(1)

    return Classifier(probabilities, classes, transform, name, torch.device("cpu"))


def _names(given: object) -> list[str]:
    """Returns class names from a list, or from a text file with one name per line."""
    if not isinstance(given, str):
        return [str(name) for name in given]  # type: ignore[attr-defined]
    return read_class_names(given, "class_names=")


class _Broken(BadImageReport):
    """Collects why images cannot be read, instead of printing it."""

    def __init__(self) -> None:
        super().__init__()
        self.reasons: dict[str, str] = {}

    def add(self, images: Iterable[BadImage], consequence: str) -> None:
        """Collects them."""
        self.reasons.update((image.path, image.reason) for image in images)


@torch.inference_mode()
def answer(
    classifier: Classifier, paths: Sequence[str], *, top: int = 5, batch_size: int = 64, num_workers: int | None = None
) -> Iterator[Answer]:
    """Yields an answer per image, in order, as batches are finished; shows their progress.

    Uses the loader and the transform of validation.

    Args:
        num_workers: number of reader processes; by default none for a few images.

    Raises:
        UnreadableImagesError: none of them can be read.
        UserError: the network's output for an image is not a number.
    """
    transform, report = classifier.transform, _Broken()
    images = ImageList(
        list(classifier.classes), np.array([os.fsencode(path) for path in paths]), torch.zeros(len(paths)).long()
    )
    loader = StreamingLoader(
        StreamedImages(images, CentreCrop(transform.resize, transform.size, transform.interpolation)),
        EpochSampler.for_evaluation(len(paths), batch_size),
        Normalize(transform.mean, transform.std, *transform.size, classifier.device),
        device=classifier.device,
        num_workers=(0 if len(paths) < _FEW else min(4, os.cpu_count() or 1)) if num_workers is None else num_workers,
        report=report,
    )
    done = 0
    with progress_bar("predict", "images classified", len(paths)) as advance:
        for batch, step in zip(loader, loader.sampler.steps, strict=True):
            probabilities = classifier.probabilities(batch.images) if len(batch.index) else torch.empty(0, 1)
            if (wrong := probabilities.isnan().any(1)).any():
                raise UserError(
                    f"{classifier.name} has no numbers for {paths[int(batch.index[wrong.cpu()][0])]}: check how its "
                    "weights were trained or converted."
                )
            best = probabilities.topk(min(top, probabilities.shape[1]), 1)
            rows = dict(zip(batch.index.tolist(), zip(*(part.tolist() for part in best), strict=True), strict=True))
            for position in range(done, done + step.stop - step.start):
                path = paths[position]
                if position in rows:
                    named = [Prediction(classifier.classes[i], p) for p, i in zip(*rows[position], strict=True)]
                    yield Answer(path, named)
                else:
                    yield Answer(path, [], report.reasons.get(path, "it cannot be read"))
            done += step.stop - step.start
            advance(step.stop - step.start)


def _recorded(answers: Iterable[Answer], finished: list[Answer]) -> Iterator[Answer]:
    for result in answers:
        finished.append(result)
        yield result


def _csv(answers: Iterable[Answer], top: int) -> Iterator[bytes]:
    """Yields CSV lines: the image, classes and probabilities in turn, and why it cannot be read."""
    ranks = range(1, top + 1)
    columns = ["image", *(f"{what}_{rank}" for rank in ranks for what in ("class", "probability")), "error"]
    yield _line(columns)
    for result in answers:
        cells = [cell for name, p in result.predictions for cell in (name, f"{p:.6f}")]
        yield _line([result.image, *(cells or [""] * 2 * top), result.error])


def _line(cells: Sequence[str]) -> bytes:
    """Formats exactly one CSV line."""
    lines = (plain_cell(" ".join(cell.splitlines())) for cell in cells)
    csv.writer(text := StringIO(), lineterminator="\n").writerow(lines)
    return text.getvalue().encode("utf-8", "surrogateescape")


def _json_lines(answers: Iterable[Answer], top: int) -> Iterator[bytes]:
    for result in answers:
        if result.error:
            row: dict[str, object] = {"image": result.image, "error": result.error}
        else:
            row = {
                "image": result.image,
                "classes": [{"class": name, "probability": round(p, 6)} for name, p in result.predictions],
            }
        yield (json.dumps(row) + "\n").encode()


def _common_folder(paths: Sequence[str]) -> str:
    """Returns the common beginning of several paths, up to a slash; empty for a single one."""
    shared = os.path.commonprefix(paths)  # noqa: RUF071 -- as written, and cut at a slash
    folder = shared[: shared.rfind(os.sep) + 1]
    return "" if len(paths) < 2 or folder == os.sep else folder


def _print(answers: Sequence[Answer], classifier: Classifier) -> None:
    read = [result for result in answers if not result.error]
    shown = read[:MOST_ROWS_SHOWN]
    width = max((len(result.predictions) for result in shown), default=0)
    folder = _common_folder([result.image for result in shown])
    rows = [
        (result.image.removeprefix(folder), *(f"{name} {100 * p:.1f} %" for name, p in result.predictions))
        for result in shown
    ]
    title = f"{classifier.name} on {len(read):,} images" + (
        f", the first {len(shown)}" if len(read) > len(shown) else ""
    )
    title += f", in {folder}" if folder else ""
    print_table(title, ("image", *(f"{rank}." for rank in range(1, width + 1))), rows)
