"""Gradients of the selective scan, steps in reverse. r_t is what reaches h_t from the steps after t:

    g_t = C_t dy_t + r_t,   r_{t-1} = exp(delta_t A) g_t          (dloss / dh_t is g_t)
    dx = delta sum_s(g B) + skip dy;   dB = sum_d(g delta x);   dC = sum_d(dy h)
    ddelta = x sum_s(g B) + sum_s(A e),   dA = sum_t(delta e),   e_t = g_t exp(delta_t A) h_{t-1}

States are computed again: from those that scan_fwd left, one per segment of EVERY steps, forward through the segment,
one per STEPS steps put into `scratch` (programs, EVERY / STEPS, BLOCK_S, BLOCK_D); then STEPS at a time in registers,
in reverse. Scratch is padded, so that Triton sees 16-byte accesses there and gives a lane four channels: with one,
sums over channels are dearer, and a step of 16 states takes half as many instructions again.
"""

# mypy: ignore-errors
# ruff: noqa: RUF005  (its tuples are only added, and not chosen between)

import triton
import triton.language as tl

from ...backends.triton_kernels.kernel import kernel
from .steps import (
    LN2,
    advance,
    carried,
    load_A2,
    load_channels,
    load_coefficients,
    load_state,
    load_token,
    of_scan,
    owned,
    softplus,
    step_size,
    store_state,
)


@triton.jit
def _store_coefficients(ptr, token, there, sums, S: tl.constexpr, BLOCK_S: tl.constexpr):
    s = tl.arange(0, BLOCK_S)
    tl.store(ptr + token * S + s, sums, mask=(s < S) & there)


