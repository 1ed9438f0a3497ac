"""The linear layer of training: its products on every instruction set, against fp64, and the op around them."""

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_accurate
from torch import nn
from watch import Watch

from mambaout_kernels import FusedGatedCNNBlock, backends
from mambaout_kernels.backends import cpu
from mambaout_kernels.benchmarking import error_bounds
from mambaout_kernels.nn.linear import linear as call
from mambaout_kernels.ops.linear import linear, linear_dweight, linear_dx

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))
ops = torch.ops.mambaout_kernels

# rows, in_features, out_features: a stage; tails of tiles, panels and depths; one of each; nothing
SHAPES = [
    (49, 96, 512),
    (341, 300, 70),
    (15, 257, 33),
    (700, 130, 31),
    (3, 600, 65),
    (1, 1, 1),
    (5, 1, 40),
    (1, 40, 3),
    (0, 8, 5),
    (6, 0, 5),
    (6, 8, 0),
]

LAYOUTS = {
    "dense": lambda t: t,
    "columns of a wider one": lambda t: torch.cat((t, t), dim=1)[:, : t.shape[1]],
    "transposed": lambda t: t.t().contiguous().t(),
    "misaligned": lambda t: torch.cat((t.new_zeros(1), t.flatten()))[1:].view(t.shape),
    "every other row": lambda t: t.repeat_interleave(2, dim=0)[::2],
    "one row for all": lambda t: t[:1].expand(t.shape) if t.shape[0] else t,
}


def tensors(rows, inputs, outputs, layout="dense"):
    change = LAYOUTS[layout]
    x, dy = torch.randn(rows, inputs), torch.randn(rows, outputs)
    return change(x), change(torch.randn(outputs, inputs) / max(inputs, 1) ** 0.5), torch.randn(outputs), change(dy)


def products(x, weight, bias, dy, of):
    """(y, y with stream_weight, dx, dweight, dbias) by `of`: ours, or PyTorch's."""
    if of == "ours":
        y, of_rows = (ops.linear(x, weight, bias, stream_weight) for stream_weight in (False, True))
        return y, of_rows, ops.linear_dx(dy, weight), *ops.linear_dweight(dy, x)
    return F.linear(x, weight, bias), F.linear(x, weight, bias), dy @ weight, dy.t() @ x, dy.sum(dim=0)


def bounds(x, weight, bias, dy):
    """Of the errors of `products`."""
    y = error_bounds.of_product(x, weight.t(), bias)
    of_bias = error_bounds.of_product(dy.t(), dy.new_ones(len(dy), 1))[:, 0]
    return y, y, error_bounds.of_product(dy, weight), error_bounds.of_product(dy.t(), x), of_bias


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_fp64(isa, shape, layout):
    given = tensors(*shape, layout)
    before = [t.clone() for t in given]
    exact = products(*(t.double() for t in given), of="PyTorch")
    eager = products(*given, of="PyTorch")
    for ours, *beside in zip(products(*given, of="ours"), eager, exact, bounds(*given), strict=True):
        assert ours.is_contiguous()
        assert_accurate(ours, *beside)
    assert all(torch.equal(now, then) for now, then in zip(given, before, strict=True))


@pytest.mark.parametrize("depth", [4096, 25088])
def test_long_sums(isa, depth):
    """As many terms as a weight's gradient has pixels, none of which may cancel."""
    given = [t.abs() for t in tensors(depth, 5, 37)]
    eager, exact = products(*given, of="PyTorch"), products(*(t.double() for t in given), of="PyTorch")
    ours = ops.linear_dweight(given[3], given[0])
    for own, *beside in zip(ours, *(results[-2:] for results in (eager, exact, bounds(*given))), strict=True):
        assert_accurate(own, *beside)


@pytest.mark.parametrize("shape", [(3136, 96, 512), (49, 576, 300)], ids=str)
def test_same_bits_at_every_number_of_threads_and_in_every_batch(isa, shape):
    x, weight, bias, dy = tensors(*shape)
    results = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        results.append(products(x, weight, bias, dy, of="ours"))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    part = slice(7, 29)
    assert torch.equal(ops.linear(x[part], weight, bias, False), results[0][0][part])
    assert torch.equal(ops.linear(x[part], weight, bias, True), results[0][1][part])
    assert torch.equal(ops.linear_dx(dy[part], weight), results[0][2][part])


@pytest.mark.parametrize("stream_weight", [False, True])
def test_nan_and_infinity_stay_where_they_belong(isa, stream_weight):
    x, weight, bias, _ = tensors(20, 40, 50)
    x[3, 7], x[11, 0] = float("nan"), float("inf")
    y = ops.linear(x, weight, bias, stream_weight)
    assert y[3].isnan().all()
    assert (~y[11].isfinite()).all()
    others = [row for row in range(20) if row not in (3, 11)]
    assert y[others].isfinite().all()


