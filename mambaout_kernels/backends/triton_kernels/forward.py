"""Forward: y = act(g) * concat(i, dwconv(c) + bias), one launch, 3 * hidden elements of DRAM traffic per pixel."""

# mypy: ignore-errors

import triton
import triton.language as tl

from .conv import PACK_BLOCK, columns_of, conv_rows, load_rows, tile_of
from .gates import gate
from .kernel import kernel


@triton.jit
def _store_gated(y_ptr, g, s, mask, ACT: tl.constexpr):
    """y = act(g) * s."""
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    y = gate(g.to(tl.float32), ACT, dtype == tl.float32) * s.to(tl.float32)
    tl.store(y_ptr, y.to(dtype), mask=mask)


@triton.jit
def _conv_branch(
    u_ptr, taps_ptr, y_ptr, first_d, first_h, w, there, H, W, D, C, padded_C, stride_h, stride_w,
    K: tl.constexpr, ACT: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    d = first_d + tl.arange(0, BLOCK_D)  # of the C conv channels
    inside = there[:, None] & (d < C)[None, :]
    s = conv_rows(
        u_ptr + (2 * D - C + first_d), taps_ptr, first_h, w, d, H, W, padded_C, stride_h, stride_w, inside,
        K, False, BLOCK_H, BLOCK_W, BLOCK_D,
    )  # fmt: skip
    # After the convolution: loaded before it, the gates would take registers while it runs.
    g = load_rows(u_ptr + (D - C + first_d), stride_h, inside, H - first_h, BLOCK_H)
    bias = tl.load(taps_ptr + K * K * padded_C + (w[:, None] * 0 + d[None, :]))
    y_ptr += D - C + first_d
    for t in tl.static_range(BLOCK_H):
        _store_gated(y_ptr + t * (W * D), g[t], s[t] + bias, inside & (t < H - first_h), ACT)


@triton.jit
def _identity_branch(
    u_ptr, y_ptr, first_d, rows_left, there, W, D, C, stride_h,
    ACT: tl.constexpr, STAGES: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    inside = there[:, None] & (first_d + tl.arange(0, BLOCK_D) < D - C)[None, :]
    u_ptr += first_d
    y_ptr += first_d
    if STAGES > 1:  # copies to shared memory: as many are in flight as there are stages, whatever registers are free
        for t in tl.range(0, BLOCK_H, num_stages=STAGES):
            mask = inside & (t < rows_left)
            g = tl.load(u_ptr + t * stride_h, mask=mask, other=0.0)
            i = tl.load(u_ptr + (D + t * stride_h), mask=mask, other=0.0)
            _store_gated(y_ptr + t * (W * D), g, i, mask, ACT)
    else:
        i = load_rows(u_ptr + D, stride_h, inside, rows_left, BLOCK_H)
        g = load_rows(u_ptr, stride_h, inside, rows_left, BLOCK_H)
        for t in tl.static_range(BLOCK_H):
            _store_gated(y_ptr + t * (W * D), g[t], i[t], inside & (t < rows_left), ACT)


@kernel
def gated_dwconv_fwd(
    u_ptr, taps_ptr, y_ptr, H, W, D, C, pack_blocks, stride_n, stride_h, stride_w, columns, blocks_d, blocks_w,
    K: tl.constexpr, ACT: tl.constexpr, VEC: tl.constexpr, STAGES: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """y = act(g) * s;  s = dwconv(c) + bias for the last C channels, i for the others.

    One program: a tile of either branch, the conv branch's channel blocks first; columns = N * W.
    u (N, H, W, 2D) with these strides; taps: see pack_filter; y (N, H, W, D) contiguous. VEC divides D, C and strides.
    """
    D, C = D // VEC * VEC, C // VEC * VEC  # tells the compiler what VEC divides
    stride_n, stride_h, stride_w = stride_n // VEC * VEC, stride_h // VEC * VEC, stride_w // VEC * VEC
    block_d, first_column, first_h = tile_of(tl.program_id(0), blocks_d, blocks_w, BLOCK_H, BLOCK_W)
    n, w, there = columns_of(first_column, columns, W, BLOCK_W)
    d = tl.arange(0, BLOCK_D)
    row_ptr = u_ptr + first_h.to(tl.int64) * stride_h  # 64 bits here, so that 32 do for what a tile spans
    u_ptr = row_ptr + (n * stride_n + w.to(tl.int64) * stride_w)[:, None] + d[None, :]
    y_ptr += (((n * H + first_h) * W + w) * D)[:, None] + d[None, :]
    conv_blocks = tl.cdiv(C, BLOCK_D)
    if block_d < conv_blocks:
        _conv_branch(
            u_ptr, taps_ptr, y_ptr, block_d * BLOCK_D, first_h, w, there, H, W, D, C, pack_blocks * PACK_BLOCK,
            stride_h, stride_w, K, ACT, BLOCK_H, BLOCK_W, BLOCK_D,
        )  # fmt: skip
    else:
        _identity_branch(
            u_ptr, y_ptr, (block_d - conv_blocks) * BLOCK_D, H - first_h, there, W, D, C, stride_h,
            ACT, STAGES, BLOCK_H, BLOCK_D,
        )  # fmt: skip
