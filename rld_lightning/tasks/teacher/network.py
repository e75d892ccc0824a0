"""Builds the frozen network of a teacher, or of several: classes in the data's order, and its input's preprocessing."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from rld_lightning.console import print_line
from rld_lightning.data.base import ImageDataModule
from rld_lightning.distributed import devices_per_node
from rld_lightning.errors import first_line, some
from rld_lightning.models.classes import class_positions, number_of_classes, select_classes
from rld_lightning.models.factory import create_model
from rld_lightning.models.libraries import published_classes
from rld_lightning.models.normalisation import (
    Normalisation,
    Renormalise,
    make_renormalise,
    published_normalisation,
    stored_normalisation,
)
from rld_lightning.models.registry import member_names
from rld_lightning.models.teacher.ensemble import Ensemble
from rld_lightning.models.teacher.frozen import FrozenTeacher
from rld_lightning.models.teacher.torchscript_and_onnx import (
    FOREIGN,
    Columns,
    OnnxTeacher,
    ScriptedNetwork,
    load_foreign,
)
from rld_lightning.models.weights.companion_files import find_weights
from rld_lightning.models.weights.facts import WeightsFacts, facts_of
from rld_lightning.models.weights.read import Weights
from rld_lightning.models.weights.verify import create_fitting
from rld_lightning.runs.checkpoint import RunRecord
from rld_lightning.tasks.run.checks import check_network
from rld_lightning.tasks.run.describe import describe_size
from rld_lightning.tasks.run.matched_classes import reorder_to_data
from rld_lightning.tasks.run.plan import Teacher
from rld_lightning.tasks.teacher.recorded import teacher_size


def build_teacher(
    teacher: Teacher, data: ImageDataModule, usual: Normalisation, before: RunRecord | None = None
) -> tuple[FrozenTeacher, WeightsFacts, str | None]:
    """Loads and freezes a teacher, and prints its lines.

    Args:
        usual: the data's default normalisation, used for a teacher whose own is unknown.
        before: what the checkpoint from which the run resumes records about its run.

    Returns:
        the teacher, the facts about its weights, and the SHA-256 of their file, if they are in one.

    Raises:
        ValueError: the weights are of another network or other classes, or differ from the checkpoint's.
    """
    files = teacher.weights if isinstance(teacher.weights, tuple) else (str(teacher.weights),)
    names = member_names(teacher.name, len(files))
    loaded = [
        load_network(replace(teacher, name=name), file, data, usual) for name, file in zip(names, files, strict=True)
    ]
    first, facts = loaded[0], loaded[0].facts
    sha256 = first.sha256
    if len(loaded) > 1:
        members, renormalises = [found.network for found in loaded], [found.renormalise for found in loaded]
        network: nn.Module = Ensemble(members, teacher.mean_of, renormalises)
        own_renormalise = None
        facts = replace(facts, top1=None)  # the facts are one member's
        sha256 = hashlib.sha256(",".join(str(found.sha256) for found in loaded).encode()).hexdigest()
    else:
        network, own_renormalise = first.network, first.renormalise
    if sha256 is not None:
        _check_sha256(teacher, sha256, before)
    shape = data.image_shape if own_renormalise is None or own_renormalise.size is None else (3, *own_renormalise.size)
    size = describe_size(network, shape)  # before the teacher wraps the network
    options = {**teacher.options, "fuse": teacher.options["fuse"] is True}  # auto: decided later, with the loss
    frozen = FrozenTeacher(network, **options, renormalise=own_renormalise)
    precision = teacher.options["dtype"] or "precision of the run" + ", logits in float32" * frozen.exact_logits
    shares = f", shared out over {devices_per_node(1)} processes" if frozen.shard else ""
    kinds = f"{len(names)} {names[0]}" if len(set(names)) == 1 else " and ".join(names)
    name = names[0] if len(names) == 1 else f"the mean of the {teacher.mean_of} of {kinds}"
    origin = ", ".join(found.origin for found in loaded)
    print_line("teacher", f"{name}, {size}, {precision}, weights {origin}{shares}")
    return frozen, facts, sha256


def _check_sha256(teacher: Teacher, found: str, before: RunRecord | None) -> None:
    if teacher.sha256 not in (None, found):
        raise ValueError(
            f"{teacher.weights} has the SHA-256 {found}, not {teacher.sha256}: give the file that it is of, or another "
            "model.teacher.sha256."
        )
    if before is not None and before.teacher_sha256 is not None and before.teacher_sha256 != found:
        raise ValueError(
            f"{teacher.weights} is not the teacher that the run had: its SHA-256 is {found[:12]}... and not "
            f"{before.teacher_sha256[:12]}...; restore that file, name its file with model.teacher.weights=, or "
            "start another run."
        )


class TeacherNetwork(NamedTuple):
    """A network of a teacher: the teacher itself, or a member of an ensemble."""

    network: nn.Module  # on the CPU; maps its own input to logits of the data's classes, in their order
    renormalise: Renormalise | None  # converts the data's images to its input; None if they are the same
    facts: WeightsFacts  # from its file
    sha256: str | None  # of its file; None without one
    origin: str  # source of its weights, in words


def load_network(teacher: Teacher, weights: str, data: ImageDataModule, usual: Normalisation) -> TeacherNetwork:
    """Loads a network of a teacher, and prints its special properties.

    Raises:
        ValueError: the weights are of another network or other classes.
    """
    foreign: ScriptedNetwork | OnnxTeacher | None = None
    network: nn.Module
    if teacher.name in FOREIGN:
        foreign, sha256 = (
            load_foreign(teacher.name, Path(weights)),
            hashlib.sha256(Path(weights).read_bytes()).hexdigest(),
        )
        network, facts, origin = foreign, foreign.facts, weights
    elif weights == "pretrained":
        network, facts, sha256, origin = _pretrained(teacher, data), WeightsFacts(), None, "pretrained"
    else:
        network, read = _of_file(teacher, weights, data)
        facts, sha256 = facts_of(read), read.sha256
        origin = f"{weights}{_known(facts)}"
    normalisation, who = teacher_normalisation(teacher, facts, usual, pretrained=weights == "pretrained")
    size = teacher_size(teacher, facts, data.image_shape[1:], pretrained=weights == "pretrained")
    if foreign is not None:
        if teacher.image_size == "auto" and foreign.size is not None:
            size = foreign.size
        network = _of_foreign(foreign, teacher, data, size)
    given = Normalisation(tuple(data.mean), tuple(data.std))
    own = make_renormalise(given, normalisation, size if size != data.image_shape[1:] else None)
    if normalisation != given:
        print_line("teacher", f"sees images normalised with its own {normalisation} ({who})")
    if size != data.image_shape[1:]:
        print_line("teacher", "sees images resized to {}x{} from {}x{}".format(*size, *data.image_shape[1:]))
    check_network(teacher.name, data, network, image_size=size)
    return TeacherNetwork(network, own, facts, sha256, origin)


def _of_file(teacher: Teacher, path: str, data: ImageDataModule) -> tuple[nn.Module, Weights]:
    """Builds a network with a file's weights, restricted to the data's classes."""
    weights, classes = find_weights(path), list(data.class_names)
    known = facts_of(weights).class_names
    count = len(known) if known is not None else number_of_classes(teacher.name, weights.state_dict)
    more = known is not None and len(known) > len(classes) and set(classes) <= set(known)
    if count is None or (teacher.class_map is None and not more):
        network, weights = create_fitting(teacher.name, data.num_classes, weights)
        reorder_to_data(network, teacher.name, weights, data, "teacher")
        return network, weights
    network, weights = create_fitting(teacher.name, count, weights)
    if weights.account:
        print_line("teacher", f"weights {weights.account}")
    return _selected(network, teacher, known, count, classes), weights


def _of_foreign(
    network: ScriptedNetwork | OnnxTeacher, teacher: Teacher, data: ImageDataModule, size: tuple[int, int]
) -> nn.Module:
    """Wraps a program to return the logits of the data's classes."""
    try:
        with torch.no_grad():
            output = network(torch.zeros(2, 3, *size))
    except Exception as error:  # each runtime has its own exceptions
        raise ValueError(
            f"the {teacher.name} teacher cannot take images of {size[0]}x{size[1]} ({first_line(error)}); give another "
            "side with model.teacher.image_size=."
        ) from error
    classes, known = list(data.class_names), network.facts.class_names
    if teacher.class_map is None and output.shape[-1] == len(classes) and known in (None, classes):
        return network
    return Columns(network, class_positions(classes, known, output.shape[-1], teacher.class_map))


