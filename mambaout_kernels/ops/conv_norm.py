"""Norms on a GPU: act(layer_norm(x + x_bias)) in one kernel, and its gradients in one; and for inference the norm with
the convolution before it (3 x 3, stride 2)."""

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

# Of any strides: torch.compile would else give back to what a convolution made the strides that it has in eager mode.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)

_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_library.define(
    "layer_norm_act(Tensor x, Tensor? x_bias, Tensor weight, Tensor bias, float eps, str act, "
    "ScalarType? dtype=None) -> Tensor",
    tags=_TAGS,
)
_library.define(
    "layer_norm_act_backward(Tensor dy, Tensor x, Tensor weight, Tensor bias, float eps, str act, bool normed) -> "
    "(Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
_library.define(
    "conv3x3s2_norm_act(Tensor x, Tensor weight, Tensor bias, Tensor norm_weight, Tensor norm_bias, float eps, "
    "str act) -> Tensor",
    tags=_TAGS,
)


def layer_norm_act(
    x: Tensor, x_bias: Tensor | None, weight: Tensor, bias: Tensor, eps: float, act: str,
    dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """act(layer_norm(x + x_bias)) over the last dimension, rounded once. Keeps its inputs alone for backward, and is
    differentiable once.

    Args:
        x: (..., dim), dim 1 to 1024; float32, bfloat16 or float16, any strides, on a GPU that Triton runs on.
        x_bias (None for none), weight, bias: (dim,), in x's dtype; weight and bias may be float32 beside any x.
        eps: of the norm. act: "gelu", "gelu_tanh", "silu" or "identity".
        dtype: of the result, float32, bfloat16 or float16; None: x's.

    Returns:
        (..., dim), contiguous.

    Raises:
        ValueError: a wrong shape or act, or a parameter elsewhere than x. TypeError: a wrong dtype.
        RuntimeError: an x that Triton does not run on.
    """
    return _op(x, x_bias, weight, bias, eps, act, dtype)


def layer_norm_act_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float, act: str, normed: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias, layer_norm(x)) for a gradient dy of act(layer_norm(x)); the last is empty unless `normed`.

    dy has x's shape, and like the last any dtype that layer_norm_act returns. Sums are accumulated in float32, in an
    order that the shape alone decides. Errors as for layer_norm_act.
    """
    return _backward_op(dy, x, weight, bias, eps, act, normed)


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
        if t is None or (t.shape, t.device) != (x.shape[-1:], x.device) or not t.is_contiguous():
            return False
        if t.dtype not in (x.dtype, torch.float32):
            return False
    in_reach = x.ndim > 0 and 1 <= x.shape[-1] <= WIDEST and x.dtype in triton.DTYPES
    return in_reach and triton.usable_on(x.device.type, x.device.index)


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


def _check_norm(x: Tensor, x_bias: Tensor | None, weight: Tensor, bias: Tensor, act: str) -> None:
    _check("x", x, {"x_bias": x_bias}, act)
    for name, t in (("weight", weight), ("bias", bias)):
        check_beside(x, name, t, tuple(x.shape[-1:]), torch.float32 if t.dtype == torch.float32 else x.dtype)


def _check_result(dtype: torch.dtype | None) -> None:
    if dtype is not None and dtype not in triton.DTYPES:
        raise TypeError(f"dtype must be float32, bfloat16, float16 or None; got {dtype}")


def _layer_norm_act(
    x: Tensor, x_bias: Tensor | None, weight: Tensor, bias: Tensor, eps: float, act: str,
    dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    from ..backends.triton_kernels import block_launch

    _check_norm(x, x_bias, weight, bias, act)
    _check_result(dtype)
    triton.check_runs(x)
    return block_launch.layer_norm(x.contiguous(), weight, bias, eps, x_bias, act, dtype=dtype)


def _layer_norm_act_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float, act: str, normed: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from ..backends.triton_kernels import block_launch

    _check_norm(x, None, weight, bias, act)
    if (dy.shape, dy.device) != (x.shape, x.device):
        raise ValueError(f"dy must be {tuple(x.shape)} on {x.device}, as x; got {tuple(dy.shape)} on {dy.device}")
    if dy.dtype not in triton.DTYPES:
        raise TypeError(f"dy must be float32, bfloat16 or float16; got {dy.dtype}")
    triton.check_runs(x)
    return block_launch.layer_norm_backward(dy.contiguous(), x.contiguous(), weight, bias, eps, act, normed)


def _backward_fake(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float, act: str, normed: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    whole = x.new_empty(x.shape)
    return whole, weight.new_empty(weight.shape), bias.new_empty(bias.shape), dy.new_empty(dy.shape if normed else 0)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps, ctx.act, _ = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, x_bias, weight, bias = ctx.saved_tensors
    biased = x if x_bias is None else x + x_bias
    dx, dweight, dbias, _ = _backward_op(dy, biased, weight, bias, ctx.eps, ctx.act, False)
    found = (dx, None if x_bias is None else dx.flatten(0, -2).sum(0), dweight, dbias)
    return (*(g if needed else None for g, needed in zip(found, ctx.needs_input_grad, strict=False)), None, None, None)


def _fake(
    x: Tensor, x_bias: Tensor | None, weight: Tensor, bias: Tensor, eps: float, act: str,
    dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape, dtype=dtype)


_library.impl("layer_norm_act", _layer_norm_act, "CompositeExplicitAutograd")
torch.library.register_fake(f"{NAMESPACE}::layer_norm_act", _fake, lib=_library)
torch.library.register_autograd(f"{NAMESPACE}::layer_norm_act", _differentiate, setup_context=_save, lib=_library)
_library.impl("layer_norm_act_backward", _layer_norm_act_backward, "CompositeExplicitAutograd")
torch.library.register_fake(f"{NAMESPACE}::layer_norm_act_backward", _backward_fake, lib=_library)
_library.impl("conv3x3s2_norm_act", _conv3x3s2_norm_act, "CompositeExplicitAutograd")
torch.library.register_fake(f"{NAMESPACE}::conv3x3s2_norm_act", _conv_fake, lib=_library)
_op = ops.layer_norm_act.default
_backward_op = ops.layer_norm_act_backward.default
_conv_op = ops.conv3x3s2_norm_act.default
