"""The Triton backend beside its arithmetic: strides, orientation, NaN, determinism, bad input, the op on top of it."""

import functools

import pytest
import torch
from numerics import Inputs, eager, exact, make_inputs

from mambaout_kernels import backends, gated_dwconv
from mambaout_kernels.backends import triton as backend
from mambaout_kernels.backends.triton_kernels import launch
from mambaout_kernels.reference import ACTIVATIONS


def run(inputs: Inputs, act: str = "gelu"):
    return (backend.gated_dwconv(*inputs, act), *backend.gated_dwconv_backward(inputs.dy, *inputs, act))


@pytest.mark.parametrize(
    "shape", [(0, 4, 4, 8, 4, 7), (2, 0, 4, 8, 4, 7), (2, 4, 0, 8, 4, 7), (1, 4, 4, 0, 0, 7)], ids=str
)
def test_zero_sizes(shape):
    inputs = make_inputs(*shape)
    y, du, dweight, dbias = run(inputs)
    assert y.shape == inputs.dy.shape
    assert du.shape == inputs.u.shape
    assert dweight.count_nonzero() == dbias.count_nonzero() == 0


STRIDES = {
    "expanded": lambda x: x[:1].expand(x.shape),
    "permuted": lambda x: x.permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3),
    "NCHW memory": lambda x: x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
    "channels of a wider tensor": lambda x: torch.cat((x, x), dim=-1)[..., : x.shape[-1]],
    "misaligned": lambda x: torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape),
    "every other row": lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
}


@functools.cache
def of_dense(expanded):
    inputs = make_inputs(2, 3, 4, 16, 8, 5, torch.bfloat16)
    u, dy = (STRIDES["expanded"](x).contiguous() if expanded else x for x in (inputs.u, inputs.dy))
    return run(Inputs(u, inputs.weight, inputs.bias, dy))


