"""The Gated CNN block in inference, in three kernels or in parts of it: u is never written to memory.

    narrow:  c = norm_linear_fwd(x);  s = depthwise_fwd(c);  out = gated_mlp_fwd(x, s)
    wide:    a = layer_norm_fwd(x);  y = gated_linear_fwd(a, s), between cuBLAS's products for c and with fc2

and what stands before the stages, conv3x3s2_norm_fwd.

PRECISION "tf32": tensor cores cut float32 to TF32, so what is made here is rounded to it before; else every product
were too small by one part in two thousand. Weights are rounded by `round_tf32`.

Weights are read as nn.Linear keeps them, (out_features, in_features): fc1's rows are [g | i | c], as u's channels.
A width that is no power of two is the sum of two, DIM = K0 + K1 (K1 = 0: one), so that 96 is not computed as 128.
"""

# mypy: ignore-errors

import triton
import triton.language as tl

from .conv import PACK_BLOCK, columns_of, conv_rows, tile_of
from .gates import gate
from .kernel import kernel


@triton.jit
def _rows_of(block, P, BLOCK_M: tl.constexpr):
    """(first row of the block in 64 bits, rows from there on in 32, whether they are among the P)."""
    first = block.to(tl.int64) * BLOCK_M
    rows = tl.arange(0, BLOCK_M)
    return first, rows, rows < P - first


@triton.jit
def _load_columns(
    x_ptr, rows, present, first, DIM: tl.constexpr, K: tl.constexpr, WHOLE: tl.constexpr, EVICT: tl.constexpr
):
    """[BLOCK_M, K]: columns first .. first + K of x (rows, DIM), zero where there are none; WHOLE: there are."""
    k = first + tl.arange(0, K)
    mask = present[:, None]
    if not WHOLE:
        mask = mask & (k < DIM)[None, :]
    return tl.load(x_ptr + rows[:, None] * DIM + k[None, :], mask=mask, other=0.0, eviction_policy=EVICT)


