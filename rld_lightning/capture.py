"""Captures the work of a training step as a CUDA graph and replays it.

With small networks the GPU waits for Python, which launches a thousand kernels a step one by one.
"""

import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rld_lightning.errors import first_line

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

Inputs = tuple[Tensor | None, ...]
Function = Callable[..., dict[str, Tensor]]


@dataclass
class _Recording:
    """State of the calls whose inputs have one layout."""

    state: Hashable = None  # constant and data pointers that the calls so far share; None before the first
    calls: int = 0  # number of these calls
    inputs: Inputs = ()  # the buffers that the graph reads
    outputs: dict[str, Tensor] = field(default_factory=dict)  # the buffers that it writes
    gradients: tuple[Tensor | None, ...] = ()  # one per parameter, also written by the graph
    replay: Callable[[], Any] | None = None  # repeats the work; None until captured


class CapturedStep:
    """Calls a function that computes the gradients of parameters, and after some calls replays it as a CUDA graph.

    Each call runs the work once. The first calls run it eagerly, which warms up the device and detects
    synchronisations (no graph can contain one); the call that captures executes nothing until its replay. Inputs of
    another layout, such as an epoch's last, smaller batch, run eagerly until there have been enough of them.

    The function must not synchronise with the device, must change tensors in place, and must touch gradients by
    ``backward()`` only. Without a graph (``record=False``, or no CUDA) the function is called with the same buffers,
    for tests to compare.

    Args:
        function: called with a constant and tensors; returns tensors by name.
        parameters: the parameters whose gradients it computes.
        watched: all tensors that it reads or changes besides its inputs; if one is reallocated, it is captured again.
        warm_up: calls with the same constant and the same watched tensors before it is captured.
        record: whether to capture a graph.

    Attributes:
        failed: why it could not be captured; empty if it could, or was not tried yet.
    """

    def __init__(
        self,
        function: Function,
        parameters: Iterable[nn.Parameter],
        watched: Iterable[Tensor],
        *,
        warm_up: int = 3,
        record: bool = True,
    ) -> None:
        self.function = function
        self.parameters = list(parameters)
        self.watched = list(watched)
        self.warm_up = warm_up
        self.record = record and torch.cuda.is_available()
        self.failed = ""
        self._recordings: dict[Hashable, _Recording] = {}
        # Warm-up and capture share one stream, for which only these calls wait.
        self._stream = torch.cuda.Stream() if self.record else None

    def __call__(self, constant: Hashable, *inputs: Tensor | None) -> dict[str, Tensor]:
        """Runs the function, or replays its graph.

        Returns:
            the function's outputs, detached; a later call may overwrite them.
        """
        layout = tuple(None if x is None else (x.shape, x.stride(), x.dtype) for x in inputs)
        recording = self._recordings.setdefault(layout, _Recording())
        state = (constant, *map(Tensor.data_ptr, self.watched))  # hundreds of tensors in each step, hence `map`
        if recording.state != state:
            recording.state, recording.calls, recording.replay = state, 0, None
        recording.calls += 1
        if recording.replay is None and recording.calls > self.warm_up and not self.failed:
            self._record(recording, constant, inputs)
        if recording.replay is None:
            return self._run_eagerly(constant, inputs, last=recording.calls == self.warm_up)
        for buffer, value in zip(recording.inputs, inputs, strict=True):
            if buffer is not None and value is not None:
                buffer.copy_(value, non_blocking=True)
        recording.replay()
        for parameter, gradient in zip(self.parameters, recording.gradients, strict=True):
            parameter.grad = gradient
        return dict(recording.outputs)

    def _run(self, constant: Hashable, inputs: Inputs) -> dict[str, Tensor]:
        for parameter in self.parameters:
            parameter.grad = None
        return {name: value.detach() for name, value in self.function(constant, *inputs).items()}

    def _run_eagerly(self, constant: Hashable, inputs: Inputs, last: bool) -> dict[str, Tensor]:
        if self._stream is None:
            return self._run(constant, inputs)
        # Memory freed on this stream is reused only on it, after the work already queued there.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            if last and not self.failed:
                with detect_synchronizations() as places:
                    outputs = self._run(constant, inputs)
                self.failed = f"{places[0]} waits for the GPU" if places else ""
            else:
                outputs = self._run(constant, inputs)
        torch.cuda.current_stream().wait_stream(self._stream)
        return outputs

    def _record(self, recording: _Recording, constant: Hashable, inputs: Inputs) -> None:
        recording.inputs = tuple(None if x is None else x.clone() for x in inputs)
        if self._stream is None:
            recording.outputs, recording.gradients = {}, ()
            recording.replay = lambda: self._rerun(recording, constant)
            return
        graph = torch.cuda.CUDAGraph()
        try:
            # The outer context restores the stream, also after a failed capture. Other threads, such as loaders', may
            # use the device at the same time.
            with (
                torch.cuda.stream(torch.cuda.current_stream()),
                torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"),
            ):
                recording.outputs = self._run(constant, recording.inputs)
        except RuntimeError as error:  # for example because the network synchronises with the device
            # The end of a failed capture raises another error, which does not tell the cause.
            self.failed = first_line(error.__context__ or error)
            discard_failed_capture(self._stream.device)
            return
        recording.gradients = tuple(parameter.grad for parameter in self.parameters)
        recording.replay = graph.replay

    def _rerun(self, recording: _Recording, constant: Hashable) -> None:
        """Does what a replay does by calling the function: outputs and gradients keep their buffers."""
        outputs = self._run(constant, recording.inputs)
        gradients = tuple(parameter.grad for parameter in self.parameters)
        if not recording.outputs:
            recording.outputs, recording.gradients = outputs, gradients
            return
        for name, value in outputs.items():
            recording.outputs[name].copy_(value)
        for kept, gradient in zip(recording.gradients, gradients, strict=True):
            if kept is not None and gradient is not None:
                kept.copy_(gradient)


def why_not_captured(trainer: "Trainer", student: nn.Module) -> str:
    """Returns why this training cannot be captured, or has not been shown to be; empty if it can."""
    if trainer.world_size > 1:
        return "several processes share a step"
    if trainer.accumulate_grad_batches > 1:
        return "gradients are accumulated"
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        return "the loss is scaled in float16"
    if student._compiled_call_impl is not None:  # by the caller, who may have chosen its CUDA graphs
        return "the student has been compiled"
    if torch.is_anomaly_enabled():
        return "anomalies are looked for"
    return ""


@contextmanager
def detect_synchronizations() -> Iterator[list[str]]:
    """Detects the Python lines, as ``"file.py:12"``, that wait for the GPU; PyTorch knows most such operations.

    Yields:
        a list that is filled at the end.
    """
    places: list[str] = []
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode(before)
    for warning in caught:
        if "called a synchronizing CUDA operation" in str(warning.message):
            places.append(f"{Path(warning.filename).name}:{warning.lineno}")
        elif "Synchronization debug mode" not in str(warning.message):  # PyTorch's warning that the mode is a prototype
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def discard_failed_capture(device: torch.device) -> None:
    """Clears the state that a failed capture leaves and that would break eager steps."""
    torch.clear_autocast_cache()  # bfloat16 weights that the graph was to compute
    generator = torch.cuda.default_generators[device.index]
    generator.graphsafe_set_state(generator.clone_state())  # a state that does not wait for the capture's end
