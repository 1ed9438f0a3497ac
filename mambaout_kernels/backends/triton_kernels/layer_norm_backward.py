"""Backward of act(layer_norm(x)): from x alone, whose mean and deviation are computed again.

With n = (x - mean) * rstd and e = dy * act'(n * gamma + beta):
    dx = rstd * (e * gamma - mean(e * gamma) - n * mean(e * gamma * n));   dgamma = sum of e * n;   dbeta = sum of e
"""

# mypy: ignore-errors

import triton
import triton.language as tl

from .block import _load_columns, _load_vector, _rows_of, _standardised, _store_columns
from .gates import gate_and_slope
from .kernel import kernel


@triton.jit
def _vectors(gamma_ptr, beta_ptr, first, DIM: tl.constexpr, K: tl.constexpr):
    k = first + tl.arange(0, K)
    return _load_vector(gamma_ptr, k, k < DIM)[None, :], _load_vector(beta_ptr, k, k < DIM)[None, :]


@triton.jit
def _before_act(dy, z, ACT: tl.constexpr, WIDE: tl.constexpr):
    """dy * act'(z)"""
    if ACT != "identity":
        _, slope = gate_and_slope(z, ACT, WIDE)
        dy = dy * slope
    return dy


@triton.jit
def _store_partials(partials_ptr, dgamma, dbeta, first, DIM: tl.constexpr, K: tl.constexpr):
    k = first + tl.arange(0, K)
    tl.store(partials_ptr + k, tl.sum(dgamma, 0), mask=k < DIM)
    tl.store(partials_ptr + DIM + k, tl.sum(dbeta, 0), mask=k < DIM)


@kernel
def layer_norm_bwd(
    dy_ptr, x_ptr, gamma_ptr, beta_ptr, dx_ptr, normed_ptr, partials_ptr, P, turns, eps,
    DIM: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, ACT: tl.constexpr, NORMED: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """dx (P, DIM), and partials (programs, 2, DIM) of dgamma and dbeta: of `turns` blocks of BLOCK_M rows each,
    p, p + programs, ...; what lies beyond the last row counts as zero.

    NORMED: layer_norm(x) too, in dy's dtype. dy and x (P, DIM), contiguous; K0 + K1 as in block.py.
    """
    WIDE: tl.constexpr = (x_ptr.dtype.element_ty == tl.float32) or (dy_ptr.dtype.element_ty == tl.float32)
    WHOLE0: tl.constexpr = K0 <= DIM
    WHOLE1: tl.constexpr = K0 + K1 <= DIM
    gamma0, beta0 = _vectors(gamma_ptr, beta_ptr, 0, DIM, K0)
    dgamma0 = tl.zeros((BLOCK_M, K0), tl.float32)
    dbeta0 = dgamma0
    if K1 > 0:
        gamma1, beta1 = _vectors(gamma_ptr, beta_ptr, K0, DIM, K1)
        dgamma1 = tl.zeros((BLOCK_M, K1), tl.float32)
        dbeta1 = dgamma1
    for turn in range(turns):
        first_row, rows, present = _rows_of(tl.program_id(0) + turn * tl.num_programs(0), P, BLOCK_M)
        at = first_row * DIM
        x0 = _load_columns(x_ptr + at, rows, present, 0, DIM, K0, WHOLE0, "").to(tl.float32)
        e0 = _load_columns(dy_ptr + at, rows, present, 0, DIM, K0, WHOLE0, "").to(tl.float32)
        x1 = x0
        if K1 > 0:
            x1 = _load_columns(x_ptr + at, rows, present, K0, DIM, K1, WHOLE1, "").to(tl.float32)
            e1 = _load_columns(dy_ptr + at, rows, present, K0, DIM, K1, WHOLE1, "").to(tl.float32)
        n0, n1, rstd = _standardised(x0, x1, eps, DIM, K0, K1)
        z0 = n0 * gamma0 + beta0
        e0 = _before_act(e0, z0, ACT, WIDE)
        dgamma0 += e0 * n0
        dbeta0 += e0
        e0 *= gamma0
        along, across = tl.sum(e0, 1), tl.sum(e0 * n0, 1)
        if K1 > 0:
            z1 = n1 * gamma1 + beta1
            e1 = _before_act(e1, z1, ACT, WIDE)
            dgamma1 += e1 * n1
            dbeta1 += e1
            e1 *= gamma1
            along += tl.sum(e1, 1)
            across += tl.sum(e1 * n1, 1)
        along, across = (along / DIM)[:, None], (across / DIM)[:, None]
        dx0 = (e0 - along - n0 * across) * rstd[:, None]
        _store_columns(dx_ptr + at, dx0, rows, present, 0, DIM, K0, WHOLE0)
        if NORMED:
            _store_columns(normed_ptr + at, z0, rows, present, 0, DIM, K0, WHOLE0)
        if K1 > 0:
            dx1 = (e1 - along - n1 * across) * rstd[:, None]
            _store_columns(dx_ptr + at, dx1, rows, present, K0, DIM, K1, WHOLE1)
            if NORMED:
                _store_columns(normed_ptr + at, z1, rows, present, K0, DIM, K1, WHOLE1)
    partials_ptr += tl.program_id(0) * (2 * DIM)
    _store_partials(partials_ptr, dgamma0, dbeta0, 0, DIM, K0)
    if K1 > 0:
        _store_partials(partials_ptr, dgamma1, dbeta1, K0, DIM, K1)
