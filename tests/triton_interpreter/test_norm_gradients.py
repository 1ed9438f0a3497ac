"""Gradients of act(layer_norm(x)) on a GPU, in the interpreter: one kernel, from x alone."""

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_accurate
from torch import nn

from mambaout_kernels import backends, reference
from mambaout_kernels.backends.triton_kernels import block_launch, block_tiles
from mambaout_kernels.nn.linear import normed
from mambaout_kernels.ops.conv_norm import layer_norm_act, layer_norm_act_backward

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def numbers(*shape, dtype=torch.float32, seed=5):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def given(shape, dtype):
    return [numbers(*size, dtype=dtype, seed=seed) for seed, size in enumerate((shape, shape[-1:], shape[-1:], shape))]


def plain(x, weight, bias, act="identity", eps=1e-6):
    return reference.activation(F.layer_norm(x, x.shape[-1:], weight, bias, eps), act)


def with_gradients(function, x, weight, bias, dy):
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
    y = function(*leaves)
    gradients = torch.autograd.grad(y, leaves, dy)
    return dict(zip(("y", "x", "weight", "bias"), (y.detach(), *gradients), strict=True))


def own(act="identity", eps=1e-6):
    return lambda x, weight, bias: layer_norm_act(x, None, weight, bias, eps, act)


SHAPES = [(3, 5, 48), (70, 1), (2, 3, 4, 96), (5, 10), (7, 300), (600, 24), (24,)]


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [  # float16 is bfloat16 with other conversions
        pytest.param(
            shape, dtype, id=f"{shape}-{dtype}", marks=pytest.mark.nightly if dtype == torch.float16 and i > 0 else ()
        )
        for i, shape in enumerate(SHAPES)
        for dtype in DTYPES
    ],
)
@pytest.mark.parametrize("act", ["identity", "gelu"])
def test_against_fp64(shape, dtype, act):
    tensors = given(shape, dtype)
    exact = with_gradients(lambda *t: plain(*t, act), *(t.double() for t in tensors))
    eager = with_gradients(lambda *t: plain(*t, act), *tensors)
    for name, value in with_gradients(own(act), *tensors).items():
        assert_accurate(value, eager[name], exact[name])


@pytest.mark.parametrize("act", reference.ACTIVATIONS)
def test_every_activation_and_any_strides(act):
    x, weight, bias, dy = given((2, 3, 5, 12), torch.float32)
    x, dy = (t.permute(0, 2, 1, 3) for t in (x, dy))
    found = with_gradients(own(act, 1e-3), x, weight, bias, dy)
    expected = with_gradients(lambda *t: plain(*t, act, 1e-3), x, weight, bias, dy)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


def test_a_bias_before_the_norm_has_its_gradient():
    x, weight, bias, dy = given((4, 6, 20), torch.float32)
    before = numbers(20, seed=9).requires_grad_()
    found = torch.autograd.grad(layer_norm_act(x, before, weight, bias, 1e-6, "silu"), before, dy)
    expected = torch.autograd.grad(plain(x + before, weight, bias, "silu"), before, dy)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_normed_input_comes_with_the_gradients(dtype):
    x, weight, bias, dy = given((5, 40), dtype)
    *gradients, again = layer_norm_act_backward(dy, x, weight, bias, 1e-6, "identity", True)
    assert torch.equal(again, layer_norm_act(x, None, weight, bias, 1e-6, "identity"))
    *alone, nothing = layer_norm_act_backward(dy, x, weight, bias, 1e-6, "identity", False)
    assert all(map(torch.equal, gradients, alone))
    assert nothing.numel() == 0


@pytest.mark.parametrize("kinds", [(torch.float32, torch.float16), (torch.float16, torch.float32)], ids=str)
def test_results_of_another_dtype(kinds):
    of_x, of_y = kinds
    x, weight, bias, dy = given((30, 40), torch.float32)
    x, dy = x.to(of_x), dy.to(of_y)

    def step(function, *tensors):
        leaves = [t.detach().clone().requires_grad_() for t in tensors]
        y = function(*leaves)
        return y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))

    found = step(lambda *t: layer_norm_act(t[0], None, *t[1:], 1e-6, "gelu", of_y), x, weight, bias)
    eager = step(lambda *t: plain(t[0].float(), *t[1:], "gelu").to(of_y), x, weight, bias)
    exact = step(lambda *t: plain(*t, "gelu"), *(t.double() for t in (x, weight, bias)))
    for ours, theirs, truth in zip(found, eager, exact, strict=True):
        assert_accurate(ours, theirs, truth)
    assert layer_norm_act_backward(dy, x, weight, bias, 1e-6, "identity", True)[3].dtype == of_y


