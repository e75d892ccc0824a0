"""Benchmarks of losses and training steps by ratio: contenders alternate, so that a noisy machine slows all alike."""

import statistics
import subprocess
import sys
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from torch import Tensor, nn

from rld_lightning.bench.latency import memory, peak_memory, reset_peak
from rld_lightning.capture import CapturedStep
from rld_lightning.console import console, print_table
from rld_lightning.errors import did_you_mean
from rld_lightning.hydra.compose import compose, expand_combined_loss
from rld_lightning.hydra.options import list_options
from rld_lightning.hydra.resolvers import fast_precision
from rld_lightning.losses.base import DistillationLoss, ModelOutput, StepContext
from rld_lightning.losses.connect import connect
from rld_lightning.losses.rld import RLDLoss, rld_loss
from rld_lightning.models.compiled import compile_for
from rld_lightning.models.complexity import clock
from rld_lightning.models.factory import create_model
from rld_lightning.models.taps import forward_with_taps
from rld_lightning.models.teacher.frozen import FrozenTeacher
from rld_lightning.models.teacher.logits_table import LogitsTable
from rld_lightning.models.teacher.resident_table import resident

Step = Callable[[], object]
Compiled = Literal["nothing", "networks", "all"]
_ROWS = 100_000  # of the table of logits
_SGD: dict[str, Any] = {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4}


def plain_rld(student: Tensor, teacher: Tensor, label: Tensor, temperature: float = 4.0) -> Tensor:
    """RLD as a plain formula: softmax, logarithm, -1e9 for masked classes; ``(B, C)`` logits."""
    p_student, p_teacher = (student / temperature).softmax(1), (teacher / temperature).softmax(1)
    confidence, true = p_teacher.amax(1), p_student.gather(1, label[:, None])[:, 0]
    two_student, two_teacher = torch.stack([true, 1 - true], 1), torch.stack([confidence, 1 - confidence], 1)
    scd = F.kl_div(two_student.log(), two_teacher, reduction="batchmean")
    drop = teacher >= teacher.gather(1, label[:, None])
    log_student = F.log_softmax((student / temperature).masked_fill(drop, -1e9), 1)
    kept_teacher = F.softmax((teacher / temperature).masked_fill(drop, -1e9), 1)
    mcd = F.kl_div(log_student, kept_teacher, reduction="batchmean")
    return temperature**2 * (scd + 8.0 * mcd)


def time_in_turn(steps: Mapping[str, Step], rounds: int, device: torch.device) -> dict[str, float]:
    """Returns the median seconds of each step, after two warm-up calls, with all steps in alternation."""
    durations: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step(), step()
    for _ in range(rounds):
        for name, step in steps.items():
            start = clock(device)
            step()
            durations[name].append(clock(device) - start)
    return {name: statistics.median(values) for name, values in durations.items()}


