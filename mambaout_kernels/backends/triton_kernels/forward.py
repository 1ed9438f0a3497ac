"""Forward: y = act(g) * concat(i, dwconv(c) + bias), one launch, 3 * hidden elements of DRAM traffic per pixel."""

# mypy: ignore-errors

import triton
import triton.language as tl

from .conv import add_to_rows, conv_rows, load_row_pairs, load_rows, tile_of
from .gates import gate


@triton.jit
def _store_gated(
    y_ptr, g, s, offsets, inside, rows_left, stride_h,
    ACT: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    for t in tl.static_range(BLOCK_H):
        y = gate(g[t].to(tl.float32), ACT, y_ptr.dtype.element_ty == tl.float32) * s[t].to(tl.float32)
        tl.store(y_ptr + (offsets + t * stride_h), y.to(y_ptr.dtype.element_ty), mask=inside & (t < rows_left))


@triton.jit
def _conv_branch(
    u_ptr, taps_ptr, y_ptr, first_d, first_h, first_w, H, W, D, C, stride_h, stride_w,
    K: tl.constexpr, ACT: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    pixel = tl.arange(0, BLOCK_W)
    d = first_d + tl.arange(0, BLOCK_D)  # of the C conv channels
    inside = (first_w + pixel < W)[:, None] & (d < C)[None, :]
    offsets = pixel[:, None] * stride_w + d[None, :]
    g = load_rows(u_ptr + (D - C), offsets, stride_h, inside, H - first_h, BLOCK_H)
    s = conv_rows(
        u_ptr + (2 * D - C), taps_ptr, first_h, first_w, d, H, W, C, stride_h, stride_w,
        K, False, BLOCK_H, BLOCK_W, BLOCK_D,
    )  # fmt: skip
    bias = tl.load(taps_ptr + K * K * C + (pixel[:, None] * 0 + d[None, :]), mask=inside, other=0.0)
    s = add_to_rows(s, bias, BLOCK_H)
    offsets = pixel[:, None] * D + d[None, :]
    _store_gated(y_ptr + (D - C), g, s, offsets, inside, H - first_h, W * D, ACT, BLOCK_H)


@triton.jit
def _identity_branch(
    u_ptr, y_ptr, first_d, first_h, first_w, H, W, D, C, stride_h, stride_w,
    ACT: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    pixel = tl.arange(0, BLOCK_W)
    d = first_d + tl.arange(0, BLOCK_D)  # of the D - C identity channels
    inside = (first_w + pixel < W)[:, None] & (d < D - C)[None, :]
    offsets = pixel[:, None] * stride_w + d[None, :]
    g, i = load_row_pairs(u_ptr, u_ptr + D, offsets, stride_h, inside, H - first_h, BLOCK_H)
    _store_gated(y_ptr, g, i, pixel[:, None] * D + d[None, :], inside, H - first_h, W * D, ACT, BLOCK_H)


@triton.jit
def gated_dwconv_fwd(
    u_ptr, taps_ptr, y_ptr, H, W, D, C, stride_n, stride_h, stride_w, blocks_d, blocks_w, blocks_h,
    K: tl.constexpr, ACT: tl.constexpr, VEC: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """y = act(g) * s;  s = dwconv(c) + bias for the last C channels, i for the others.

    One program: a tile of either branch, the conv branch's channel blocks first.
    u (N, H, W, 2D) with these strides; taps: see pack_filter; y (N, H, W, D) contiguous. VEC divides D, C and strides.
    """
    D, C = D // VEC * VEC, C // VEC * VEC  # tells the compiler what VEC divides
    stride_n, stride_h, stride_w = stride_n // VEC * VEC, stride_h // VEC * VEC, stride_w // VEC * VEC
    block_d, first_w, first_h, n = tile_of(tl.program_id(0), blocks_d, blocks_w, blocks_h, BLOCK_H, BLOCK_W)
    u_ptr += n * stride_n + first_h.to(tl.int64) * stride_h + first_w.to(tl.int64) * stride_w
    y_ptr += ((n * H + first_h) * W + first_w) * D
    conv_blocks = tl.cdiv(C, BLOCK_D)
    if block_d < conv_blocks:
        _conv_branch(
            u_ptr, taps_ptr, y_ptr, block_d * BLOCK_D, first_h, first_w, H, W, D, C, stride_h, stride_w,
            K, ACT, BLOCK_H, BLOCK_W, BLOCK_D,
        )  # fmt: skip
    else:
        _identity_branch(
            u_ptr, y_ptr, (block_d - conv_blocks) * BLOCK_D, first_h, first_w, H, W, D, C, stride_h, stride_w,
            ACT, BLOCK_H, BLOCK_W, BLOCK_D,
        )  # fmt: skip