def test_rows_of_one_number_have_no_deviation():
    x, weight, bias, dy = given((6, 32), torch.float32)
    found = with_gradients(own(), torch.full_like(x, 3.0), weight, bias, dy)
    expected = with_gradients(plain, torch.full_like(x, 3.0), weight, bias, dy)
    torch.testing.assert_close(found["x"], expected["x"], rtol=1e-4, atol=1e-2)  # 1 / sqrt(eps) is 1000
    torch.testing.assert_close(found["bias"], expected["bias"])


def test_a_large_mean_does_not_cancel():
    x, weight, bias, dy = given((40, 96), torch.float32)
    tensors = (x + 1000, weight, bias, dy)
    exact = with_gradients(plain, *(t.double() for t in tensors))
    assert_accurate(with_gradients(own(), *tensors)["x"], with_gradients(plain, *tensors)["x"], exact["x"])


def test_what_is_not_a_number_stays_in_its_row():
    x, weight, bias, dy = given((9, 24), torch.float32)
    x[4, 3] = float("nan")
    found = with_gradients(own("gelu"), x, weight, bias, dy)
    rows = torch.arange(9) != 4
    assert found["x"][4].isnan().all()
    assert found["x"][rows].isfinite().all()
    assert found["weight"].isnan().all()


def test_without_rows():
    x, weight, bias, dy = given((0, 16), torch.float32)
    found = with_gradients(own("gelu"), x, weight, bias, dy)
    assert (found["x"].shape, found["weight"].any(), found["bias"].any()) == ((0, 16), False, False)


def test_only_what_is_asked_for():
    x, weight, bias, dy = given((3, 16), torch.float32)
    weight.requires_grad_()
    layer_norm_act(x, None, weight, bias, 1e-6, "identity").backward(dy)
    assert x.grad is bias.grad is None
    assert weight.grad is not None


def test_blocks_of_rows_are_shared_out_equally():
    for blocks in (*range(9), 100, 4224, 4225, 25088, 50177):
        programs = block_tiles.programs_of_backward(blocks)
        turns = -(-blocks // max(programs, 1))
        assert programs * turns >= blocks
        assert (programs - 1) * turns < blocks or blocks == 0
        assert programs <= 1056


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"dy": torch.ones(3, 17)}, ValueError, r"dy must be \(3, 16\).*got \(3, 17\)"),
        ({"dy": torch.ones(3, 16).double()}, TypeError, "dy must be float32, bfloat16 or float16; got torch.float64"),
        ({"weight": torch.ones(8)}, ValueError, "weight must have shape"),
        ({"bias": torch.ones(16).double()}, TypeError, "bias must be"),
        ({"x": torch.ones(3, 16).double()}, TypeError, "x must be float32, bfloat16 or float16"),
        ({"act": "relu"}, ValueError, "act must be one of"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_bad_arguments(change, error, message):
    x, weight, bias, dy = given((3, 16), torch.float32)
    arguments = {"dy": dy, "x": x, "weight": weight, "bias": bias, "eps": 1e-6, "act": "gelu", **change}
    with pytest.raises(error, match=message):
        layer_norm_act_backward(**arguments)


def test_a_bad_dtype_of_the_result():
    x, weight, bias, _ = given((3, 16), torch.float32)
    with pytest.raises(TypeError, match="dtype must be float32, bfloat16, float16 or None"):
        layer_norm_act(x, None, weight, bias, 1e-6, "gelu", torch.float64)


def test_opcheck():
    x, weight, bias, dy = given((5, 24), torch.float32)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    torch.library.opcheck(backends.namespace.ops.layer_norm_act.default, (leaves[0], None, *leaves[1:], 1e-6, "gelu"))
    for wanted in (True, False):
        arguments = (dy, *(t.detach() for t in leaves), 1e-6, "identity", wanted)
        torch.library.opcheck(backends.namespace.ops.layer_norm_act_backward.default, arguments)


@pytest.mark.parametrize("act", [nn.GELU(), nn.SiLU(), nn.GELU(approximate="tanh"), nn.Identity(), None], ids=str)
def test_norm_and_activation_of_modules_in_one_kernel(act, monkeypatch):
    norm, x = nn.LayerNorm(24), numbers(4, 24)
    calls, run = [], block_launch.layer_norm
    monkeypatch.setattr(block_launch, "layer_norm", lambda *a, **k: calls.append(a) or run(*a, **k))
    with backends.force("triton"):
        found = normed(norm, x, act)
    expected = norm(x) if act is None else act(norm(x))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert len(calls) == 1


def test_an_activation_that_is_not_plain_is_called():
    hooked, x, norm = nn.GELU(), numbers(4, 24), nn.LayerNorm(24)
    hooked.register_forward_hook(lambda _module, _inputs, y: y + 1)
    for act in (hooked, nn.ReLU()):
        with backends.force("triton"):
            torch.testing.assert_close(normed(norm, x, act), act(norm(x)), rtol=1e-4, atol=1e-5)
