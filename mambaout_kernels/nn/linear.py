"""fc(x), norm(x) and fc(norm(x)) of modules: by our kernels where these compute the same, else by calling them."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import backends
from ..ops import linear as ops
from ..ops.conv_norm import layer_norm_act, normalises
from ..ops.norm_linear import norm_linear as norm_linear_op
from .plain import Weights, is_plain_layer_norm, is_plain_linear, linear_weights


def linear(fc: nn.Module | Weights, x: Tensor, stream_weight: bool = False) -> Tensor:
    """fc(x); by the compiled kernels for a plain nn.Linear in float32 on the CPU, outside autocast.

    stream_weight: x has few rows, so that reading the weight takes longer than multiplying it.
    """
    own = _weights(fc, x, stream_weight)
    if own is None:
        return F.linear(x, *fc) if isinstance(fc, Weights) else fc(x)
    return ops.linear(x, *own, stream_weight)


def _weights(fc: nn.Module | Weights, x: Tensor, stream_weight: bool) -> Weights | None:
    """For the op; None where it does not compute the same, or no faster."""
    if x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return None
    if torch.compiler.is_compiling() and not stream_weight:  # a compiler does better with what it knows
        return None
    own = fc if isinstance(fc, Weights) else linear_weights(fc)
    return own if own is not None and x.shape[-1] == own.weight.shape[-1] else None


def _is_plain(fc: nn.Module | Weights) -> bool:
    return isinstance(fc, Weights) or is_plain_linear(fc)


def norm_linear(norm: nn.Module, fc: nn.Module | Weights, x: Tensor) -> Tensor:
    """fc(norm(x)), (..., dim) to (..., out_features); in training without keeping norm(x), where both are plain."""
    if not _recomputes_norm(norm, fc, x):
        return linear(fc, normed(norm, x))
    ln: Any = norm
    layer: Any = fc
    return norm_linear_op(x, ln.weight, ln.bias, ln.eps, layer.weight, layer.bias)


def normed(norm: nn.Module, x: Tensor) -> Tensor:
    """norm(x); where no gradients are wanted by our kernel on a GPU, for a plain one of x's dtype."""
    if not x.is_cuda and backends.forced() != "triton":  # most calls
        return norm(x)
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or backends.uses_reference(x.device.type):
        return norm(x)
    if torch.is_autocast_enabled(x.device.type) or not is_plain_layer_norm(norm):
        return norm(x)
    ln: Any = norm
    if ln.normalized_shape != x.shape[-1:] or not normalises(x, ln.weight, ln.bias):
        return norm(x)
    return layer_norm_act(x, None, ln.weight, ln.bias, ln.eps, "identity")


def _recomputes_norm(norm: nn.Module, fc: nn.Module | Weights, x: Tensor) -> bool:
    """Plain modules of x's dtype, outside autocast and compilers, when gradients are wanted; not on the reference."""
    if backends.uses_reference(x.device.type):
        return False
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type):
        return False
    if not is_plain_layer_norm(norm) or not _is_plain(fc):
        return False
    gamma: Any = norm.weight
    plain: Any = fc
    return gamma is not None and gamma.dtype == plain.weight.dtype == x.dtype and norm.normalized_shape == x.shape[-1:]
