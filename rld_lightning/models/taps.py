"""Intermediate tensors of any network by module path, captured with forward hooks."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from rld_lightning.errors import did_you_mean


class FeatureTaps:
    """Captures the outputs or inputs of named modules while the context is open.

    A path is a module's name in ``named_modules()`` and stands for its output: ``"layer1"``. With ``:in`` it stands for
    the module's first positional input: ``"layer1.2.relu:in"``. Hooks exist only inside the ``with`` block::

        with FeatureTaps(model, ["layer1", "fc:in"]) as taps:
            logits = model(images)
        taps.features["layer1"]

    If a module runs several times, its last call is captured. Tensors are not copied or detached.

    ``DistributedDataParallel`` and ``torch.compile`` wrappers are unwrapped. Code compiled before the taps were opened
    does not run the hooks (:attr:`features` then raises), so open them before the first call.

    Args:
        model: the network; not changed.
        paths: tap paths; duplicates are ignored.

    Raises:
        ValueError: a path names no module of the model.
    """

    def __init__(self, model: nn.Module, paths: Iterable[str]) -> None:
        self._paths = tuple(dict.fromkeys(paths))
        self._modules = _tapped_modules(unwrap(model), self._paths)
        self._captured: dict[str, Tensor] = {}
        self._versions: dict[str, int] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        self._captured.clear()
        for path, module in self._modules.items():
            if path.endswith(":in"):
                self._handles.append(module.register_forward_pre_hook(self._input_hook(path)))
            else:
                self._handles.append(module.register_forward_hook(self._output_hook(path)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @property
    def features(self) -> dict[str, Tensor]:
        """The captured tensors by path, in the order of the paths given.

        Raises:
            RuntimeError: a tapped module did not run, or its tensor was later overwritten by an in-place operation.
        """
        for path in self._paths:
            if path not in self._captured:
                raise RuntimeError(
                    f"tap {path!r} captured nothing: its module did not run inside the `with` block, or the model was "
                    "compiled before the taps were opened (compile inside the block, or tap the uncompiled model)."
                )
            tensor = self._captured[path]
            if not tensor.is_inference() and tensor._version != self._versions[path]:
                raise RuntimeError(
                    f"tap {path!r} was overwritten in place after it was captured; tap a later module, or switch the "
                    "in-place operation off (inplace=False)."
                )
        return {path: self._captured[path] for path in self._paths}

    def _output_hook(self, path: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda _module, _args, output: self._capture(path, output)

    def _input_hook(self, path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _module, args: self._capture(path, args[0] if args else None)

    def _capture(self, path: str, value: Any) -> None:
        if not isinstance(value, Tensor):
            raise TypeError(f"tap {path!r} captured a {type(value).__name__}, not a tensor; name a module inside it.")
        self._captured[path] = value
        # Inference tensors have no version counter.
        self._versions[path] = 0 if value.is_inference() else value._version


def forward_with_taps(model: nn.Module, images: Tensor, paths: Iterable[str] = ()) -> tuple[Tensor, dict[str, Tensor]]:
    """Runs one forward pass and captures the tensors at the tap paths.

    Args:
        model: any network that maps a batch of images to logits.
        images: ``(B, 3, H, W)``.
        paths: tap paths, see :class:`FeatureTaps`; if empty, no hook is registered.

    Returns:
        the logits ``(B, C)``, and the captured tensors by path.

    Raises:
        ValueError: a path names no module of the model; raised before the forward pass.
    """
    paths = tuple(paths)
    if not paths:
        return model(images), {}
    with FeatureTaps(model, paths) as taps:
        logits = model(images)
    return logits, taps.features


def feature_shapes(model: nn.Module, image_shape: Sequence[int], paths: Iterable[str]) -> dict[str, torch.Size]:
    """Returns the shapes at the tap paths for a batch of two images; the model is not changed.

    Runs one forward pass of zeros in evaluation mode, on the model's device and dtype.

    Args:
        model: any network that takes one batch of images.
        image_shape: channels, height and width.
        paths: tap paths, see :class:`FeatureTaps`.

    Raises:
        ValueError: a path names no module of the model.
    """
    like = next(model.parameters(), torch.empty(0))
    images = torch.zeros(2, *image_shape, device=like.device, dtype=like.dtype)
    with evaluation_mode(model), torch.no_grad():
        _, features = forward_with_taps(model, images, paths)
    return {path: feature.shape for path, feature in features.items()}


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Context with the model in evaluation mode; on exit each module's own mode is restored."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        # Per module, because part of the model may have been in evaluation mode on purpose.
        for module, mode in training.items():
            module.training = mode


def unwrap(model: nn.Module) -> nn.Module:
    """Returns the plain module inside ``DistributedDataParallel`` and ``torch.compile`` wrappers."""
    while True:
        inner = model.module if isinstance(model, DistributedDataParallel) else getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _tapped_modules(model: nn.Module, paths: tuple[str, ...]) -> dict[str, nn.Module]:
    modules = dict(model.named_modules())
    tapped = {}
    for path in paths:
        name, colon, side = path.partition(":")
        if colon and side != "in":
            raise ValueError(f"tap path {path!r} ends in {colon + side!r}; only ':in' (the module's input) is known.")
        if name not in modules:
            raise ValueError(
                f"tap path {path!r} names no module of {type(model).__name__}.{did_you_mean(name, modules)} "
                "model.named_modules() lists all."
            )
        tapped[path] = modules[name]
    return tapped