@pytest.mark.parametrize("name", STRIDES)
def test_any_strides_give_the_same_bits(name):
    inputs, strides = make_inputs(2, 3, 4, 16, 8, 5, torch.bfloat16), STRIDES[name]
    turned = inputs.weight.transpose(2, 3).contiguous().transpose(2, 3)
    strided = Inputs(strides(inputs.u), turned, inputs.bias, strides(inputs.dy))
    assert name == "expanded" or (torch.equal(strided.u, inputs.u) and torch.equal(strided.dy, inputs.dy))
    for ours, theirs in zip(run(strided), of_dense(name == "expanded"), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("K", [1, 3, 5, 7, 9])
def test_impulse_returns_the_turned_filter(K):
    weight = torch.randn(3, 1, K, K)
    u = torch.zeros(1, K + 2, K + 2, 6)
    u[..., :3] = 1  # the gate; act is the identity
    R = K // 2
    u[0, R + 1, R + 1, 3:] = 1
    y = backend.gated_dwconv(u, weight, torch.zeros(3), "identity")
    window = y[0, 1 : K + 1, 1 : K + 1].permute(2, 0, 1)
    assert torch.equal(window, weight[:, 0].flip((1, 2)))
    assert y.count_nonzero() == weight.count_nonzero()


@pytest.mark.parametrize("K", [3, 7, pytest.param(9, marks=pytest.mark.nightly)])
def test_impulse_in_the_gradient(K):
    """dc of one unit of e is the filter itself; dweight is c around that pixel."""
    R, size = K // 2, K + 2
    weight = torch.randn(2, 1, K, K)
    u = torch.randn(1, size, size, 4)
    u[..., :2] = 1
    dy = torch.zeros(1, size, size, 2)
    dy[0, R + 1, R + 1] = 1
    du, dweight, dbias = backend.gated_dwconv_backward(dy, u, weight, torch.zeros(2), "identity")
    assert torch.equal(du[0, 1 : K + 1, 1 : K + 1, 2:].permute(2, 0, 1), weight[:, 0])
    assert torch.equal(dweight[:, 0], u[0, 1 : K + 1, 1 : K + 1, 2:].permute(2, 0, 1))
    assert torch.equal(dbias, torch.ones(2))


CHANNELS = {"g of i": 0, "g of c": 3, "i": 5, "c": 9, "last c": 11}


@pytest.mark.parametrize(
    ("channel", "act"),
    [  # an activation sees its gates alone
        pytest.param(
            channel, act, id=f"{name}-{act}", marks=() if act == "gelu" or "g of" in name else pytest.mark.nightly
        )
        for name, channel in CHANNELS.items()
        for act in ACTIVATIONS
    ],
)
def test_not_finite_where_eager_is_not_finite(act, channel):
    inputs = make_inputs(1, 5, 6, 6, 4, 3)
    inputs.u[0, [0, 0, 4], [0, 5, 2], channel] = torch.tensor([torch.nan, torch.inf, -torch.inf])  # no tap meets two
    ours, theirs = run(inputs, act), eager(inputs, act)
    for name, a, b in zip(("y", "du"), ours[:2], theirs[:2], strict=True):
        assert torch.equal(a.isfinite(), b.isfinite()), name
    # Inf times a gate whose activation underflows is Inf or NaN, as the rounding has it
    certain = inputs.u[..., :6].abs() < 3
    assert torch.equal(ours[0].isnan() & certain, theirs[0].isnan() & certain)


def test_bitwise_the_same_in_every_run_and_the_inputs_unchanged():
    inputs = make_inputs(3, 4, 9, 12, 8, 3, torch.bfloat16)
    before = [t.clone() for t in (*inputs, inputs.dy)]
    for ours, theirs in zip(run(inputs), run(inputs), strict=True):
        assert torch.equal(ours, theirs)
    for now, then in zip((*inputs, inputs.dy), before, strict=True):
        assert torch.equal(now, then)


def test_an_image_is_the_same_alone_and_in_a_batch():
    inputs = make_inputs(3, 3, 9, 12, 8, 3)
    y, du, *_ = run(inputs)
    alone = run(Inputs(inputs.u[2:], inputs.weight, inputs.bias, inputs.dy[2:]))
    assert torch.equal(y[2:], alone[0])
    assert torch.equal(du[2:], alone[1])


def test_rows_too_wide_for_32_bit_offsets_run_on_the_reference(monkeypatch):
    inputs = make_inputs(1, 2, 3, 4, 2, 3)
    assert launch._too_wide(3, 7, 3, 4, (0, 2**28, 8))
    assert not launch._too_wide(3, 7, 3, 4, inputs.u.stride()[:3])
    narrow = launch.forward(*inputs, "gelu")
    monkeypatch.setattr(launch, "_LARGEST_OFFSET", 1)
    torch.testing.assert_close(launch.forward(*inputs, "gelu"), narrow)
    assert launch.backward(inputs.dy, *inputs, "gelu")[0].shape == inputs.u.shape


def test_supports_what_the_interpreter_and_the_kernels_can():
    assert backend.unavailable() is None
    weight = torch.zeros(1, 1, 3, 3)
    for dtype, expected in (
        (torch.float32, True),
        (torch.bfloat16, True),
        (torch.float16, True),
        (torch.float64, False),
    ):
        assert backend.supports(torch.zeros(1, 1, 1, 2, dtype=dtype), weight.to(dtype)) is expected
    assert not backend.supports(torch.zeros(1, 1, 1, 2, device="meta"), weight)


def test_the_op_and_its_gradient_on_this_backend():
    inputs = make_inputs(1, 4, 5, 10, 6, 5)
    leaves = [t.clone().requires_grad_() for t in inputs]
    with backends.force("triton"):
        y = gated_dwconv(*leaves)
        y.backward(inputs.dy)
    truth = exact(inputs, "gelu")
    for ours, expected in zip((y, *(t.grad for t in leaves)), truth, strict=True):
        torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5)


def test_forced_on_what_it_does_not_support():
    inputs = make_inputs(1, 2, 2, 4, 2, 3, torch.float64)
    with backends.force("triton"), pytest.raises(RuntimeError, match=r"'triton' does not support u of torch\.float64"):
        gated_dwconv(*inputs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": torch.zeros(1, 4, 4, 15)}, "u must have an even number"),
        ({"weight": torch.zeros(4, 1, 6, 6)}, "weight must have an odd kernel size"),
        ({"bias": torch.zeros(5)}, r"bias must have shape \(4,\)"),
        ({"act": "relu"}, "act must be one of"),
        ({"dy": torch.zeros(1, 4, 5, 8)}, "dy must have shape"),
    ],
)
def test_bad_input_is_refused_before_a_launch(change, message):
    arguments = {
        "dy": torch.zeros(1, 4, 4, 8),
        "u": torch.zeros(1, 4, 4, 16),
        "weight": torch.zeros(4, 1, 7, 7),
        "bias": torch.zeros(4),
        "act": "gelu",
    } | change
    with pytest.raises(ValueError, match=message):
        backend.gated_dwconv_backward(**arguments)
