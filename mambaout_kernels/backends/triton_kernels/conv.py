"""What one program owns, and the depthwise convolution of its tile.

A program owns BLOCK_H rows x BLOCK_W pixels x BLOCK_D channels of one image, in one of the two branches. A thread keeps
BLOCK_H accumulators in a column, for 16 bytes of neighbouring channels. For each kw, every input row of the tile and
its halo is loaded once, shifted, and goes to all the output rows that it is under: K * (BLOCK_H + K - 1) / BLOCK_H
loads per output, not K * K. All but the first of the K shifted reads hit L1.
"""

# mypy: ignore-errors
# ruff: noqa: RUF005, SIM108  (its tuples are only added, and not chosen between)

import triton
import triton.language as tl


@triton.jit
def pack_filter(weight_ptr, bias_ptr, taps_ptr, C, TAPS: tl.constexpr, BLOCK: tl.constexpr):
    """taps (TAPS + 1, C) fp32: weight (C, TAPS) turned, so that neighbouring channels lie together; last row: bias."""
    tap = tl.program_id(0)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if tap < TAPS:
        value = tl.load(weight_ptr + c * TAPS + tap, mask=c < C).to(tl.float32)
    else:
        value = tl.load(bias_ptr + c, mask=c < C).to(tl.float32)
    tl.store(taps_ptr + tap * C + c, value, mask=c < C)


@triton.jit
def tile_of(program, blocks_d, blocks_w, blocks_h, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr):
    """(channel block, first column, first row, image). Channels first: neighbours share rows, and mix both branches."""
    rest = program // blocks_d
    strip = rest // blocks_w
    first_w = (rest % blocks_w) * BLOCK_W
    first_h = (strip % blocks_h) * BLOCK_H
    return program % blocks_d, first_w, first_h, (strip // blocks_h).to(tl.int64)


@triton.jit
def load_rows(x_ptr, offsets, stride_h, inside, rows_left, BLOCK_H: tl.constexpr):
    """BLOCK_H tensors [BLOCK_W, BLOCK_D], all in flight together; zero where not inside and beyond rows_left."""
    rows = ()
    for t in tl.static_range(BLOCK_H):
        rows = rows + (tl.load(x_ptr + (offsets + t * stride_h), mask=inside & (t < rows_left), other=0.0),)
    return rows


@triton.jit
def load_row_pairs(a_ptr, b_ptr, offsets, stride_h, inside, rows_left, BLOCK_H: tl.constexpr):
    """load_rows of two tensors with the same strides, in turns: all are in flight before the first is used."""
    a, b = (), ()
    for t in tl.static_range(BLOCK_H):
        mask = inside & (t < rows_left)
        a = a + (tl.load(a_ptr + (offsets + t * stride_h), mask=mask, other=0.0),)
        b = b + (tl.load(b_ptr + (offsets + t * stride_h), mask=mask, other=0.0),)
    return a, b


@triton.jit
def conv_rows(
    x_ptr, taps_ptr, first_h, first_w, d, H, W, C, stride_h, stride_w,
    K: tl.constexpr, FLIP: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_H fp32 tensors [BLOCK_W, BLOCK_D]: the rows from first_h on of the convolution of one image.

    x_ptr: the image at row first_h, column first_w; taps: see pack_filter; FLIP turns the filter by 180 degrees.
    """
    R: tl.constexpr = K // 2
    rows = (tl.zeros([BLOCK_W, BLOCK_D], tl.float32),) * BLOCK_H
    pixel = tl.arange(0, BLOCK_W) - R
    channels = pixel[:, None] * 0 + d[None, :]  # [BLOCK_W, BLOCK_D]: every thread loads the taps of its own channels
    for kw in range(K):
        inside = ((first_w + pixel + kw >= 0) & (first_w + pixel + kw < W))[:, None] & (d < C)[None, :]
        offsets = (pixel + kw)[:, None] * stride_w + d[None, :]
        taps = ()
        for kh in tl.static_range(K):
            tap = (K * K - 1 - kh * K) - kw if FLIP else kh * K + kw
            taps = taps + (tl.load(taps_ptr + tap * C + channels, mask=channels < C, other=0.0),)
        for r in tl.static_range(BLOCK_H + K - 1):
            h = first_h + r - R
            mask = inside & (h >= 0) & (h < H)
            x = tl.load(x_ptr + (offsets + (r - R) * stride_h), mask=mask, other=0.0).to(tl.float32)
            updated = ()
            for t in tl.static_range(BLOCK_H):
                if r - t >= 0 and r - t < K:
                    updated = updated + (rows[t] + x * taps[r - t],)
                else:
                    updated = updated + (rows[t],)
            rows = updated
    return rows


@triton.jit
def add_to_rows(rows, addend, BLOCK_H: tl.constexpr):
    """Every row of the tuple plus addend [BLOCK_W, BLOCK_D]."""
    sums = ()
    for t in tl.static_range(BLOCK_H):
        sums = sums + (rows[t] + addend,)
    return sums