@pytest.mark.parametrize("shape", [(6,), (2, 3, 4, 6), (0, 6)], ids=str)
def test_leading_dimensions(shape):
    x = torch.randn(shape, requires_grad=True)
    weight, bias = torch.randn(5, 6, requires_grad=True), torch.randn(5, requires_grad=True)
    ours, theirs = linear(x, weight, bias), F.linear(x, weight, bias)
    torch.testing.assert_close(ours, theirs)
    dy = torch.randn_like(ours)
    for a, b in zip(*(torch.autograd.grad(y, (x, weight, bias), dy) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b)


def test_opcheck():
    x, weight, bias, dy = (t.requires_grad_() for t in tensors(6, 5, 4))
    x, dy = x.view(2, 3, 5), dy.view(2, 3, 4)
    torch.library.opcheck(ops.linear.default, (x.detach().requires_grad_(), weight, bias))
    torch.library.opcheck(ops.linear.default, (x.detach(), weight, None))
    torch.library.opcheck(ops.linear_dx.default, (dy.detach().requires_grad_(), weight))
    torch.library.opcheck(ops.linear_dweight.default, (dy.detach().requires_grad_(), x.detach().requires_grad_()))


def test_differentiable_three_times(monkeypatch):
    monkeypatch.setattr(cpu, "instruction_set", lambda: "avx2")  # by the ops, also where these are not faster
    x, weight, bias, dy = (t.requires_grad_() for t in tensors(6, 5, 4))

    def derivatives(of):
        leaves = (x, weight, bias, dy)
        value = of(x, weight, bias).square().mul(dy).sum()
        found = []
        for _ in range(3):
            gradients = torch.autograd.grad(value, leaves, create_graph=True, allow_unused=True)
            found += [g for g in gradients if g is not None]
            value = sum(g.pow(3).sum() for g in gradients if g is not None)
        return found

    for ours, theirs in zip(derivatives(linear), derivatives(F.linear), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("needed", range(3))
def test_only_the_gradients_asked_for(needed):
    leaves = [t.requires_grad_(i == needed) for i, t in enumerate(tensors(6, 5, 4)[:3])]
    linear(*leaves).sum().backward()
    assert [t.grad is not None for t in leaves] == [i == needed for i in range(3)]


def test_per_sample_gradients_on_the_reference():
    """PyTorch's function transforms do not differentiate custom operators."""
    block = FusedGatedCNNBlock(8)
    parameters = dict(block.named_parameters())
    x = torch.randn(3, 5, 5, 8)

    def loss(p, image):
        return torch.func.functional_call(block, p, (image[None],)).square().sum()

    with backends.force("reference"):
        gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for i in range(3):
        alone = torch.autograd.grad(loss(parameters, x[i]), list(parameters.values()))
        for (name, gradient), expected in zip(gradients.items(), alone, strict=True):
            torch.testing.assert_close(gradient[i], expected, msg=name)


@pytest.mark.parametrize(
    ("f", "arguments", "message"),
    [
        (ops.linear, ((3, 5), (4, 6), None), r"x must be \(\.\.\., 6\).* 5"),
        (ops.linear, ((3, 5), (4, 5, 1), None), r"weight must be \(out_features, in_features\).* 3 dimensions"),
        (ops.linear, ((3, 5), (4, 5), (5,)), r"bias must be \(4,\)"),
        (ops.linear, ((), (4, 5), None), "x must have a dimension of features"),
        (ops.linear_dx, ((3, 5), (4, 5)), r"dy must be \(\.\.\., 4\).* 5"),
        (ops.linear_dx, ((3, 5), (5,)), "weight must be"),
        (ops.linear_dweight, ((3, 5), (4, 5)), "dy must have the leading dimensions of x"),
        (ops.linear_dweight, ((3, 5), (3, 1, 5)), "dy must have the leading dimensions of x"),
    ],
)
def test_wrong_shapes(f, arguments, message):
    with pytest.raises(RuntimeError, match=message):
        f(*(None if shape is None else torch.randn(shape) for shape in arguments))


@pytest.mark.parametrize("position", range(3))
def test_wrong_dtype(position):
    given, names = [torch.randn(3, 5), torch.randn(4, 5), torch.randn(4)], ("x", "weight", "bias")
    given[position] = given[position].double()
    with pytest.raises(RuntimeError, match=rf"{names[position]} must be float32"):
        ops.linear(*given)


def is_ours(f):
    """Whether the compiled product runs."""
    with Watch() as watch:
        f()
    return "mambaout_kernels::linear" in watch.names


def test_which_calls_are_ours():
    fc, x = nn.Linear(6, 4), torch.randn(3, 6)
    for of, ours in (
        (lambda: call(fc, x), True),
        (lambda: call(fc.double(), x.double()), False),
        (lambda: call(fc.float(), x), True),
        (lambda: call(nn.Sequential(fc), x), False),
        (lambda: call(fc.bfloat16(), x.bfloat16()), False),
    ):
        assert is_ours(of) == ours
    fc.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert call(fc, x).dtype == torch.bfloat16
        assert not is_ours(lambda: call(fc, x))
    with backends.force("reference"):
        assert not is_ours(lambda: call(fc, x))
    handle = fc.register_forward_hook(lambda *_: None)
    assert not is_ours(lambda: call(fc, x))
    handle.remove()
    assert is_ours(lambda: call(fc, x))
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert not is_ours(lambda: call(fc, x))
    finally:
        handle.remove()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        call(fc, torch.randn(3, 5))  # PyTorch's own error


def test_without_fast_instructions_pytorch_multiplies():
    before = cpu.instruction_set()
    cpu.module.set_cpu_capability("portable")
    try:
        assert not is_ours(lambda: call(nn.Linear(6, 4), torch.randn(3, 6)))
    finally:
        cpu.module.set_cpu_capability(before)


@pytest.mark.parametrize("f", [linear_dx, linear_dweight])
def test_gradients_in_other_dtypes_are_pytorchs(f):
    a, b = torch.randn(5, 4, dtype=torch.float64), torch.randn((4, 6) if f is linear_dx else (5, 6)).double()
    found = f(a, b)
    expected = a @ b if f is linear_dx else (a.t() @ b, a.sum(dim=0))
    torch.testing.assert_close(found, expected)


def test_devices_of_which_autocast_knows_nothing():
    """Counting multiplications, or laying out a model, runs it on meta tensors."""
    block = FusedGatedCNNBlock(8).to("meta")
    assert block(torch.empty(1, 5, 5, 8, device="meta")).shape == (1, 5, 5, 8)
