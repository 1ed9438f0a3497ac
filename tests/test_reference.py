"""The reference: its closed-form backward is autograd's, and it can be differentiated twice."""

import pytest
import torch
from numerics import exact, make_inputs

from mambaout_kernels import reference
from mambaout_kernels.reference import ACTIVATIONS


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize(
    "shape", [(2, 5, 6, 10, 4, 7), (1, 4, 3, 6, 6, 3), (1, 3, 3, 5, 0, 5), (1, 1, 1, 4, 2, 1)], ids=str
)
def test_closed_form_backward_is_autograds(shape, act):
    inputs = make_inputs(*shape, torch.float64)
    ours = reference.gated_dwconv_backward(inputs.dy, *inputs, act)
    for a, b in zip(ours, exact(inputs, act)[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_gradcheck_twice(act):
    leaves = [t.requires_grad_() for t in make_inputs(1, 3, 4, 3, 2, 3, torch.float64)]
    assert torch.autograd.gradcheck(lambda *a: reference.gated_dwconv(*a, act), leaves)
    assert torch.autograd.gradgradcheck(lambda *a: reference.gated_dwconv(*a, act), leaves)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_slope_is_the_derivative(act):
    x = torch.linspace(-8, 8, 401, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(reference.activation(x, act).sum(), x)
    torch.testing.assert_close(reference.activation_slope(x, act), slope, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_slope_of_large_values(act, dtype):
    """Finite wherever the value is, whose powers are not."""
    x = torch.tensor([30.0, 41.0, 300.0, torch.finfo(dtype).max], dtype=dtype)
    x = torch.cat((x, -x)).requires_grad_()
    slope = reference.activation_slope(x, act)
    expected = torch.ones(8) if act == "identity" else torch.tensor([1.0] * 4 + [0.0] * 4)
    torch.testing.assert_close(slope.float(), expected, rtol=0, atol=1e-8)
    if act != "identity":
        assert torch.autograd.grad(slope.sum(), x)[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_fp32_parameters_are_fp32(dtype):
    inputs = make_inputs(1, 4, 5, 6, 3, 3, dtype, torch.float32)
    du, dweight, dbias = reference.gated_dwconv_backward(inputs.dy, *inputs, "gelu")
    assert (du.dtype, dweight.dtype, dbias.dtype) == (dtype, torch.float32, torch.float32)


def test_by_hand():
    """One pixel, one conv channel, one identity channel: y = g * (i, c * centre + bias) for the identity activation."""
    u = torch.tensor([2.0, 3.0, 5.0, 7.0]).view(1, 1, 1, 4)  # g0 g1 i c
    weight = torch.arange(9.0).view(1, 1, 3, 3)  # centre 4
    y = reference.gated_dwconv(u, weight, torch.tensor([1.0]), "identity")
    assert y.flatten().tolist() == [2 * 5.0, 3 * (7 * 4 + 1.0)]
