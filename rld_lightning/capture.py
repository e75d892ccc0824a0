"""The work of a training step recorded as a CUDA graph, and launched as one.

Small networks leave a GPU waiting for Python, which launches a thousand kernels a step, one by one.
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
    """What is known of calls with inputs of one layout."""

    state: Hashable = None  # what the calls so far had in common; None of none
    calls: int = 0  # how many of them there were
    inputs: Inputs = ()  # where the graph reads
    outputs: dict[str, Tensor] = field(default_factory=dict)  # where it writes
    gradients: tuple[Tensor | None, ...] = ()  # of each parameter, likewise
    replay: Callable[[], Any] | None = None  # does the work again; None until it is recorded


class CapturedStep:
    """Calls a function that computes the gradients of parameters anew, and from some calls on replays what it did.

    Each call does the work once: the first ones as they are, which warms the device up and shows what waits for it (no
    graph can), and one that records computes nothing before its replay. What is called with other inputs in between,
    as an epoch's last and smaller batch, is done as it is until there were enough of them, too.

    The function reads nothing from the device, changes tensors where they are, and ``backward()`` is all that touches
    gradients. Without a graph (``record=False``, and where there is no CUDA) the same is done with the same buffers,
    but by calling it: what a test can compare.

    Args:
        function: called with a constant and tensors; returns tensors by name.
        parameters: whose gradients it computes.
        watched: all tensors that it reads or changes beside its inputs; once one lies elsewhere it is recorded anew.
        warm_up: calls with the same constant and the same watched tensors before it is recorded.
        record: whether there is to be a graph.

    Attributes:
        failed: why it could not be recorded; empty where it could, or has not been tried.
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
        # Warm-up and recording on one stream, which nothing but these waits for.
        self._stream = torch.cuda.Stream() if self.record else None

    def __call__(self, constant: Hashable, *inputs: Tensor | None) -> dict[str, Tensor]:
        """Does the work.

        Returns:
            what the function returns, without gradient; a later call may overwrite it.
        """
        layout = tuple(None if x is None else (x.shape, x.stride(), x.dtype) for x in inputs)
        found = self._recordings.setdefault(layout, _Recording())
        state = (constant, *map(Tensor.data_ptr, self.watched))  # of hundreds, in each step
        if found.state != state:
            found.state, found.calls, found.replay = state, 0, None
        found.calls += 1
        if found.replay is None and found.calls > self.warm_up and not self.failed:
            self._record(found, constant, inputs)
        if found.replay is None:
            return self._as_it_is(constant, inputs, last=found.calls == self.warm_up)
        for buffer, value in zip(found.inputs, inputs, strict=True):
            if buffer is not None and value is not None:
                buffer.copy_(value, non_blocking=True)
        found.replay()
        for parameter, gradient in zip(self.parameters, found.gradients, strict=True):
            parameter.grad = gradient
        return dict(found.outputs)

    def _run(self, constant: Hashable, inputs: Inputs) -> dict[str, Tensor]:
        for parameter in self.parameters:
            parameter.grad = None
        return {name: value.detach() for name, value in self.function(constant, *inputs).items()}

    def _as_it_is(self, constant: Hashable, inputs: Inputs, last: bool) -> dict[str, Tensor]:
        if self._stream is None:
            return self._run(constant, inputs)
        # What is freed there is only taken again there, after all that has been asked for before.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            if last and not self.failed:
                with notice_waits() as places:
                    outputs = self._run(constant, inputs)
                self.failed = f"{places[0]} waits for the GPU" if places else ""
            else:
                outputs = self._run(constant, inputs)
        torch.cuda.current_stream().wait_stream(self._stream)
        return outputs

    def _record(self, found: _Recording, constant: Hashable, inputs: Inputs) -> None:
        found.inputs = tuple(None if x is None else x.clone() for x in inputs)
        if self._stream is None:
            found.outputs, found.gradients = {}, ()
            found.replay = lambda: self._again(found, constant)
            return
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads, such as those of loaders, may use the device meanwhile.
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                found.outputs = self._run(constant, found.inputs)
        except RuntimeError as error:  # of a network that reads from the device, say
            self.failed = first_line(error)
            forget_recording(self._stream.device)
            return
        found.gradients = tuple(parameter.grad for parameter in self.parameters)
        found.replay = graph.replay

    def _again(self, found: _Recording, constant: Hashable) -> None:
        """What replaying a graph does, by calling the function: outputs and gradients stay where they are."""
        outputs = self._run(constant, found.inputs)
        gradients = tuple(parameter.grad for parameter in self.parameters)
        if not found.outputs:
            found.outputs, found.gradients = outputs, gradients
            return
        for name, value in outputs.items():
            found.outputs[name].copy_(value)
        for kept, gradient in zip(found.gradients, gradients, strict=True):
            if kept is not None and gradient is not None:
                kept.copy_(gradient)


def why_not_captured(trainer: "Trainer", student: nn.Module) -> str:
    """What of a training does not go into a CUDA graph, or has not been shown to; nothing where all does."""
    if trainer.world_size > 1:
        return "several processes share a step"
    if trainer.accumulate_grad_batches > 1:
        return "gradients are accumulated"
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        return "the loss is scaled in float16"
    if student._compiled_call_impl is not None:  # by somebody else, who may have chosen graphs of its own
        return "the student has been compiled"
    if torch.is_anomaly_enabled():
        return "anomalies are looked for"
    return ""


@contextmanager
def notice_waits() -> Iterator[list[str]]:
    """Finds the lines of Python, as ``"file.py:12"``, that wait for the GPU meanwhile; PyTorch knows of most of them.

    Yields:
        a list, filled at the end.
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
        elif "Synchronization debug mode" not in str(warning.message):  # is a prototype, it says
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def forget_recording(device: torch.device) -> None:
    """Forgets what a recording that failed has left behind, and would be in the way of the step as it is."""
    torch.clear_autocast_cache()  # weights in bfloat16 that were to be computed in the graph
    generator = torch.cuda.default_generators[device.index]
    generator.graphsafe_set_state(generator.clone_state())  # one that does not wait for the recording's end
