"""Folds batch norms into the convolutions before them: the same logits with fewer operations."""

import warnings
from collections import Counter
from collections.abc import Sequence

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from rld_lightning.models.teacher.full_precision_linear import FullPrecisionLinear


def fuse_conv_bn(model: nn.Module) -> nn.Module:
    """Folds each evaluation-mode BatchNorm into the convolution before it, if nothing else uses that convolution.

    Returns:
        a traced copy that shares the unfused weights with ``model``; or, with a warning, ``model`` itself if its
        forward cannot be traced.
    """
    try:
        traced = fx.GraphModule(model, _Tracer().trace(model), type(model).__name__)
    except Exception as error:  # tracing runs the model's own code on proxies, which can raise anything
        warnings.warn(f"{type(model).__name__} cannot be traced and is not fused: {error}", stacklevel=3)
        return model
    calls = Counter(node.target for node in traced.graph.nodes if node.op == "call_module")
    for node in traced.graph.nodes:
        conv_node = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(conv_node, fx.Node) or conv_node.op != "call_module" or len(conv_node.users) > 1:
            continue
        conv, norm = traced.get_submodule(str(conv_node.target)), traced.get_submodule(str(node.target))
        if not (isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d) and norm.track_running_stats):
            continue
        if calls[conv_node.target] > 1:  # shared weights: the other call has another BatchNorm or none
            continue
        traced.set_submodule(str(conv_node.target), fuse_conv_bn_eval(conv, norm))
        node.replace_all_uses_with(conv_node)
        traced.graph.erase_node(node)
    traced.delete_all_unused_submodules()
    traced.recompile()
    return traced


def fold_if_same(model: nn.Module, image_shape: Sequence[int]) -> tuple[nn.Module, int]:
    """Same as :func:`fuse_conv_bn`, without its warning, and only if the logits of random images stay the same.

    Returns:
        the traced copy and how many batch norms were folded; or ``model`` and 0.
    """
    with warnings.catch_warnings(action="ignore"):
        folded = fuse_conv_bn(model)
    count = _count_norms(model) - _count_norms(folded)
    return (folded, count) if count and _same_logits(model, folded, image_shape) else (model, 0)


class _Tracer(fx.Tracer):
    """Does not trace into a :class:`FullPrecisionLinear`, since autocast cannot be traced."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, FullPrecisionLinear) or super().is_leaf_module(m, module_qualified_name)


def _count_norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def _same_logits(model: nn.Module, folded: nn.Module, image_shape: Sequence[int]) -> bool:
    """Compares both on random images, since tracing records only one branch of a forward with several."""
    like = next(model.parameters())
    images = torch.randn(2, *image_shape, generator=torch.Generator().manual_seed(0)).to(like)
    with torch.no_grad(), torch.autocast(like.device.type, enabled=False):
        expected, found = model(images), folded(images)
    # Half precision rounds after each of a deep network's layers.
    share = 1e-3 if like.dtype in (torch.float32, torch.float64) else 0.1
    return bool((found - expected).abs().amax() <= share * expected.abs().amax())
