"""Prints the coefficients in exponentials.h: polynomials of least relative error, by Lawson's iteration.

python csrc/cpu/simd/fit_exponentials.py
"""

import numpy as np


def fit(basis, target, lowest, highest, terms):
    """c that makes the largest |sum_k c_k basis(x, k) - target(x)| over [lowest, highest] least, and that largest."""
    x = np.cos(np.pi * (np.arange(4001) + 0.5) / 4001) * (highest - lowest) / 2 + (highest + lowest) / 2
    matrix, wanted = np.stack([basis(x, k) for k in range(terms)], 1), target(x)
    weight = np.full(len(x), 1 / len(x))
    for _ in range(400):
        root = np.sqrt(weight)
        coefficients = np.linalg.lstsq(matrix * root[:, None], wanted * root, rcond=None)[0]
        error = np.abs(matrix @ coefficients - wanted)
        weight = weight * error / (weight * error).sum()
    return coefficients, error.max()


def atanh_ratio(square):
    root = np.sqrt(square)
    return np.arctanh(root) / root


FITS = {
    "exp(r) = 1 + r q(r), |r| <= 0.5 ln 2": (
        lambda r, k: r ** (k + 1) / np.exp(r),
        lambda r: 1 - np.exp(-r),
        -0.3466,
        0.3466,
        6,
    ),
    "atanh(s) = s q(s^2), s <= 1/3": (lambda t, k: t**k / atanh_ratio(t), np.ones_like, 1e-12, 1 / 9, 5),
}

if __name__ == "__main__":
    for name, problem in FITS.items():
        found, largest = fit(*problem)
        print(f"{name}: {', '.join(f'{c:.9e}f' for c in found)}  (relative error {largest:.1e})")
