"""Evaluates any checkpoint or export: accuracy, likelihood, calibration, and accuracy per class."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hydra.utils import instantiate
from lightning.pytorch import LightningModule, Trainer
from omegaconf import DictConfig
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError, MulticlassStatScores

from rld_lightning.callbacks import RunProgress
from rld_lightning.console import print_files, print_line, print_table
from rld_lightning.data.base import Batch, ImageDataModule
from rld_lightning.data.imagefolder import ImageFolderDataModule
from rld_lightning.distributed import rank_zero_only
from rld_lightning.errors import UserError, user_errors
from rld_lightning.hydra.checks.targets import check_parts
from rld_lightning.hydra.options import list_options
from rld_lightning.losses.base import cross_entropy
from rld_lightning.models.imported import trust
from rld_lightning.models.normalisation import (
    Normalisation,
    Renormalise,
    make_renormalise,
    published_normalisation,
    stored_normalisation,
)
from rld_lightning.models.teacher.torchscript_and_onnx import OnnxTeacher
from rld_lightning.models.weights.companion_files import find_weights
from rld_lightning.models.weights.facts import facts_of
from rld_lightning.models.weights.read import Weights
from rld_lightning.models.weights.verify import create_fitting
from rld_lightning.runs.files import EVALUATION, PER_CLASS, SPLIT, run_of, split_of, write_csv, write_json
from rld_lightning.tasks.run.checks import check_network, check_split, split_to_measure
from rld_lightning.tasks.run.make import make_trainer
from rld_lightning.tasks.run.matched_classes import match_classes
from rld_lightning.tasks.run.plan import freeze
from rld_lightning.tasks.run.processes import processes_to_start, run_in_processes

MOST_CLASSES_SHOWN = 20


@dataclass(frozen=True)
class Evaluation:
    """Scores of a model; written as ``evaluation.json``. Accuracies and calibration error in percent, NLL in nats.

    ``ece`` is the expected calibration error over 15 bins of confidence (Guo et al., arXiv 1706.04599). If model and
    data have only a part of their classes in common, ``shared_classes`` is their number, and the images are those of
    these classes; all classes of the model compete. It is None if the classes are the same.
    """

    weights: str
    model: str
    dataset: str
    split: str
    images: int
    top1: float
    top5: float | None
    nll: float
    ece: float
    shared_classes: int | None = None


class EvaluationModule(LightningModule):
    """Runs a model over a split once; every metric synchronises itself, so the result is exact on any number of ranks.

    Args:
        model: maps images ``(B, 3, H, W)`` to logits ``(B, C)``.
        num_classes: C.
        class_of: for each class of the data, its index among the logits, or -1 to skip its images; by default the same.
        renormalise: converts images to the normalisation that the model was trained with; None if they have it.
    """

    class_of: Tensor

    def __init__(
        self,
        model: nn.Module,
        num_classes: int,
        class_of: Sequence[int] | None = None,
        renormalise: Renormalise | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.renormalise = renormalise
        self.register_buffer(
            "class_of", torch.tensor(range(num_classes) if class_of is None else class_of), persistent=False
        )
        metrics: dict[str, Metric | MetricCollection] = {
            "top1": MulticlassAccuracy(num_classes, average="micro"),
            "ece": MulticlassCalibrationError(num_classes, n_bins=15),
            "per_class": MulticlassStatScores(num_classes, average=None),
        }
        if num_classes > 5:
            metrics["top5"] = MulticlassAccuracy(num_classes, top_k=5, average="micro")
        self.metrics = MetricCollection(metrics, compute_groups=False)
        self.nll = MeanMetric(nan_strategy=math.nan)  # by default it skips NaN

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Updates the metrics with a batch."""
        label = self.class_of[batch.label]
        known = label >= 0
        images, label = batch.images[known], label[known]
        if not len(label):
            return
        logits = self.model(images if self.renormalise is None else self.renormalise(images)).float()
        # Probabilities, because torchmetrics takes logits of a batch that are all in [0, 1] for probabilities. A
        # confidence of exactly 1 would get a sixteenth bin.
        self.metrics["ece"].update(logits.softmax(1).clamp(max=1 - 2**-24), label)
        for name, metric in self.metrics.items():
            if name != "ece":
                metric.update(logits, label)
        self.nll.update(cross_entropy(logits, label), weight=len(label))

    def on_test_epoch_end(self) -> None:
        """Computes all metrics, on all ranks in the same order."""
        self.results: dict[str, Tensor] = {**self.metrics.compute(), "nll": self.nll.compute()}

    def scores(self, split: str) -> dict[str, Any]:
        """Returns the scores by the names of :class:`Evaluation`, after a split was evaluated."""
        found = {name: float(value) for name, value in self.results.items() if name != "per_class"}
        percent = {name: 100 * value for name, value in found.items() if name != "nll"}
        images = int(self.results["per_class"][:, -1].sum())
        return {"split": split, "images": images, "top5": None, "nll": found["nll"], **percent}


