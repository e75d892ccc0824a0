"""Latency percentiles and memory of networks on this machine, each measured in a separate process."""

import gc
import logging
import multiprocessing
import re
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rld_lightning.models.complexity import clock
from rld_lightning.models.factory import create_model
from rld_lightning.models.imported import check_trusted, is_external, trust
from rld_lightning.models.input_size import split_size
from rld_lightning.models.onnx_file import OnnxNetwork
from rld_lightning.models.weights.companion_files import find_weights
from rld_lightning.models.weights.verify import create_fitting

_WARM_UP = 3
_LEAST = 10


@dataclass(frozen=True)
class Contender:
    """A network and its runtime."""

    name: str  # the network's name for `create_model`
    weights: str  # its file; `"pretrained"` for its library's weights; with ONNX the file to run
    num_classes: int  # C
    image_shape: tuple[int, int, int]  # channels, height and width
    backend: str = "eager"  # `"eager"`, `"compiled"`, `"onnx"` or `"onnx_int8"`


@dataclass(frozen=True)
class Latency:
    """Percentiles of the time of a batch, in milliseconds."""

    batch_size: int
    batches: int  # number of timed batches
    p50: float
    p90: float
    p99: float

    @property
    def images_per_s(self) -> float:
        """Images/s at the median."""
        return 1000 * self.batch_size / self.p50


@dataclass(frozen=True)
class Measured:
    """The measurements of a contender."""

    latencies: tuple[Latency, ...] = ()  # by batch size
    # Peak memory with the largest batch, beyond what the process used before it loaded the network, so with weights; of
    # the GPU if it runs there. None if the system does not report it, and for compiled networks, where most of it is
    # the compiler's.
    peak_mb: float | None = None
    error: str = ""  # why it does not run; empty if it does


def measure_alone(
    contender: Contender, batch_sizes: tuple[int, ...], seconds: float, threads: int, device: str
) -> Measured:
    """Runs :func:`measure` in a fresh process, so that memory and threads are those of this network alone.

    Raises:
        ValueError: the network is an external one whose name is not trusted.
    """
    if is_external(plain := split_size(contender.name)[0]):
        check_trusted(plain)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(_measure_trusted, contender, batch_sizes, seconds, threads, device).result()
        except BrokenProcessPool:  # killed by the system, perhaps out of memory
            return Measured(error="its process was ended")


def _measure_trusted(contender: Contender, *how: Any) -> Measured:
    trust(contender.name)  # measure_alone has checked it in the parent process
    return measure(contender, *how)


def measure(
    contender: Contender, batch_sizes: tuple[int, ...], seconds: float, threads: int, device: str = "cpu"
) -> Measured:
    """Times forward passes in evaluation mode on random images that are already on the device.

    Args:
        batch_sizes: each is measured separately.
        seconds: duration of each measurement after a warm-up; at least ten batches are timed.
        threads: CPU threads per operation.
        device: ``"cpu"`` or ``"cuda"``; int8 runs on the CPU.
    """
    torch.set_num_threads(threads)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # hides a warning about a missing GPU
    where = torch.device(device)
    reset_peak(where)
    before = memory(where)
    try:
        network = _build(contender, threads, where)
        with torch.inference_mode():
            latencies = tuple(
                _time(network, size, contender.image_shape, seconds, where) for size in sorted(batch_sizes)
            )
    except Exception as error:  # compilers and runtimes raise their own types
        lines = [line for line in str(error).splitlines() if line.strip()]
        return Measured(error=lines[0] if lines else type(error).__name__)
    peak = peak_memory(where)
    known = contender.backend != "compiled" and before is not None and peak is not None
    return Measured(latencies, (peak - before) / 1e6 if known else None)  # type: ignore[operator]


def network_of(contender: Contender) -> nn.Module:
    """Creates the network of a contender in PyTorch, with its weights.

    Raises:
        FileNotFoundError: its weights file does not exist.
        WeightsError: the file is another network's.
    """
    if contender.weights == "pretrained":
        return create_model(contender.name, contender.num_classes, pretrained=True)
    return create_fitting(contender.name, contender.num_classes, find_weights(contender.weights))[0]


def _build(contender: Contender, threads: int, device: torch.device) -> Callable[[Tensor], Tensor]:
    if contender.backend.startswith("onnx"):
        return OnnxNetwork(contender.weights, threads=threads, device=device.type)
    network = network_of(contender).eval().requires_grad_(False).to(device)
    if contender.backend == "compiled":
        network.compile()
    gc.collect()
    return network


def _time(
    network: Callable[[Tensor], Tensor],
    batch_size: int,
    image_shape: tuple[int, int, int],
    seconds: float,
    device: torch.device,
) -> Latency:
    images = torch.randn(batch_size, *image_shape, device=device)
    for _ in range(_WARM_UP):
        network(images)
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while len(taken) < _LEAST or time.perf_counter() < end:
        start = clock(device)
        network(images)
        taken.append(1000 * (clock(device) - start))
    p50, p90, p99 = np.percentile(taken, (50, 90, 99)).tolist()
    return Latency(batch_size, len(taken), p50, p90, p99)


def reset_peak(device: torch.device) -> None:
    """Resets the peak of :func:`peak_memory` to what is in use now, if the system supports that."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM


def memory(device: torch.device) -> int | None:
    """Returns the bytes in use by this process, of its GPU or main memory; None if the system does not report it."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _status_bytes("VmRSS")


def peak_memory(device: torch.device) -> int | None:
    """Returns the peak of :func:`memory`; None if the system does not report it."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status_bytes("VmHWM")


def _status_bytes(key: str) -> int | None:
    status = Path("/proc/self/status")
    match = re.search(rf"^{key}:\s+(\d+) kB", status.read_text(), re.MULTILINE) if status.exists() else None
    return 1024 * int(match[1]) if match else None
