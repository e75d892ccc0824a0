"""An Apple GPU (``mps``) that is only pretended: its tensors have values, which are computed on the CPU.

It raises where PyTorch's backend would: for float64, and for operators that PyTorch's list does not have for MPS.
Whether the kernels of an Apple GPU compute the right thing, only an Apple GPU can tell.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.resources import files
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

MPS, CPU = torch.device("mps", 0), torch.device("cpu")
_ANYWHERE = {"CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional", "CompositeImplicitAutograd"}


@cache
def operators_without_kernel() -> frozenset[str]:
    """Returns the operators that raise ``NotImplementedError`` on an Apple GPU, by PyTorch's list of all operators."""
    text = (files("torchgen") / "packaged/ATen/native/native_functions.yaml").read_text()
    kernels, delegates = {}, {}
    for entry in text.split("\n- func: ")[1:]:
        name = entry[: entry.index("(")]
        dispatch = re.search(r"^  dispatch:\n((?:    .*\n)+)", entry + "\n", re.MULTILINE)
        keys = re.findall(r"^    ([\w, ]+):", dispatch[1], re.MULTILINE) if dispatch else []
        kernels[name] = {key for some in keys for key in some.split(", ")}
        if delegate := re.search(r"^  structured_delegate: (\S+)", entry, re.MULTILINE):
            delegates[name] = delegate[1]
    known = {name: keys | kernels.get(delegates.get(name), set()) for name, keys in kernels.items()}
    return frozenset(name for name, keys in known.items() if keys and not keys & {"MPS", *_ANYWHERE})


class AppleTensor(Tensor):
    """A tensor on the pretended GPU."""

    @staticmethod
    def __new__(cls, values):
        layout = {"strides": values.stride(), "storage_offset": values.storage_offset(), "dtype": values.dtype}
        made = Tensor._make_wrapper_subclass(cls, values.shape, device="cpu", **layout)  # autograd has no queue of MPS
        made.values_on_cpu = values
        return made

    device = property(lambda self: MPS)

    def data_ptr(self):
        return self.values_on_cpu.data_ptr()

    def __deepcopy__(self, memo):
        copied = AppleTensor(self.values_on_cpu.clone())
        if isinstance(self, torch.nn.Parameter):
            copied = torch.nn.Parameter(copied, self.requires_grad)
        return memo.setdefault(id(self), copied)

    def __reduce_ex__(self, protocol):
        return self.values_on_cpu.clone().__reduce_ex__(protocol)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        name, kwargs = getattr(function, "__name__", ""), kwargs or {}
        if name in ("cpu", "tolist"):
            values = ToCpu.apply(args[0])
            return values if name == "cpu" else values.tolist()
        if name in ("numpy", "pin_memory"):
            raise TypeError(f"{name} of a tensor on mps")
        if name == "to":
            device, dtype = _wanted(args[1:], kwargs)
            moved = ToCpu.apply(args[0]) if device is not None and device.type == "cpu" else args[0]
            copied = args[0].clone() if kwargs.get("copy") and moved is args[0] else moved
            layout = kwargs.get("memory_format", torch.preserve_format)
            if dtype in (None, copied.dtype) and (layout == torch.preserve_format or _has_layout(copied, layout)):
                return copied
            return torch.ops.aten._to_copy(copied, dtype=dtype or copied.dtype, memory_format=layout)
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


class ToCpu(torch.autograd.Function):
    """Copies to the CPU, and the gradient back."""

    @staticmethod
    def forward(ctx, values):
        return values.values_on_cpu.clone()

    @staticmethod
    def backward(ctx, gradient):
        return AppleTensor(gradient)


class ToMps(torch.autograd.Function):
    """Copies from the CPU, and the gradient back."""

    @staticmethod
    def forward(ctx, values):
        return torch.ops.aten._to_copy(values, device=MPS)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.values_on_cpu


def _wanted(args, kwargs):
    """Returns the device and the dtype that arguments of ``Tensor.to`` ask for, or None."""
    device = dtype = None
    for value in [*args, *kwargs.values()]:
        if isinstance(value, Tensor):
            device, dtype = value.device, value.dtype
        elif isinstance(value, str | torch.device):
            device = torch.device(value)
        elif isinstance(value, torch.dtype):
            dtype = value
    return device, dtype


def _run(function, args, kwargs):
    inputs = [value for value in tree_leaves((args, kwargs)) if isinstance(value, AppleTensor)]
    wanted = None if kwargs.get("device") is None else torch.device(kwargs["device"])
    to_mps = wanted is not None and wanted.type == "mps"
    if not inputs and not to_mps:
        return function(*args, **kwargs)
    name = str(function).removeprefix("aten.").removesuffix(".default")
    if inputs and name in operators_without_kernel():
        raise NotImplementedError(f"The operator 'aten::{name}' is not currently implemented for the MPS device.")
    if name == "_adaptive_avg_pool2d" and any(x % y for x, y in zip(args[0].shape[-2:], args[1], strict=True)):
        raise RuntimeError("Adaptive pool MPS: input sizes must be divisible by output sizes.")
    if "batch_norm" in name and args[0].ndim == 4 and not args[0].values_on_cpu.is_contiguous():
        raise RuntimeError(f"the gradient of {name} would be wrong: its input is in channels-last layout")
    given = {id(value.values_on_cpu): value for value in inputs}

    def wrap(value):
        if not isinstance(value, Tensor) or isinstance(value, AppleTensor):
            return value
        if value.dtype in (torch.float64, torch.complex128):
            raise TypeError(f"Cannot convert a MPS Tensor to {value.dtype}, which MPS does not support ({name}).")
        return given.get(id(value)) if id(value) in given else AppleTensor(value)

    args, kwargs = tree_map(lambda v: v.values_on_cpu if isinstance(v, AppleTensor) else v, (args, kwargs))
    result = function(*args, **(kwargs | {"device": CPU} if to_mps else kwargs))
    return result if wanted is not None and not to_mps else tree_map(wrap, result)


class _Operators(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """What never reaches the dispatcher: copies to the device, and tensors made from numbers."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name, kwargs = getattr(function, "__name__", ""), kwargs or {}
        if name in ("tensor", "as_tensor") and _is_mps(kwargs.get("device")):
            device = kwargs.pop("device")
            return args[0] if isinstance(args[0], AppleTensor) else function(*args, **kwargs).to(device)
        if name == "to" and not isinstance(args[0], AppleTensor):
            device, dtype = _wanted(args[1:], kwargs)
            if _is_mps(device):
                return ToMps.apply(function(args[0], dtype or args[0].dtype, **_layout(kwargs)))
        return function(*args, **kwargs)


def _has_layout(values, layout):
    return values.ndim != 4 or values.is_contiguous(memory_format=layout)


def _layout(kwargs):
    return {key: value for key, value in kwargs.items() if key == "memory_format"}


def _is_mps(device):
    return device is not None and torch.device(device).type == "mps"


class _GeneratorOnCpu(torch.Generator):
    def __new__(cls, device="cpu"):
        return super().__new__(cls)


@contextmanager
def pretended_apple_gpu() -> Iterator[None]:
    """Context in which ``device="mps"`` needs no Apple GPU."""
    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with mock.patch("torch.Generator", _GeneratorOnCpu), _Functions(), _Operators():
            yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
