"""Runs the networks of a finished run on the images that the run was validated on."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rld_lightning.console import print_line
from rld_lightning.data.base import ImageDataModule
from rld_lightning.models.factory import create_model
from rld_lightning.models.normalisation import Look, published_look, relook, trained_look
from rld_lightning.models.weights.beside import find_weights
from rld_lightning.models.weights.facts import facts_of
from rld_lightning.models.weights.read import split_part
from rld_lightning.models.weights.verify import check_fits, load_weights
from rld_lightning.reporting.logits import RunLogits
from rld_lightning.runs.files import STUDENT
from rld_lightning.runs.finished import Run
from rld_lightning.runs.rebuild import build_data


class LogitReader:
    """Runs students and teachers over their validation images, each once, in float32.

    Args:
        data_root: where the data lie, if not where they lay when the runs were trained.
        teacher: the teacher's weights, if not where they lay then.
    """

    def __init__(self, data_root: Path | None = None, teacher: Path | None = None) -> None:
        self.data_root = data_root
        self.teacher = teacher
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._data: dict[str, ImageDataModule] = {}
        self._logits: dict[tuple[str, int], tuple[Tensor, Tensor, Tensor]] = {}

    def read(self, run: Run) -> RunLogits:
        """Computes the logits of a run's student and teacher on what it was validated on.

        Raises:
            FileNotFoundError: weights or data are not where they were.
            ValueError: the run has no teacher, or weights do not fit.
        """
        data = self.data(run)
        teacher, name = self._teacher_of(run)
        student_logits, label, index = self._of(data, run.folder / STUDENT, run.summary.model)
        teacher_logits, _, _ = self._of(data, teacher, name)
        return RunLogits(student_logits, teacher_logits, label, index, list(data.class_names))

    def data(self, run: Run) -> ImageDataModule:
        """The data of a run, loaded."""
        settings = run.config["data"]
        # What has no part in the images that are validated on; the seed has where they are held out.
        unimportant = {"batch_size", "subset", "augment"} | (set() if settings.get("val_fraction") else {"seed"})
        key = str({name: value for name, value in settings.items() if name not in unimportant})
        if key not in self._data:
            data = build_data(run, self.data_root)
            data.prepare_data()
            data.setup("validate")
            self._data[key] = data
        return self._data[key]

    def image(self, run: Run, index: int) -> Tensor:
        """One validation image of a run, ``(H, W, 3)`` with values in [0, 1].

        Raises:
            ValueError: there is no image of this index.
        """
        data = self.data(run)
        for batch in data.val_dataloader():
            for image in batch.images[batch.index == index]:
                mean, std = (torch.tensor(values)[:, None, None] for values in (data.mean, data.std))
                return (image * std + mean).clamp(0, 1).permute(1, 2, 0)
        raise ValueError(f"there is no validation image {index} in {data.name}; choose 0 to {data.val_size - 1}.")

    def _teacher_of(self, run: Run) -> tuple[str | Path, str | None]:
        """Its weights, and its name where the run's configuration is about them."""
        settings: dict[str, Any] | None = run.config["model"]["teacher"]
        if self.teacher is not None:
            return self.teacher, settings["name"] if settings else None
        if run.summary.teacher is None or settings is None:
            raise ValueError(
                f"{run.folder} was trained without a teacher; choose a distilled run, or add --teacher FILE."
            )
        if not isinstance(settings["weights"], str):
            raise ValueError(f"{run.folder} had several teachers; choose one with --teacher FILE.")
        return settings["weights"], settings["name"]

    def _of(self, data: ImageDataModule, weights: str | Path, name: str | None) -> tuple[Tensor, Tensor, Tensor]:
        key = (str(weights), id(data))
        if key not in self._logits:
            model, own = _load(weights, name, data.num_classes)
            model = model.to(self.device).eval()
            other = relook(Look(tuple(data.mean), tuple(data.std)), own)
            look = nn.Identity() if other is None else other.to(self.device)
            print_line("logits", f"{weights} on the {data.val_size:,} validation images of {data.name}")
            logits, label, index = [], [], []
            with torch.inference_mode():
                for batch in data.val_dataloader():
                    logits.append(model(look(batch.images.to(self.device))).float().cpu())
                    label.append(batch.label.cpu())
                    index.append(batch.index.cpu())
            self._logits[key] = torch.cat(logits), torch.cat(label), torch.cat(index)
        return self._logits[key]


def _load(path: str | Path, name: str | None, num_classes: int) -> tuple[nn.Module, Look | None]:
    """A network with its weights, by the name that the file knows, else by ``name``; and the look that it wants."""
    if path == "pretrained" and name is not None:
        return create_model(name, num_classes, pretrained=True), published_look(name)
    if not split_part(path)[0].is_file():
        raise FileNotFoundError(
            f"there are no weights at {path}; run from the folder that the run was started in, or give the teacher's "
            "with --teacher FILE."
        )
    weights = find_weights(path)
    name = weights.metadata.get("name") or weights.metadata.get("student") or name
    if name is None:
        raise ValueError(f"{path} does not say which model it is of; give weights that this package has written.")
    check_fits(name, num_classes, weights)
    model = create_model(name, num_classes)
    load_weights(model, weights, name=name)
    return model, trained_look(facts_of(weights))
