"""Partial sums to results, in an order that the shape alone decides; and rows that no step of a scan visits."""

# mypy: ignore-errors

import triton.language as tl

from ...backends.triton_kernels.kernel import kernel


@kernel
def sum_partials(
    partials_ptr, out_ptr, Q, R, VEC: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_R: tl.constexpr
):  # fmt: skip
    """out (P, R), the sum of partials (P, Q, R) over Q, rounded once. VEC divides R."""
    R = R // VEC * VEC
    blocks = tl.cdiv(R, BLOCK_R)
    p = (tl.program_id(0) // blocks).to(tl.int64)
    r = tl.program_id(0) % blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    total = tl.zeros([BLOCK_Q, BLOCK_R], tl.float32)
    for first in range(0, Q, BLOCK_Q):
        q = first + tl.arange(0, BLOCK_Q)
        mask = (q < Q)[:, None] & (r < R)[None, :]
        total += tl.load(partials_ptr + (p * Q + q)[:, None] * R + r[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + p * R + r, tl.sum(total, 0).to(out_ptr.dtype.element_ty), mask=r < R)


@kernel
def mark_tokens(order_ptr, visited_ptr, L, BLOCK: tl.constexpr):
    """visited (G, L), zeros: 1 where a step of the scan goes."""
    t = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(0).to(tl.int64) * L
    token = tl.load(order_ptr + row + t, mask=t < L, other=-1)
    tl.store(visited_ptr + row + token, tl.full([BLOCK], 1, tl.int8), mask=(token >= 0) & (token < L))


@kernel
def clear_unvisited(out_ptr, visited_ptr, G, L, W, rows, BLOCK_T: tl.constexpr, BLOCK_W: tl.constexpr):
    """Zeros in out (rows, G, L, W) where no step wrote. One program: BLOCK_T tokens of a scan; most find nothing."""
    g = tl.program_id(0).to(tl.int64)
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    missing = tl.load(visited_ptr + g * L + t, mask=t < L, other=1) == 0
    if tl.sum(missing.to(tl.int32), 0) > 0:
        for row in range(rows):
            for first in range(0, W, BLOCK_W):
                w = first + tl.arange(0, BLOCK_W)
                at = ((row * G + g) * L + t)[:, None] * W + w[None, :]
                zero = tl.zeros([BLOCK_T, BLOCK_W], out_ptr.dtype.element_ty)
                tl.store(out_ptr + at, zero, mask=missing[:, None] & (w < W)[None, :])
