"""Networks as ONNX files: exported by PyTorch, quantised and run by ONNX Runtime."""

import json
import logging
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rld_lightning.models.preprocessing import PixelsToProbabilities
from rld_lightning.models.taps import unwrap
from rld_lightning.models.weights.facts import WeightsFacts, read_facts
from rld_lightning.models.weights.read import WeightsError, read_once

PIXELS = "pixels"  # input name of a network that includes its preprocessing; otherwise "images"
_RESIZES = "resizes"  # metadata key of a file that includes resizing
# Operations in int8. Softmax and the arithmetic of the preprocessing keep their precision.
_QUANTISED = (
    *("Conv", "MatMul", "Gemm", "Add", "Mul", "Relu", "Clip", "Concat", "Reshape", "Transpose", "Flatten"),
    *("MaxPool", "AveragePool", "GlobalAveragePool", "ReduceMean"),
)


def example_input(network: nn.Module, image_shape: tuple[int, int, int]) -> tuple[Tensor, tuple[dict[int, Any], ...]]:
    """Returns the example input for tracing a network, and its dynamic dimensions.

    Args:
        network: a :func:`export_copy`, of a :class:`~rld_lightning.models.preprocessing.PixelsToProbabilities` or
            another network.
        image_shape: channels, height and width of the network's input.

    Returns:
        a batch of two images (the exporter would specialise for a batch of one), and the dynamic dimensions.
    """
    channels, height, width = image_shape
    batch = {0: torch.export.Dim("batch")}
    if not isinstance(network, PixelsToProbabilities):
        return torch.zeros(2, channels, height, width), (batch,)
    if not network.resize:
        return torch.zeros(2, height, width, channels, dtype=torch.uint8), (batch,)
    side = network.preprocessing.resize  # sizes with no special relation
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC}
    return torch.zeros(2, 2 * side + 3, 3 * side + 5, channels, dtype=torch.uint8), (free,)


def export_copy(network: nn.Module) -> nn.Module:
    """Copies a network for exporters: in evaluation mode, on the CPU, in float32 and contiguous layout."""
    copy = deepcopy(unwrap(network)).cpu().float().to(memory_format=torch.contiguous_format)
    return copy.requires_grad_(False).eval()


def to_onnx(network: nn.Module, image_shape: tuple[int, int, int], facts: Mapping[str, object]) -> bytes:
    """Exports a network to ONNX, for batches of any size.

    Args:
        network: a :func:`export_copy` of a network from normalised images ``(B, 3, H, W)`` to logits, or of a
            :class:`~rld_lightning.models.preprocessing.PixelsToProbabilities`.
        image_shape: channels, height and width of the network's input.
        facts: metadata for the file; strings are written unchanged, other values as JSON.

    Returns:
        the file's bytes; its input is named ``"pixels"`` or ``"images"``, its output ``"probabilities"`` or
        ``"logits"``.

    Raises:
        ImportError: a package of the extra is not installed.
        ValueError: the exporter cannot translate the network.
    """
    _import("onnx")
    _import("onnxscript")
    example, free = example_input(network, image_shape)
    pixels = isinstance(network, PixelsToProbabilities)
    try:
        with _quiet():
            program = torch.onnx.export(
                network,
                (example,),
                dynamo=True,
                dynamic_shapes=[{axis: ("batch", "height", "width")[axis] for axis in dims} for dims in free],
                input_names=[PIXELS if pixels else "images"],
                output_names=["probabilities" if pixels else "logits"],
                verbose=False,
            )
    except Exception as error:  # each stage of the exporter raises its own types
        raise ValueError(
            f"PyTorch's ONNX exporter cannot translate {type(network).__name__} ({_reason(error)}); leave onnx out "
            "of formats=."
        ) from error
    assert program is not None  # with dynamo=True
    own = {_RESIZES: True} if isinstance(network, PixelsToProbabilities) and network.resize else {}
    return _with_facts(program.model_proto, {**facts, **own})


def quantise_onnx(content: bytes, batches: Iterable[Tensor]) -> bytes:
    """Quantises a network to int8: static quantisation by ONNX Runtime, with one scale per channel of the weights.

    Args:
        content: an ONNX file in float32.
        batches: inputs made of training images, to calibrate the ranges of intermediate values.

    Raises:
        ImportError: ONNX Runtime or onnx is not installed.
        ValueError: ONNX Runtime cannot quantise the network.
    """
    onnx, _ = _import("onnx"), _import("onnxruntime")
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    model = onnx.load_from_string(content)
    facts = {entry.key: entry.value for entry in model.metadata_props}

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(batches)

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.batches, None)
            return None if batch is None else {model.graph.input[0].name: batch.numpy()}

    with TemporaryDirectory() as folder, _quiet():
        whole, prepared, quantised = (str(Path(folder, f"{name}.onnx")) for name in ("whole", "prepared", "int8"))
        Path(whole).write_bytes(content)
        try:
            quant_pre_process(whole, prepared, skip_symbolic_shape=True)  # folds batch norm into convolutions
            quantization.quantize_static(
                prepared,
                quantised,
                Reader(),
                per_channel=True,
                op_types_to_quantize=list(_QUANTISED),
            )
        except Exception as error:  # of many types, too
            raise ValueError(f"ONNX Runtime cannot quantise the network ({_reason(error)}).") from error
        return _with_facts(onnx.load(quantised), facts | {"quantised": "int8"})