def evaluate(cfg: DictConfig, *, classes_shown: int = MOST_CLASSES_SHOWN) -> Evaluation:
    """Runs the job of ``conf/eval.yaml``: evaluates, prints, and writes ``evaluation.json`` and ``per_class.csv``.

    Args:
        classes_shown: number of classes to print, least accurate first, if this process evaluates alone.

    Raises:
        UserError: the weights cannot be read or do not fit the model or the data.
    """
    freeze(cfg)
    with user_errors():
        check_parts(cfg, found_later=ImageDataModule.split_options.values())
        processes = processes_to_start(cfg.trainer)
    if processes > 1:
        run_in_processes(processes, "rld_lightning.tasks.evaluate:evaluate", cfg)
        return Evaluation(**json.loads((Path(cfg.paths.run) / EVALUATION).read_text()))
    with user_errors():
        trust(cfg.name)
        program = OnnxTeacher(Path(cfg.weights)) if str(cfg.weights).endswith(".onnx") else None
        weights = find_weights(cfg.weights) if program is None else _of_program(program)
        name = cfg.name or _model_name(weights)
        data: ImageDataModule = instantiate(cfg.data, **split_to_measure(cfg.data, weights))
        _share_out_as_trained(weights, data, Path(cfg.paths.run))
        _check_number_of_classes(weights, data)
        check_split(weights, data, cfg.split)
        data.prepare_data()
        data.setup("test")
        _check_held_out(weights, data, cfg.split)
        print_line("data", data.describe())
        classes = match_classes(facts_of(weights), data)
        model: nn.Module
        if program is None:
            model, weights = create_fitting(name, len(classes.names), weights)
        else:
            model = program
        check_network(name, data, model, other_sizes="image_size" in cfg.data, num_classes=len(classes.names))
        print_line("model", f"{name}, weights {weights.source}{f' ({weights.account})' if weights.account else ''}")
        own_renormalise = _own_renormalise(weights, data, cfg.data, name)
        bars = None if cfg.trainer.get("enable_progress_bar") is False else [RunProgress()]
        trainer = make_trainer(cfg.trainer, logger=False, enable_checkpointing=False, callbacks=bars)
    module = EvaluationModule(model, len(classes.names), classes.class_of, own_renormalise)
    test_with(trainer, module, data, cfg.split)
    per_class = class_results(module.results["per_class"], classes.names)
    if not any(result.images for result in per_class):
        raise UserError(
            f"not one image of the {cfg.split} split of {data.name} was evaluated, so that there is no result: raise "
            "trainer.limit_test_batches, or look at the images."
        )
    if classes.shared is not None:
        per_class = [result for result in per_class if result.images]
    evaluation = Evaluation(
        weights=str(weights.source),
        model=name,
        dataset=data.name,
        shared_classes=classes.shared,
        **module.scores(cfg.split),
    )
    _report(evaluation, per_class, Path(cfg.paths.run), classes_shown)
    return evaluation


def test_with(trainer: Trainer, module: EvaluationModule, data: ImageDataModule, split: str) -> None:
    """Evaluates a model on a split of the data, in all processes of a trainer.

    Args:
        trainer: an unused trainer.
        module: the model; holds its ``results`` afterwards.
        data: the data, which belong to this trainer from now on.
        split: ``"test"`` or ``"val"``.

    Raises:
        UserError: the model's logits are not finite for some images.
    """
    data.trainer = trainer
    loader = data.test_dataloader if split == "test" else data.val_dataloader
    data.setup("test")
    trainer.test(module, loader(), verbose=False)
    if module.results["per_class"][:, -1].any() and module.results["nll"].isnan():
        raise UserError(
            f"the network's logits are not numbers (NaN) for images of the {split} split, so it has no score: check "
            "how its weights were trained or converted, or measure it with trainer.precision=32-true."
        )


def _of_program(program: OnnxTeacher) -> Weights:
    """Returns an ONNX file's facts, named after the file if it does not name its network."""
    source = program.file.source
    return Weights({}, {"name": source.name} | program.file.metadata, source)


def _model_name(weights: Weights) -> str:
    name = facts_of(weights).name
    if name is None:
        raise ValueError(f"{weights.source} does not say which model it is of; add name=<model>.")
    return name


def _share_out_as_trained(weights: Weights, data: ImageDataModule, run: Path) -> None:
    """Splits a folder of images as the run of the weights has recorded, unless the command says otherwise."""
    written = split_of(run_of(weights.source))
    if not isinstance(data, ImageFolderDataModule) or data.split_file != run / SPLIT:
        return
    if written is not None and facts_of(weights).dataset == data.name:
        data.split_file = written
        print_line("data", f"split as in {written}")