@kernel
def scan_bwd(
    dy_ptr, x_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, skip_ptr, bias_ptr, order_ptr, states_ptr, ends_ptr, sums_ptr,
    scratch_ptr, dx_ptr, ddelta_ptr, dB_ptr, dC_ptr, partials_ptr, G, L, D, chunks, length,
    dy_n, dy_g, dy_l, x_n, x_g, x_l, delta_n, delta_g, delta_l, B_n, B_g, B_l, C_n, C_g, C_l,
    S: tl.constexpr, VEC: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, STEPS: tl.constexpr,
    EVERY: tl.constexpr,
):  # fmt: skip
    """dx, ddelta (N, G, L, D); of this block of channels dB, dC (N, blocks, G, L, S); of this n and chunk partials
    (G, N * chunks, S + 2, D): dA, dskip, dbias.

    One program: as in forward.py. length is a multiple of EVERY, and that of STEPS.
    """
    row, n, g, k, block, d = owned(G, D, chunks, BLOCK_D)
    inside = d < D
    A2 = load_A2(A_ptr, g, d, D, S, BLOCK_S)
    bias = tl.load(bias_ptr + g * D + d, mask=inside, other=0.0)
    skip = tl.load(skip_ptr + g * D + d, mask=inside, other=0.0)
    dy_ptr += of_scan(n, g, dy_n, dy_g, 1)
    x_ptr += of_scan(n, g, x_n, x_g, 1)
    delta_ptr += of_scan(n, g, delta_n, delta_g, 1)
    B_ptr += of_scan(n, g, B_n, B_g, VEC)
    C_ptr += of_scan(n, g, C_n, C_g, VEC)
    order_ptr += g * L
    of_block = ((n * tl.cdiv(D, BLOCK_D) + block) * G + g) * L * S
    dB_ptr += of_block
    dC_ptr += of_block
    kept = tl.program_id(0).to(tl.int64) * (EVERY // STEPS)
    column = d - block * BLOCK_D
    segments = tl.cdiv(L, EVERY)
    begin = k * length
    end = tl.minimum(begin + length, L)

    r = carried(ends_ptr, sums_ptr, A2, row, chunks - 1, chunks - 1 - k, -1, chunks, d, D, S, BLOCK_S)
    dA = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    dskip = tl.zeros([BLOCK_D], tl.float32)
    dbias = tl.zeros([BLOCK_D], tl.float32)
    for back in range(tl.cdiv(end - begin, EVERY)):
        segment = begin // EVERY + tl.cdiv(end - begin, EVERY) - 1 - back
        start = segment * EVERY
        h = load_state(states_ptr, row * segments + segment, d, D, S, BLOCK_S)
        tl.debug_barrier()  # the last segment has been read from scratch
        for i in range(EVERY // STEPS - 1):
            store_state(scratch_ptr, kept + i, h, column, BLOCK_D, BLOCK_S, BLOCK_S)
            for j in tl.static_range(STEPS):
                t = start + i * STEPS + j
                token, there = load_token(order_ptr, t, t < end, L)
                x = load_channels(x_ptr, token, there, x_l, d, D)
                raw = load_channels(delta_ptr, token, there, delta_l, d, D)
                B = load_coefficients(B_ptr, token, there, B_l, S, BLOCK_S, VEC)
                h = advance(h, x, step_size(raw, bias, there), B, A2)
        tl.debug_barrier()  # and this one is written
        for i in range(EVERY // STEPS - 1, -1, -1):
            if i < EVERY // STEPS - 1:
                h = load_state(scratch_ptr, kept + i, column, BLOCK_D, BLOCK_S, BLOCK_S)
            states = (h,)  # before each of STEPS steps, and after the last
            loaded = ()
            for j in tl.static_range(STEPS):
                t = start + i * STEPS + j
                token, there = load_token(order_ptr, t, t < end, L)
                x = load_channels(x_ptr, token, there, x_l, d, D)
                raw = load_channels(delta_ptr, token, there, delta_l, d, D)
                dy = load_channels(dy_ptr, token, there, dy_l, d, D)
                B = load_coefficients(B_ptr, token, there, B_l, S, BLOCK_S, VEC)
                states = states + (advance(states[j], x, step_size(raw, bias, there), B, A2),)
                loaded = loaded + ((x, raw, dy, B, token, there),)
            for j in tl.static_range(STEPS - 1, -1, -1):
                x, raw, dy, B, token, there = loaded[j]
                C = load_coefficients(C_ptr, token, there, C_l, S, BLOCK_S, VEC)
                x, dy = x.to(tl.float32), dy.to(tl.float32)
                z = raw.to(tl.float32) + bias
                delta, slope = softplus(z)
                delta = tl.where(there, delta, 0.0)
                _store_coefficients(dC_ptr, token, there, tl.sum(states[j + 1] * dy[None, :], 1), S, BLOCK_S)
                gradient = r + C.to(tl.float32)[:, None] * dy[None, :]
                _store_coefficients(dB_ptr, token, there, tl.sum(gradient * (delta * x)[None, :], 1), S, BLOCK_S)
                r = tl.exp2(A2 * delta[None, :]) * gradient
                e = r * states[j]
                dA += e * delta[None, :]
                along_B = tl.sum(gradient * B.to(tl.float32)[:, None], 0)
                draw = (along_B * x + tl.sum(A2 * e, 0) * LN2) * slope
                dbias += tl.where(there, draw, 0.0)
                dskip += dy * x
                dx = along_B * delta + skip * dy
                at = (row * L + token) * D + d
                tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside & there)
                tl.store(ddelta_ptr + at, draw.to(ddelta_ptr.dtype.element_ty), mask=inside & there)
    share = (g * (tl.num_programs(0) // tl.cdiv(D, BLOCK_D) // G) + n * chunks + k) * (S + 2)
    s = tl.arange(0, BLOCK_S)
    tl.store(partials_ptr + (share + s)[:, None] * D + d[None, :], dA, mask=(s < S)[:, None] & inside[None, :])
    tl.store(partials_ptr + (share + S) * D + d, dskip, mask=inside)
    tl.store(partials_ptr + (share + S + 1) * D + d, dbias, mask=inside)
