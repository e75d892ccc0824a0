"""The teacher of a run: where its weights are, and the frozen network they make."""

import json
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig
from torch import Tensor, nn

from rld_lightning.config import devices_per_node
from rld_lightning.console import print_line
from rld_lightning.data.base import ImageDataModule
from rld_lightning.losses.base import DistillationLoss
from rld_lightning.models.complexity import count_macs, count_parameters
from rld_lightning.models.factory import classifier_of, create_model
from rld_lightning.models.graft import GraftedStudent, graft
from rld_lightning.models.store import TeacherStore, resolve_teacher_weights
from rld_lightning.models.teacher import FrozenTeacher
from rld_lightning.models.weights import load_weights


def find_teacher(cfg: DictConfig, data: ImageDataModule) -> bool:
    """Puts the file of the teacher's weights in the configuration; False when the teacher has to be trained first."""
    settings = cfg.model.teacher
    if settings.shard and devices_per_node(1) < 2:
        raise ValueError(
            "model.teacher.shard=true shares the teacher out over the processes of a machine, and there is one; take "
            "more devices (trainer=ddp trainer.devices=2), or model.teacher.shard=false."
        )
    if settings.weights == "pretrained":
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


def build_teacher(cfg: DictConfig, data: ImageDataModule) -> FrozenTeacher:
    """Loads and freezes the teacher that :func:`find_teacher` has put in the configuration, and prints its line."""
    settings = cfg.model.teacher
    if settings.weights == "pretrained":
        network, origin = _pretrained(settings.name, data.num_classes), "pretrained"
    else:
        network = create_model(settings.name, data.num_classes)
        facts = load_weights(network, settings.weights, name=settings.name).metadata
        if "class_names" in facts and json.loads(facts["class_names"]) != list(data.class_names):
            raise ValueError(
                f"{settings.weights} was trained on other classes than those of {data.name}; move it away, or name "
                "another file with model.teacher.weights=."
            )
        origin = f"{settings.weights}{_known(facts)}"
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
    if "/" not in name:
        raise ValueError(
            f"model.teacher.weights=pretrained is for torchvision/<name> and timm/<name>, not for {name}; "
            "use a file, published or fit."
        )
    network = create_model(name, num_classes, pretrained=True)
    known = getattr(network, "pretrained_cfg", {}).get("num_classes", 1000)
    if known != num_classes:
        raise ValueError(
            f"the pretrained {name} knows {known:,} classes and the data has {num_classes}, so its classifier would be "
            "random; fine-tune it on the data first (loss=ce) and give its file with model.teacher.weights=."
        )
    return network


def _known(metadata: dict[str, str]) -> str:
    """What a weights file says about itself, for the console."""
    top1 = f"top-1 {float(metadata['top1']):.2f} %" if "top1" in metadata else ""
    epochs = f"after {metadata['epochs']} epoch(s)" if "epochs" in metadata else ""
    facts = ", ".join(filter(None, (top1, epochs, metadata.get("source"))))
    return f" ({facts})" if facts else ""


def describe_size(model: nn.Module, data: ImageDataModule) -> str:
    """Parameters and multiply-accumulates of a model, for the console."""
    parameters, macs = count_parameters(model), count_macs(model, data.image_shape)
    return f"{parameters / 1e6:.2f} M parameters, {macs / 1e6:.1f} M MACs"
