"""Prints the coefficients in gates.py: polynomials q with exp2(a * q(a)) / 2 = Phi(-a), the normal distribution's tail.

log2 of the tail is smooth, so one short polynomial holds where erf needs pieces. The error that counts is gelu's,
a * Phi(-a) * ln(2) * a * dq; below `tail` it may grow relatively. The leading coefficients are negative, so that the
exponent falls to -infinity beyond the fit and the gate ends in an exact 0.

    python mambaout_kernels/backends/triton_kernels/fit_gelu.py
"""

import math

import numpy as np
from numpy.polynomial import Chebyshev, Polynomial


def fit(degree: int, end: float, tail: float) -> tuple[np.ndarray, float]:
    """Coefficients, constant first, and the largest weighted error over [0, end]; Lawson's iteration."""
    a = np.linspace(1e-6, end, 6001)
    phi = np.array([0.5 * math.erfc(x / math.sqrt(2)) for x in a])
    target = np.log2(2 * phi)
    weight = math.log(2) * np.maximum(np.maximum(a, 0.25) * phi, tail)
    basis = a[:, None] * np.polynomial.chebyshev.chebvander(2 * a / end - 1, degree)
    emphasis = np.ones_like(a)
    for _ in range(3000):
        scale = weight * np.sqrt(emphasis)
        solution = np.linalg.lstsq(basis * scale[:, None], target * scale, rcond=None)[0]
        error = np.abs(basis @ solution - target) * weight
        emphasis *= error / error.max() + 1e-3
        emphasis /= emphasis.max()
    return Chebyshev(solution, domain=[0, end]).convert(kind=Polynomial).coef, error.max()


if __name__ == "__main__":
    for name, arguments in {"32-bit": (9, 6.0, 1e-9), "16-bit": (4, 5.0, 1e-7)}.items():
        coefficients, error = fit(*arguments)
        print(f"{name}: error {error:.1e}, constant last: {[float(np.float32(c)) for c in coefficients[::-1]]}")
