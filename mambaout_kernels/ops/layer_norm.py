"""y = act(layer_norm(x + x_bias)) in one kernel on a GPU: what follows a convolution of the stem and between stages."""

from typing import Any

import torch
from torch import Tensor

from ..reference import ACTIVATIONS

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDEST = 1024  # channels that one program holds

_library = torch.library.Library("mambaout_kernels", "FRAGMENT")
_library.define(
    "layer_norm_act(Tensor x, Tensor? x_bias, Tensor weight, Tensor bias, float eps, str act) -> Tensor",
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
        ValueError: a wrong shape, device or act. TypeError: a wrong dtype.
    """
    return _op(x, x_bias, weight, bias, eps, act)


def _check(x: Tensor, parameters: dict[str, Tensor | None], act: str) -> None:
    if x.ndim == 0 or not 1 <= x.shape[-1] <= WIDEST:
        raise ValueError(f"x must be (..., dim), dim 1 to {WIDEST}; got shape {tuple(x.shape)}")
    if x.dtype not in _DTYPES:
        raise TypeError(f"x must be float32, bfloat16 or float16; got {x.dtype}")
    if act not in ACTIVATIONS:
        raise ValueError(f"act must be one of {', '.join(ACTIVATIONS)}; got {act!r}")
    for name, t in parameters.items():
        if t is None:
            continue
        if t.shape != x.shape[-1:]:
            raise ValueError(f"{name} must have shape {tuple(x.shape[-1:])}; got {tuple(t.shape)}")
        if t.dtype != x.dtype:
            raise TypeError(f"{name} must be {x.dtype}, as x is; got {t.dtype}")
        if t.device != x.device or not t.is_contiguous():
            raise ValueError(f"{name} must be contiguous, on the device of x, {x.device}; got {t.device}")


def _layer_norm_act(x: Tensor, x_bias: Tensor | None, weight: Tensor, bias: Tensor, eps: float, act: str) -> Tensor:
    from ..backends.triton_kernels import block_launch

    _check(x, {"x_bias": x_bias, "weight": weight, "bias": bias}, act)
    return block_launch.layer_norm(x.contiguous(), weight, bias, eps, x_bias, act)


def _fake(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


_library.impl("layer_norm_act", _layer_norm_act, "CompositeExplicitAutograd")
torch.library.register_fake("mambaout_kernels::layer_norm_act", _fake, lib=_library)
_op = torch.ops.mambaout_kernels.layer_norm_act.default