def _pretrained(teacher: Teacher, data: ImageDataModule) -> nn.Module:
    classes, name = list(data.class_names), teacher.name
    names = published_classes(name)
    wanted = teacher.class_map is not None or (names is not None and set(classes) < set(names))
    network = create_model(name, len(names) if wanted and names else data.num_classes, pretrained=True)
    known = len(names) if names else getattr(network, "pretrained_cfg", {}).get("num_classes", 1000)
    if wanted and names is not None:
        return _selected(network, teacher, names, len(names), classes)
    if known != data.num_classes:
        raise ValueError(
            f"the pretrained {name} knows {known:,} classes and the data has {data.num_classes}, so its classifier "
            "would be random; fine-tune it on the data first (model.teacher.weights=fit "
            f"model.teacher.start=pretrained, or model=single model.student.name={name} "
            "model.student.weights=pretrained loss=ce and then its file with model.teacher.weights=), or say which of "
            "them the data's are with model.teacher.class_map=."
        )
    return network


def _selected(
    network: nn.Module, teacher: Teacher, known: list[str] | None, count: int, classes: list[str]
) -> nn.Module:
    places = class_positions(classes, known, count, teacher.class_map)
    pairs = [f"{name} is {known[place] if known else place}" for name, place in zip(classes, places, strict=True)]
    how = "as model.teacher.class_map says" if teacher.class_map is not None else "by name"
    print_line(
        "teacher", f"{len(classes)} of its {count:,} classes are used, matched to the data's {how}: {some(pairs)}"
    )
    return select_classes(network, teacher.name, places, count)


