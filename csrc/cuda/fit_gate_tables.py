"""Fits gate_tables.h: the tail of the normal distribution as a power of two. python fit_gate_tables.py > gate_tables.h

    log2(Phi(-a)) ~ polynomial in a >= 0,   Phi(-a) = erfc(a / sqrt(2)) / 2

minimax in the error of gelu(-a) = -a * Phi(-a), relative to |gelu(-a)| + floor. The highest coefficient must be
negative, so that beyond the fitted interval the power falls to 0.
"""

import math

import numpy as np

LIMIT = 5.6  # gelu(-5.6) is 6e-8
ITERATIONS = 200

# name: degree, floor. fp32 work needs its own; one for bfloat16 alone would save less than an instruction.
TABLES = {"Float32Tail": (10, 1e-4), "LowPrecisionTail": (7, 0.0)}


def fit(degree: int, floor: float, points: int = 2000) -> np.ndarray:
    """Polynomial coefficients, lowest power first: Lawson's iteration on Chebyshev points."""
    t = np.cos(np.pi * (np.arange(points) + 0.5) / points)
    a = (t + 1) * LIMIT / 2
    tail = np.array([0.5 * math.erfc(x / math.sqrt(2)) for x in a])
    sensitivity = math.log(2) * a * tail / (a * tail + floor)
    basis = np.polynomial.chebyshev.chebvander(t, degree)
    weight = np.ones(points)
    for _ in range(ITERATIONS):
        scale = np.sqrt(weight) * sensitivity
        coefficients = np.linalg.lstsq(basis * scale[:, None], np.log2(tail) * scale, rcond=None)[0]
        error = np.abs((basis @ coefficients - np.log2(tail)) * sensitivity)
        weight *= error / error.max() + 1e-3
        weight /= weight.sum()
    series = np.polynomial.chebyshev.Chebyshev(coefficients, domain=[0, LIMIT])
    return series.convert(kind=np.polynomial.Polynomial, domain=[-1, 1], window=[-1, 1]).coef


def main() -> None:
    print("// Written by fit_gate_tables.py; edit that.\n#pragma once\n")
    print('#include "platform.cuh"\n\nnamespace mambaout_kernels::cuda {\n')
    print("// log2(Phi(-a)) as a polynomial in a >= 0: the factor of a^power.")
    for name, (degree, floor) in TABLES.items():
        coefficients = fit(degree, floor)
        assert coefficients[-1] < 0, name
        values = [f"{np.float32(c):.9e}f" for c in coefficients]
        rows = [", ".join(values[i : i + 6]) for i in range(0, len(values), 6)]
        print(f"struct {name} {{\n  static constexpr int kDegree = {degree};")
        print("  __device__ __forceinline__ static float factor(int power) {")
        print("    // clang-format off\n    constexpr float factors[kDegree + 1] = {")
        print(",\n".join(f"        {row}" for row in rows) + "};\n    // clang-format on")
        print("    return factors[power];\n  }\n};")
    print("\n}  // namespace mambaout_kernels::cuda")


if __name__ == "__main__":
    main()
