"""The mathematics of the fused op in plain PyTorch: the definition of right, in any floating dtype, on any device.

    u = [g, i, c]  (N, H, W, 2D):  gate D, identity D - C, conv C channels
    s = concat(i, dwconv(c) + bias),   y = act(g) * s

Source: the Gated CNN block of MambaOut (arXiv 2405.07992, equation 2 and algorithm 1).
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = ("gelu", "gelu_tanh", "silu", "identity")

_TANH_SCALE = math.sqrt(2 / math.pi)
_TANH_CUBIC = 0.044715


def _gelu_slope(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(x * math.sqrt(0.5))) + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def _gelu_tanh_slope(x: Tensor) -> Tensor:
    near = x.clamp(-10, 10)  # beyond, the tangent is 1 in every dtype, and powers of x overflow
    t = torch.tanh(_TANH_SCALE * (near + _TANH_CUBIC * near**3))
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * _TANH_SCALE * (1 + 3 * _TANH_CUBIC * near * near)


def _silu_slope(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1 + x * (1 - s))


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _identity(x: Tensor) -> Tensor:
    return x


_VALUES: dict[str, Callable[[Tensor], Tensor]] = dict(
    zip(ACTIVATIONS, (F.gelu, _gelu_tanh, F.silu, _identity), strict=True)
)
_SLOPES: dict[str, Callable[[Tensor], Tensor]] = dict(
    zip(ACTIVATIONS, (_gelu_slope, _gelu_tanh_slope, _silu_slope, torch.ones_like), strict=True)
)


def activation(x: Tensor, act: str) -> Tensor:
    """act(x), elementwise."""
    return _VALUES[act](x)


def activation_slope(x: Tensor, act: str) -> Tensor:
    """d act(x) / dx in closed form, elementwise; of two-byte types in float32, rounded once, as PyTorch's own."""
    return _SLOPES[act](x.float()).to(x.dtype) if x.dtype.itemsize == 2 else _SLOPES[act](x)


def unavailable() -> str | None:
    """None: the reference runs wherever PyTorch does."""
    return None


def supports(u: Tensor, weight: Tensor) -> bool:
    """Every floating dtype and device."""
    return True


def _split(u: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(g, i, c) of u; views."""
    hidden, conv_channels = u.shape[-1] // 2, weight.shape[0]
    g, i, c = u.split((hidden, hidden - conv_channels, conv_channels), dim=-1)
    return g, i, c


def dwconv(c: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Depthwise convolution of an NHWC tensor, in its own dtype, as PyTorch's layers under autocast do it."""
    if c.numel() == 0:  # where conv2d refuses a height or width of 0, and a group of no channels
        return c * weight[:, 0, 0, 0].to(c.dtype) + bias.to(c.dtype)
    x = F.conv2d(
        c.permute(0, 3, 1, 2),
        weight.to(c.dtype),
        bias.to(c.dtype),
        padding=weight.shape[-1] // 2,
        groups=weight.shape[0],
    )
    return x.permute(0, 2, 3, 1)


def gated_dwconv(u: Tensor, weight: Tensor, bias: Tensor, act: str) -> Tensor:
    """y = act(g) * concat(i, dwconv(c)) as separate PyTorch operations; what "eager" means in tests and benchmarks.

    u (N, H, W, 2D); weight (C, 1, K, K); bias (C,); y (N, H, W, D) in u's dtype. Differentiable any number of times.
    """
    g, i, c = _split(u, weight)
    return activation(g, act) * torch.cat((i, dwconv(c, weight, bias)), dim=-1)


def gated_dwconv_backward(
    dy: Tensor, u: Tensor, weight: Tensor, bias: Tensor, act: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(du, dweight, dbias) in closed form, itself differentiable.

    dg = dy * s * act'(g);  di, e = split(dy * act(g));  dc = e convolved with the filter turned by 180 degrees;
    dweight[kh, kw] = sum over pixels of e[h, w] * c[h + kh - R, w + kw - R];  dbias = sum of e.
    du (N, H, W, 2D) in u's dtype; dweight and dbias in their parameters' dtypes.
    """
    g, i, c = _split(u, weight)
    conv_channels = weight.shape[0]
    s = torch.cat((i, dwconv(c, weight, bias)), dim=-1)
    dg = dy * s * activation_slope(g, act)
    di, e = (dy * activation(g, act)).split((i.shape[-1], conv_channels), dim=-1)
    if conv_channels == 0 or u.numel() == 0:
        return torch.cat((dg, di, e), dim=-1), torch.zeros_like(weight), torch.zeros_like(bias)
    dc = dwconv(e, weight.flip((2, 3)), torch.zeros_like(bias))
    du = torch.cat((dg, di, dc), dim=-1)
    return du, weight_gradient(e, c, weight).to(weight.dtype), e.sum(dim=(0, 1, 2)).to(bias.dtype)


def weight_gradient(e: Tensor, c: Tensor, weight: Tensor) -> Tensor:
    """(C, 1, K, K) from e and c (N, H, W, C), tap by tap: PyTorch's own has no double backward for symbolic shapes."""
    height, width, size = c.shape[1], c.shape[2], weight.shape[-1]
    padded = F.pad(c, (0, 0, *[size // 2] * 4))
    taps = [
        (e * padded[:, kh : kh + height, kw : kw + width]).sum(dim=(0, 1, 2))
        for kh in range(size)
        for kw in range(size)
    ]
    return torch.stack(taps, dim=-1).reshape(weight.shape)
