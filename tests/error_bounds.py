"""How far from the truth correct arithmetic can be: bounds of the rounding errors, element by element, in fp64.

A sum of n products in floating point, in any order, with or without fma, is off by at most gamma(n) * sum |a| |b|,
where gamma(n) = n u / (1 - n u) and u is half the distance of neighbouring numbers (Higham, Accuracy and Stability of
Numerical Algorithms, 3.1 and 4.2). From layer to layer, an error E of a factor a becomes E |b|, and a result that is
stored is off by one rounding more. What is beyond such a bound is not the rounding of sums in fp32 (fp64 for fp64).

The op may store act(g), and dy times it or its slope, and its results in its dtype; the block, the downsampling and the
head what PyTorch's modules store: norm, fc1, convolution, gate, y, fc2, scale, sum; mean. Parameters are exact in the
dtype that they are given in.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambaout_kernels import reference

# Of act(x) relative to |x|, and of act'(x) to 1 + |x|: test_activation_over_all_magnitudes holds the kernels to less.
ACT_ROUNDINGS = 8.0
SLOPE_LIMIT = 1.13  # of |act'|


def _unit(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def _of_sums(dtype: torch.dtype) -> float:
    return _unit(torch.float64 if dtype == torch.float64 else torch.float32)


def _smallest(dtype: torch.dtype) -> float:
    """What a number near zero may be off by: results below the smallest normal one may become 0, but in fp16."""
    info = torch.finfo(dtype)
    return info.tiny * info.eps if dtype == torch.float16 else info.tiny


def gamma(terms: float, unit: float) -> float:
    assert terms * unit < 0.1
    return terms * unit / (1 - terms * unit)


@dataclass
class Bounded:
    """A tensor in fp64, how far from it what is computed can be, and the dtype that is computed in."""

    value: Tensor
    error: Tensor
    dtype: torch.dtype

    @staticmethod
    def exactly(x: Tensor, dtype: torch.dtype) -> "Bounded":
        return Bounded(x.double(), torch.zeros_like(x, dtype=torch.float64), dtype)

    @property
    def size(self) -> Tensor:
        return self.value.abs() + self.error

    def _with(self, value: Tensor, error: Tensor) -> "Bounded":
        return Bounded(value, error, self.dtype)

    def stored(self, dtype: torch.dtype | None = None) -> "Bounded":
        dtype = dtype or self.dtype
        return self._with(self.value, self.error + _unit(dtype) * self.size + _smallest(dtype))

    def _in_sums(self) -> "Bounded":
        return self._with(self.value, self.error + _of_sums(self.dtype) * self.size)

    def times(self, other: "Bounded") -> "Bounded":
        error = self.size * other.error + other.value.abs() * self.error
        return self._with(self.value * other.value, error)._in_sums()

    def plus(self, other: "Bounded") -> "Bounded":
        return self._with(self.value + other.value, self.error + other.error)._in_sums()

    def sums(self, terms: float, linear, bias: Tensor | None = None) -> "Bounded":
        """linear(x) + bias: `linear(x, of)` is linear in x with of(its factors), and adds up so many terms."""
        bias = self.value.new_zeros(1) if bias is None else bias.double()
        sizes = linear(self.size, torch.abs) + bias.abs()
        error = linear(self.error, torch.abs) + gamma(terms + 2, _of_sums(self.dtype)) * sizes
        return self._with(linear(self.value, lambda factors: factors) + bias, error)

    def activated(self, act: str, slope: bool = False) -> "Bounded":
        """In two bytes the kernels take less exact tables: an eighth of a rounding of the result."""
        function = reference.activation_slope if slope else reference.activation
        unit = ACT_ROUNDINGS * _of_sums(self.dtype) + (_unit(self.dtype) / 8 if self.dtype.itemsize == 2 else 0.0)
        own = unit * (self.size + 1.0 if slope else self.size)
        return self._with(function(self.value, act), own + SLOPE_LIMIT * self.error)

    def normed(self, norm: nn.LayerNorm) -> "Bounded":
        """The mean's rounding is taken off again, or never there, as in PyTorch's: what is left of it is squared."""
        dim, unit = self.value.shape[-1], _of_sums(self.dtype)
        of_mean = gamma(dim + 2, unit)
        x = self.value
        centred = x - x.mean(-1, keepdim=True)
        # Of x - mean, before what the mean is off by is taken off.
        before = centred.abs() + of_mean * self.size.mean(-1, keepdim=True)
        error = of_mean * (before + before.mean(-1, keepdim=True)) + self.error + self.error.mean(-1, keepdim=True)
        variance = centred.square().mean(-1, keepdim=True)
        of_variance = (2 * centred.abs() * error + error.square()).mean(-1, keepdim=True) + of_mean * variance
        scaled = variance + norm.eps
        lowest = (scaled - of_variance).clamp_min(norm.eps / 2)
        root, of_root = scaled.rsqrt(), lowest.rsqrt() - scaled.rsqrt() + 4 * unit * lowest.rsqrt()
        result = self._with(centred, error).times(self._with(root, of_root))
        if norm.weight is not None:
            result = result.times(Bounded.exactly(norm.weight.detach(), self.dtype))
        if norm.bias is not None:
            result = result.plus(Bounded.exactly(norm.bias.detach(), self.dtype))
        return result


def _dwconv(x: Tensor, weight: Tensor) -> Tensor:
    """x (N, H, W, C), weight (C, 1, K, K)."""
    if x.numel() == 0:
        return x * weight[:, 0, 0, 0]
    return F.conv2d(x.permute(0, 3, 1, 2), weight, padding=weight.shape[-1] // 2, groups=x.shape[3]).permute(0, 2, 3, 1)


def _convolved(c: Bounded, weight: Tensor, bias: Tensor | None) -> Bounded:
    weight = weight.double()
    return c.sums(weight[0:1].numel(), lambda x, of: _dwconv(x, of(weight)), bias)


def _joined(first: Bounded, second: Bounded) -> Bounded:
    value, error = torch.cat((first.value, second.value), -1), torch.cat((first.error, second.error), -1)
    return Bounded(value, error, first.dtype)


def _parts(x: Bounded, sizes) -> list[Bounded]:
    return [Bounded(*both, x.dtype) for both in zip(x.value.split(sizes, -1), x.error.split(sizes, -1), strict=True)]


def _middle(u: Bounded, weight: Tensor, bias: Tensor, act: str) -> tuple[Bounded, ...]:
    """g, c, s and act(g)."""
    D, C = u.value.shape[-1] // 2, weight.shape[0]
    g, i, c = _parts(u, (D, D - C, C))
    return g, c, _joined(i, _convolved(c, weight, bias)), g.activated(act)


def of_op(u: Tensor, weight: Tensor, bias: Tensor, dy: Tensor, act: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of (y, du, dweight, dbias)."""
    D, C = dy.shape[-1], weight.shape[0]
    g, c, s, gate = _middle(Bounded.exactly(u, u.dtype), weight, bias, act)
    y = s.times(gate.stored()).stored()
    upstream = Bounded.exactly(dy, u.dtype)
    dg = upstream.times(g.activated(act, slope=True)).stored().times(s).stored()
    di, e = _parts(upstream.times(gate).stored(), (D - C, C))
    dc = _convolved(e, weight.flip((2, 3)), None).stored()
    du = torch.cat((dg.error, di.error, dc.error), -1)
    pixels = dy.shape[:3].numel()

    def over_pixels(x: Tensor, of) -> Tensor:
        taps = torch.zeros_like(weight, dtype=torch.float64).requires_grad_()
        if x.numel() == 0:
            return taps.detach()
        return torch.autograd.grad(_dwconv(of(c.value), taps), taps, x)[0]

    dweight = e.sums(pixels, over_pixels).stored(weight.dtype)
    dbias = e.sums(pixels, lambda x, of: x.sum((0, 1, 2))).stored(bias.dtype)
    return y.error, du, dweight.error, dbias.error