def _check_number_of_classes(weights: Weights, data: ImageDataModule) -> None:
    """Refuses data with a number of classes that cannot be the model's, before anything is downloaded."""
    facts = facts_of(weights)
    if facts.num_classes not in (None, data.num_classes) and not set(facts.class_names or ()) & set(data.class_names):
        of = f" of {facts.dataset}" if facts.dataset else ""
        option = (
            facts.dataset if facts.dataset in list_options("data") else "imagefolder (or shards) and data.root=<folder>"
        )
        raise ValueError(
            f"{weights.source} knows the {facts.num_classes} classes{of} and {data.name} has {data.num_classes}; "
            f"choose the data it was trained on with data={option}."
        )


def _own_renormalise(weights: Weights, data: ImageDataModule, settings: DictConfig, name: str) -> Renormalise | None:
    """Returns the conversion of the data's images to the normalisation stored with a model; prints both."""
    facts, given = facts_of(weights), Normalisation(tuple(data.mean), tuple(data.std))
    if (own := stored_normalisation(facts)) is None and (published := published_normalisation(name)) not in (
        None,
        given,
    ):
        print_line(
            "caution",
            f"{weights.source} does not say what images were normalised with, and {name} is published for {published}; "
            f"it is measured with {given}",
        )
    trained, found, sized = facts.image_shape, data.image_shape, "image_size" in settings
    if trained is not None and trained != found:
        print_line(
            "caution",
            f"{weights.source} was trained with image_shape {list(trained)}, and is measured with {list(found)}"
            + f"; data.image_size={trained[1]} measures it as it was trained" * (sized and trained[1] == trained[2]),
        )
    own_renormalise = make_renormalise(given, own)
    if own_renormalise is not None:
        print_line("model", f"sees images normalised with its own {own}, as its file says")
    return own_renormalise


def _check_held_out(weights: Weights, data: ImageDataModule, split: str) -> None:
    """Refuses loaded data on which the model was trained."""
    if split != "val":
        return
    facts = facts_of(weights)
    if not data.has_own_validation:
        none_out = facts.val_fraction is not None
        way_out = "its run held none out; use split=test" if none_out else "hold some out with data.val_fraction"
        raise ValueError(f"{data.name} has no validation images of its own; {way_out}.")
    if facts.val_fraction is None and data.val_fraction > 0:
        print_line(
            "caution",
            f"{weights.source} does not say what was held out when it was trained, so that these images may be among "
            "those it was trained on",
        )


class ClassResult(NamedTuple):
    """Results for one class, in percent; None if the denominator is 0."""

    name: str  # of the class
    images: int  # how many there are of it
    accuracy: float | None  # fraction of its images that the model assigned to it (recall)
    precision: float | None  # fraction of the images assigned to it that belong to it


def class_results(stat_scores: Tensor, class_names: list[str]) -> list[ClassResult]:
    """Returns all classes, least accurate first, those without images last."""
    results = [
        ClassResult(name, int(images), _percent(right, images), _percent(right, right + wrong))
        for name, (right, wrong, _, _, images) in zip(class_names, stat_scores.tolist(), strict=True)
    ]
    return sorted(results, key=lambda result: (result.accuracy is None, result.accuracy))


def _percent(part: float, whole: float) -> float | None:
    return 100 * part / whole if whole else None


@rank_zero_only
def _report(evaluation: Evaluation, per_class: Sequence[ClassResult], run: Path, classes_shown: int) -> None:
    write_json(run / EVALUATION, asdict(evaluation))
    names, images, *shares = zip(*per_class, strict=True)
    accuracy, precision = (["" if share is None else f"{share:.4f}" for share in column] for column in shares)
    write_csv(run / PER_CLASS, {"class": names, "images": images, "accuracy": accuracy, "precision": precision})
    part = f", {evaluation.shared_classes} shared classes only" if evaluation.shared_classes is not None else ""
    print_table(
        f"{evaluation.model} on {evaluation.images:,} {evaluation.split} images of {evaluation.dataset}{part}",
        ("top-1 %", "top-5 %", "NLL", "ECE %"),
        [(f"{evaluation.top1:.2f}", evaluation.top5, f"{evaluation.nll:.4f}", evaluation.ece)],
    )
    if shown := per_class[:classes_shown]:
        all_of_them = len(shown) == len(per_class)
        title = "Classes" if all_of_them else f"The {len(shown)} least accurate of {len(per_class)} classes"
        print_table(title, ("class", "images", "accuracy %", "precision %"), shown)
    print_files(run, {EVALUATION: "these numbers", PER_CLASS: "every class"})
