"""What stands before the stages, on a GPU: act(layer_norm(x + x_bias)) in one kernel, behind a convolution of cuDNN's,
or with the convolution (3 x 3, stride 2) in it."""

from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..backends import triton
from ..backends.checks import check_beside
from ..backends.namespace import NAMESPACE, ops
from ..reference import ACTIVATIONS

WIDEST = 1024  # channels that one program holds
NARROW_CONV = 128  # output channels up to which the convolution is faster here than in cuDNN
MOST_PIXELS = 2**31  # of images, which are counted in 32 bits

_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_library.define(
    "layer_norm_act(Tensor x, Tensor? x_bias, Tensor weight, Tensor bias, float eps, str act) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "conv3x3s2_norm_act(Tensor x, Tensor weight, Tensor bias, Tensor norm_weight, Tensor norm_bias, float eps, "
    "str act) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def layer_norm_act(x: Tensor, x_bias: Tensor | None, weight: Tensor, bias: Tensor, eps: float, act: str) -> Tensor:
    """act(layer_norm(x + x_bias)) over the last dimension, without gradients; rounded once.

    Args:
        x: (..., dim), dim 1 to 1024; float32, bfloat16 or float16, any strides, on a GPU that Triton runs on.
        x_bias (None for none), weight, bias: (dim,), in x's dtype.
        eps: of the norm. act: "gelu", "gelu_tanh", "silu" or "identity".

    Returns:
        (..., dim), contiguous.

    Raises:
        ValueError: a wrong shape or act, or a parameter elsewhere than x. TypeError: a wrong dtype.
        RuntimeError: an x that Triton does not run on.
    """
    return _op(x, x_bias, weight, bias, eps, act)


def conv3x3s2_norm_act(
    x: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, act: str
) -> Tensor:
    """act(layer_norm(conv(x) + bias)), conv of 3 x 3, stride 2 and zero padding 1; without gradients, rounded once.

    Args:
        x: (N, C, H, W), bfloat16 or float16, any strides, on a GPU that Triton runs on.
        weight: (9 * C, dim), what pack_conv makes of a conv's; dim 1 to 1024.
        bias, norm_weight, norm_bias: (dim,). All in x's dtype.
        eps: of the norm. act: "gelu", "gelu_tanh", "silu" or "identity".

    Returns:
        (N, (H + 1) // 2, (W + 1) // 2, dim), contiguous.

    Raises:
        ValueError: a wrong shape or act, or a parameter elsewhere than x. TypeError: a wrong dtype.
        RuntimeError: an x that Triton does not run on.
    """
    return _conv_op(x, weight, bias, norm_weight, norm_bias, eps, act)


def pack_conv(weight: Tensor) -> Tensor:
    """(dim, C, 3, 3) as conv3x3s2_norm_act reads it: (9 * C, dim), taps before channels."""
    return weight.permute(2, 3, 1, 0).flatten(0, 2).contiguous()


def _conv3x3s2_norm_act(
    x: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, act: str
) -> Tensor:
    from ..backends.triton_kernels import block_launch

    if x.ndim != 4 or 0 in x.shape[1:]:
        raise ValueError(f"x must be (N, C, H, W), of C, H, W at least 1; got shape {tuple(x.shape)}")
    if x.dtype not in (torch.bfloat16, torch.float16):
        raise TypeError(f"x must be bfloat16 or float16; got {x.dtype}")
    C, dim = x.shape[1], weight.shape[-1] if weight.ndim else 0
    if weight.shape != (9 * C, dim) or weight.dtype != x.dtype or weight.device != x.device:
        raise ValueError(
            f"weight must be (9 * {C}, dim) of {x.dtype} on {x.device}; got {tuple(weight.shape)} of {weight.dtype} on "
            f"{weight.device}"
        )
    if weight.layout != torch.strided or not weight.is_contiguous() or x.numel() // C >= MOST_PIXELS:
        raise ValueError(f"weight must be contiguous, and x have fewer than 2^31 pixels; got {tuple(x.shape)}")
    _check("weight", weight, {"bias": bias, "norm_weight": norm_weight, "norm_bias": norm_bias}, act)
    triton.check_runs(x)
    return block_launch.conv3x3s2_norm(x, weight, bias, norm_weight, norm_bias, eps, act)


def _conv_fake(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    N, _C, H, W = x.shape
    return x.new_empty((N, (H + 1) // 2, (W + 1) // 2, weight.shape[1]))


def normalises(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether layer_norm_act takes them, and is faster than PyTorch's: on an H100 eight times at 96 channels."""
    if not x.is_cuda and backends.forced() != "triton":
        return False
    for t in (weight, bias):
        if t is None or (t.shape, t.dtype, t.device) != (x.shape[-1:], x.dtype, x.device) or not t.is_contiguous():
            return False
    return x.ndim > 0 and 1 <= x.shape[-1] <= WIDEST and triton.unavailable() is None and triton.supports(x)


def _check(name_of_x: str, x: Tensor, parameters: dict[str, Tensor | None], act: str) -> None:
    if x.ndim == 0 or not 1 <= x.shape[-1] <= WIDEST:
        raise ValueError(f"{name_of_x} must be (..., dim), dim 1 to {WIDEST}; got shape {tuple(x.shape)}")
    if x.dtype not in triton.DTYPES:
        raise TypeError(f"x must be float32, bfloat16 or float16; got {x.dtype}")
    if act not in ACTIVATIONS:
        raise ValueError(f"act must be one of {', '.join(ACTIVATIONS)}; got {act!r}")
    for name, t in parameters.items():
        if t is not None:
            check_beside(x, name, t, tuple(x.shape[-1:]), x.dtype)


def _layer_norm_act(x: Tensor, x_bias: Tensor | None, weight: Tensor, bias: Tensor, eps: float, act: str) -> Tensor:
    from ..backends.triton_kernels import block_launch

    _check("x", x, {"x_bias": x_bias, "weight": weight, "bias": bias}, act)
    triton.check_runs(x)
    return block_launch.layer_norm(x.contiguous(), weight, bias, eps, x_bias, act)


def _fake(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


_library.impl("layer_norm_act", _layer_norm_act, "CompositeExplicitAutograd")
torch.library.register_fake(f"{NAMESPACE}::layer_norm_act", _fake, lib=_library)
_library.impl("conv3x3s2_norm_act", _conv3x3s2_norm_act, "CompositeExplicitAutograd")
torch.library.register_fake(f"{NAMESPACE}::conv3x3s2_norm_act", _conv_fake, lib=_library)
_op = ops.layer_norm_act.default
_conv_op = ops.conv3x3s2_norm_act.default
