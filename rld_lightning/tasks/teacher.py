"""The teacher of a run: where its weights are, and the frozen network they make."""

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from rld_lightning.console import print_line
from rld_lightning.data.base import ImageDataModule
from rld_lightning.distributed import devices_per_node
from rld_lightning.losses.base import DistillationLoss
from rld_lightning.models.complexity import count_macs, count_parameters
from rld_lightning.models.factory import create_model
from rld_lightning.models.facts import WeightsFacts, facts_of
from rld_lightning.models.graft import GraftedStudent, graft
from rld_lightning.models.stages import classifier_of
from rld_lightning.models.store import TeacherStore, resolve_teacher_weights
from rld_lightning.models.teacher import FrozenTeacher
from rld_lightning.models.verify import load_weights
from rld_lightning.runs.files import CONFIG
from rld_lightning.tasks.check import check_classes


def find_teacher(cfg: DictConfig, data: ImageDataModule) -> bool:
    """Puts the file of the teacher's weights in the configuration; False when the teacher has to be trained first."""
    settings = cfg.model.teacher
    if settings.shard and devices_per_node(1) < 2:
        raise ValueError(
            "model.teacher.shard=true shares the teacher out over the processes of a machine, and there is one; take "
            "more devices (trainer=ddp trainer.devices=2), or model.teacher.shard=false."
        )
    if settings.weights is None:
        raise ValueError("model.teacher.weights has no value; give a file, auto, fit, published or pretrained.")
    if settings.weights == "pretrained":
        return True
    if settings.weights in ("auto", "fit", "published") and (before := _teacher_of(cfg.resume, settings.name)):
        print_line("teacher", f"the one that the run in {Path(cfg.resume).parent} had: {before}")
        settings.weights = str(before)
        return True
    path = resolve_teacher_weights(
        settings.weights,
        name=settings.name,
        dataset=data.name,
        store=TeacherStore(Path(cfg.paths.teachers)),
        url=settings.published_url,
    )
    if path is not None:
        settings.weights = str(path)
    return path is not None


def _teacher_of(resume: str | None, name: str) -> Path | None:
    """The file of the teacher that a run had before it goes on, if it is still there.

    The folder may be a stranger's: its configuration is read as plain YAML, and what it says is a file to read weights
    from or nothing.
    """
    if resume is None or not (config := Path(resume).parent / CONFIG).is_file():
        return None
    try:
        found = yaml.safe_load(config.read_bytes())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{config} is not the configuration of a run ({type(error).__name__}); move it away."
        ) from error
    for key in ("model", "teacher"):
        found = found.get(key) if isinstance(found, dict) else None
    if not isinstance(found, dict) or found.get("name") != name or not isinstance(found.get("weights"), str):
        return None
    return path if (path := Path(found["weights"])).is_file() else None


def teacher_config(cfg: DictConfig, folder: Path) -> DictConfig:
    """The configuration of a run that trains a run's teacher: with cross-entropy, and that run's data and recipe.

    Args:
        cfg: the run's, which stays as it is.
        folder: the folder for the teacher's.
    """
    own = deepcopy(cfg)
    OmegaConf.set_struct(own, False)
    own.pop("hydra", None)
    name = cfg.model.teacher.name
    student = {**cfg.model.student, "name": name, "weights": None}
    own.model = OmegaConf.merge(cfg.model, {"label": name, "teacher": None, "student": student, "tuned": None})
    own.loss = {"_target_": "rld_lightning.losses.CELoss"}
    own.method = "ce"
    own.print_config = False
    own.paths.run = str(folder)
    own.resume = None
    own.callbacks.pop("pruner", None)  # which would take it for a trial
    return own


def build_teacher(cfg: DictConfig, data: ImageDataModule) -> FrozenTeacher:
    """Loads and freezes the teacher that :func:`find_teacher` has put in the configuration, and prints its line."""
    settings = cfg.model.teacher
    if settings.weights == "pretrained":
        network, origin = _pretrained(settings.name, data.num_classes), "pretrained"
    else:
        network = create_model(settings.name, data.num_classes)
        weights = load_weights(network, settings.weights, name=settings.name)
        check_classes(weights, data, "move it away, or name another file with model.teacher.weights=")
        origin = f"{settings.weights}{_known(facts_of(weights))}"
    size = describe_size(network, data)  # before the teacher takes the network over
    options = {name: settings[name] for name in ("dtype", "channels_last", "fuse", "shard")}
    teacher = FrozenTeacher(network, **options)
    precision = settings.dtype or "precision of the run"
    shares = f", shared out over {devices_per_node(1)} processes" if settings.shard else ""
    print_line("teacher", f"{settings.name}, {size}, {precision}, weights {origin}{shares}")
    return teacher


def connect(
    loss: DistillationLoss, student: nn.Module, teacher: nn.Module, image_shape: Sequence[int], train_label: Tensor
) -> nn.Module:
    """Connects a loss to both networks.

    Returns:
        the student to train: the one given or, for a loss that reuses the teacher's classifier, one that ends in it.
    """
    if loss.reuses_classifier and isinstance(student, GraftedStudent):  # to be trained on
        student.classifier.load_state_dict(classifier_of(teacher).state_dict())
    elif loss.reuses_classifier:
        student = graft(student, teacher)
    loss.connect(student, teacher, image_shape, train_label)
    return student


def _pretrained(name: str, num_classes: int) -> nn.Module:
    network = create_model(name, num_classes, pretrained=True)
    known = getattr(network, "pretrained_cfg", {}).get("num_classes", 1000)
    if known != num_classes:
        raise ValueError(
            f"the pretrained {name} knows {known:,} classes and the data has {num_classes}, so its classifier would be "
            f"random; fine-tune it on the data first (model=single model.student.name={name} "
            "model.student.weights=pretrained loss=ce) and give its file with model.teacher.weights=."
        )
    return network


def _known(facts: WeightsFacts) -> str:
    """What a weights file says about itself, for the console."""
    top1 = f"top-1 {facts.top1:.2f} %" if facts.top1 is not None else ""
    epochs = f"after {facts.epochs} epoch(s)" if facts.epochs is not None else ""
    known = ", ".join(filter(None, (top1, epochs, facts.source)))
    return f" ({known})" if known else ""


def describe_size(model: nn.Module, data: ImageDataModule) -> str:
    """Parameters and multiply-accumulates of a model, for the console."""
    parameters, macs = count_parameters(model), count_macs(model, data.image_shape)
    return f"{parameters / 1e6:.2f} M parameters, {macs / 1e6:.1f} M MACs"
