"""Backward, the first and second of three steps: dg, di and e; then dc. The convolution is recomputed.

e = dy * act(g) of the conv channels goes through memory, rounded to u's dtype as eager PyTorch rounds it: its halo is
needed K times by neighbours. weight_gradient.py reads it too. DRAM traffic per pixel, in elements: 5 * hidden (u, dy
in; dg, di, e out) + 3 * C (e, c in; dc out) + C (e again).
"""

# mypy: ignore-errors

import triton
import triton.language as tl

from .conv import PACK_BLOCK, columns_of, conv_rows, load_rows, tile_of
from .gates import gate_and_slope
from .kernel import kernel


@triton.jit
def _store_gradients(dg_ptr, ds_ptr, dy, g, s, mask, ACT: tl.constexpr):
    """dg = dy * s * act'(g), and ds = dy * act(g), which is di or e."""
    dtype: tl.constexpr = dg_ptr.dtype.element_ty
    value, slope = gate_and_slope(g.to(tl.float32), ACT, dtype == tl.float32)
    dy = dy.to(tl.float32)
    tl.store(dg_ptr, (dy * s.to(tl.float32) * slope).to(dtype), mask=mask)
    tl.store(ds_ptr, (dy * value).to(dtype), mask=mask)


@triton.jit
def _conv_branch(
    dy_ptr, u_ptr, taps_ptr, du_ptr, e_ptr, first_d, first_h, w, there, H, W, D, C, padded_C,
    dy_stride_h, stride_h, stride_w,
    K: tl.constexpr, ACT: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    d = first_d + tl.arange(0, BLOCK_D)  # of the C conv channels
    inside = there[:, None] & (d < C)[None, :]
    s = conv_rows(
        u_ptr + (2 * D - C + first_d), taps_ptr, first_h, w, d, H, W, padded_C, stride_h, stride_w, inside,
        K, False, BLOCK_H, BLOCK_W, BLOCK_D,
    )  # fmt: skip
    g = load_rows(u_ptr + (D - C + first_d), stride_h, inside, H - first_h, BLOCK_H)
    dy = load_rows(dy_ptr + (D - C + first_d), dy_stride_h, inside, H - first_h, BLOCK_H)
    bias = tl.load(taps_ptr + K * K * padded_C + (w[:, None] * 0 + d[None, :]))
    du_ptr += D - C + first_d
    e_ptr += first_d
    for t in tl.static_range(BLOCK_H):
        mask = inside & (t < H - first_h)
        _store_gradients(du_ptr + t * (W * 2 * D), e_ptr + t * (W * C), dy[t], g[t], s[t] + bias, mask, ACT)


@triton.jit
def _identity_branch(
    dy_ptr, u_ptr, du_ptr, first_d, rows_left, there, W, D, C, dy_stride_h, stride_h,
    ACT: tl.constexpr, STAGES: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    inside = there[:, None] & (first_d + tl.arange(0, BLOCK_D) < D - C)[None, :]
    u_ptr += first_d
    dy_ptr += first_d
    du_ptr += first_d
    if STAGES > 1:  # as in the forward
        for t in tl.range(0, BLOCK_H, num_stages=STAGES):
            mask = inside & (t < rows_left)
            g = tl.load(u_ptr + t * stride_h, mask=mask, other=0.0)
            i = tl.load(u_ptr + (D + t * stride_h), mask=mask, other=0.0)
            dy = tl.load(dy_ptr + t * dy_stride_h, mask=mask, other=0.0)
            _store_gradients(du_ptr + t * (W * 2 * D), du_ptr + (D + t * (W * 2 * D)), dy, g, i, mask, ACT)
    else:
        i = load_rows(u_ptr + D, stride_h, inside, rows_left, BLOCK_H)
        dy = load_rows(dy_ptr, dy_stride_h, inside, rows_left, BLOCK_H)
        g = load_rows(u_ptr, stride_h, inside, rows_left, BLOCK_H)
        for t in tl.static_range(BLOCK_H):
            mask = inside & (t < rows_left)
            _store_gradients(du_ptr + t * (W * 2 * D), du_ptr + (D + t * (W * 2 * D)), dy[t], g[t], i[t], mask, ACT)


@kernel
def gate_backward(
    dy_ptr, u_ptr, taps_ptr, du_ptr, e_ptr, H, W, D, C, pack_blocks,
    dy_stride_n, dy_stride_h, dy_stride_w, stride_n, stride_h, stride_w, columns, blocks_d, blocks_w,
    K: tl.constexpr, ACT: tl.constexpr, VEC: tl.constexpr, STAGES: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dg and di into du (N, H, W, 2D) contiguous, e (N, H, W, C) contiguous. Programs as in gated_dwconv_fwd.

    dy (N, H, W, D) and u (N, H, W, 2D) with these strides. VEC divides D, C and all strides.
    """
    D, C = D // VEC * VEC, C // VEC * VEC  # tells the compiler what VEC divides
    stride_n, stride_h, stride_w = stride_n // VEC * VEC, stride_h // VEC * VEC, stride_w // VEC * VEC
    dy_stride_n, dy_stride_h = dy_stride_n // VEC * VEC, dy_stride_h // VEC * VEC
    dy_stride_w = dy_stride_w // VEC * VEC
    block_d, first_column, first_h = tile_of(tl.program_id(0), blocks_d, blocks_w, BLOCK_H, BLOCK_W)
    n, w, there = columns_of(first_column, columns, W, BLOCK_W)
    d = tl.arange(0, BLOCK_D)
    row_ptr = u_ptr + first_h.to(tl.int64) * stride_h
    u_ptr = row_ptr + (n * stride_n + w.to(tl.int64) * stride_w)[:, None] + d[None, :]
    dy_row_ptr = dy_ptr + first_h.to(tl.int64) * dy_stride_h
    dy_ptr = dy_row_ptr + (n * dy_stride_n + w.to(tl.int64) * dy_stride_w)[:, None] + d[None, :]
    pixel = (n * H + first_h) * W + w
    du_ptr += (pixel * (2 * D))[:, None] + d[None, :]
    conv_blocks = tl.cdiv(C, BLOCK_D)
    if block_d < conv_blocks:
        _conv_branch(
            dy_ptr, u_ptr, taps_ptr, du_ptr, e_ptr + ((pixel * C)[:, None] + d[None, :]), block_d * BLOCK_D,
            first_h, w, there, H, W, D, C, pack_blocks * PACK_BLOCK, dy_stride_h, stride_h, stride_w,
            K, ACT, BLOCK_H, BLOCK_W, BLOCK_D,
        )  # fmt: skip
    else:
        _identity_branch(
            dy_ptr, u_ptr, du_ptr, (block_d - conv_blocks) * BLOCK_D, H - first_h, there, W, D, C,
            dy_stride_h, stride_h, ACT, STAGES, BLOCK_H, BLOCK_D,
        )  # fmt: skip


@kernel
def input_gradient(
    e_ptr, taps_ptr, du_ptr, H, W, D, C, pack_blocks, columns, blocks_d, blocks_w,
    K: tl.constexpr, VEC: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dc = e convolved with the filter turned by 180 degrees, into the last C channels of du. e, du contiguous."""
    D, C = D // VEC * VEC, C // VEC * VEC
    block_d, first_column, first_h = tile_of(tl.program_id(0), blocks_d, blocks_w, BLOCK_H, BLOCK_W)
    n, w, there = columns_of(first_column, columns, W, BLOCK_W)
    pixel = (n * H + first_h) * W + w
    d = block_d * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = there[:, None] & (d < C)[None, :]
    dc = conv_rows(
        e_ptr + ((pixel * C)[:, None] + d[None, :]), taps_ptr, first_h, w, d, H, W, pack_blocks * PACK_BLOCK,
        W * C, C, inside, K, True, BLOCK_H, BLOCK_W, BLOCK_D,
    )  # fmt: skip
    dc_ptr = du_ptr + (2 * D - C) + ((pixel * (2 * D))[:, None] + d[None, :])
    for t in tl.static_range(BLOCK_H):
        mask = inside & (t < H - first_h)
        tl.store(dc_ptr + t * (W * 2 * D), dc[t].to(du_ptr.dtype.element_ty), mask=mask)
