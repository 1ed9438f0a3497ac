"""What stands between the stages as one op, for inference on the CPU.

    out = act(layer_norm(conv3x3(x))),   stride 2, zero padding of 1, channels last

PyTorch's convolution orders its weights anew at every call, which for one image takes longer than the convolution.
"""

from typing import Any

import torch
from torch import Tensor, nn

from . import seen
from .backends import cpu
from .linear import hooked
from .norm_linear import is_layer_norm
from .packs import Pack, check_dtype, low_precision, packed, stored_dtype
from .reference import ACTIVATIONS

_library = torch.library.Library("mambaout_kernels", "FRAGMENT")
_library.define(
    "downsample(Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, bool normed, float eps, "
    "str act, ScalarType dtype, bool multiply_bf16, int pack) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _check(x: Tensor, weight: Tensor, act: str) -> None:
    if x.ndim != 4 or x.shape[3] != weight.shape[1]:
        raise ValueError(f"x must be (N, H, W, {weight.shape[1]}), as weight's inputs; got {tuple(x.shape)}")
    check_dtype(x=x)
    if weight.shape[2:] != (3, 3):
        raise ValueError(f"weight must be (out_channels, in_channels, 3, 3); got {tuple(weight.shape)}")
    if act not in ACTIVATIONS:
        raise ValueError(f"act must be one of {', '.join(ACTIVATIONS)}; got {act!r}")


def _impl(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    normed: bool,
    eps: float,
    act: str,
    dtype: torch.dtype,
    multiply_bf16: bool,
    pack: int,
) -> Tensor:
    _check(x, weight, act)
    parameters = packed(pack, (weight, bias, norm_weight, norm_bias), multiply_bf16, cpu.pack_downsample)
    return cpu.downsample(x, parameters, normed, eps, act, dtype == torch.bfloat16)


def _fake(x: Tensor, weight: Tensor, *arguments: Any) -> Tensor:
    act, dtype = arguments[5], arguments[6]
    _check(x, weight, act)
    return x.new_empty((x.shape[0], (x.shape[1] + 1) // 2, (x.shape[2] + 1) // 2, weight.shape[0]), dtype=dtype)


_library.impl("downsample", _impl, "CPU")
torch.library.register_fake("mambaout_kernels::downsample", _fake, lib=_library)
_op = torch.ops.mambaout_kernels.downsample.default


def applies(conv: nn.Module, norm: nn.Module | None, act: nn.Module | None, act_name: str | None, x: Tensor) -> bool:
    """Whether `run` computes what calling the modules one after the other would, on x (N, H, W, C).

    It does on the compiled CPU kernels, when no gradient is wanted, for plain modules without hooks, in float32 or
    bfloat16, or with float32 parameters under bfloat16 autocast. act_name: what act computes, "identity" for None.
    """
    stored = stored_dtype(x)
    if stored is None:
        return False
    if type(conv) is not nn.Conv2d or hooked(conv) or act_name is None or (act is not None and hooked(act)):
        return False
    if (conv.kernel_size, conv.stride, conv.padding, conv.dilation) != ((3, 3), (2, 2), (1, 1), (1, 1)):
        return False
    if conv.groups != 1 or conv.padding_mode != "zeros" or x.shape[3] != conv.in_channels:
        return False
    parameters = [conv.weight]
    if norm is not None:
        if not is_layer_norm(norm) or hooked(norm) or norm.normalized_shape != (conv.out_channels,):
            return False
        norm_weight: Any = norm.weight
        if norm_weight is not None:
            parameters.append(norm_weight)
    return all(p.dtype == stored and p.device == x.device for p in parameters)


# Attributes of conv, norm and act that `applies` looks at.
_SETTINGS = (
    "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode",
    "normalized_shape", "eps", "_fast_norm", "approximate",
)  # fmt: skip


def again(pack: Pack, x: Tensor) -> Tensor | None:
    """The output, where everything is as it was when `run` was called last with this pack; else None."""
    return seen.again(pack, cpu.downsample, x)


def run(conv: Any, norm: Any, act_name: str, x: Tensor, pack: Pack, owner: nn.Module) -> Tensor:
    """act(norm(conv(x))), (N, H, W, C) to (N, H/2, W/2, out_channels), halves rounded up; all are owner's modules.

    See `applies`.
    """
    parameters = (conv.weight, conv.bias, *((None, None) if norm is None else (norm.weight, norm.bias)))
    eps = 0.0 if norm is None else norm.eps
    dtype = torch.bfloat16 if low_precision(x) else torch.float32
    multiply_bf16 = low_precision(x) and cpu.multiplies_bf16()
    y = _op(x, *parameters, norm is not None, eps, act_name, dtype, multiply_bf16, pack.number)
    seen.remember(
        pack, (owner,), _SETTINGS, parameters, cpu.downsample, x, y, norm is not None, eps, act_name,
        dtype == torch.bfloat16,
    )  # fmt: skip
    return y
