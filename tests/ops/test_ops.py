"""The op as PyTorch sees it: schema, autograd, compilers, autocast."""

import subprocess

import pytest
import torch
from numerics import assert_accurate, expected_of, make_inputs
from processes import python

from mambaout_kernels import backends, gated_dwconv, reference

OP = torch.ops.mambaout_kernels.gated_dwconv.default
BACKWARD = torch.ops.mambaout_kernels.gated_dwconv_backward.default
SHAPE = (2, 6, 7, 10, 4, 7)


def leaves(*shape, dtype=torch.float32, weight_dtype=None):
    inputs = make_inputs(*(shape or SHAPE), dtype, weight_dtype)
    return [t.requires_grad_() for t in inputs], inputs.dy


def test_schemas():
    assert str(OP._schema) == "mambaout_kernels::gated_dwconv(Tensor u, Tensor weight, Tensor bias, str act) -> Tensor"
    assert str(BACKWARD._schema).endswith(
        "gated_dwconv_backward(Tensor dy, Tensor u, Tensor weight, Tensor bias, str act) -> (Tensor, Tensor, Tensor)"
    )


@pytest.mark.parametrize(
    ("dtype", "act"),
    [(torch.float32, "gelu"), pytest.param(torch.bfloat16, "silu", marks=pytest.mark.nightly)],
    ids=str,
)
def test_opcheck(dtype, act):
    tensors, dy = leaves(2, 6, 7, 10, 4, 3, dtype=dtype)  # tracing takes long for each tap of the filter
    torch.library.opcheck(OP, (*tensors, act), rtol=3e-2, atol=3e-2)
    torch.library.opcheck(BACKWARD, (dy, *tensors, act), rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", ["dense", "expanded dy", "permuted", "channel stride 2"])
def test_autograd_against_fp64(dtype, layout):
    inputs = make_inputs(*SHAPE, dtype)
    if layout == "expanded dy":
        inputs.dy = inputs.dy[:1, :1, :1].expand(inputs.dy.shape)
    elif layout == "permuted":
        inputs.u = inputs.u.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
        inputs.dy = inputs.dy.permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1)
    elif layout == "channel stride 2":
        inputs.u = inputs.u.repeat_interleave(2, dim=3)[..., ::2]
    tensors = [t.detach().requires_grad_() for t in inputs]
    y = gated_dwconv(*tensors, "gelu")
    ours = (y, *torch.autograd.grad(y, tensors, inputs.dy))
    for a, *beside in zip(ours, *expected_of(inputs, "gelu"), strict=True):
        assert_accurate(a.detach(), *beside)


def test_gradcheck_twice():
    tensors = [t.requires_grad_() for t in make_inputs(1, 3, 4, 3, 2, 3, torch.float64)]
    assert torch.autograd.gradcheck(lambda *a: gated_dwconv(*a, "gelu"), tensors)
    assert torch.autograd.gradgradcheck(lambda *a: gated_dwconv(*a, "gelu"), tensors)


def test_backward_takes_rows():
    """What torch.compile keeps of u, and gives back."""
    tensors = make_inputs(2, 3, 4, 6, 2, 3, torch.float64)
    u, weight, bias = tensors
    dy = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    raw = torch.ops.mambaout_kernels.gated_dwconv_backward
    expected, rows = raw(dy, u, weight, bias, "gelu"), raw(dy, u.flatten(0, 2), weight, bias, "gelu")
    assert rows[0].shape == (24, 12)
    assert all(torch.equal(a.flatten(), b.flatten()) for a, b in zip(rows, expected, strict=True))
    leaves = [t.requires_grad_() for t in (dy, u.flatten(0, 2), weight, bias)]
    assert torch.autograd.gradcheck(lambda *a: raw(*a, "gelu"), leaves)
    for bad in (u.flatten(0, 2)[1:], u.flatten(0, 2).detach().to("meta")[1:]):
        like = dy if bad.device.type == "cpu" else dy.detach().to("meta")
        given = [t.detach().to(bad.device) for t in (weight, bias)]
        with pytest.raises(
            ValueError, match=r"u must have a row for each pixel of dy, \(2, 3, 4, 6\); got .* \(23, 12\)"
        ):
            raw(like, bad, *given, "gelu")
    with pytest.raises(ValueError, match="u must have a row"):
        raw(dy.detach()[0], u.detach().flatten(0, 2), weight.detach(), bias.detach(), "gelu")


