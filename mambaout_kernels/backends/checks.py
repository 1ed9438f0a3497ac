"""What the op takes, and what it says of anything else."""

import torch
from torch import Tensor

from ..reference import ACTIVATIONS

MAX_KERNEL_SIZE = 31

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_LOW_PRECISION = (torch.bfloat16, torch.float16)


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _check_parameter(name: str, parameter: Tensor, u: Tensor) -> None:
    if parameter.device != u.device:
        raise RuntimeError(f"{name} must be on the device of u, {u.device}; got {parameter.device}")
    allowed = (u.dtype, torch.float32) if u.dtype in _LOW_PRECISION else (u.dtype,)
    if parameter.dtype not in allowed:
        raise TypeError(f"{name} must be {' or '.join(map(str, allowed))} beside u of {u.dtype}; got {parameter.dtype}")


def check(u: Tensor, weight: Tensor, bias: Tensor, act: str) -> None:
    """Raise a ValueError, TypeError or RuntimeError that names the argument, what was given and what is allowed."""
    if u.ndim != 4:
        raise ValueError(f"u must have 4 dimensions (N, H, W, 2 * hidden); got shape {tuple(u.shape)}")
    if u.dtype not in _DTYPES:
        raise TypeError(f"u must be one of {_names(_DTYPES)}; got {u.dtype}")
    if u.shape[3] % 2 != 0:
        raise ValueError(f"u must have an even number of channels, 2 * hidden; got {u.shape[3]} in {tuple(u.shape)}")
    check_parameters(u, u.shape[3] // 2, weight, bias, act)


def check_parameters(u: Tensor, hidden: int, weight: Tensor, bias: Tensor, act: str) -> None:
    """As `check`, of the filter beside a u of so many hidden channels."""
    if weight.ndim != 4 or weight.shape[1] != 1 or weight.shape[2] != weight.shape[3]:
        raise ValueError(f"weight must have shape (conv_channels, 1, K, K); got {tuple(weight.shape)}")
    if weight.shape[2] % 2 == 0 or weight.shape[2] > MAX_KERNEL_SIZE:
        raise ValueError(f"weight must have an odd kernel size from 1 to {MAX_KERNEL_SIZE}; got {weight.shape[2]}")
    if weight.shape[0] > hidden:
        raise ValueError(f"weight must have at most hidden = {hidden} channels, half of u's; got {weight.shape[0]}")
    if bias.ndim != 1 or bias.shape[0] != weight.shape[0]:
        raise ValueError(f"bias must have shape ({weight.shape[0]},), as weight's channels; got {tuple(bias.shape)}")
    if act not in ACTIVATIONS:
        raise ValueError(f"act must be one of {', '.join(ACTIVATIONS)}; got {act!r}")
    _check_parameter("weight", weight, u)
    _check_parameter("bias", bias, u)


def check_gradient(dy: Tensor, u: Tensor) -> None:
    expected = (*u.shape[:3], u.shape[3] // 2)
    if dy.shape != expected:
        raise ValueError(f"dy must have shape {expected}, as y; got {tuple(dy.shape)}")
    if dy.dtype != u.dtype:
        raise TypeError(f"dy must have the dtype of u, {u.dtype}; got {dy.dtype}")
    if dy.device != u.device:
        raise RuntimeError(f"dy must be on the device of u, {u.device}; got {dy.device}")


def check_beside(x: Tensor, name: str, t: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """ValueError or TypeError unless a kernel can read t beside x: of this shape and dtype, dense, on x's device."""
    if t.shape != shape:
        raise ValueError(f"{name} must have shape {shape}; got {tuple(t.shape)}")
    if t.dtype != dtype:
        raise TypeError(f"{name} must be {dtype} beside x of {x.dtype}; got {t.dtype}")
    if t.device != x.device:
        raise ValueError(f"{name} must be on the device of x, {x.device}; got {t.device}")
    if t.layout != torch.strided:
        raise ValueError(f"{name} must be dense, of layout torch.strided; got {t.layout}")
    if not t.is_contiguous():
        raise ValueError(f"{name} must be contiguous; got strides {t.stride()} of shape {shape}")


def check_devices(*tensors: Tensor | None) -> None:
    """RuntimeError unless all are on one device: of a fake kernel, which runs where one of them has no memory."""
    devices = {str(t.device) for t in tensors if t is not None}
    if len(devices) > 1:
        raise RuntimeError(f"all tensors must be on one device; got {', '.join(sorted(devices))}")
