"""How far from the truth correct arithmetic can be: bounds of the rounding errors, element by element, in fp64.

A sum of n products in floating point, in any order, with or without fma, is off by at most gamma(n) * sum |a| |b|,
where gamma(n) = n u / (1 - n u) and u is half the distance of neighbouring numbers (Higham, Accuracy and Stability of
Numerical Algorithms, 3.1 and 4.2). From layer to layer, an error E of a factor a becomes E |b|, and a result that is
stored is off by one rounding more. What is beyond such a bound is not the rounding of sums in fp32 (fp64 for fp64).
No processor has a part in it: only dtypes and values.

The op may store act(g), and dy times it or its slope, and its results in its dtype; the block, the downsampling and the
head what PyTorch's modules store: norm, fc1, convolution, gate, y, fc2, scale, sum; mean, and in training what stands
between them. Parameters are exact in the dtype that they are given in, but of blocks rounded to that of the map; under
autocast, in `low`, the factors of products are rounded to it.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import reference

# Of act(x) relative to |x|, and of act'(x) to 1 + |x|: test_activation_over_all_magnitudes holds the kernels to less.
ACT_ROUNDINGS = 8.0
SLOPE_LIMIT = 1.13  # of |act'|

_Bilinear = Callable[[Tensor, Tensor], Tensor]


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
    def exactly(x: Tensor, dtype: torch.dtype | None = None) -> "Bounded":
        x = x.detach()
        return Bounded(x.double(), torch.zeros_like(x, dtype=torch.float64), dtype or x.dtype)

    @property
    def size(self) -> Tensor:
        return self.value.abs() + self.error

    def _with(self, value: Tensor, error: Tensor) -> "Bounded":
        return Bounded(value, error, self.dtype)

    def stored(self, dtype: torch.dtype | None = None) -> "Bounded":
        dtype = dtype or self.dtype
        return Bounded(self.value, self.error + _unit(dtype) * self.size + _smallest(dtype), dtype)

    def to(self, dtype: torch.dtype | None) -> "Bounded":
        """Rounded where the dtype holds less; None: as it is."""
        if dtype is None or dtype == self.dtype:
            return self
        return self.stored(dtype) if _unit(dtype) > _unit(self.dtype) else replace(self, dtype=dtype)

    def _in_sums(self) -> "Bounded":
        return self._with(self.value, self.error + _of_sums(self.dtype) * self.size)

    def times(self, other: "Bounded") -> "Bounded":
        error = self.size * other.error + other.value.abs() * self.error
        return self._with(self.value * other.value, error)._in_sums()

    def plus(self, other: "Bounded") -> "Bounded":
        return self._with(self.value + other.value, self.error + other.error)._in_sums()

    def minus(self, other: "Bounded") -> "Bounded":
        return self.plus(other._with(-other.value, other.error))

    def mean(self) -> "Bounded":
        """Over the channels."""
        of_sum = gamma(self.value.shape[-1] + 2, _of_sums(self.dtype))
        error = self.error + of_sum * self.size
        return self._with(self.value.mean(-1, keepdim=True), error.mean(-1, keepdim=True))

    def sums(self, terms: float, bilinear: _Bilinear, factors: "Bounded", bias: "Bounded | None" = None) -> "Bounded":
        """bilinear(x, factors) + bias: each element adds up so many products of an x and a factor."""
        value, size = bilinear(self.value, factors.value), bilinear(self.size, factors.size)
        error = torch.zeros_like(value)
        if self.error.any():
            error = error + bilinear(self.error, factors.value.abs())
        if factors.error.any():
            error = error + bilinear(self.size, factors.error)
        if bias is not None:
            value, size, error = value + bias.value, size + bias.size, error + bias.error
        return self._with(value, error + gamma(terms + 2, _of_sums(self.dtype)) * size)

    def activated(self, act: str, slope: bool = False) -> "Bounded":
        """In two bytes the kernels take less exact tables: an eighth of a rounding of the result."""
        function = reference.activation_slope if slope else reference.activation
        unit = ACT_ROUNDINGS * _of_sums(self.dtype) + (_unit(self.dtype) / 8 if self.dtype.itemsize == 2 else 0.0)
        own = unit * (self.size + 1.0 if slope else self.size)
        return self._with(function(self.value, act), own + SLOPE_LIMIT * self.error)

    def _standard(self, norm: Any) -> tuple["Bounded", "Bounded"]:
        """x - mean, of nn.RMSNorm x, and 1 / sqrt(its mean square + eps).

        The mean's rounding is taken off again, or never there, as in PyTorch's: what is left of it is squared.
        """
        unit = _of_sums(self.dtype)
        of_mean = gamma(self.value.shape[-1] + 2, unit)
        centred = self
        if isinstance(norm, nn.LayerNorm):
            x = self.value - self.value.mean(-1, keepdim=True)
            # Of x - mean, before what the mean is off by is taken off.
            before = x.abs() + of_mean * self.size.mean(-1, keepdim=True)
            error = of_mean * (before + before.mean(-1, keepdim=True)) + self.error + self.error.mean(-1, keepdim=True)
            centred = self._with(x, error)
        variance = centred.value.square().mean(-1, keepdim=True)
        of_squares = 2 * centred.value.abs() * centred.error + centred.error.square()
        of_variance = of_squares.mean(-1, keepdim=True) + of_mean * variance
        eps: Any = torch.finfo(self.dtype).eps if norm.eps is None else norm.eps
        scaled = variance + eps
        lowest = (scaled - of_variance).clamp_min(eps / 2)
        root, of_root = scaled.rsqrt(), lowest.rsqrt() - scaled.rsqrt() + 4 * unit * lowest.rsqrt()
        return centred, self._with(root, of_root)

    def normed(self, norm: Any) -> "Bounded":
        """By nn.LayerNorm, nn.RMSNorm or nn.Identity."""
        if isinstance(norm, nn.Identity):
            return self
        centred, root = self._standard(norm)
        result = centred.times(root)
        if norm.weight is not None:
            result = result.times(Bounded.exactly(norm.weight))
        bias = getattr(norm, "bias", None)
        return result if bias is None else result.plus(Bounded.exactly(bias))

    def through_norm(self, norm: Any, dy: "Bounded") -> tuple["Bounded", dict[str, "Bounded"]]:
        """Gradients of normed(norm) by x and by its parameters, as PyTorch computes them, m and r stored.

        dx = r dn + b x + c,   b = -(mean(dn x) - m mean(dn)) r^3,   c = -b m - mean(dn) r,   dn = dy * weight
        """
        if isinstance(norm, nn.Identity):
            return dy, {}
        root = self._standard(norm)[1].stored()
        dn = dy if norm.weight is None else dy.times(Bounded.exactly(norm.weight))
        of_x, shift, normed = dn.times(self).mean(), None, self.times(root)
        if isinstance(norm, nn.LayerNorm):
            mean, of_dn = self.mean().stored(), dn.mean()
            of_x = of_x.minus(of_dn.times(mean))
            normed = normed.minus(mean.times(root))
            shift = of_dn.times(root)
        b = of_x.times(root).times(root).times(root)
        dx = dn.times(root).minus(b.times(self))
        if shift is not None:
            dx = dx.plus(b.times(mean)).minus(shift)
        gradients = {}
        if norm.weight is not None:
            gradients["weight"] = dy.over_pixels(normed).stored(norm.weight.dtype)
        if getattr(norm, "bias", None) is not None:
            gradients["bias"] = dy.over_pixels().stored(norm.bias.dtype)
        return dx.stored(), gradients

    def over_pixels(self, other: "Bounded | None" = None) -> "Bounded":
        """Sums over all but the channels: of self * other, or of self."""
        x = self if other is None else self.times(other)
        one = Bounded.exactly(x.value.new_ones(()))
        return x.sums(x.value.shape[:-1].numel(), lambda x, one: x.flatten(0, -2).sum(0) * one, one)


def _parameter(p: Tensor, low: torch.dtype | None) -> Bounded:
    return Bounded.exactly(p).to(low)


def _bias(p: Tensor | None, low: torch.dtype | None) -> Bounded | None:
    return None if p is None else _parameter(p, low)


def of_product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """Of a b + bias, matrices in their own dtype."""
    return Bounded.exactly(a).sums(a.shape[1], torch.matmul, Bounded.exactly(b), _bias(bias, None)).stored().error


def dwconv(x: Tensor, weight: Tensor) -> Tensor:
    """x (N, H, W, C), weight (C, 1, K, K); without the bias. In float64 PyTorch's own goes channel by channel."""
    (_, height, width, _), size = x.shape, weight.shape[-1]
    padded, y = F.pad(x, (0, 0, *[size // 2] * 4)), torch.zeros_like(x)
    for kh, kw in itertools.product(range(size), repeat=2):
        y.addcmul_(padded[:, kh : kh + height, kw : kw + width], weight[:, 0, kh, kw])
    return y


def _convolved(c: Bounded, weight: Bounded, bias: Bounded | None) -> Bounded:
    return c.sums(weight.value[0:1].numel(), dwconv, weight, bias)


def _joined(*parts: Bounded) -> Bounded:
    value, error = torch.cat([x.value for x in parts], -1), torch.cat([x.error for x in parts], -1)
    return Bounded(value, error, parts[0].dtype)


def _parts(x: Bounded, sizes: tuple[int, ...]) -> list[Bounded]:
    return [Bounded(*both, x.dtype) for both in zip(x.value.split(sizes, -1), x.error.split(sizes, -1), strict=True)]


@dataclass
class _Op:
    """y = act(g) * concat(i, dwconv(c) + bias) of u, and its gradients; `composed`: every operation's result stored."""

    u: Bounded
    weight: Bounded
    bias: Bounded
    act: str
    composed: bool

    def __post_init__(self) -> None:
        D, self.C = self.u.value.shape[-1] // 2, self.weight.value.shape[0]
        self.identity = D - self.C
        self.parameters = self.weight.dtype, self.bias.dtype
        if self.composed:
            self.weight, self.bias = self.weight.to(self.u.dtype), self.bias.to(self.u.dtype)
        self.g, i, self.c = _parts(self.u, (D, self.identity, self.C))
        self.s = _joined(i, self._between(_convolved(self.c, self.weight, self.bias)))
        self.gate = self.g.activated(self.act)

    def _between(self, x: Bounded) -> Bounded:
        return x.stored(self.u.dtype) if self.composed else x

    @property
    def y(self) -> Bounded:
        return self.s.times(self.gate.stored()).stored()

    def gradients(self, dy: Bounded) -> tuple[Bounded, Bounded, Bounded]:
        """(du, dweight, dbias), the last two in the dtypes of the parameters."""
        slope = self._between(self.g.activated(self.act, slope=True))
        dg = dy.times(slope).stored().times(self.s).stored()
        di, e = _parts(dy.times(self._between(self.gate)).stored(), (self.identity, self.C))
        turned = replace(self.weight, value=self.weight.value.flip((2, 3)), error=self.weight.error.flip((2, 3)))
        dc = _convolved(e, turned, None).stored()
        pixels = dy.value.shape[:3].numel()

        def over_pixels(x: Tensor, c: Tensor) -> Tensor:
            return reference.weight_gradient(x, c, self.weight.value)

        dweight, dbias = e.sums(pixels, over_pixels, self._between(self.c)), e.over_pixels()
        results = zip((dweight, dbias), self.parameters, strict=True)
        dweight, dbias = (self._between(x).stored(dtype) for x, dtype in results)
        return _joined(dg, di, dc), dweight, dbias


def of_op(
    u: Tensor, weight: Tensor, bias: Tensor, dy: Tensor | None, act: str, composed: bool = False
) -> tuple[Tensor, ...]:
    """Of (y, du, dweight, dbias), without dy of y alone; composed: of the reference, which stores every operation's
    result.
    """
    op = _Op(Bounded.exactly(u), Bounded.exactly(weight), Bounded.exactly(bias), act, composed)
    if dy is None:
        return (op.y.error,)
    return (op.y.error, *(gradient.error for gradient in op.gradients(Bounded.exactly(dy, u.dtype))))


def _linear(x: Bounded, layer: nn.Linear, low: torch.dtype | None = None) -> Bounded:
    weight, bias = _parameter(layer.weight, low), _bias(layer.bias, low)
    return x.sums(layer.in_features, F.linear, weight, bias).stored()


def _through_linear(
    x: Bounded, layer: nn.Linear, dy: Bounded, low: torch.dtype | None = None
) -> tuple[Bounded, dict[str, Bounded]]:
    """Gradients by x, and by the parameters."""
    pixels = x.value.shape[:-1].numel()
    dx = dy.sums(layer.out_features, torch.matmul, _parameter(layer.weight, low)).stored()
    dweight = dy.sums(pixels, lambda dy, x: dy.flatten(0, -2).t() @ x.flatten(0, -2), x).stored()
    gradients = {"weight": dweight.to(layer.weight.dtype)}
    if layer.bias is not None:
        gradients["bias"] = dy.over_pixels().stored().to(layer.bias.dtype)
    return dx, gradients


def of_norm_linear(norm: nn.Module, layer: nn.Linear, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Of layer(norm(x)), "y", and of its gradients by "x" and by the parameters, named as norm.weight, layer.bias."""
    start, upstream = Bounded.exactly(x), Bounded.exactly(dy)
    normed = start.normed(norm).stored()
    dnormed, of_layer = _through_linear(normed, layer, upstream)
    dx, of_norm = start.through_norm(norm, dnormed)
    found = {"y": _linear(normed, layer), "x": dx, **_named("norm", of_norm), **_named("layer", of_layer)}
    return {name: one.error for name, one in found.items()}


def _named(module: str, gradients: dict[str, Bounded]) -> dict[str, Bounded]:
    return {f"{module}.{name}": gradient for name, gradient in gradients.items()}


def of_block(block: Any, x: Tensor, dy: Tensor | None = None, low: torch.dtype | None = None) -> dict[str, Tensor]:
    """Of a FusedGatedCNNBlock's output, "y", and with `dy` of the gradients by "x" and by every parameter.

    low: under autocast in it.
    """
    start = Bounded.exactly(x)
    into_norm = start.to(torch.float32 if low else None)
    normed = into_norm.normed(block.norm).stored().to(low)
    u = _linear(normed, block.fc1, low)
    conv = block.conv if isinstance(block.conv, nn.Conv2d) else None
    weight: Any = x.new_zeros(0, 1, 1, 1) if conv is None else conv.weight
    bias: Any = x.new_zeros(0) if conv is None else conv.bias
    op = _Op(u, _parameter(weight, low), _parameter(bias, low), block.op_act, composed=True)
    y = op.y
    branch = unscaled = _linear(y, block.fc2, low)
    scale = getattr(block.ls, "gamma", None)
    if scale is not None:
        branch = unscaled.to(torch.promote_types(unscaled.dtype, scale.dtype)).times(Bounded.exactly(scale)).stored()
    out = start.to(torch.promote_types(start.dtype, branch.dtype)).plus(branch).stored()
    if dy is None:
        return {"y": out.error}

    upstream = Bounded.exactly(dy, out.dtype)
    found = {"y": out}
    into_branch = upstream.to(branch.dtype)
    if scale is not None:
        found["ls.gamma"] = into_branch.times(unscaled).stored().over_pixels().stored(scale.dtype)
        into_branch = into_branch.times(Bounded.exactly(scale)).stored().to(unscaled.dtype)
    into_op, of_fc2 = _through_linear(y, block.fc2, into_branch, low)
    into_fc1, dweight, dbias = op.gradients(into_op)
    into_normed, of_fc1 = _through_linear(normed, block.fc1, into_fc1, low)
    dx, of_norm = into_norm.through_norm(block.norm, into_normed.to(into_norm.dtype))
    found |= {"x": dx.to(start.dtype).plus(upstream.to(start.dtype)).stored(), **_named("norm", of_norm)}
    found |= {**_named("fc1", of_fc1), **_named("fc2", of_fc2)}
    if conv is not None:
        found |= {"conv.weight": dweight.to(weight.dtype), "conv.bias": dbias.to(bias.dtype)}
    return {name: one.error for name, one in found.items()}


def _halved(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(x.permute(0, 3, 1, 2), weight, stride=2, padding=1).permute(0, 2, 3, 1)


def of_downsampling(layers: Sequence[nn.Module | str | None], x: Tensor, low: torch.dtype | None = None) -> Tensor:
    """Of x (N, H, W, channels) through 3x3 convolutions of stride 2, norms, and activations by name; None is skipped.

    low: under autocast in it.
    """
    current = Bounded.exactly(x)
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            if current.value.numel() == 0:
                N, H, W, _ = x.shape
                return torch.zeros(N, (H + 1) // 2, (W + 1) // 2, layer.out_channels)
            terms = layer.weight[0].numel()
            weight, bias = _parameter(layer.weight, low), _bias(layer.bias, low)
            current = current.to(low).sums(terms, _halved, weight, bias).stored()
        elif isinstance(layer, nn.Module):
            current = current.to(torch.float32 if low else None).normed(layer).stored()
        elif layer is not None:
            current = current.activated(layer).stored()
    return current.error


def of_head(norm: nn.LayerNorm, head: Any, x: Tensor) -> Tensor:
    """Of head(norm(mean of x over H and W)), x (N, H, W, channels)."""
    pixels = x.shape[1] * x.shape[2]
    one = Bounded.exactly(x.new_ones(()).double())
    mean = Bounded.exactly(x).sums(pixels, lambda x, one: x.mean((1, 2)) * one, one).stored()
    y = _linear(mean.normed(norm).stored(), head.fc1).activated("gelu").stored()
    if head.norm is not None:
        y = y.normed(head.norm).stored()
    return _linear(y, head.fc2).error if isinstance(head.fc2, nn.Linear) else y.error