class OnnxNetwork:
    """An ONNX file, run by ONNX Runtime; a call with a batch returns the file's first output.

    The file is data: ONNX Runtime runs only its built-in operations, and none from other files.

    Args:
        source: a file, or its bytes.
        threads: threads per operation; by default as many as PyTorch uses.
        device: ``"cpu"``, or ``"cuda"`` if ONNX Runtime supports it.

    Raises:
        ImportError: ONNX Runtime is not installed.
        WeightsError: the file is not a network with one image input and one output.
    """

    def __init__(self, source: str | Path | bytes, *, threads: int | None = None, device: str = "cpu") -> None:
        runtime = _import("onnxruntime")
        self.source = Path("<bytes>") if isinstance(source, bytes) else Path(source).expanduser()
        content = source if isinstance(source, bytes) else read_once(self.source)
        _check_whole(content, self.source)
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        options.log_severity_level = 3  # errors are raised instead of logged
        providers = ["CUDAExecutionProvider"] if device.startswith("cuda") else []
        try:
            self.session = runtime.InferenceSession(content, options, providers=[*providers, "CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's errors have no common base class
            raise WeightsError(f"{self.source} is not an ONNX file that can be run ({_reason(error)})") from error
        inputs, outputs = self.session.get_inputs(), self.session.get_outputs()
        if len(inputs) != 1 or len(inputs[0].shape) != 4 or len(outputs) < 1 or len(outputs[0].shape) != 2:
            shapes = [[tuple(value.shape) for value in values] for values in (inputs, outputs)]
            raise WeightsError(
                f"{self.source} takes {shapes[0]} and gives {shapes[1]}; a classifier takes one batch of images "
                "(B, 3, H, W) and gives (B, C)"
            )
        self.input, self.output = inputs[0], outputs[0]

    @property
    def metadata(self) -> dict[str, str]:
        """The file's own metadata."""
        return dict(self.session.get_modelmeta().custom_metadata_map)

    @property
    def facts(self) -> WeightsFacts:
        """The file's metadata, checked like the header of a weights file."""
        return read_facts(self.metadata, self.source)

    @property
    def takes_pixels(self) -> bool:
        """Whether it maps uint8 ``(B, H, W, 3)`` to probabilities, rather than normalised images to logits."""
        return self.input.type == "tensor(uint8)"

    @property
    def resizes(self) -> bool:
        """Whether it is one of our files that resizes and crops images of any size itself."""
        return self.takes_pixels and self.metadata.get(_RESIZES) == "true"

    @property
    def num_classes(self) -> int | None:
        """C, if the file states it."""
        width = self.output.shape[1]
        return width if isinstance(width, int) else None

    @property
    def image_size(self) -> int | None:
        """Height and width of the images, if the file states them."""
        side = self.input.shape[2]
        return side if isinstance(side, int) else None

    def __call__(self, batch: Tensor) -> Tensor:
        """Runs a batch ``(B, ...)`` on the CPU."""
        (found,) = self.session.run([self.output.name], {self.input.name: np.ascontiguousarray(batch.cpu().numpy())})
        return torch.from_numpy(found)


def _check_whole(content: bytes, source: Path) -> None:
    """Checks that a file refers to no other files, which ONNX Runtime would read from the current folder.

    Raises:
        WeightsError: the file has external weights, or is not an ONNX file.
    """
    onnx = _import("onnx")
    try:
        model = onnx.load_from_string(content)
    except Exception as error:  # protobuf raises its own types
        raise WeightsError(f"{source} is not an ONNX file that can be run ({_reason(error)})") from error
    if any(tensor.external_data or tensor.data_location for tensor in _messages(model, onnx.TensorProto)):
        raise WeightsError(f"{source} has weights in other files, which are not read; save it as one file")


def _messages(whole: Any, kind: type) -> Iterator[Any]:
    """Yields all nested messages of one type; onnx's own list of tensors omits those inside sparse tensors."""
    waiting = [whole]
    while waiting:
        message = waiting.pop()
        if isinstance(message, kind):
            yield message
        for field, value in message.ListFields():
            if field.message_type is not None:
                waiting += [value] if hasattr(value, "ListFields") else value


def _with_facts(model: Any, facts: Mapping[str, object]) -> bytes:
    onnx = _import("onnx")
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in facts.items()}
    onnx.helper.set_model_props(model, texts)
    onnx.checker.check_model(model)
    return model.SerializeToString(deterministic=True)


def _import(package: str) -> ModuleType:
    try:
        return __import__(package)
    except ImportError as error:
        raise ImportError(f'ONNX files need {package}: pip install "rld-lightning[onnx]"') from error


def _reason(error: BaseException) -> str:
    """Returns the reason stated in an exporter's long error text, else its last line."""
    if summary := re.search(r"Exception summary\s+(\S.*)", str(error)):
        return summary[1]
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the exporters' warnings and log messages."""
    loggers = [logging.getLogger(name) for name in ("", "torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
