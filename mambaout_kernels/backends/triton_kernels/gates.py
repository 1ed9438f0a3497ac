"""act(x) and its slope, in fp32. Coefficients of gelu: fit_gelu.py.

In products with a constant the tensor comes first: the interpreter takes only that order.
"""

# mypy: ignore-errors

import triton
import triton.language as tl

_LOG2E = tl.constexpr(1.4426950408889634)
_TANH_SCALE = tl.constexpr(0.7978845608028654)  # sqrt(2 / pi)
_TANH_CUBIC = tl.constexpr(0.044715)
_NORMAL_SCALE = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)


@triton.jit
def _normal_cdf(x, WIDE: tl.constexpr):
    """Phi(x) = 1 - Phi(-x). Gelu's error is 4e-8 where WIDE (32-bit results), else 6e-7."""
    a = tl.abs(x)
    if WIDE:
        q = a * -5.4719258e-08 + 1.361004e-06
        q = q * a - 1.49857242e-05
        q = q * a + 9.3582697e-05
        q = q * a - 3.21563683e-04
        q = q * a + 5.9192338e-05
        q = q * a + 6.90073194e-03
        q = q * a - 5.24235517e-02
        q = q * a - 4.5922333e-01
        q = q * a - 1.15110421
    else:
        q = a * -4.89855243e-04 + 7.21131964e-03
        q = q * a - 5.21781892e-02
        q = q * a - 4.59563553e-01
        q = q * a - 1.15101182
    tail = tl.exp2(q * a) * 0.5
    return tl.where(x > 0, 1 - tail, tail)


@triton.jit
def _sigmoid(x):
    """(s, s * (1 - s)); exp2 of what is never positive, so that nothing overflows or cancels."""
    e = tl.exp2(tl.abs(x) * (-_LOG2E))
    upper = 1 / (e + 1)
    lower = e * upper
    return tl.where(x > 0, upper, lower), upper * lower


@triton.jit
def _gelu_tanh_argument(x):
    return (x * x * _TANH_CUBIC + 1) * x * (2 * _TANH_SCALE)


@triton.jit
def gate(x, ACT: tl.constexpr, WIDE: tl.constexpr):
    """act(x)."""
    if ACT == "gelu":
        return x * _normal_cdf(x, WIDE)
    elif ACT == "gelu_tanh":
        s, _ = _sigmoid(_gelu_tanh_argument(x))
        return x * s
    elif ACT == "silu":
        s, _ = _sigmoid(x)
        return x * s
    else:
        return x


@triton.jit
def gate_and_slope(x, ACT: tl.constexpr, WIDE: tl.constexpr):
    """(act(x), act'(x))."""
    if ACT == "gelu":
        cdf = _normal_cdf(x, WIDE)
        return x * cdf, cdf + x * _NORMAL_SCALE * tl.exp2(x * x * (-0.5 * _LOG2E))
    elif ACT == "gelu_tanh":
        s, slope = _sigmoid(_gelu_tanh_argument(x))
        return x * s, s + x * slope * (x * x * (3 * _TANH_CUBIC) + 1) * (2 * _TANH_SCALE)
    elif ACT == "silu":
        s, slope = _sigmoid(x)
        return x * s, s + x * slope
    else:
        return x, tl.zeros_like(x) + 1
