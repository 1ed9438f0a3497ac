"""fc(x), norm(x) and fc(norm(x)) of modules: by our kernels where these compute the same, else by calling them."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import backends
from ..ops import linear as ops
from ..ops.conv_norm import layer_norm_act, normalises
from ..ops.norm_linear import norm_linear as norm_linear_op
from .plain import Weights, activation_name, has_hooks, is_plain_layer_norm, is_plain_linear, linear_weights


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
        return linear(fc, normed(norm, x, into_product=True))
    ln: Any = norm
    layer: Any = fc
    low = _autocast_dtype(x)
    weight, bias = (t if t is None or low is None else t.to(low) for t in (layer.weight, layer.bias))
    return norm_linear_op(x, ln.weight, ln.bias, ln.eps, weight, bias)


def normed(norm: nn.Module, x: Tensor, act: nn.Module | None = None, into_product: bool = False) -> Tensor:
    """act(norm(x)), or norm(x); by our kernels on a GPU, for plain ones.

    Under autocast float32 as PyTorch's; but what only goes into a product, which casts it, is of that dtype at once.
    """
    name = "identity" if act is None else activation_name(act)
    if name is None or (act is not None and has_hooks(act)) or not _has_own_kernel(norm, x):
        return norm(x) if act is None else act(norm(x))
    ln: Any = norm
    low = _autocast_dtype(x)
    dtype = None if low is None else low if into_product else torch.float32
    return layer_norm_act(x, None, ln.weight, ln.bias, ln.eps, name, dtype)


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Of products; None outside autocast."""
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else None


def _has_own_kernel(norm: nn.Module, x: Tensor) -> bool:
    if not x.is_cuda and backends.forced() != "triton":  # most calls
        return False
    if backends.uses_reference(x.device.type) or not is_plain_layer_norm(norm):
        return False
    ln: Any = norm
    if ln.normalized_shape != x.shape[-1:] or not normalises(x, ln.weight, ln.bias):
        return False
    return _autocast_dtype(x) is not None or ln.weight.dtype == ln.bias.dtype == x.dtype  # else PyTorch's error


def _recomputes_norm(norm: nn.Module, fc: nn.Module | Weights, x: Tensor) -> bool:
    """Plain modules of x's dtype, when gradients are wanted; not on the reference. Under autocast, and under compilers,
    which fuse their own norms with what is around them, where the norm is our kernel."""
    if backends.uses_reference(x.device.type) or not torch.is_grad_enabled():
        return False
    if not is_plain_layer_norm(norm) or not _is_plain(fc):
        return False
    gamma: Any = norm.weight
    plain: Any = fc
    if gamma is None or norm.normalized_shape != x.shape[-1:]:
        return False
    casts = torch.is_autocast_enabled(x.device.type)
    if (casts or torch.compiler.is_compiling()) and not _has_own_kernel(norm, x):
        return False
    return casts or gamma.dtype == plain.weight.dtype == x.dtype
