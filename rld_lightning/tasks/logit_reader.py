"""Runs the networks of a finished run on its validation images."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from rld_lightning.console import print_line
from rld_lightning.data.base import ImageDataModule
from rld_lightning.models.normalisation import Normalisation
from rld_lightning.models.weights.companion_files import find_weights
from rld_lightning.models.weights.facts import facts_of
from rld_lightning.reporting.logits import RunLogits
from rld_lightning.runs.files import STUDENT
from rld_lightning.runs.finished import Run
from rld_lightning.runs.rebuild import build_data
from rld_lightning.tasks.run.matched_classes import read_student
from rld_lightning.tasks.run.plan import Teacher
from rld_lightning.tasks.teacher.network import build_teacher
from rld_lightning.tasks.teacher.recorded import teacher_of


class LogitReader:
    """Runs students and teachers on their validation images, each once, in float32.

    Args:
        data_root: where the data are, if not where they were during training.
        teacher: the teacher's weights, if not where they were during training.
    """

    def __init__(self, data_root: Path | None = None, teacher: Path | None = None) -> None:
        self.data_root = data_root
        self.teacher = teacher
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._data: dict[str, ImageDataModule] = {}
        self._logits: dict[tuple[str, int], tuple[Tensor, Tensor, Tensor]] = {}

    def read(self, run: Run) -> RunLogits:
        """Computes the logits of a run's student and teacher on its validation images.

        Each gets images as in training: its size, its normalisation, and the classes in the data's order.

        Raises:
            FileNotFoundError: weights or data have moved.
            ValueError: the run has no teacher, or weights do not fit.
        """
        data, teacher = self.data(run), self._teacher_of(run)
        if not (file := run.folder / STUDENT).is_file():
            raise FileNotFoundError(f"there are no weights at {file}; the run must have exported its student.")
        student_logits, label, index = self._of(data, str(file), lambda: read_student(file, run.summary.model, data))
        usual = Normalisation(tuple(data.mean), tuple(data.std))
        key = f"{teacher.weights} {teacher.name} {teacher.normalisation} {teacher.image_size} {teacher.class_map}"
        teacher_logits, _, _ = self._of(data, key, lambda: build_teacher(teacher, data, usual)[0])
        return RunLogits(student_logits, teacher_logits, label, index, list(data.class_names))

    def data(self, run: Run) -> ImageDataModule:
        """Returns a run's data module, with loaded data."""
        settings = run.config["data"]
        # Settings without an effect on the validation images; the seed has one if they are held out.
        unimportant = {"batch_size", "subset", "augment"} | (set() if settings.get("val_fraction") else {"seed"})
        key = str({name: value for name, value in settings.items() if name not in unimportant})
        if key not in self._data:
            data = build_data(run, self.data_root)
            data.prepare_data()
            data.setup("validate")
            self._data[key] = data
        return self._data[key]

    def image(self, run: Run, index: int) -> Tensor:
        """Returns one validation image of a run, ``(H, W, 3)`` with values in [0, 1].

        Raises:
            ValueError: there is no image of this index.
        """
        data = self.data(run)
        for batch in data.val_dataloader():
            for image in batch.images[batch.index == index]:
                mean, std = (torch.tensor(values)[:, None, None] for values in (data.mean, data.std))
                return (image * std + mean).clamp(0, 1).permute(1, 2, 0)
        raise ValueError(f"there is no validation image {index} in {data.name}; choose 0 to {data.val_size - 1}.")

    def _teacher_of(self, run: Run) -> Teacher:
        """Returns the teacher with its weights; a given file determines its network itself."""
        if self.teacher is None:
            if run.summary.teacher is None:
                raise ValueError(
                    f"{run.folder} was trained without a teacher; choose a distilled run, or add --teacher FILE."
                )
            return teacher_of(run, option="--teacher ")
        known = facts_of(find_weights(self.teacher)).name
        if run.config["model"].get("teacher"):
            planned = teacher_of(run, str(self.teacher), option="--teacher ")
            return replace(planned, name=known or planned.name)
        if known is None:
            raise ValueError(f"{self.teacher} does not say which model it is of; give weights of this package.")
        return Teacher(known, str(self.teacher), "", None, {"fuse": False, "dtype": None})

    def _of(self, data: ImageDataModule, what: str, make: Callable[[], nn.Module]) -> tuple[Tensor, Tensor, Tensor]:
        """Returns a network's results for all validation images, computed once; ``make`` builds it on the CPU."""
        key = (what, id(data))
        if key not in self._logits:
            network = make().to(self.device).eval()
            print_line("logits", f"{what.split()[0]} on the {data.val_size:,} validation images of {data.name}")
            logits, label, index = [], [], []
            with torch.inference_mode():
                for batch in data.val_dataloader():
                    output = network(batch.images.to(self.device))
                    logits.append((output[0] if isinstance(output, tuple) else output).float().cpu())
                    label.append(batch.label.cpu())
                    index.append(batch.index.cpu())
            self._logits[key] = torch.cat(logits), torch.cat(label), torch.cat(index)
        return self._logits[key]
