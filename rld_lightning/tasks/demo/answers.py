"""Answers for the demo page: runs both networks on a picture, and shows how RLD refines the teacher."""

import base64
import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor

from rld_lightning.console import print_line
from rld_lightning.data.base import ImageDataModule
from rld_lightning.data.decode import BadImageError, decode_image, read_header
from rld_lightning.errors import user_errors
from rld_lightning.losses.rld import RLDLoss
from rld_lightning.models.imported import trust
from rld_lightning.models.normalisation import Normalisation
from rld_lightning.models.student import check_numbers, load_student
from rld_lightning.models.weights.read import RUN_WEIGHTS
from rld_lightning.reporting.figures.explain_page import explain_in_words
from rld_lightning.reporting.figures.refine import Refinement, default_rld, refine, rld_of
from rld_lightning.runs.finished import Run, read_run
from rld_lightning.tasks.demo.web_server import serve
from rld_lightning.tasks.run.make import device_of
from rld_lightning.tasks.run.plan import freeze
from rld_lightning.tasks.teacher.network import build_teacher
from rld_lightning.tasks.teacher.recorded import teacher_of

FORMATS = ("JPEG", "PNG", "WEBP")
MOST_PIXELS = 50_000_000  # less than for data: decoding one picture takes some hundred megabytes
BEST = 5  # classes of each network that get a row
_REMEMBERED = 8  # pictures whose logits are cached, for another label
_TIMED, _LEAST, _SECONDS = 11, 3, 0.3  # passes at most and at least, and for how many seconds


@dataclass(frozen=True)
class _Images:
    """The images' properties that a teacher needs: those of the student's input."""

    name: str
    class_names: list[str]
    num_classes: int
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]


class Asked(NamedTuple):
    """Results of both networks for a picture."""

    student: Tensor  # logits `(C,)`, float32
    teacher: Tensor  # logits `(C,)`, float32
    milliseconds: dict[str, float]  # of each network: median over some passes with a batch of one
    seen: str  # the networks' input pixels, as a `data:` URL of a PNG file


class Demo:
    """Teacher and student of a finished run, for one picture at a time; threads take turns.

    Args:
        run: a finished run, with the student in its directory.
        teacher: the teacher's file, if not where it was during training.
        device: device of both networks, as for ``device=``.
        name: the student's network, if its file names an external one.

    Raises:
        FileNotFoundError: a file has moved.
        ValueError: the run has no teacher, or not one with a single weights file; the device does not exist; or a
            network's logits are not numbers.
    """

    def __init__(self, run: Run, teacher: str | None = None, device: str = "cpu", name: str | None = None) -> None:
        self.device = device_of(device)
        student = load_student(run.folder / RUN_WEIGHTS, name=name)
        look = student.transform
        images = _Images(
            run.summary.dataset, student.classes, len(student.classes), (3, *look.size), look.mean, look.std
        )
        planned = teacher_of(run, teacher)
        data = cast(ImageDataModule, images)  # the part that a teacher uses
        frozen, _, _ = build_teacher(planned, data, Normalisation(look.mean, look.std))
        self.student, self.teacher = student.to(self.device).eval(), frozen.to(self.device).eval()
        self.names = {"student": student.name, "teacher": planned.name}
        own = rld_of(run)
        self.loss: RLDLoss = own or default_rld(run)
        self.distilled_with = run.method
        self.trained_with_rld = own is not None
        self._turn = threading.Lock()
        self._remembered: OrderedDict[bytes, Asked] = OrderedDict()
        self._time(torch.zeros(1, 3, *look.size))  # the first passes are slow

    def facts(self) -> dict[str, Any]:
        """Returns plain values that the page needs before there is a picture."""
        loss = self.loss
        settings = {"alpha": loss.alpha, "beta": loss.beta, "temperature": loss.temperature, "mask": loss.mask}
        return {
            "classes": self.student.classes,
            "names": self.names,
            "method": self.distilled_with,
            "rld": self.trained_with_rld,
            "settings": settings,
            "device": str(self.device),
        }

    def ask(self, content: bytes, label: int | None = None) -> dict[str, Any]:
        """Answers a request for a picture.

        Args:
            content: a JPEG, PNG or WebP file.
            label: the class that RLD treats as true; None for the student's most likely one.

        Returns:
            plain values for the page.

        Raises:
            BadImageError: the bytes are not such a picture, or it is too large.
            ValueError: there is no class of this number.
        """
        if label is not None and not 0 <= label < len(self.student.classes):
            raise ValueError(f"there is no class {label}")
        with self._turn:
            key = hashlib.sha256(content).digest()
            if key not in self._remembered:
                self._remembered[key] = self._look(content)
                while len(self._remembered) > _REMEMBERED:
                    self._remembered.popitem(last=False)
            self._remembered.move_to_end(key)
            asked = self._remembered[key]
        label = int(asked.student.argmax()) if label is None else label
        sample = refine(asked.student, asked.teacher, label, self.loss)
        return answer(asked, sample, self.student.classes, self.loss)

    def _look(self, content: bytes) -> Asked:
        pixels = self.student.transform.crop(_decode(content))
        images = self.student.transform.normalize(pixels)[None]
        logits, milliseconds = self._time(images)
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file := BytesIO(), "PNG")
        seen = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        return Asked(logits["student"], logits["teacher"], milliseconds, seen)

    @torch.inference_mode()
    def _time(self, images: Tensor) -> tuple[dict[str, Tensor], dict[str, float]]:
        images = images.to(self.device)
        networks: Mapping[str, Callable[[Tensor], Tensor]] = {
            "teacher": lambda images: self.teacher(images)[0],
            "student": self.student,
        }
        logits, milliseconds = {}, {}
        for role, network in networks.items():
            taken: list[float] = []
            end = time.perf_counter() + _SECONDS
            while len(taken) < _LEAST or (len(taken) < _TIMED and time.perf_counter() < end):
                start = time.perf_counter()
                logits[role] = network(images)[0].float().cpu()  # synchronises with the device
                taken.append(1000 * (time.perf_counter() - start))
            check_numbers(logits[role], f"the {role} {self.names[role]}")
            milliseconds[role] = float(np.median(taken))
        return logits, milliseconds


