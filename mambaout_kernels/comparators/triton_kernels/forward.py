"""y_t = C_t h_t + skip x_t,  h_t = exp(delta_t A) h_{t-1} + delta_t x_t B_t,  delta_t = softplus(delta + bias).

One program: one scan (n, g), BLOCK_D channels, one chunk of its steps; states [BLOCK_S, BLOCK_D] in registers. Where
there are several chunks, a first launch finds the state that each leaves from a zero one, and the sum of its deltas:
a chunk as a whole decays by exp(A * that sum). Loads of STEPS steps come before their arithmetic.
"""

# mypy: ignore-errors
# ruff: noqa: RUF005  (its tuples are only added, and not chosen between)

import triton.language as tl

from ...backends.triton_kernels.kernel import kernel
from .steps import (
    advance,
    carried,
    load_A2,
    load_channels,
    load_coefficients,
    load_token,
    of_scan,
    owned,
    step_size,
    store_state,
)


@kernel
def chunk_ends(
    v_ptr, delta_ptr, A_ptr, w_ptr, bias_ptr, order_ptr, ends_ptr, sums_ptr, G, L, D, chunks, length,
    v_n, v_g, v_l, delta_n, delta_g, delta_l, w_n, w_g, w_l,
    S: tl.constexpr, VEC: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, STEPS: tl.constexpr,
    REVERSE: tl.constexpr,
):  # fmt: skip
    """ends (N, G, chunks, S, D) and sums of delta (N, G, chunks, D), of all chunks but the one that none needs.

    v, w: x, B, for h after the last step; REVERSE: dy, C, for what reaches the chunk before of h's gradient.
    """
    row, n, g, k, _, d = owned(G, D, chunks - 1, BLOCK_D)
    if REVERSE:
        k += 1
    A2 = load_A2(A_ptr, g, d, D, S, BLOCK_S)
    bias = tl.load(bias_ptr + g * D + d, mask=d < D, other=0.0)
    v_ptr += of_scan(n, g, v_n, v_g, 1)
    w_ptr += of_scan(n, g, w_n, w_g, VEC)
    delta_ptr += of_scan(n, g, delta_n, delta_g, 1)
    order_ptr += g * L
    begin = k * length
    count = tl.minimum(length, L - begin)
    h = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_D], tl.float32)
    for first in range(0, count, STEPS):
        loaded = ()
        for j in tl.static_range(STEPS):
            t = begin + (count - 1 - first - j if REVERSE else first + j)
            token, there = load_token(order_ptr, t, first + j < count, L)
            v = load_channels(v_ptr, token, there, v_l, d, D)
            raw = load_channels(delta_ptr, token, there, delta_l, d, D)
            w = load_coefficients(w_ptr, token, there, w_l, S, BLOCK_S, VEC)
            loaded = loaded + ((v, raw, w, there),)
        for j in tl.static_range(STEPS):
            v, raw, w, there = loaded[j]
            delta = step_size(raw, bias, there)
            if REVERSE:
                h += v.to(tl.float32)[None, :] * w.to(tl.float32)[:, None]
                h *= tl.exp2(A2 * delta[None, :])
            else:
                h = advance(h, v, delta, w, A2)
            total += delta
    store_state(ends_ptr, row * chunks + k, h, d, D, S, BLOCK_S)
    tl.store(sums_ptr + (row * chunks + k) * D + d, total, mask=d < D)


@kernel
def scan_fwd(
    x_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, skip_ptr, bias_ptr, order_ptr, ends_ptr, sums_ptr, out_ptr,
    G, L, D, chunks, length, x_n, x_g, x_l, delta_n, delta_g, delta_l, B_n, B_g, B_l, C_n, C_g, C_l,
    S: tl.constexpr, VEC: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, STEPS: tl.constexpr,
    EVERY: tl.constexpr,
):  # fmt: skip
    """out: y (N, G, L, D); or, EVERY so many steps, the state before them (N, G, cdiv(L, EVERY), S, D).

    length, the steps of a chunk, is a multiple of EVERY, and that of STEPS.
    """
    row, n, g, k, _, d = owned(G, D, chunks, BLOCK_D)
    A2 = load_A2(A_ptr, g, d, D, S, BLOCK_S)
    bias = tl.load(bias_ptr + g * D + d, mask=d < D, other=0.0)
    skip = tl.load(skip_ptr + g * D + d, mask=d < D, other=0.0)
    x_ptr += of_scan(n, g, x_n, x_g, 1)
    B_ptr += of_scan(n, g, B_n, B_g, VEC)
    C_ptr += of_scan(n, g, C_n, C_g, VEC)
    delta_ptr += of_scan(n, g, delta_n, delta_g, 1)
    order_ptr += g * L
    begin = k * length
    end = tl.minimum(begin + length, L)
    h = carried(ends_ptr, sums_ptr, A2, row, 0, k, 1, chunks, d, D, S, BLOCK_S)
    for first in range(begin, end, STEPS):
        if EVERY:  # noqa: SIM102  (a constant, which decides what is compiled)
            if first % EVERY == 0:
                store_state(out_ptr, row * tl.cdiv(L, EVERY) + first // EVERY, h, d, D, S, BLOCK_S)
        loaded = ()
        for j in tl.static_range(STEPS):
            token, there = load_token(order_ptr, first + j, first + j < end, L)
            x = load_channels(x_ptr, token, there, x_l, d, D)
            raw = load_channels(delta_ptr, token, there, delta_l, d, D)
            B = load_coefficients(B_ptr, token, there, B_l, S, BLOCK_S, VEC)
            C = B if EVERY else load_coefficients(C_ptr, token, there, C_l, S, BLOCK_S, VEC)
            loaded = loaded + ((x, raw, B, C, token, there),)
        for j in tl.static_range(STEPS):
            x, raw, B, C, token, there = loaded[j]
            h = advance(h, x, step_size(raw, bias, there), B, A2)
            if not EVERY:
                y = tl.sum(h * C.to(tl.float32)[:, None], 0) + skip * x.to(tl.float32)
                at = (row * L + token) * D + d
                tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=(d < D) & there)
