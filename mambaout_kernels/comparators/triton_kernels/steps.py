"""One step of the recurrence, h <- exp(delta A) h + delta x B, for states h [BLOCK_S, BLOCK_D] in registers.

Lanes lie along channels, so that sums over states stay in a thread. `A2` is A * log2(e).
"""

# mypy: ignore-errors

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LOG2E_LOW = tl.constexpr(1.925963033500834e-08)  # log2(e) less its nearest in float32
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def owned(G, D, chunks, BLOCK_D: tl.constexpr):
    """(row = n * G + g, n, g, chunk, block of channels, channels) of this program; channels vary fastest."""
    blocks = tl.cdiv(D, BLOCK_D)
    rest = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    row = (rest // chunks).to(tl.int64)
    return row, row // G, row % G, rest % chunks, block, block * BLOCK_D + tl.arange(0, BLOCK_D)


@triton.jit
def load_state(states_ptr, index, d, D, S: tl.constexpr, BLOCK_S: tl.constexpr):
    """Number `index` of states (..., S, D)."""
    s = tl.arange(0, BLOCK_S)
    mask = (s < S)[:, None] & (d < D)[None, :]
    return tl.load(states_ptr + (index * S + s)[:, None] * D + d[None, :], mask=mask, other=0.0)


@triton.jit
def store_state(states_ptr, index, h, d, D, S: tl.constexpr, BLOCK_S: tl.constexpr):
    s = tl.arange(0, BLOCK_S)
    mask = (s < S)[:, None] & (d < D)[None, :]
    tl.store(states_ptr + (index * S + s)[:, None] * D + d[None, :], h, mask=mask)


@triton.jit
def load_A2(A_ptr, g, d, D, S: tl.constexpr, BLOCK_S: tl.constexpr):
    """A is (G, S, D) here, so that lanes read it along channels too."""
    return load_state(A_ptr, g, d, D, S, BLOCK_S) * LOG2E


@triton.jit
def carried(ends_ptr, sums_ptr, A2, row, first, count, step, chunks, d, D, S: tl.constexpr, BLOCK_S: tl.constexpr):
    """The state after `count` chunks first, first + step, ..., of each of which the end from a zero state is known."""
    h = tl.zeros_like(A2)
    for i in range(count):
        index = row * chunks + first + i * step
        delta = tl.load(sums_ptr + index * D + d, mask=d < D, other=0.0)
        h = tl.exp2(A2 * delta[None, :]) * h + load_state(ends_ptr, index, d, D, S, BLOCK_S)
    return h


@triton.jit
def of_scan(n, g, stride_n, stride_g, VEC: tl.constexpr):
    return n * (stride_n // VEC * VEC) + g * (stride_g // VEC * VEC)


@triton.jit
def load_token(order_ptr, t, present, L):
    """(token, whether there is one)."""
    token = tl.load(order_ptr + t, mask=present, other=-1).to(tl.int64)
    return token, (token >= 0) & (token < L)


@triton.jit
def load_channels(ptr, token, there, stride, d, D):
    return tl.load(ptr + token * stride + d, mask=(d < D) & there, other=0.0)


@triton.jit
def load_coefficients(ptr, token, there, stride, S: tl.constexpr, BLOCK_S: tl.constexpr, VEC: tl.constexpr):
    """B or C of a token, in every lane. VEC: divides the strides and offsets."""
    s = tl.arange(0, BLOCK_S)
    ptr += token * (stride // VEC * VEC)
    return tl.load(ptr + s, mask=(s < S) & there, other=0.0)


@triton.jit
def _exp_of_negative(x):
    """exp(-x). What rounding costs x * log2(e), and log2(e) itself, is put back: it would be a share of x of e."""
    t = x * -LOG2E
    lost = tl.fma(x, tl.full(x.shape, -LOG2E, tl.float32), -t) + x * -LOG2E_LOW
    e = tl.exp2(t)
    return e + e * (lost * LN2)


@triton.jit
def softplus(x):
    """(log(1 + exp(x)), its slope). Above 20 it is x, as PyTorch has it: the rest is less than a rounding.

    log(1 + e) = 2 artanh(q), q = e / (2 + e) of at most 1/3; by its series.
    """
    e = _exp_of_negative(tl.abs(x))
    q = e / (e + 2)
    r = q * q
    series = r * (2 / 15) + (2 / 13)
    series = series * r + (2 / 11)
    series = series * r + (2 / 9)
    series = series * r + (2 / 7)
    series = series * r + (2 / 5)
    series = series * r + (2 / 3)
    series = series * r + 2
    upper = 1 / (e + 1)
    return tl.maximum(x, 0.0) + series * q, tl.where(x > 0, upper, e * upper)


@triton.jit
def step_size(raw, bias, there):
    """delta; 0 for a step without a token, which then leaves the state as it is."""
    delta, _ = softplus(raw.to(tl.float32) + bias)
    return tl.where(there, delta, 0.0)


@triton.jit
def advance(h, x, delta, B, A2):
    return tl.exp2(A2 * delta[None, :]) * h + (delta * x.to(tl.float32))[None, :] * B.to(tl.float32)[:, None]