@triton.jit
def _store_columns(y_ptr, value, rows, present, first, DIM: tl.constexpr, K: tl.constexpr, WHOLE: tl.constexpr):
    """Columns first .. first + K of y (rows, DIM)."""
    k = first + tl.arange(0, K)
    mask = present[:, None]
    if not WHOLE:
        mask = mask & (k < DIM)[None, :]
    tl.store(y_ptr + rows[:, None] * DIM + k[None, :], value.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _load_vector(ptr, index, present):
    return tl.load(ptr + index, mask=present, other=0.0).to(tl.float32)


@triton.jit
def _affine(n, gamma_ptr, beta_ptr, first, DIM: tl.constexpr, K: tl.constexpr):
    k = first + tl.arange(0, K)
    gamma, beta = _load_vector(gamma_ptr, k, k < DIM), _load_vector(beta_ptr, k, k < DIM)
    return n * gamma[None, :] + beta[None, :]


@triton.jit
def _standardised(x0, x1, eps, DIM: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr):
    """(x - mean) / deviation in its two parts, and 1 / deviation, of rows in fp32 that are zero beyond DIM."""
    total = tl.sum(x0, 1)
    if K1 > 0:
        total += tl.sum(x1, 1)
    mean = total / DIM
    x0 -= mean[:, None]
    if K0 > DIM:
        x0 = tl.where((tl.arange(0, K0) < DIM)[None, :], x0, 0.0)
    square = tl.sum(x0 * x0, 1)
    if K1 > 0:
        x1 -= mean[:, None]
        if K0 + K1 > DIM:
            x1 = tl.where((K0 + tl.arange(0, K1) < DIM)[None, :], x1, 0.0)
        square += tl.sum(x1 * x1, 1)
    rstd = tl.rsqrt(square / DIM + eps)
    x0 *= rstd[:, None]
    if K1 > 0:
        x1 *= rstd[:, None]
    return x0, x1, rstd


@triton.jit
def _rounded(x, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """x in `dtype`, a factor of products of that precision."""
    x = x.to(dtype)
    if PRECISION == "tf32":  # but not NaN, nor what would become infinite
        bits = x.to(tl.int32, bitcast=True)
        nearest = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        x = tl.where(tl.abs(x) < 3.4e38, nearest, x)
    return x


@triton.jit
def _layer_norm(
    x_ptr, x_bias_ptr, gamma_ptr, beta_ptr, rows, present, eps,
    DIM: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """layer_norm(x + x_bias), the bias if BIASED, of these rows: fp32 [BLOCK_M, K0] and [BLOCK_M, K1]; the second is
    the first if K1 = 0."""
    x0 = _load_columns(x_ptr, rows, present, 0, DIM, K0, K0 <= DIM, "").to(tl.float32)
    x1 = x0
    if K1 > 0:
        x1 = _load_columns(x_ptr, rows, present, K0, DIM, K1, K0 + K1 <= DIM, "").to(tl.float32)
    return _normed(x0, x1, x_bias_ptr, gamma_ptr, beta_ptr, eps, DIM, K0, K1, BIASED)


@triton.jit
def _normed(
    x0, x1, x_bias_ptr, gamma_ptr, beta_ptr, eps,
    DIM: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """The same of x in registers, fp32, zero beyond DIM."""
    if BIASED:
        x0 += _load_vector(x_bias_ptr, tl.arange(0, K0), tl.arange(0, K0) < DIM)[None, :]
        if K1 > 0:
            k1 = K0 + tl.arange(0, K1)
            x1 += _load_vector(x_bias_ptr, k1, k1 < DIM)[None, :]
    n0, n1, _ = _standardised(x0, x1, eps, DIM, K0, K1)
    a0 = _affine(n0, gamma_ptr, beta_ptr, 0, DIM, K0)
    a1 = a0
    if K1 > 0:
        a1 = _affine(n1, gamma_ptr, beta_ptr, K0, DIM, K1)
    return a0, a1


@triton.jit
def _layer_norm_factor(
    x_ptr, gamma_ptr, beta_ptr, rows, present, eps,
    DIM: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """layer_norm(x) as the left factor of products."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    a0, a1 = _layer_norm(x_ptr, x_ptr, gamma_ptr, beta_ptr, rows, present, eps, DIM, K0, K1, False)
    return _rounded(a0, dtype, PRECISION), _rounded(a1, dtype, PRECISION)


@triton.jit
def _load_turned(w_ptr, n, present, first, DIM: tl.constexpr, K: tl.constexpr, WHOLE: tl.constexpr):
    """[K, BLOCK_N]: inputs first .. first + K of outputs n of a weight w (out_features, DIM)."""
    k = first + tl.arange(0, K)
    mask = present[None, :]
    if not WHOLE:
        mask = mask & (k < DIM)[:, None]
    return tl.load(w_ptr + n[None, :] * DIM + k[:, None], mask=mask, other=0.0)


@triton.jit
def _linear(
    a0, a1, w_ptr, b_ptr, n, present,
    DIM: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """a w^T + b for outputs n, in fp32 [BLOCK_M, BLOCK_N]; the bias is added last."""
    sums = tl.dot(a0, _load_turned(w_ptr, n, present, 0, DIM, K0, K0 <= DIM), input_precision=PRECISION)
    if K1 > 0:
        sums = tl.dot(a1, _load_turned(w_ptr, n, present, K0, DIM, K1, K0 + K1 <= DIM), sums, input_precision=PRECISION)
    return sums + _load_vector(b_ptr, n, present)[None, :]


@kernel
def layer_norm_fwd(
    x_ptr, x_bias_ptr, gamma_ptr, beta_ptr, y_ptr, P, eps,
    DIM: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, BIASED: tl.constexpr, ACT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """y = act(layer_norm(x + x_bias)), the bias if BIASED: x and y (P, DIM), contiguous; parameters of any dtype."""
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    WIDE: tl.constexpr = dtype == tl.float32
    first_row, rows, present = _rows_of(tl.program_id(0), P, BLOCK_M)
    x_ptr += first_row * DIM
    y_ptr += first_row * DIM
    a0, a1 = _layer_norm(x_ptr, x_bias_ptr, gamma_ptr, beta_ptr, rows, present, eps, DIM, K0, K1, BIASED)
    a0 = _rounded(gate(a0, ACT, WIDE), dtype, PRECISION)
    _store_columns(y_ptr, a0, rows, present, 0, DIM, K0, K0 <= DIM)
    if K1 > 0:
        a1 = _rounded(gate(a1, ACT, WIDE), dtype, PRECISION)
        _store_columns(y_ptr, a1, rows, present, K0, DIM, K1, K0 + K1 <= DIM)


@kernel
def conv3x3s2_norm_fwd(
    x_ptr, w_ptr, b_ptr, gamma_ptr, beta_ptr, y_ptr, P, H, W, OH, OW, stride_n, stride_h, stride_w, stride_c, eps,
    C: tl.constexpr, DIM: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, ACT: tl.constexpr, NHWC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y = act(layer_norm(conv(x) + b)), 3 x 3, stride 2, padding 1: x (N, C, H, W) by its strides, or in NHWC
    contiguous; w (9 * C, DIM), taps before channels; y (P, DIM), contiguous, P = N * OH * OW below 2^31.
    """
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    first_row, rows, present = _rows_of(tl.program_id(0), P, BLOCK_M)
    pixel = tl.program_id(0) * BLOCK_M + rows
    image = (pixel // (OW * OH)).to(tl.int64)
    h, w = pixel // OW % OH * 2 - 1, pixel % OW * 2 - 1
    if NHWC:  # noqa: SIM108
        x_rows = x_ptr + (((image * H + h) * W + w) * C)
    else:
        x_rows = x_ptr + (image * stride_n + h * stride_h + w * stride_w)
    n0 = tl.arange(0, K0)
    sums0 = tl.zeros((BLOCK_M, K0), tl.float32)
    sums1 = sums0
    if K1 > 0:
        n1 = K0 + tl.arange(0, K1)
        sums1 = tl.zeros((BLOCK_M, K1), tl.float32)
    for start in tl.range(0, 9 * C, BLOCK_K, num_stages=STAGES):
        k = start + tl.arange(0, BLOCK_K)
        kh, kw, c = k // (3 * C), k // C % 3, k % C
        if NHWC:  # noqa: SIM108
            offset = (kh * W + kw) * C + c
        else:
            offset = kh * stride_h + kw * stride_w + c * stride_c
        x_h, x_w, tap = h[:, None] + kh[None, :], w[:, None] + kw[None, :], k < 9 * C
        inside = present[:, None] & tap[None, :] & (x_h >= 0) & (x_h < H) & (x_w >= 0) & (x_w < W)
        x = tl.load(x_rows[:, None] + offset[None, :], mask=inside, other=0.0)
        w0 = tl.load(w_ptr + k[:, None] * DIM + n0[None, :], mask=tap[:, None] & (n0 < DIM)[None, :], other=0.0)
        sums0 = tl.dot(x, w0, sums0)
        if K1 > 0:
            w1 = tl.load(w_ptr + k[:, None] * DIM + n1[None, :], mask=tap[:, None] & (n1 < DIM)[None, :], other=0.0)
            sums1 = tl.dot(x, w1, sums1)
    y0, y1 = _normed(sums0, sums1, b_ptr, gamma_ptr, beta_ptr, eps, DIM, K0, K1, True)
    y_ptr += first_row * DIM
    _store_columns(y_ptr, gate(y0, ACT, False).to(dtype), rows, present, 0, DIM, K0, K0 <= DIM)
    if K1 > 0:
        _store_columns(y_ptr, gate(y1, ACT, False).to(dtype), rows, present, K0, DIM, K1, K0 + K1 <= DIM)


@kernel
def norm_linear_fwd(
    x_ptr, gamma_ptr, beta_ptr, w_ptr, b_ptr, y_ptr, P, eps,
    N: tl.constexpr, DIM: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y = layer_norm(x) w^T + b: x (P, DIM), w (N, DIM), y (P, N), contiguous."""
    first_row, rows, present = _rows_of(tl.program_id(0), P, BLOCK_M)
    x_ptr += first_row * DIM
    y_ptr += first_row * N
    a0, a1 = _layer_norm_factor(x_ptr, gamma_ptr, beta_ptr, rows, present, eps, DIM, K0, K1, PRECISION)
    for first in tl.static_range(0, N, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        y = _linear(a0, a1, w_ptr, b_ptr, n, n < N, DIM, K0, K1, PRECISION)
        _store_columns(y_ptr, y, rows, present, first, N, BLOCK_N, first + BLOCK_N <= N)


@kernel
def depthwise_fwd(
    x_ptr, taps_ptr, y_ptr, H, W, C, pack_blocks, columns, blocks_d, blocks_w,
    K: tl.constexpr, VEC: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """y = dwconv(x) + bias: x and y (N, H, W, C), contiguous; columns = N * W; taps: see pack_filter; VEC divides C."""
    C = C // VEC * VEC  # tells the compiler what VEC divides
    block_d, first_column, first_h = tile_of(tl.program_id(0), blocks_d, blocks_w, BLOCK_H, BLOCK_W)
    n, w, there = columns_of(first_column, columns, W, BLOCK_W)
    d = block_d * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = there[:, None] & (d < C)[None, :]
    offset = (((n * H + first_h) * W + w) * C)[:, None] + d[None, :]
    padded_C = pack_blocks * PACK_BLOCK
    rows = conv_rows(
        x_ptr + offset, taps_ptr, first_h, w, d, H, W, padded_C, W * C, C, inside, K, False, BLOCK_H, BLOCK_W, BLOCK_D
    )
    bias = tl.load(taps_ptr + K * K * padded_C + (w[:, None] * 0 + d[None, :]))
    for t in tl.static_range(BLOCK_H):
        y = (rows[t] + bias).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + offset + t * (W * C), y, mask=inside & (t < H - first_h))


@triton.jit
def _project(
    y, w2_ptr, d, present, sums, first,
    DIM: tl.constexpr, D: tl.constexpr, K: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """sums + y w2^T of the hidden channels d, outputs first .. first + K; w2 (DIM, D)."""
    k = first + tl.arange(0, K)
    mask = present[:, None]
    if not WHOLE:
        mask = mask & (k < DIM)[None, :]
    w2 = tl.load(w2_ptr + k[None, :] * D + d[:, None], mask=mask, other=0.0)
    return tl.dot(y, w2, sums, input_precision=PRECISION)


@triton.jit
def _store_residual(
    x_ptr, b2_ptr, scale_ptr, out_ptr, sums, rows, present, first,
    DIM: tl.constexpr, K: tl.constexpr, WHOLE: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """out = x + scale * (sums + b2), columns first .. first + K."""
    k = first + tl.arange(0, K)
    value = sums + _load_vector(b2_ptr, k, k < DIM)[None, :]
    if SCALED:
        value *= _load_vector(scale_ptr, k, k < DIM)[None, :]
    # Not as x was loaded for the norm: else it is kept in registers from there to here.
    value += _load_columns(x_ptr, rows, present, first, DIM, K, WHOLE, "evict_first").to(tl.float32)
    _store_columns(out_ptr, value, rows, present, first, DIM, K, WHOLE)


@kernel
def gated_mlp_fwd(
    x_ptr, s_ptr, gamma_ptr, beta_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, scale_ptr, out_ptr, P, eps,
    DIM: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, D: tl.constexpr, C: tl.constexpr, ACT: tl.constexpr,
    SCALED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out = x + scale * fc2(act(g) * concat(i, s)),   [g, i] = fc1(layer_norm(x)), for BLOCK_M rows of x (P, DIM).

    BLOCK_N hidden channels at a time: their g and i are made in registers, gated, rounded, and multiplied into fc2's
    sums at once. w1 (2D, DIM) with rows [g | i | c], w2 (DIM, D), s (P, C).
    """
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    WIDE: tl.constexpr = dtype == tl.float32
    IDENTITY: tl.constexpr = D - C
    first_row, rows, present = _rows_of(tl.program_id(0), P, BLOCK_M)
    x_ptr += first_row * DIM
    s_ptr += first_row * C
    out_ptr += first_row * DIM
    a0, a1 = _layer_norm_factor(x_ptr, gamma_ptr, beta_ptr, rows, present, eps, DIM, K0, K1, PRECISION)
    sums0 = tl.zeros((BLOCK_M, K0), tl.float32)
    sums1 = sums0
    if K1 > 0:
        sums1 = tl.zeros((BLOCK_M, K1), tl.float32)
    for first in tl.range(0, IDENTITY, BLOCK_N, num_stages=STAGES):
        d = first + tl.arange(0, BLOCK_N)
        g = _linear(a0, a1, w1_ptr, b1_ptr, d, d < IDENTITY, DIM, K0, K1, PRECISION)
        i = _linear(a0, a1, w1_ptr + D * DIM, b1_ptr + D, d, d < IDENTITY, DIM, K0, K1, PRECISION)
        y = _rounded(gate(g, ACT, WIDE) * i, dtype, PRECISION)
        sums0 = _project(y, w2_ptr, d, d < IDENTITY, sums0, 0, DIM, D, K0, K0 <= DIM, PRECISION)
        if K1 > 0:
            sums1 = _project(y, w2_ptr, d, d < IDENTITY, sums1, K0, DIM, D, K1, K0 + K1 <= DIM, PRECISION)
    for first in tl.range(0, C, BLOCK_N, num_stages=STAGES):
        d = first + tl.arange(0, BLOCK_N)
        g = _linear(a0, a1, w1_ptr + IDENTITY * DIM, b1_ptr + IDENTITY, d, d < C, DIM, K0, K1, PRECISION)
        mask = present[:, None] & (d < C)[None, :]
        s = tl.load(s_ptr + rows[:, None] * C + d[None, :], mask=mask, other=0.0)
        y = _rounded(gate(g, ACT, WIDE) * s.to(tl.float32), dtype, PRECISION)
        sums0 = _project(y, w2_ptr + IDENTITY, d, d < C, sums0, 0, DIM, D, K0, K0 <= DIM, PRECISION)
        if K1 > 0:
            sums1 = _project(y, w2_ptr + IDENTITY, d, d < C, sums1, K0, DIM, D, K1, K0 + K1 <= DIM, PRECISION)
    _store_residual(x_ptr, b2_ptr, scale_ptr, out_ptr, sums0, rows, present, 0, DIM, K0, K0 <= DIM, SCALED)
    if K1 > 0:
        _store_residual(x_ptr, b2_ptr, scale_ptr, out_ptr, sums1, rows, present, K0, DIM, K1, K0 + K1 <= DIM, SCALED)


@kernel
def gated_linear_fwd(
    a_ptr, s_ptr, w1_ptr, b1_ptr, y_ptr, P,
    DIM: tl.constexpr, D: tl.constexpr, C: tl.constexpr, ACT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y = act(g) * concat(i, s),   [g, i] = a w1^T + b1: a (P, DIM), s (P, C), y (P, D); w1 (2D, DIM) as [g | i | c].

    One program: BLOCK_M rows and BLOCK_N hidden channels of one branch, the identity's first. Programs for the same
    rows follow each other, so that these are in L2.
    """
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    WIDE: tl.constexpr = dtype == tl.float32
    IDENTITY: tl.constexpr = D - C
    identity_blocks: tl.constexpr = (IDENTITY + BLOCK_N - 1) // BLOCK_N
    blocks: tl.constexpr = identity_blocks + (C + BLOCK_N - 1) // BLOCK_N
    first_row, rows, present = _rows_of(tl.program_id(0) // blocks, P, BLOCK_M)
    a_ptr += first_row * DIM
    s_ptr += first_row * C
    y_ptr += first_row * D
    block = tl.program_id(0) % blocks
    if block < identity_blocks:
        d = block * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = d < IDENTITY
        g = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        i = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in tl.range(0, DIM, BLOCK_K, num_stages=STAGES):
            a = _load_columns(a_ptr, rows, present, k, DIM, BLOCK_K, DIM % BLOCK_K == 0, "")
            w = _load_turned(w1_ptr, d, inside, k, DIM, BLOCK_K, DIM % BLOCK_K == 0)
            g = tl.dot(a, w, g, input_precision=PRECISION)
            w = _load_turned(w1_ptr + D * DIM, d, inside, k, DIM, BLOCK_K, DIM % BLOCK_K == 0)
            i = tl.dot(a, w, i, input_precision=PRECISION)
        i += _load_vector(b1_ptr, D + d, inside)[None, :]
    else:
        d = (block - identity_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = d < C
        g = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in tl.range(0, DIM, BLOCK_K, num_stages=STAGES):
            a = _load_columns(a_ptr, rows, present, k, DIM, BLOCK_K, DIM % BLOCK_K == 0, "")
            w = _load_turned(w1_ptr + IDENTITY * DIM, d, inside, k, DIM, BLOCK_K, DIM % BLOCK_K == 0)
            g = tl.dot(a, w, g, input_precision=PRECISION)
        s = tl.load(s_ptr + rows[:, None] * C + d[None, :], mask=present[:, None] & inside[None, :], other=0.0)
        i = s.to(tl.float32)
        d += IDENTITY
    g += _load_vector(b1_ptr, d, inside)[None, :]
    y = _rounded(gate(g, ACT, WIDE) * i, dtype, PRECISION)
    tl.store(y_ptr + rows[:, None] * D + d[None, :], y, mask=present[:, None] & inside[None, :])
