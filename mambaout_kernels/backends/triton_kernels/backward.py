"""Backward, the first and second of three steps: dg, di and e; then dc. The convolution is recomputed.

e = dy * act(g) of the conv channels goes through memory, rounded to u's dtype as eager PyTorch rounds it: its halo is
needed K times by neighbours. weight_gradient.py reads it too. DRAM traffic per pixel, in elements: 5 * hidden (u, dy
in; dg, di, e out) + 3 * C (e, c in; dc out) + C (e again).
"""

# mypy: ignore-errors

import triton
import triton.language as tl

from .conv import add_to_rows, conv_rows, load_row_pairs, load_rows, tile_of
from .gates import gate_and_slope


@triton.jit
def _store_gradients(
    dg_ptr, ds_ptr, dy, g, s, dg_offsets, ds_offsets, inside, rows_left, dg_stride_h, ds_stride_h,
    ACT: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """dg = dy * s * act'(g), and ds = dy * act(g), which is di or e."""
    dtype: tl.constexpr = dg_ptr.dtype.element_ty
    for t in tl.static_range(BLOCK_H):
        value, slope = gate_and_slope(g[t].to(tl.float32), ACT, dtype == tl.float32)
        dy_row = dy[t].to(tl.float32)
        mask = inside & (t < rows_left)
        tl.store(dg_ptr + (dg_offsets + t * dg_stride_h), (dy_row * s[t].to(tl.float32) * slope).to(dtype), mask=mask)
        tl.store(ds_ptr + (ds_offsets + t * ds_stride_h), (dy_row * value).to(dtype), mask=mask)


@triton.jit
def _conv_branch(
    dy_ptr, u_ptr, taps_ptr, du_ptr, e_ptr, first_d, first_h, first_w, H, W, D, C,
    dy_stride_h, dy_stride_w, stride_h, stride_w,
    K: tl.constexpr, ACT: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    pixel = tl.arange(0, BLOCK_W)
    d = first_d + tl.arange(0, BLOCK_D)  # of the C conv channels
    inside = (first_w + pixel < W)[:, None] & (d < C)[None, :]
    s = conv_rows(
        u_ptr + (2 * D - C), taps_ptr, first_h, first_w, d, H, W, C, stride_h, stride_w,
        K, False, BLOCK_H, BLOCK_W, BLOCK_D,
    )  # fmt: skip
    rows_left = H - first_h
    g = load_rows(u_ptr + (D - C), pixel[:, None] * stride_w + d[None, :], stride_h, inside, rows_left, BLOCK_H)
    dy_offsets = pixel[:, None] * dy_stride_w + d[None, :]
    dy = load_rows(dy_ptr + (D - C), dy_offsets, dy_stride_h, inside, rows_left, BLOCK_H)
    bias = tl.load(taps_ptr + K * K * C + (pixel[:, None] * 0 + d[None, :]), mask=inside, other=0.0)
    s = add_to_rows(s, bias, BLOCK_H)
    dg_offsets = pixel[:, None] * (2 * D) + d[None, :]
    e_offsets = pixel[:, None] * C + d[None, :]
    _store_gradients(
        du_ptr + (D - C), e_ptr, dy, g, s, dg_offsets, e_offsets, inside, rows_left, W * 2 * D, W * C, ACT, BLOCK_H
    )


@triton.jit
def _identity_branch(
    dy_ptr, u_ptr, du_ptr, first_d, first_h, first_w, H, W, D, C, dy_stride_h, dy_stride_w, stride_h, stride_w,
    ACT: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    pixel = tl.arange(0, BLOCK_W)
    d = first_d + tl.arange(0, BLOCK_D)  # of the D - C identity channels
    inside = (first_w + pixel < W)[:, None] & (d < D - C)[None, :]
    rows_left = H - first_h
    offsets = pixel[:, None] * stride_w + d[None, :]
    g, i = load_row_pairs(u_ptr, u_ptr + D, offsets, stride_h, inside, rows_left, BLOCK_H)
    dy_offsets = pixel[:, None] * dy_stride_w + d[None, :]
    dy = load_rows(dy_ptr, dy_offsets, dy_stride_h, inside, rows_left, BLOCK_H)
    du_offsets = pixel[:, None] * (2 * D) + d[None, :]
    _store_gradients(
        du_ptr, du_ptr + D, dy, g, i, du_offsets, du_offsets, inside, rows_left, W * 2 * D, W * 2 * D, ACT, BLOCK_H
    )


@triton.jit
def gate_backward(
    dy_ptr, u_ptr, taps_ptr, du_ptr, e_ptr, H, W, D, C,
    dy_stride_n, dy_stride_h, dy_stride_w, stride_n, stride_h, stride_w, blocks_d, blocks_w, blocks_h,
    K: tl.constexpr, ACT: tl.constexpr, VEC: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dg and di into du (N, H, W, 2D) contiguous, e (N, H, W, C) contiguous. Programs as in gated_dwconv_fwd.

    dy (N, H, W, D) and u (N, H, W, 2D) with these strides. VEC divides D, C and all strides.
    """
    D, C = D // VEC * VEC, C // VEC * VEC  # tells the compiler what VEC divides
    stride_n, stride_h, stride_w = stride_n // VEC * VEC, stride_h // VEC * VEC, stride_w // VEC * VEC
    dy_stride_n, dy_stride_h = dy_stride_n // VEC * VEC, dy_stride_h // VEC * VEC
    dy_stride_w = dy_stride_w // VEC * VEC
    block_d, first_w, first_h, n = tile_of(tl.program_id(0), blocks_d, blocks_w, blocks_h, BLOCK_H, BLOCK_W)
    u_ptr += n * stride_n + first_h.to(tl.int64) * stride_h + first_w.to(tl.int64) * stride_w
    dy_ptr += n * dy_stride_n + first_h.to(tl.int64) * dy_stride_h + first_w.to(tl.int64) * dy_stride_w
    first_pixel = (n * H + first_h) * W + first_w
    du_ptr += first_pixel * (2 * D)
    conv_blocks = tl.cdiv(C, BLOCK_D)
    if block_d < conv_blocks:
        _conv_branch(
            dy_ptr, u_ptr, taps_ptr, du_ptr, e_ptr + first_pixel * C, block_d * BLOCK_D, first_h, first_w, H, W, D, C,
            dy_stride_h, dy_stride_w, stride_h, stride_w, K, ACT, BLOCK_H, BLOCK_W, BLOCK_D,
        )  # fmt: skip
    else:
        _identity_branch(
            dy_ptr, u_ptr, du_ptr, (block_d - conv_blocks) * BLOCK_D, first_h, first_w, H, W, D, C,
            dy_stride_h, dy_stride_w, stride_h, stride_w, ACT, BLOCK_H, BLOCK_W, BLOCK_D,
        )  # fmt: skip


@triton.jit
def input_gradient(
    e_ptr, taps_ptr, du_ptr, H, W, D, C, blocks_d, blocks_w, blocks_h,
    K: tl.constexpr, VEC: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dc = e convolved with the filter turned by 180 degrees, into the last C channels of du. e, du contiguous."""
    D, C = D // VEC * VEC, C // VEC * VEC
    block_d, first_w, first_h, n = tile_of(tl.program_id(0), blocks_d, blocks_w, blocks_h, BLOCK_H, BLOCK_W)
    first_pixel = (n * H + first_h) * W + first_w
    pixel = tl.arange(0, BLOCK_W)
    d = block_d * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (first_w + pixel < W)[:, None] & (d < C)[None, :]
    dc = conv_rows(
        e_ptr + first_pixel * C, taps_ptr, first_h, first_w, d, H, W, C, W * C, C,
        K, True, BLOCK_H, BLOCK_W, BLOCK_D,
    )  # fmt: skip
    dc_ptr = du_ptr + first_pixel * (2 * D) + (2 * D - C)
    offsets = pixel[:, None] * (2 * D) + d[None, :]
    for t in tl.static_range(BLOCK_H):
        mask = inside & (t < H - first_h)
        tl.store(dc_ptr + (offsets + t * (W * 2 * D)), dc[t].to(du_ptr.dtype.element_ty), mask=mask)
