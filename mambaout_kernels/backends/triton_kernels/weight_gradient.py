"""Backward, the third step: dweight and dbias, in two launches, so that their bits never change.

dweight[kh, kw] = sum over pixels of e[h, w] * c[h + kh - R, w + kw - R];  dbias = sum of e
"""

# mypy: ignore-errors
# ruff: noqa: RUF005  (its tuples are only added, and not chosen between)

import triton
import triton.language as tl

from .conv import columns_of
from .kernel import kernel


@triton.jit
def _load_row(x_ptr, h, H, stride_h, inside):
    mask = inside & (h >= 0) & (h < H)
    return tl.load(x_ptr + h.to(tl.int64) * stride_h, mask=mask, other=0.0)


@kernel
def weight_gradient_partials(
    e_ptr, u_ptr, partials_ptr, items, H, W, D, C, stride_n, stride_h, stride_w, columns,
    K: tl.constexpr, GROUP: tl.constexpr, VEC: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """partials (programs, K * K + 1, C) fp32: what each program's share of the pixels gives; last row: dbias.

    One program: BLOCK_D channels, GROUP rows of the filter, and the items p, p + programs, ...; an item is BLOCK_W of
    the N * W columns (see conv.py), from top to bottom. A thread keeps GROUP * K accumulators per channel and slides
    down: each row of c is loaded K times, shifted, each row of e once, into a window of GROUP rows.
    """
    R: tl.constexpr = K // 2
    CENTRE: tl.constexpr = R if GROUP == K else 0  # the entry of the window whose row is c's
    D, C = D // VEC * VEC, C // VEC * VEC
    stride_n, stride_h, stride_w = stride_n // VEC * VEC, stride_h // VEC * VEC, stride_w // VEC * VEC
    first_kh = (tl.program_id(0) % (K // GROUP)) * GROUP
    d = (tl.program_id(0) // (K // GROUP)) * BLOCK_D + tl.arange(0, BLOCK_D)
    u_ptr += 2 * D - C
    zero = tl.zeros([BLOCK_W, BLOCK_D], tl.float32)
    sums = (zero,) * (GROUP * K)
    e_sum = zero
    for item in range(tl.program_id(1), items, tl.num_programs(1)):
        n, w, there = columns_of(item * BLOCK_W, columns, W, BLOCK_W)
        inside = there[:, None] & (d < C)[None, :]
        e_column = e_ptr + ((n * H * W + w) * C)[:, None] + d[None, :]
        c_column = u_ptr + (n * stride_n + (w - R).to(tl.int64) * stride_w)[:, None] + d[None, :]
        newest = R - first_kh  # e's row that row 0 of c meets under the group's first row of taps
        window = ()  # window[j]: e's row under tap row first_kh + j; here as of c's row -1
        for j in tl.static_range(GROUP):
            window = window + (_load_row(e_column, newest - 1 - j, H, W * C, inside).to(tl.float32),)
        for first_h in range(0, H, GROUP):
            e_rows, c_rows = (), ()  # all loads of GROUP rows before their arithmetic
            for step in tl.static_range(GROUP):
                h = first_h + step
                e_rows = e_rows + (_load_row(e_column, newest + h, H, W * C, inside),)
                for kw in tl.static_range(K):
                    column = w + (kw - R)
                    here = inside & ((column >= 0) & (column < W))[:, None]
                    c_rows = c_rows + (_load_row(c_column + kw * stride_w, h, H, stride_h, here),)
            for step in tl.static_range(GROUP):
                window = (e_rows[step].to(tl.float32),) + window[: GROUP - 1]
                e_sum += window[CENTRE]
                updated = ()
                for j in tl.static_range(GROUP):
                    for kw in tl.static_range(K):
                        c = c_rows[step * K + kw].to(tl.float32)
                        updated = updated + (tl.fma(window[j], c, sums[j * K + kw]),)
                sums = updated
    partials_ptr += tl.program_id(1).to(tl.int64) * (K * K + 1) * C + d
    for j in tl.static_range(GROUP):
        for kw in tl.static_range(K):
            tap = (first_kh + j) * K + kw
            tl.store(partials_ptr + tap * C, tl.sum(sums[j * K + kw], axis=0), mask=d < C)
    if first_kh + CENTRE == R:
        tl.store(partials_ptr + K * K * C, tl.sum(e_sum, axis=0), mask=d < C)


@kernel
def weight_gradient_sum(
    partials_ptr, dweight_ptr, dbias_ptr, programs, C, taps,
    VEC: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dweight (C, taps) and dbias (C,): the partials in order. One program: one tap, BLOCK_D channels."""
    C = C // VEC * VEC
    tap = tl.program_id(0)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    for first in range(0, programs, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        offsets = p.to(tl.int64)[:, None] * ((taps + 1) * C) + tap * C + d[None, :]
        total += tl.load(partials_ptr + offsets, mask=(p < programs)[:, None] & (d < C)[None, :], other=0.0)
    value = tl.sum(total, axis=0)
    if tap < taps:
        tl.store(dweight_ptr + d * taps + tap, value.to(dweight_ptr.dtype.element_ty), mask=d < C)
    else:
        tl.store(dbias_ptr + d, value.to(dbias_ptr.dtype.element_ty), mask=d < C)