def demo(cfg: DictConfig) -> None:
    """Runs the job of ``conf/demo.yaml`` until it is stopped.

    Raises:
        UserError: the run is not finished, a network's file has moved, or the port is in use.
    """
    freeze(cfg)
    with user_errors():
        trust(cfg.name, cfg.trust)
        run = read_run(Path(cfg.run))
        networks = Demo(run, cfg.teacher, cfg.device, cfg.name)
    print_line("student", f"{networks.names['student']}, {len(networks.student.classes)} classes, of {run.folder}")
    serve(networks.facts(), networks.ask, cfg.port)


def shown_rows(sample: Refinement) -> list[int]:
    """Returns the classes with a row: both networks' most likely and the label, by decreasing student probability."""
    both = (sample.student_logits, sample.teacher_logits)
    chosen = {sample.label}.union(*(logits.topk(min(BEST, len(logits))).indices.tolist() for logits in both))
    return [index for index in sample.student_logits.argsort(descending=True, stable=True).tolist() if index in chosen]


def answer(asked: Asked, sample: Refinement, classes: Sequence[str], loss: RLDLoss) -> dict[str, Any]:
    """Returns the page's content for a picture, as plain values; probabilities are in [0, 1]."""
    shown = shown_rows(sample)
    sides = {"teacher": sample.teacher_probs, "refined": sample.teacher_correlation, "student": sample.student_probs}
    others = torch.ones(len(classes), dtype=torch.bool)
    others[shown] = False
    return {
        "seen": asked.seen,
        "label": sample.label,
        "temperature": loss.temperature,
        "networks": {
            role: {"class": classes[int(logits.argmax())], "probability": float(logits.softmax(0).max())}
            | {"milliseconds": asked.milliseconds[role]}
            for role, logits in (("teacher", asked.teacher), ("student", asked.student))
        },
        "rows": [
            {"class": classes[index], "true": index == sample.label, "masked": bool(sample.masked[index])}
            | {side: float(probs[index]) for side, probs in sides.items()}
            for index in shown
        ],
        "others": {"count": int(others.sum()), "masked": int(sample.masked[others].sum())}
        | {side: float(probs[others].sum()) for side, probs in sides.items()},
        "masked": int(sample.masked.sum()),
        "confidence": {"teacher": sample.teacher_confidence, "student": sample.student_confidence},
        "confidence_temperature": loss.confidence_temperature or loss.temperature,
        "terms": sample.terms,
        "words": explain_in_words(sample, classes, loss),
    }


def _decode(content: bytes) -> Tensor:
    """Decodes a picture of an allowed format and size to uint8 pixels ``(3, H, W)``."""
    file = torch.from_numpy(np.frombuffer(content, np.uint8).copy())
    header = read_header(file)
    if header.format not in FORMATS:
        raise BadImageError(f"pictures of the format {header.format} are not taken; choose JPEG, PNG or WebP")
    if header.height * header.width > MOST_PIXELS:
        raise BadImageError(f"its {header.width:,} x {header.height:,} pixels are more than {MOST_PIXELS:,}")
    return decode_image(file, header=header)
