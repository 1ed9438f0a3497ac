"""What one program owns, and the depthwise convolution of its tile.

A program owns BLOCK_H rows x BLOCK_W columns x BLOCK_D channels in one of the two branches. The columns of all images
are counted through, n * W + w, so that maps narrower than a block leave no lane idle. A thread keeps BLOCK_H
accumulators in a column, for 16 bytes of neighbouring channels. For each kw, every input row of the tile and its halo
is loaded once, shifted, and goes to all the output rows that it is under: K * (BLOCK_H + K - 1) / BLOCK_H loads per
output, not K * K. All but the first of the K shifted reads hit L1.
"""

# mypy: ignore-errors
# ruff: noqa: RUF005  (its tuples are only added)

import triton
import triton.language as tl

PACK_BLOCK = tl.constexpr(128)  # channels; rows of the packed filter are whole blocks


@triton.jit(do_not_specialize=["weight_ptr", "bias_ptr", "C", "taps", "pack_blocks"])
def pack_filter(weight_ptr, bias_ptr, taps_ptr, C, taps, pack_blocks):
    """(taps + 1, pack_blocks * PACK_BLOCK) fp32: weight (C, taps) turned, so that neighbouring channels lie together.

    The last row is the bias. Zeros beyond C: rows are aligned, and are read without masks.
    """
    tap = tl.program_id(0)
    c = tl.program_id(1) * PACK_BLOCK + tl.arange(0, PACK_BLOCK)
    if tap < taps:
        value = tl.load(weight_ptr + c * taps + tap, mask=c < C, other=0.0).to(tl.float32)
    else:
        value = tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    tl.store(taps_ptr + tap * (pack_blocks * PACK_BLOCK) + c, value)


@triton.jit
def tile_of(program, blocks_d, blocks_w, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr):
    """(channel block, first column, first row). Channels first: neighbours share rows, and mix both branches."""
    rest = program // blocks_d
    return program % blocks_d, (rest % blocks_w) * BLOCK_W, (rest // blocks_w) * BLOCK_H


@triton.jit
def columns_of(first_column, columns, W, BLOCK_W: tl.constexpr):
    """(n, w, whether there is such a column), each [BLOCK_W]."""
    column = first_column + tl.arange(0, BLOCK_W)
    return (column // W).to(tl.int64), column % W, column < columns


@triton.jit
def load_rows(x_ptr, stride_h, inside, rows_left, BLOCK_H: tl.constexpr):
    """BLOCK_H tensors [BLOCK_W, BLOCK_D] from pointers of that shape; zero where not inside and beyond rows_left."""
    rows = ()
    for t in tl.static_range(BLOCK_H):
        rows = rows + (tl.load(x_ptr + t * stride_h, mask=inside & (t < rows_left), other=0.0),)
    return rows


@triton.jit
def conv_rows(
    x_ptr, taps_ptr, first_h, w, d, H, W, padded_C, stride_h, stride_w, inside,
    K: tl.constexpr, FLIP: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_H fp32 tensors [BLOCK_W, BLOCK_D]: the rows from first_h on of the convolution.

    x_ptr [BLOCK_W, BLOCK_D]: to row first_h of each column w [BLOCK_W] and channel d [BLOCK_D]; taps: see pack_filter;
    FLIP turns the filter by 180 degrees.
    """
    R: tl.constexpr = K // 2
    rows = (tl.zeros([BLOCK_W, BLOCK_D], tl.float32),) * BLOCK_H
    taps_ptr += w[:, None] * 0 + d[None, :]  # [BLOCK_W, BLOCK_D]: every thread loads the taps of its own channels
    for kw in range(K):
        shift = kw - R
        within = inside & ((w + shift >= 0) & (w + shift < W))[:, None]
        taps = ()
        for kh in tl.static_range(K):
            tap = (K * K - 1 - kh * K) - kw if FLIP else kh * K + kw
            taps = taps + (tl.load(taps_ptr + tap * padded_C),)
        for r in tl.static_range(BLOCK_H + K - 1):
            h = first_h + r - R
            mask = within & (h >= 0) & (h < H)
            x = tl.load(x_ptr + ((r - R) * stride_h + shift * stride_w), mask=mask, other=0.0).to(tl.float32)
            updated = ()
            for t in tl.static_range(BLOCK_H):
                if r - t >= 0 and r - t < K:
                    updated = updated + (tl.fma(x, taps[r - t], rows[t]),)
                else:
                    updated = updated + (rows[t],)
            rows = updated
    return rows