def bench_loss(batch: int, classes: int, device: torch.device, rounds: int) -> None:
    """Compares time and peak memory of RLD's forward and backward pass with the plain formula's."""
    student, teacher, label = _logits(batch, classes, device)
    contenders = {"plain formula": plain_rld, "rld_loss": _log_space_rld}
    if device.type == "cuda":  # on a CPU, compiled kernels are slower than ours
        contenders["rld_loss, compiled"] = compile_for(device, _log_space_rld, of_logits=True)

    def step(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        student.grad = None
        loss(student, teacher, label).backward()

    steps = {name: lambda loss=loss: step(loss) for name, loss in contenders.items()}
    seconds = time_in_turn(steps, rounds, device)
    memory = {name: _peak_memory(name, step, batch, classes, device) for name, step in steps.items()}
    base = "plain formula"
    print_table(
        f"RLD, forward and backward, {batch} x {classes} float32 logits on {machine(device)}",
        ("", "ms, median", "time ratio", "peak MiB", "memory ratio"),
        [(n, 1e3 * seconds[n], seconds[n] / seconds[base], memory[n], memory[n] / memory[base]) for n in contenders],
    )
    console.print(f"medians of {rounds} rounds in alternation; memory beyond the inputs", style="dim")


def bench_step(
    teacher_name: str, student_name: str, batch: int, image_shape: Sequence[int], device: torch.device, rounds: int
) -> None:
    """Compares a whole training step with RLD, plain (eager, float32, contiguous) and ours.

    Ours is measured with the teacher's forward pass, and with its logits looked up in a complete table on disk. On a
    GPU also as in ``fit.py``: captured as one CUDA graph, with the teacher's batch norms folded, the table on the
    device, and the networks, then also the loss, compiled.
    """
    images = torch.randn(batch, *image_shape, device=device)
    label = torch.randint(100, (batch,), device=device)
    bf16 = fast_precision(device.type) == "bf16-mixed"

    def student_step(
        student: nn.Module,
        teacher: Callable[[Tensor], Tensor],
        loss: Callable[[Tensor, Tensor, Tensor], Tensor],
        images: Tensor,
        autocast: bool,
    ) -> Step:
        return _eager_step(
            student.parameters(), lambda: loss(student(images), teacher(images), label), device, autocast=autocast
        )

    def plain_loss(student: Tensor, teacher: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(student, label) + plain_rld(student, teacher, label)

    def plain_teacher(images: Tensor) -> Tensor:
        with torch.no_grad():
            return plain(images)

    def frozen(network: nn.Module) -> Callable[[Tensor], Tensor]:
        teacher = FrozenTeacher(network, channels_last=True)
        return lambda images: teacher(images)[0]

    rows = torch.randint(_ROWS, (rounds + 2, batch), generator=torch.Generator().manual_seed(0)).to(device)

    def looking_up(table: LogitsTable) -> Callable[[Tensor], Tensor]:
        each = iter(rows)

        def teacher(images: Tensor) -> Tensor:
            logits, known = table.read(next(each))
            assert known.all()
            return logits

        return teacher

    def models() -> tuple[nn.Module, nn.Module]:
        torch.manual_seed(0)
        return create_model(teacher_name).to(device).eval(), create_model(student_name).to(device).train()

    criterion = RLDLoss()
    plain, student = models()
    steps = {"plain eager float32": student_step(student, plain_teacher, plain_loss, images, False)}
    with TemporaryDirectory() as folder:
        table = LogitsTable(Path(folder) / "table", _ROWS, 100)
        for some in torch.arange(_ROWS).split(1000):
            table.write(some, 5 * torch.randn(len(some), 100), some % 100)
        for name, autocast, cached in (
            ("ours, float32", False, False),
            ("ours, float32, cached logits", False, True),
            ("ours, bfloat16 autocast", True, False),
            ("ours, bfloat16, cached logits", True, True),
        ):
            if autocast and not bf16:
                continue
            network, student = models()
            steps[name] = student_step(
                student.to(memory_format=torch.channels_last),
                looking_up(table) if cached else frozen(network),
                lambda student, teacher, label: _total(criterion(student, teacher, label)),
                images.to(memory_format=torch.channels_last),
                autocast,
            )
        if device.type == "cuda" and bf16:
            ways: list[tuple[str, bool, Compiled]] = [
                ("", False, "nothing"),
                (", cached logits", True, "nothing"),
                (", compiled", False, "networks"),
                (", cached logits, compiled", True, "networks"),
                (", cached logits, compiled with the loss", True, "all"),
            ]
            for name, cached, compiled in ways:
                network, student = models()
                known = resident(table, device) if cached else None
                step = graph_step(student, network, known, rows[0], images, label, compiled=compiled)
                steps[f"ours, bfloat16, one graph{name}"] = step
        seconds = time_in_turn(steps, rounds, device)
    base = seconds["plain eager float32"]
    print_table(
        f"{teacher_name} to {student_name}, batch {batch}, {'x'.join(map(str, image_shape))} on {machine(device)}",
        ("step", "ms, median", "images/s", "speed ratio"),
        [(name, 1e3 * value, batch / value, base / value) for name, value in seconds.items()],
    )
    console.print(f"medians of {rounds} rounds in alternation", style="dim")


def graph_step(
    student: nn.Module,
    network: nn.Module,
    table: LogitsTable | None,
    rows: Tensor,
    images: Tensor,
    label: Tensor,
    *,
    compiled: Compiled = "nothing",
) -> Step:
    """Returns a training step whose passes and loss are one CUDA graph; without a GPU, the same step without a graph.

    Args:
        table: a complete table of the teacher's logits; None to compute them.
        rows: of the images in the table, int64 ``(B,)``.
        images: ``(B, 3, H, W)``.
        label: int64 ``(B,)``.
        compiled: what is compiled; ``"all"`` is the loss and both networks.
    """
    device, loss = images.device, RLDLoss()
    cuda = device.type == "cuda"
    student = student.to(memory_format=torch.channels_last)
    # PyTorch's compiler fuses the loss's hundred small kernels into a few.
    criterion = compile_for(device, loss, of_logits=True) if compiled == "all" else loss
    teacher = FrozenTeacher(network, channels_last=True)
    teacher.fold(images.shape[1:])
    forward: Callable[[Tensor], Tensor] = student
    if compiled != "nothing":
        teacher.model.compile(dynamic=False)
        forward = compile_for(device, student)
    optimizer = torch.optim.SGD(student.parameters(), **_SGD, fused=cuda)

    def work(_: Hashable, images: Tensor, rows: Tensor) -> dict[str, Tensor]:
        with torch.autocast(images.device.type, torch.bfloat16):
            soft = teacher(images)[0] if table is None else table.read_known(rows)
            total = _total(criterion(forward(images), soft, label))
        total.backward()
        return {"loss": total}

    watched = [*student.parameters(), *student.buffers()]
    step = CapturedStep(work, student.parameters(), watched, record=cuda)
    images = images.to(memory_format=torch.channels_last)
    for _ in range(step.warm_up + 1):  # so that it is recorded before being timed
        step(None, images, rows)

    def run() -> None:
        step(None, images, rows)
        optimizer.step()

    return run


def bench_losses(
    losses: dict[str, DistillationLoss],
    teacher_name: str,
    student_name: str,
    batch: int,
    image_shape: Sequence[int],
    device: torch.device,
    rounds: int,
) -> None:
    """Times a whole training step with each loss, with forward passes and optimiser, relative to the first one."""
    images, strong = (
        torch.randn(batch, *image_shape, device=device).to(memory_format=torch.channels_last) for _ in range(2)
    )
    index, train_label = torch.arange(batch, device=device), torch.arange(50_000, device=device) % 100
    autocast = fast_precision(device.type) == "bf16-mixed"
    network = create_model(teacher_name).to(device)
    teacher = FrozenTeacher(network, channels_last=True)

    def training_step(loss: DistillationLoss) -> Step:
        torch.manual_seed(0)
        student = connect(loss, create_model(student_name).to(device), network, image_shape, train_label)
        student = student.to(memory_format=torch.channels_last).train()
        parameters = [p for p in [*student.parameters(), *loss.to(device).parameters()] if p.requires_grad]

        def outputs(images: Tensor) -> tuple[ModelOutput, ModelOutput | None]:
            soft = ModelOutput(*teacher(images, loss.teacher_taps)) if loss.needs_teacher else None
            return ModelOutput(*forward_with_taps(student, images, loss.student_taps)), soft

        def total() -> Tensor:
            views = outputs(images)
            second = outputs(strong) if loss.needs_strong_view else (None, None)
            return _total(loss(StepContext(*views, train_label[:batch], index, None, *second)))

        return _eager_step(parameters, total, device, autocast=autocast)

    seconds = time_in_turn({name: training_step(loss) for name, loss in losses.items()}, rounds, device)
    base = next(iter(losses))
    print_table(
        f"{teacher_name} to {student_name}, batch {batch}, {'x'.join(map(str, image_shape))}, "
        f"{'bfloat16 autocast' if autocast else 'float32'} on {machine(device)}",
        ("loss", "ms, median", f"time relative to {base}"),
        [(name, 1e3 * value, value / seconds[base]) for name, value in seconds.items()],
    )
    console.print(f"medians of {rounds} rounds in alternation", style="dim")


def configured_losses(names: Sequence[str]) -> dict[str, DistillationLoss]:
    """Creates losses by name (all for an empty list); ``kd`` is first."""
    every = [name for name in list_options("loss") if name != "combined"]
    if unknown := [name for name in names if not name.startswith("[") and name not in every]:
        raise ValueError(f"{unknown[0]} is not a loss.{did_you_mean(unknown[0], every)} fit.py --help lists all.")
    return {
        name: instantiate(compose(expand_combined_loss([f"loss={name}"])).loss)
        for name in dict.fromkeys(["kd", *(names or every)])
    }


def _eager_step(
    parameters: Iterable[nn.Parameter], loss: Callable[[], Tensor], device: torch.device, *, autocast: bool
) -> Step:
    """Returns an eager training step that minimises ``loss()``."""
    optimizer = torch.optim.SGD(parameters, **_SGD)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            total = loss()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()

    return step


def _log_space_rld(student: Tensor, teacher: Tensor, label: Tensor) -> Tensor:
    return _total(rld_loss(student, teacher, label))


def _total(terms: Mapping[str, Tensor]) -> Tensor:
    """Sums the terms as the training step does."""
    return torch.stack(list(terms.values())).sum()


def _logits(batch: int, classes: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, batch, classes, generator=generator).to(device)
    return student.clone().requires_grad_(), teacher.clone(), torch.arange(batch, device=device) % classes


def _peak_memory(name: str, step: Step, batch: int, classes: int, device: torch.device) -> float:
    """Returns the peak MiB beyond the inputs; on a CPU measured in a fresh process, as freed memory is not returned."""
    if device.type == "cuda":
        return _peak_of(step, device)
    code = f"from rld_lightning.bench.steps import cpu_peak; print(cpu_peak({name!r}, {batch}, {classes}))"
    return float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


def cpu_peak(name: str, batch: int, classes: int) -> float:
    """Returns the peak MiB of one forward and backward pass beyond its inputs; call it in a fresh process."""
    cpu = torch.device("cpu")
    inputs, loss = _logits(batch, classes, cpu), plain_rld if name == "plain formula" else _log_space_rld
    return _peak_of(lambda: loss(*inputs).backward(), cpu)


def _peak_of(work: Step, device: torch.device) -> float:
    """Returns the peak MiB beyond what is in use; NaN if the system does not report it."""
    reset_peak(device)
    before = memory(device)
    work()
    peak = peak_memory(device)
    return float("nan") if before is None or peak is None else (peak - before) / 2**20


def matrix_products(device: torch.device) -> dict[str, float]:
    """Returns the operations per second of a large square matrix product in each precision."""
    size, speeds = 8192 if device.type == "cuda" else 2048, {}
    for name, dtype in {"float32": torch.float32, "bfloat16": torch.bfloat16}.items():
        a, b = torch.randn(2, size, size, device=device, dtype=dtype)
        speeds[name] = 2 * size**3 / shortest(partial(torch.mm, a, b), device)
    return speeds


def shortest(step: Step, device: torch.device) -> float:
    """Returns the least seconds of a step that is repeated for a second: long enough for one without disturbance."""
    least, stop = float("inf"), clock(device) + 1
    while (start := clock(device)) < stop:
        step()
        least = min(least, clock(device) - start)
    return least


def machine(device: torch.device) -> str:
    """Describes the hardware of the measurements."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} CPU threads, torch {torch.__version__}"
