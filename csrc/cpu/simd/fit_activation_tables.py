"""Writes activation_tables.h: piecewise polynomials of the gates, for vector units that look up by permutation.

For an activation act(x) = x * F(x) with F(x) + F(-x) = 1 the kernels look up, at a = |x|,
    value:  r(a) = F(-a)                    act(x)  = max(x, 0) - a * r(a)
    slope:  p(a) = act'(-a)                 act'(x) = p(a) for x < 0, else 1 - p(a)
Both are small where the activation is, so that its tails keep their accuracy; beyond `limit` they count as 0.
[0, limit] is cut into `pieces` pieces centred at i * width, so that i = round(a / width), and each piece is a
polynomial in a - i * width, fitted at Chebyshev nodes.

    python csrc/cpu/simd/fit_activation_tables.py > csrc/cpu/simd/activation_tables.h
"""

import math

import numpy as np

TANH_SCALE = math.sqrt(2 / math.pi)
TANH_CUBIC = 0.044715


def gelu_value(a):
    return 0.5 * math.erfc(a / math.sqrt(2))


def gelu_slope(a):
    return gelu_value(a) - a * math.exp(-a * a / 2) / math.sqrt(2 * math.pi)


def gelu_tanh_value(a):
    return 1 / (1 + math.exp(2 * TANH_SCALE * (a + TANH_CUBIC * a**3)))


def gelu_tanh_slope(a):
    r = gelu_tanh_value(a)
    return r - a * r * (1 - r) * 2 * TANH_SCALE * (1 + 3 * TANH_CUBIC * a * a)


# (pieces, degree, degree where the result is rounded to 16 bits): one register of 8 or 16 lanes holds one coefficient
# of every piece.
SHAPES = [(8, 7, 5), (16, 5, 3)]
FUNCTIONS = [
    ("GeluValue", gelu_value, 5.6),
    ("GeluSlope", gelu_slope, 6.2),
    ("GeluTanhValue", gelu_tanh_value, 5.4),
    ("GeluTanhSlope", gelu_tanh_slope, 5.8),
]


def fit(function, limit, pieces, degree):
    """Coefficients [degree + 1][pieces], lowest power first, and the width of a piece."""
    width = float(np.float32(limit / (pieces - 0.5) * (1 + 1e-6)))  # so that `limit` itself is in the last piece
    nodes = np.cos(np.pi * (np.arange(4 * degree) + 0.5) / (4 * degree)) * width / 2
    table = np.zeros((degree + 1, pieces))
    for piece in range(pieces):
        values = np.array([function(piece * width + s) for s in nodes])
        scaled = np.polynomial.chebyshev.Chebyshev.fit(nodes, values, degree, domain=[-width / 2, width / 2])
        table[:, piece] = np.pad(scaled.convert(kind=np.polynomial.Polynomial).coef, (0, degree + 1))[: degree + 1]
    return table.astype(np.float32), np.float32(width)


def print_table(name, function, limit, pieces, degree):
    table, width = fit(function, limit, pieces, degree)
    print("template <>")
    print(f"struct {name}<{pieces}> {{")
    print(f"  static constexpr int kDegree = {degree};")
    print(f"  static constexpr float kLimit = {float(np.float32(limit))!r}f, kWidth = {float(width)!r}f,")
    print(f"                         kInverseWidth = {float(np.float32(1 / width))!r}f;")
    print(f"  alignas(64) static constexpr float kCoefficients[kDegree + 1][{pieces}] = {{")
    for row in table:
        print("      {" + ", ".join(f"{float(c):.9e}f" for c in row) + "},")
    print("  };\n};")


def main():
    print("// Written by fit_activation_tables.py; edit that.")
    print("#pragma once\n")
    print("namespace mambaout_kernels::cpu {\n")
    print("// clang-format off")
    for name, function, limit in FUNCTIONS:
        for suffix in ("", "Half"):
            print(f"template <int kPieces>\nstruct {name}{suffix};")
            for pieces, degree, half_degree in SHAPES:
                print_table(name + suffix, function, limit, pieces, half_degree if suffix else degree)
    print("// clang-format on\n")
    print("}  // namespace mambaout_kernels::cpu")


if __name__ == "__main__":
    main()
