"""Steps after a run of ``scripts/fit.py``, chosen by ``after=[alone,networks,export]``.

They train the student alone, compare the networks, and export the student.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from rld_lightning.console import print_files, print_line, print_table
from rld_lightning.data.base import ImageDataModule
from rld_lightning.distributed import rank_zero_only
from rld_lightning.errors import user_errors
from rld_lightning.hydra.quoting import as_argument
from rld_lightning.models.complexity import count_macs, count_parameters, images_per_second
from rld_lightning.models.imported import is_external
from rld_lightning.models.input_size import split_size
from rld_lightning.models.teacher.fold import fold_if_same
from rld_lightning.models.teacher.frozen import FrozenTeacher
from rld_lightning.models.weights.read import split_part
from rld_lightning.module import DistillationModule
from rld_lightning.mps import image_layout
from rld_lightning.package_files import script_command
from rld_lightning.reporting.networks import Network, table_of, write_networks
from rld_lightning.runs.files import ALONE, NETWORKS, NETWORKS_CLASSES, STUDENT, SUMMARY, write_csv
from rld_lightning.runs.provenance import processor_name
from rld_lightning.runs.summary import Summary
from rld_lightning.tasks.evaluate import MOST_CLASSES_SHOWN, ClassResult, EvaluationModule, class_results, test_with
from rld_lightning.tasks.run.make import make_trainer
from rld_lightning.tasks.run.matched_classes import read_student
from rld_lightning.tasks.run.plan import Plan, standalone_config, with_values
from rld_lightning.tasks.run.resume import run_once


@dataclass(frozen=True)
class Finished:
    """A run that has written its results."""

    cfg: DictConfig  # its configuration
    plan: Plan  # its plan
    data: ImageDataModule  # its data module, set up
    module: DistillationModule  # its student and teacher, on the training device
    summary: Summary  # its results
    fit: Callable[[DictConfig], Summary]  # runs another job, see `run_once`


class _Logits(nn.Module):
    """A teacher as a network that returns only logits."""

    def __init__(self, teacher: FrozenTeacher) -> None:
        super().__init__()
        self.teacher = teacher

    def forward(self, images: Tensor) -> Tensor:
        return self.teacher(images)[0]


def train_alone(finished: Finished) -> None:
    """Trains a run's student alone: with cross-entropy, on the same data, with the same recipe and initial weights."""
    plan = finished.plan
    if plan.teacher is None:
        return  # it was trained alone already
    folder = plan.run / ALONE
    if not (folder / SUMMARY).exists():
        print_line("alone", f"training {plan.student.name} once more without the teacher, for comparison")
    run_once(
        standalone_config(finished.cfg, plan.student.name, plan.student.weights, folder), finished.fit, name="alone"
    )


def compare_networks(finished: Finished) -> None:
    """Measures the networks of a run on its test split, on which nothing was selected if images were held out.

    Prints a table and writes ``networks.json`` and ``networks.csv``, the accuracies per class.
    """
    with user_errors():
        measured = [_measure(finished, *network) for network in _networks(finished)]
    _report(finished.plan.run, [network for network, _ in measured], [classes for _, classes in measured])


def _networks(finished: Finished) -> Iterator[tuple[str, str, nn.Module, int]]:
    """Yields role, name, network and number of bytes of each network."""
    plan, module = finished.plan, finished.module
    if module.teacher is not None and plan.teacher is not None and not module.teacher.shard:
        weights = plan.teacher.weights
        files = [split_part(file)[0] for file in (weights if isinstance(weights, tuple) else (str(weights),))]
        if all(map(Path.is_file, files)):
            size = sum(file.stat().st_size for file in files)
        else:
            size = sum(parameter.nbytes for parameter in module.teacher.parameters())
        name = plan.teacher.name
        name = name if "+" in name else "+".join([name] * len(files))  # an ensemble of one network
        yield "teacher", name, _Logits(module.teacher), size
    role = "distilled student" if plan.teacher is not None else "student alone"
    students = {"student alone": plan.run / ALONE / STUDENT, role: plan.run / STUDENT}
    for role, file in students.items():
        if file.is_file():
            name = finished.summary.model if file.parent == plan.run else plan.student.name
            yield role, name, read_student(file, name, finished.data), file.stat().st_size