def test_saves_the_inputs_and_nothing_else():
    tensors, _ = leaves()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        gated_dwconv(*tensors)
    assert sorted(saved) == sorted(t.data_ptr() for t in tensors)


def test_retained_graph_gives_the_same_again_and_inputs_stay():
    tensors, dy = leaves()
    before = [t.detach().clone() for t in tensors]
    y = gated_dwconv(*tensors)
    first = torch.autograd.grad(y, tensors, dy, retain_graph=True)
    second = torch.autograd.grad(y, tensors, dy)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


@pytest.mark.parametrize("needed", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1)], ids=str)
def test_only_the_gradients_asked_for(needed):
    tensors, dy = leaves()
    full = torch.autograd.grad(gated_dwconv(*tensors), tensors, dy)
    some = [t.detach().requires_grad_(bool(n)) for t, n in zip(tensors, needed, strict=True)]
    gated_dwconv(*some).backward(dy)
    for t, n, g in zip(some, needed, full, strict=True):
        assert torch.equal(t.grad, g) if n else t.grad is None


@pytest.mark.parametrize("shape", [(0, 4, 4, 8, 4, 7), (2, 0, 4, 8, 4, 7), (2, 4, 4, 8, 0, 7)], ids=str)
def test_zero_sizes(shape):
    tensors, dy = leaves(*shape)
    y = gated_dwconv(*tensors)
    assert y.shape == dy.shape
    y.sum().backward()
    assert tensors[0].grad.shape == tensors[0].shape
    assert tensors[1].grad.count_nonzero() == 0


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mixed_dtypes_each_gradient_in_its_tensors_dtype(weight_dtype, bias_dtype):
    inputs = make_inputs(*SHAPE, torch.bfloat16)
    tensors = [
        t.to(d).requires_grad_() for t, d in zip(inputs, (torch.bfloat16, weight_dtype, bias_dtype), strict=True)
    ]
    y = gated_dwconv(*tensors)
    y.backward(inputs.dy)
    assert y.dtype == torch.bfloat16
    for t, b, *beside in zip(tensors, *(results[1:] for results in expected_of(inputs, "gelu")), strict=True):
        assert t.grad.dtype == t.dtype
        assert_accurate(t.grad.to(b.dtype), b, *beside)


# By inductor whole models are compiled in test_compilers.py.
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.nightly)])
def test_compiles_without_a_graph_break(compiler):
    tensors, dy = leaves()

    def step(u, weight, bias):
        return gated_dwconv(2 * u, weight, bias, "silu") + 1

    compiled = torch.compile(step, fullgraph=True, backend=compiler, dynamic=True)
    ours, theirs = compiled(*tensors), step(*tensors)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(torch.autograd.grad(ours, tensors, dy), torch.autograd.grad(theirs, tensors, dy), strict=True):
        torch.testing.assert_close(a, b)


def test_forced_reference_is_plain_pytorch():
    tensors, _ = leaves()
    with backends.force("reference"):
        y = gated_dwconv(*tensors)
    assert "gated_dwconv" not in y.grad_fn.name().lower()
    assert torch.equal(y, reference.gated_dwconv(*tensors, "gelu"))


def test_fake_tensors_have_the_right_shape_and_dtype():
    with torch._subclasses.fake_tensor.FakeTensorMode():
        y = gated_dwconv(torch.empty(2, 5, 6, 20, dtype=torch.bfloat16), torch.empty(4, 1, 7, 7), torch.empty(4))
    assert y.shape == (2, 5, 6, 10)
    assert y.dtype == torch.bfloat16


def test_without_the_compiled_module_the_reference_runs_with_one_warning():
    code = """
import sys, warnings
sys.modules["mambaout_kernels._C"] = None
warnings.simplefilter("always")
with warnings.catch_warnings(record=True) as caught:
    import torch, mambaout_kernels as m
    u, w, b = torch.randn(1, 4, 4, 8, requires_grad=True), torch.randn(2, 1, 3, 3), torch.randn(2)
    for _ in range(3):
        m.gated_dwconv(u, w, b).sum().backward()
ours = [str(w.message) for w in caught if "mambaout_kernels" in str(w.message)]
assert len(ours) == 1 and "reference" in ours[0] and "pip install" in ours[0], ours
assert "compiled module" in m.backends.status()["cpu"]
"""
    subprocess.run([python(), "-c", code], check=True, timeout=120)