def _linear(x: Bounded, layer: nn.Linear) -> Bounded:
    weight = layer.weight.detach().double()
    bias = None if layer.bias is None else layer.bias.detach()
    return x.sums(layer.in_features, lambda x, of: F.linear(x, of(weight)), bias).stored()


def of_block(block, x: Tensor) -> Tensor:
    """Of a FusedGatedCNNBlock's output."""
    start = Bounded.exactly(x, x.dtype)
    u = _linear(start.normed(block.norm).stored(), block.fc1)
    weight, bias = x.new_zeros(0, 1, 1, 1), x.new_zeros(0)
    if isinstance(block.conv, nn.Conv2d):
        weight, bias = block.conv.weight.detach(), block.conv.bias.detach()
    _, _, s, gate = _middle(u, weight, bias, block.op_act)
    y = _linear(s.stored().times(gate.stored()).stored(), block.fc2)
    gamma_of_ls = getattr(block.ls, "gamma", None)
    if gamma_of_ls is not None:
        y = y.times(Bounded.exactly(gamma_of_ls.detach(), x.dtype)).stored()
    return start.plus(y).stored().error


def of_downsampling(conv: nn.Conv2d, norm: nn.LayerNorm | None, act: str, x: Tensor) -> Tensor:
    """Of act(norm(conv(x))), x (N, H, W, channels)."""
    if x.numel() == 0:
        return torch.zeros(x.shape[0], (x.shape[1] + 1) // 2, (x.shape[2] + 1) // 2, conv.out_channels)
    weight = conv.weight.detach().double()

    def convolve(x: Tensor, of) -> Tensor:
        return F.conv2d(x.permute(0, 3, 1, 2), of(weight), stride=2, padding=1).permute(0, 2, 3, 1)

    bias = None if conv.bias is None else conv.bias.detach()
    y = Bounded.exactly(x, x.dtype).sums(weight[0].numel(), convolve, bias).stored()
    if norm is not None:
        y = y.normed(norm).stored()
    return y.activated(act).stored().error


def of_head(norm: nn.LayerNorm, head: nn.Module, x: Tensor) -> Tensor:
    """Of head(norm(mean of x over H and W)), x (N, H, W, channels)."""
    pixels = x.shape[1] * x.shape[2]
    mean = Bounded.exactly(x, x.dtype).sums(pixels, lambda x, of: x.mean((1, 2))).stored()
    y = _linear(mean.normed(norm).stored(), head.fc1).activated("gelu").stored()
    if head.norm is not None:
        y = y.normed(head.norm).stored()
    return _linear(y, head.fc2).error if isinstance(head.fc2, nn.Linear) else y.error
