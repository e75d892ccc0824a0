"""Measures networks: those of a run side by side, with size, computation, memory and latency, or one by its name."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from omegaconf import DictConfig

from rld_lightning.atomic_files import write_whole
from rld_lightning.bench.latency import Contender, Measured, measure_alone, network_of
from rld_lightning.console import print_files, print_line, print_table
from rld_lightning.errors import user_errors
from rld_lightning.models.classes import number_of_classes
from rld_lightning.models.complexity import count_macs, count_parameters, images_per_second
from rld_lightning.models.factory import create_model
from rld_lightning.models.imported import trust
from rld_lightning.models.onnx_file import export_copy, quantise_onnx, to_onnx
from rld_lightning.models.student import EXPORT, load_student
from rld_lightning.models.weights.facts import read_facts
from rld_lightning.models.weights.read import RUN_WEIGHTS, read_metadata, read_weights, split_part
from rld_lightning.reporting.known_cost import Cost, known_cost
from rld_lightning.runs.files import EXPORTED, STUDENT, check_file, write_json
from rld_lightning.runs.finished import Run, read_run
from rld_lightning.runs.provenance import processor_name
from rld_lightning.tasks.run.make import device_of
from rld_lightning.tasks.run.plan import freeze
from rld_lightning.tasks.teacher.recorded import input_shape_as_teacher, input_size, teacher_of

COST = "cost.json"
# Limits for a run directory that may be untrusted: its networks are built and run.
_MOST_CLASSES, _LARGEST_SIDE = 100_000, 1024
_LARGEST = 1 << 62


@dataclass(frozen=True)
class Network:
    """A network of a run."""

    role: str  # `"teacher"` or `"student"`
    contender: Contender  # in eager mode, with its input size in the run
    top1: float | None  # accuracy in percent, as measured by the run; None if it was not


@dataclass(frozen=True)
class Row:
    """The cost of a network with one backend; ``file_mb`` is None for weights that their library stores.

    ``top1_images`` is the number of images for ``top1``.
    """

    role: str
    name: str
    backend: str
    parameters: int
    macs: int
    file_mb: float | None
    top1: float | None
    top1_images: int | None
    measured: Measured


def cost(cfg: DictConfig) -> list[Row]:
    """Runs the job of ``conf/cost.yaml``: measures, prints, and writes ``cost.json`` and ``cost.png``.

    Raises:
        UserError: the run is not finished, or a network's file has moved.
    """
    freeze(cfg)
    folder, sizes = Path(cfg.paths.run), tuple(cfg.batch_sizes)
    threads = cfg.threads or torch.get_num_threads()
    with user_errors():
        device = device_of(cfg.device).type
        if not sizes or not cfg.backends:
            raise ValueError("batch_sizes= and backends= must name at least one each, such as batch_sizes=[1,64].")
        trust(cfg.trust)
        run = read_run(Path(cfg.run))
        found = list(networks(run))
        rows = []
        for network in found:
            for backend in cfg.backends:
                print_line("measure", f"{network.role} {network.contender.name}, {backend}")
                rows.append(_row(run, network, backend, folder, (sizes, cfg.seconds, threads, device)))
                if error := rows[-1].measured.error:
                    print_line("left out", f"{network.role}, {backend}: {error}")
    machine = _processor(threads)
    machine = f"{torch.cuda.get_device_name()}, {machine}" if device == "cuda" else machine
    where = run.summary.validated_on
    facts = {"machine": machine, "torch": torch.__version__, "accuracy_on": where}
    write_json(folder / COST, facts | {"rows": [asdict(row) for row in rows]})
    _print(rows, sizes, machine, where)
    files = {COST: "these numbers"}
    if _draw(rows, sizes[0], f"{machine}\naccuracy on {where}{_other_images(rows, run.summary.images)}", folder):
        files["cost.png"] = "accuracy against latency"
    print_files(folder, files)
    return rows


def networks(run: Run) -> Iterator[Network]:
    """Yields a run's teacher, if it has one, and its student.

    Raises:
        FileNotFoundError: a file has moved.
        ValueError: the teacher is a program, or the run's settings are invalid.
    """
    student = load_student(run.folder / RUN_WEIGHTS)
    shape, classes = (3, *student.transform.size), len(student.classes)
    teacher = run.config["model"].get("teacher")
    if run.summary.teacher is not None and teacher and isinstance(teacher["weights"], list):
        print_line("teacher", "an ensemble, which is not measured")
    elif run.summary.teacher is not None and teacher:
        planned = teacher_of(run, option=None, classes_count=False)
        weights, known = str(planned.weights), None
        if weights != "pretrained":  # it may have more classes than the data
            known = number_of_classes(planned.name, read_weights(weights).state_dict)
        seen = (3, *input_size(planned, student.transform.size))
        teacher_network = Contender(planned.name, weights, known or classes, seen)
        yield Network("teacher", teacher_network, run.summary.teacher_top1)
    yield Network("student", Contender(student.name, str(run.folder / RUN_WEIGHTS), classes, shape), run.summary.top1)


def _row(run: Run, network: Network, backend: str, folder: Path, how: tuple[tuple[int, ...], float, int, str]) -> Row:
    contender = replace(network.contender, backend=backend)
    name, image_shape = contender.name, contender.image_shape
    model, file, error = network_of(contender), split_part(contender.weights)[0], ""
    if backend.startswith("onnx"):
        file = folder / f"{network.role}.{backend}.onnx"
        try:
            content = to_onnx(export_copy(model), image_shape, {"name": name})
            if backend == "onnx_int8":  # its speed does not depend on the ranges
                content = quantise_onnx(content, [torch.randn(8, *image_shape)])
            write_whole(file, content)
            contender = replace(contender, weights=str(file))
        except ValueError as refusal:
            error = str(refusal)
    top1: float | None = network.top1
    images: int | None = run.summary.images
    if backend == "onnx_int8":
        top1, images = _exported_top1(run) if network.role == "student" else (None, None)
    return Row(
        network.role,
        name,
        backend,
        count_parameters(model),
        count_macs(model, image_shape),
        None if error or contender.weights == "pretrained" else file.stat().st_size / 1e6,
        top1,
        images,
        Measured(error=error) if error else measure_alone(contender, *how),
    )


def _exported_top1(run: Run) -> tuple[float | None, int | None]:
    """Returns the accuracy of the run's int8 export, and its number of images."""
    path = run.folder / EXPORT / EXPORTED
    if not path.exists():
        return None, None
    check_file(path)
    try:
        files = {file["format"]: file for file in json.loads(path.read_text())["files"]}
        top1, images = files["onnx_int8"]["top1"], files["onnx_int8"]["images"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None, None
    right = type(top1) in (int, float) and 0 <= top1 <= 100 and type(images) is int and 0 < images < _LARGEST
    return (float(top1), images) if right else (None, None)


def _print(rows: Sequence[Row], sizes: Sequence[int], machine: str, accuracy_on: str) -> None:
    sized = {(row.role, row.name): row for row in reversed(rows)}
    print_table(
        f"Networks, accuracy on {accuracy_on}",
        ("", "parameters", "M MACs", "top-1 %"),
        [
            (f"{role} {name}", row.parameters, f"{row.macs / 1e6:.1f}", row.top1)
            for (role, name), row in reversed(sized.items())
        ],
    )
    ran = [row for row in rows if not row.measured.error]
    print_table(
        f"Files, and peak memory at a batch of {max(sizes)}",
        ("", "file MB", "peak MB", "top-1 %", "of images"),
        [
            (f"{row.role} {row.backend}", row.file_mb, row.measured.peak_mb, row.top1, row.top1 and row.top1_images)
            for row in ran
        ],
    )
    for index, size in enumerate(sorted(sizes)):
        lines = []
        for row in ran:
            found = row.measured.latencies[index]
            times = [f"{value:.2f}" for value in (found.p50, found.p90, found.p99)]
            lines.append((f"{row.role} {row.backend}", *times, f"{found.images_per_s:,.0f}", found.batches))
        print_table(f"Batch of {size}, {machine}", ("", "ms p50", "p90", "p99", "images/s", "n"), lines)


def _other_images(rows: Sequence[Row], usual: int) -> str:
    """Returns what accuracies were measured on if not on all of the run's images: an export's may be on fewer."""
    fewer = {row.backend: row.top1_images for row in rows if row.top1 is not None and row.top1_images != usual}
    return "".join(f", of {backend.replace('_', ' ')} on {images:,} of them" for backend, images in fewer.items())


def _draw(rows: Sequence[Row], batch_size: int, below: str, folder: Path) -> bool:
    try:
        from rld_lightning.reporting.latency_plot import Point, draw_latency  # matplotlib is an extra
    except ImportError as error:
        print_line("cost.png", f'not drawn ({error}): pip install "rld-lightning[report]"')
        return False
    points = [
        Point(row.role, row.backend, latency.p50, row.top1)
        for row in rows
        for latency in row.measured.latencies
        if latency.batch_size == batch_size and row.top1 is not None
    ]
    if points:
        names = {row.role: row.name for row in rows}
        title = ", ".join(f"{role}: {name}" for role, name in names.items())
        draw_latency(points, batch_size, f"{title}\n{below}", folder / "cost.png")
    return bool(points)


def measure_cost(name: str, runs: Sequence[Run], *, latency: bool = True) -> Cost | None:
    """Returns the cost of a network by name.

    Args:
        runs: runs on its data set; they provide the images' size, and the network's cost if they trained it.
        latency: whether to measure its time, about half a second, with random weights on the CPU.

    Returns:
        the cost; None if the network cannot be built, for example because it was removed from this package, or does
            not take images of this size.
    """
    known = known_cost(name, runs)
    if known is not None and not latency:
        return known
    num_classes, image_shape = _images(runs)
    seen = input_shape_as_teacher(name, runs, image_shape)
    image_shape = seen if max(seen) <= _LARGEST_SIDE else image_shape
    try:
        network = create_model(name, num_classes)
        cost = known or Cost(count_parameters(network), count_macs(network, image_shape))
        speed = images_per_second(network, image_shape, batch_size=1, seconds=0.5) if latency else None
    except (ValueError, ImportError, RuntimeError, AssertionError):  # the last two of images of another size
        return known
    machine = f"{_processor(torch.get_num_threads())}, torch {torch.__version__}, float32"
    return replace(cost, milliseconds=1000 / speed, machine=machine) if speed else cost


def _processor(threads: int) -> str:
    return f"{processor_name()}, {threads} thread{'s' if threads > 1 else ''}"


def _images(runs: Sequence[Run]) -> tuple[int, tuple[int, int, int]]:
    """Returns number of classes and image shape of an exported student; else of the configuration."""
    for run in runs:
        weights = run.folder / STUDENT
        try:
            facts = read_facts(read_metadata(weights) if weights.is_file() else {}, weights)
        except (ValueError, OSError):  # incomplete or of another kind
            continue
        classes, shape = facts.num_classes, facts.image_shape
        if classes is not None and shape is not None and classes <= _MOST_CLASSES and max(shape) <= _LARGEST_SIDE:
            return classes, shape
    size = runs[0].config["data"].get("image_size")
    size = size if type(size) is int and 0 < size <= _LARGEST_SIDE else 32
    return 100, (3, size, size)