def _known(facts: WeightsFacts) -> str:
    """Describes the facts of a weights file, for the console."""
    held_out = " on held-out images" if facts.val_fraction else ""  # else of the test split, or the data's own
    top1 = f"top-1 {facts.top1:.2f} %{held_out}" if facts.top1 is not None else ""
    epochs = f"after {facts.epochs} epoch(s)" if facts.epochs is not None else ""
    known = ", ".join(filter(None, (top1, epochs, facts.source)))
    return f" ({known})" if known else ""


def teacher_normalisation(
    teacher: Teacher, facts: WeightsFacts, usual: Normalisation, *, pretrained: bool
) -> tuple[Normalisation, str]:
    """Returns the normalisation that a teacher needs, and its source in words.

    Args:
        pretrained: whether its weights are its library's.
    """
    if teacher.normalisation is not None:
        return teacher.normalisation, "model.teacher.mean and std"
    published = published_normalisation(teacher.name)
    if pretrained:
        return published or usual, "its library says so"
    if (trained := stored_normalisation(facts)) is not None:
        return trained, "its file says so"
    if published not in (None, usual):
        print_line(
            "caution",
            f"the teacher's file does not say what images were normalised with, and {teacher.name} is published for "
            f"{published}; it gets {usual}, as the data have it: set model.teacher.mean and std for another",
        )
    return usual, "as the data have it"
