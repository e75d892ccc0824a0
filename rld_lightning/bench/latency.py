"""What a network takes on this machine: latency by percentiles, and memory, each contender in a process of its own."""

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

from rld_lightning.models.factory import create_model
from rld_lightning.models.imported import check_trusted, is_from_elsewhere, trust
from rld_lightning.models.input_size import split_size
from rld_lightning.models.onnx_file import OnnxNetwork
from rld_lightning.models.weights.beside import find_weights
from rld_lightning.models.weights.verify import create_fitting

_WARM_UP = 3
_LEAST = 10


@dataclass(frozen=True)
class Contender:
    """A network and what runs it."""

    name: str  # of the network, for `create_model`
    weights: str  # its file; `"pretrained"` for those of its library. With ONNX the file that is run.
    num_classes: int  # C
    image_shape: tuple[int, int, int]  # channels, height and width
    backend: str  # `"eager"`, `"compiled"`, `"onnx"` or `"onnx_int8"`


@dataclass(frozen=True)
class Latency:
    """How long a batch takes, in milliseconds."""

    batch_size: int  # images in a batch
    batches: int  # how many were timed
    p50: float  # half of them took no longer
    p90: float  # nine tenths
    p99: float  # ninety-nine hundredths

    @property
    def images_per_s(self) -> float:
        """Images a second, at the median."""
        return 1000 * self.batch_size / self.p50


@dataclass(frozen=True)
class Measured:
    """What a contender takes."""

    latencies: tuple[Latency, ...] = ()  # by batch size
    # The most memory that came on top of what the process had before the network was there, at the largest batch,
    # weights included; of the GPU where it runs there. None where the system does not say, and of compiled networks,
    # where most of it is the compiler's.
    peak_mb: float | None = None
    error: str = ""  # why it does not run; empty where it does


def measure_alone(
    contender: Contender, batch_sizes: tuple[int, ...], seconds: float, threads: int, device: str
) -> Measured:
    """:func:`measure` in a fresh process, so that memory and threads are those of this network alone.

    Raises:
        ValueError: the network is from elsewhere, and nobody has trusted its name.
    """
    if is_from_elsewhere(plain := split_size(contender.name)[0]):
        check_trusted(plain)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(_measure_trusted, contender, batch_sizes, seconds, threads, device).result()
        except BrokenProcessPool:  # the system has ended it, for want of memory perhaps
            return Measured(error="its process was ended")


def _measure_trusted(contender: Contender, *how: Any) -> Measured:
    trust(contender.name)  # as it was in the process that has asked
    return measure(contender, *how)


def measure(
    contender: Contender, batch_sizes: tuple[int, ...], seconds: float, threads: int, device: str = "cpu"
) -> Measured:
    """Times forward passes in evaluation mode, of random images that are on the device already.

    Args:
        batch_sizes: images in a batch, each on its own.
        seconds: how long to time each, after a warm-up; at least ten batches.
        threads: of one operation on the CPU.
        device: ``"cpu"`` or ``"cuda"``; int8 runs on the CPU.
    """
    torch.set_num_threads(threads)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # a machine without a GPU is no news
    where = torch.device(device)
    forget_peak(where)
    before = memory(where)
    try:
        network = _build(contender, threads, where)
        with torch.inference_mode():
            latencies = tuple(
                _time(network, size, contender.image_shape, seconds, where) for size in sorted(batch_sizes)
            )
    except Exception as error:  # compilers and exporters raise their own
        lines = [line for line in str(error).splitlines() if line.strip()]
        return Measured(error=lines[0] if lines else type(error).__name__)
    peak = peak_memory(where)
    known = contender.backend != "compiled" and before is not None and peak is not None
    return Measured(latencies, (peak - before) / 1e6 if known else None)  # type: ignore[operator]


def network_of(contender: Contender) -> nn.Module:
    """The network of a contender in PyTorch, with its weights.

    Raises:
        FileNotFoundError: its file is not there.
        WeightsError: it is another network's.
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
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        network(images)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(1000 * (time.perf_counter() - start))
    p50, p90, p99 = np.percentile(taken, (50, 90, 99)).tolist()
    return Latency(batch_size, len(taken), p50, p90, p99)


def forget_peak(device: torch.device) -> None:
    """Has the peak of :func:`peak_memory` count from what is in use now, where the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what is in use


def memory(device: torch.device) -> int | None:
    """Bytes that this process has in use, of its GPU or of the machine; None where the system does not say."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _of_process("VmRSS")


def peak_memory(device: torch.device) -> int | None:
    """Likewise the most that it had in use."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _of_process("VmHWM")


def _of_process(key: str) -> int | None:
    status = Path("/proc/self/status")
    found = re.search(rf"^{key}:\s+(\d+) kB", status.read_text(), re.MULTILINE) if status.exists() else None
    return 1024 * int(found[1]) if found else None
