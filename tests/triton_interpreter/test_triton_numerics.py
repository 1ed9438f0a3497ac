"""The Triton kernels against fp64, within the one tolerance policy, in the interpreter."""

import pytest
import torch
from numerics import Inputs, activation_bounds, check_backend, eager, exact, make_inputs

from mambaout_kernels.backends import triton as backend
from mambaout_kernels.reference import ACTIVATIONS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# N, H, W, D, C, K: each reaches a branch of its own; small, for the interpreter takes a second for each
SHAPES = {
    "several images, two tiles each way": (2, 8, 9, 12, 8, 5),
    "filter larger than the image": (1, 5, 3, 19, 19, 7),
    "one pixel": (1, 1, 1, 8, 3, 7),
    "two blocks of channels in each branch": (1, 3, 4, 136, 68, 3),
    "5 x 5": (1, 6, 6, 12, 5, 5),
    "no conv channels": (2, 4, 4, 10, 0, 7),
    "no identity channels": (1, 7, 8, 32, 32, 7),
    "9 x 9": (1, 2, 5, 9, 4, 9),
    "pointwise filter": (1, 5, 6, 41, 36, 1),  # channels enough that the largest error says something
    "blocks of columns across images": (3, 2, 5, 9, 5, 5),
    "base's odd hidden": (1, 4, 4, 85, 32, 7),
    "hidden of two": (1, 3, 7, 42, 20, 7),
    "one row": (1, 1, 17, 16, 16, 5),
    "one column": (1, 15, 1, 16, 16, 7),
    "several shares of the weight gradient": (5, 2, 9, 8, 8, 3),
}


LATER = pytest.mark.nightly


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [  # float16 is bfloat16 with other conversions
        pytest.param(
            shape,
            dtype,
            id=f"{name}-{dtype}",
            marks=LATER if dtype == torch.float16 and name != "hidden of two" else (),
        )
        for name, shape in SHAPES.items()
        for dtype in DTYPES
    ],
)
def test_against_fp64(shape, dtype):
    check_backend("triton", make_inputs(*shape, dtype), "gelu")


@pytest.mark.parametrize("act", ACTIVATIONS[1:])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        pytest.param(shape, dtype, id=f"{shape}-{dtype}", marks=LATER if dtype != torch.float32 and i > 0 else ())
        for i, shape in enumerate([(2, 3, 5, 17, 9, 5), (1, 4, 4, 10, 0, 7), (1, 4, 5, 16, 16, 3)])
        for dtype in DTYPES
    ],
)
def test_other_activations_against_fp64(shape, act, dtype):
    check_backend("triton", make_inputs(*shape, dtype), act)


def test_large_filters():
    check_backend("triton", make_inputs(1, 2, 3, 2, 1, 13), "silu")
    inputs = make_inputs(1, 2, 3, 2, 1, 31)
    torch.testing.assert_close(backend.gated_dwconv(*inputs, "silu"), eager(inputs, "silu")[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_fp32_parameters_beside_low_precision(dtype):
    inputs = make_inputs(1, 5, 6, 20, 12, 7, dtype, torch.float32)
    check_backend("triton", inputs, "gelu")
    assert backend.gated_dwconv_backward(inputs.dy, *inputs, "gelu")[1].dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activation_over_all_magnitudes(act, dtype):
    """C = 0 and i = 1 lays the activation bare; its slope is dg. Every exponent, both signs."""
    exponents = torch.arange(-24, 16) if dtype == torch.float16 else torch.arange(-149, 60)
    powers = exponents.double().exp2()
    grid = torch.cat((torch.linspace(-12, 12, 3001, dtype=torch.float64), powers, -powers)).to(dtype)
    gates = torch.cat((grid, grid.new_zeros(-grid.numel() % 256))).view(1, -1, 8, 32)
    inputs = Inputs(
        torch.cat((gates, torch.ones_like(gates)), dim=-1),
        gates.new_empty(0, 1, 1, 1),
        gates.new_empty(0),
        torch.ones_like(gates),
    )
    ours = (backend.gated_dwconv(*inputs, act), backend.gated_dwconv_backward(inputs.dy, *inputs, act)[0][..., :32])
    truth = (t[..., :32] for t in exact(inputs, act))
    squared = gates.abs() <= 1e18  # beyond, the closed form's x * x overflows
    tables_end = 1.2e-8 if dtype == torch.float32 else 2e-6  # gates.py: a shorter polynomial for 16 bits
    for a, x, bound in zip(ours, truth, activation_bounds(gates, act, tables_end), strict=False):
        assert ((a.double() - x).abs() <= bound)[squared].all()


def test_large_sums_of_the_weight_gradient():
    """Ones everywhere: dbias is the number of pixels, exactly, beyond what bf16 would hold."""
    N, H, W = 2, 16, 17
    inputs = Inputs(torch.ones(N, H, W, 2), torch.zeros(1, 1, 3, 3), torch.zeros(1), torch.ones(N, H, W, 1))
    _, dweight, dbias = backend.gated_dwconv_backward(inputs.dy, *inputs, "identity")
    assert dbias.item() == N * H * W
    assert dweight[0, 0, 1, 1].item() == N * H * W
    assert dweight[0, 0, 0, 2].item() == N * (H - 1) * (W - 1)