def _measure(
    finished: Finished, role: str, name: str, network: nn.Module, size: int
) -> tuple[Network, list[ClassResult]]:
    data = finished.data
    exact = with_values(finished.cfg, {"trainer.precision": "32-true"}).trainer  # for an exact measurement
    trainer = make_trainer(exact, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    module = EvaluationModule(network, data.num_classes)
    test_with(trainer, module, data, "test")
    classes = class_results(module.results["per_class"], list(data.class_names))
    device = trainer.strategy.root_device
    parameters, macs = count_parameters(network), count_macs(network, data.image_shape)
    timed, shape = _as_timed(network, data.image_shape, image_layout(device))
    speed = images_per_second(timed.to(device), shape, batch_size=1, seconds=0.5)
    teacher = network.teacher if isinstance(network, _Logits) else None
    measured = Network(
        role=role,
        name=name,
        parameters=(teacher.parameter_count if teacher is not None else parameters) or None,
        macs=macs or None,
        bytes=size,
        milliseconds=1000 / speed,
        **module.scores("test"),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name(),
    )
    return measured, classes


def _as_timed(
    network: nn.Module, image_shape: tuple[int, int, int], layout: torch.memory_format
) -> tuple[nn.Module, tuple[int, int, int]]:
    """Returns a network with its batch norms folded, in the device's layout, and the shape of its own images.

    A run's teacher is so if its loss allows it: otherwise a student of the same architecture would look slower.
    """
    teacher = network.teacher if isinstance(network, _Logits) else None
    model, shape = (network, image_shape) if teacher is None else (teacher.model, teacher.input_shape(image_shape))
    return fold_if_same(model.eval(), shape)[0].to(memory_format=layout), shape


@rank_zero_only
def _report(run: Path, networks: Sequence[Network], classes: Sequence[Sequence[ClassResult]]) -> None:
    write_networks(run, networks)
    head, rows = table_of(networks)
    timing = "ms: the fastest of one image at a time, batch norms folded"
    print_table(f"{networks[0].images:,} images of the test split; {timing}", head, rows)
    roles = head[1:]
    by_name = [{result.name: result for result in results} for results in classes]
    hardest = [result.name for result in classes[-1]]  # for the distilled student
    table = [(name, by_name[-1][name].images, *(found[name].accuracy for found in by_name)) for name in hardest]
    write_csv(run / NETWORKS_CLASSES, dict(zip(("class", "images", *roles), zip(*table, strict=True), strict=True)))
    shown = table[:MOST_CLASSES_SHOWN]
    which = f"the {len(shown)} hardest of {len(table)} classes" if len(shown) < len(table) else "each class"
    print_table(f"Accuracy of {which}, %", ("class", "images", *roles), shown)
    print_files(run, {NETWORKS: "these numbers", NETWORKS_CLASSES: "every class"})
    if caution := no_gain_note(networks):
        print_line("caution", caution)
        trust = _foreign_override("trust", networks[-1].name)
        print_line(
            "alone", f"exported by {script_command('export')} {as_argument('run', run / ALONE)}{trust}", pasted=True
        )


def no_gain_note(networks: Sequence[Network]) -> str:
    """Returns a sentence if the student alone is at least as good as the distilled one; else empty."""
    top1 = {network.role: network.top1 for network in networks}
    by_itself, distilled = top1.get("student alone"), top1.get("distilled student")
    if by_itself is None or distilled is None or distilled > by_itself:
        return ""
    return (
        f"the distilled student has {distilled:.2f} % and the student alone {by_itself:.2f} %, of one run each: the "
        "teacher has not helped, with this loss in these epochs"
    )


@rank_zero_only
def export_student(finished: Finished) -> None:
    """Exports the student with a model card, and to ONNX if that is installed, and prints how to predict with it."""
    from rld_lightning.tasks.export import export_run, missing_for_onnx  # takes a second to import

    run = finished.plan.run
    formats = ["safetensors", "onnx"]
    if missing_for_onnx():
        formats.remove("onnx")
        print_line("export", 'without ONNX, which needs pip install "rld-lightning[onnx]"')
    with user_errors():
        export_run(run, formats)
    name = _foreign_override("name", finished.plan.student.name)
    print_line("next", f"{script_command('predict')} {as_argument('weights', run)}{name} images=photo.jpg", pasted=True)


def _foreign_override(key: str, name: str) -> str:
    """Returns an argument that a command needs for a network from elsewhere, as files do not provide it."""
    return f" {as_argument(key, name)}" if is_external(split_size(name)[0]) else ""


STEPS: Mapping[str, Callable[[Finished], None]] = {
    "alone": train_alone,  # the student without its teacher, with cross-entropy, in <run>/alone
    "networks": compare_networks,  # teacher, student alone and distilled student side by side, on the test split
    "export": export_student,  # safetensors, ONNX and a model card in <run>/export
}


def run_follow_ups(finished: Finished) -> None:
    """Runs the steps that ``after`` names, in the order of :data:`STEPS`."""
    for name, step in STEPS.items():
        if name in finished.cfg.after:
            step(finished)
