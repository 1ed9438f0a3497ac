"""The compiled CPU kernels, on every instruction set that this processor has."""

import pytest
import torch
from numerics import Inputs, activation_bounds, activations_of, case, check_backend, eager, exact, make_inputs

from mambaout_kernels import backends
from mambaout_kernels.backends import cpu
from mambaout_kernels.reference import ACTIVATIONS

if cpu.unavailable():
    pytest.skip(str(cpu.unavailable()), allow_module_level=True)

from mambaout_kernels import _C

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LOW = [torch.bfloat16, torch.float16]

# N, H, W, D, C, K: each reaches a branch of its own
SHAPES = {
    "several images, odd sizes": (2, 9, 11, 40, 24, 7),
    "filter larger than the image": (2, 5, 3, 19, 19, 7),
    "one pixel": (1, 1, 1, 8, 3, 7),
    "two columns of tiles": (1, 16, 70, 20, 5, 5),
    "three strips, small filter": (2, 30, 15, 33, 16, 3),
    "no conv channels": (1, 4, 4, 10, 0, 7),
    "no identity channels": (1, 8, 9, 32, 32, 7),
    "any odd filter": (1, 6, 5, 21, 8, 9),
    "largest filter": (1, 3, 40, 12, 7, 31),
    "pointwise filter": (1, 5, 6, 9, 4, 1),
    "base's odd hidden": (2, 14, 14, 341, 128, 7),
    "four strips": (1, 56, 56, 24, 20, 7),
    "one row": (1, 1, 65, 16, 16, 7),
    "one column": (1, 33, 1, 16, 16, 7),
}


def run(inputs: Inputs, act: str = "gelu"):
    return (cpu.gated_dwconv(*inputs, act), *cpu.gated_dwconv_backward(inputs.dy, *inputs, act))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_against_fp64(isa, shape, dtype):
    for act in activations_of(dtype, shape, SHAPES.values()):
        inputs, expected = case(shape, dtype, act)
        check_backend("cpu", inputs, act, expected)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_fp32_parameters_beside_low_precision(isa, dtype):
    inputs = make_inputs(2, 9, 11, 40, 24, 7, dtype, torch.float32)
    # eager rounds the filter first; the kernel does not have to
    check_backend("cpu", inputs, "gelu")
    assert cpu.gated_dwconv_backward(inputs.dy, *inputs, "gelu")[1].dtype == torch.float32


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_results_are_rounded_to_nearest_even(isa, dtype):
    """One pixel, no activation, c = 1: every result is one product, exact in float32, rounded once."""
    D, C = 8192, 4096
    bits = {torch.bfloat16: 7, torch.float16: 10}[dtype]

    def numbers(count):
        return ((1 + torch.randint(2**bits, (count,)) / 2**bits) * (2.0 * torch.randint(2, (count,)) - 1)).to(dtype)

    g, i, dy = numbers(D), numbers(D - C), numbers(D)
    u = torch.cat((g, i, torch.ones(C, dtype=dtype))).view(1, 1, 1, 2 * D)
    inputs = Inputs(u, torch.zeros(C, 1, 1, 1, dtype=dtype), torch.zeros(C, dtype=dtype), dy.view(1, 1, 1, D))
    y, du, dweight, dbias = run(inputs, "identity")
    of_g = dy.float() * g.float()
    products = {
        "y": (y.flatten()[: D - C], g[: D - C].float() * i.float()),
        "dg": (du.flatten()[: D - C], dy[: D - C].float() * i.float()),
        "di": (du.flatten()[D : 2 * D - C], of_g[: D - C]),
        "dweight": (dweight.flatten(), of_g[D - C :]),
        "dbias": (dbias, of_g[D - C :]),
    }
    for name, (actual, product) in products.items():
        rounded = product.to(dtype)
        unit = 2.0 ** (product.abs().log2().floor() - bits)
        ties = (rounded.float() - product).abs() == unit / 2
        up = ties & (rounded.float().abs() > product.abs())
        assert 0 < up.sum() < ties.sum(), name  # both happen
        assert torch.equal(actual, rounded), name


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0x7F800001, -1], ids=hex)
def test_a_nan_of_any_bits_is_rounded_to_nan(isa, bits, dtype):
    """Rounded as a number, float32's largest NaN would be minus zero."""
    D, C = 88, 43
    inputs = make_inputs(1, 1, 1, D, C, 1, dtype, torch.float32)
    inputs.bias.copy_(torch.tensor(bits, dtype=torch.int32).view(torch.float32))
    y, du, *_ = run(inputs, "identity")
    convolved = torch.arange(D) >= D - C
    assert torch.equal(y.flatten().isnan(), convolved)
    assert torch.equal(du.flatten()[:D].isnan(), convolved)


@pytest.mark.parametrize(
    "shape", [(0, 4, 4, 8, 4, 7), (2, 0, 4, 8, 4, 7), (2, 4, 0, 8, 4, 7), (1, 4, 4, 0, 0, 7)], ids=str
)
def test_zero_sizes(isa, shape):
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


@pytest.mark.parametrize("strides", STRIDES.values(), ids=STRIDES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_strides_give_the_same_bits(isa, strides, dtype):
    inputs = make_inputs(2, 6, 9, 21, 10, 7, dtype)
    strided = Inputs(
        strides(inputs.u), inputs.weight.transpose(2, 3).contiguous().transpose(2, 3), inputs.bias, strides(inputs.dy)
    )
    dense = Inputs(strided.u.contiguous(), inputs.weight, inputs.bias, strided.dy.contiguous())
    for ours, theirs in zip(run(strided), run(dense), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("K", [1, 3, 5, 7, 9])
def test_impulse_returns_the_turned_filter(isa, K):
    weight = torch.randn(3, 1, K, K)
    u = torch.zeros(1, 2 * K + 1, 2 * K + 1, 6)
    u[..., :3] = 1  # the gate; act is the identity
    u[0, K, K, 3:] = 1
    y = cpu.gated_dwconv(u, weight, torch.zeros(3), "identity")
    R = K // 2
    window = y[0, K - R : K + R + 1, K - R : K + R + 1].permute(2, 0, 1)
    assert torch.equal(window, weight[:, 0].flip((1, 2)))
    assert y.count_nonzero() == weight.count_nonzero()


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.int16 if x.element_size() == 2 else torch.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(3, 30, 15, 40, 33, 7), (1, 14, 14, 96, 80, 7), (2, 40, 70, 20, 18, 5)], ids=str)
def test_bitwise_the_same_at_every_thread_count_and_run(isa, shape, dtype):
    inputs = make_inputs(*shape, dtype)
    torch.set_num_threads(1)
    first = run(inputs)
    for threads in (1, 2, 3, 4, 8, 2):
        torch.set_num_threads(threads)
        for ours, theirs in zip(run(inputs), first, strict=True):
            assert torch.equal(bits(ours), bits(theirs))


def test_an_image_is_the_same_alone_and_in_a_batch(isa):
    inputs = make_inputs(4, 15, 17, 40, 24, 7)
    y, du, *_ = run(inputs)
    alone = run(Inputs(inputs.u[2:3], inputs.weight, inputs.bias, inputs.dy[2:3]))
    assert torch.equal(y[2:3], alone[0])
    assert torch.equal(du[2:3], alone[1])


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("channel", [0, 3, 5, 9, 11], ids=["g of i", "g of c", "i", "c", "last c"])
def test_not_finite_where_eager_is_not_finite(isa, act, value, channel):
    inputs = make_inputs(1, 11, 12, 6, 4, 7)
    inputs.u[0, 5, 6, channel] = value
    ours, theirs = run(inputs, act), eager(inputs, act)
    for name, a, b in zip(("y", "du"), ours[:2], theirs[:2], strict=True):
        assert torch.equal(a.isfinite(), b.isfinite()), name
    # Inf times a gate whose activation underflows is Inf or NaN, as the rounding has it
    certain = inputs.u[..., :6].abs() < 3
    assert torch.equal(ours[0].isnan() & certain, theirs[0].isnan() & certain)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activation_over_all_magnitudes(isa, act):
    """C = 0 and i = 1 lays the activation bare; its slope is dg. Every exponent of fp32, both signs."""
    exponents = torch.arange(-149, 128, dtype=torch.float64).exp2()
    grid = torch.cat((torch.linspace(-20, 20, 40001, dtype=torch.float64), exponents, -exponents)).float()
    gates = torch.cat((grid, torch.tensor([0.0, -0.0, 1e-45, -1e-45, 3e38, -3e38]))).view(1, 1, -1, 1)
    inputs = Inputs(
        torch.cat((gates, torch.ones_like(gates)), dim=-1),
        torch.empty(0, 1, 1, 1),
        torch.empty(0),
        torch.ones_like(gates),
    )
    ours, truth = run(inputs, act), exact(inputs, act)
    squared = gates.abs() <= 1e18  # beyond, the closed form's x * x overflows
    for a, x, bound in zip(ours, truth, activation_bounds(gates, act, 1.2e-8), strict=False):
        assert ((a[..., :1].double() - x[..., :1]).abs() <= bound)[squared].all()


def test_inputs_are_not_written(isa):
    inputs = make_inputs(2, 9, 11, 40, 24, 7)
    before = [t.clone() for t in (*inputs, inputs.dy)]
    run(inputs)
    for now, then in zip((*inputs, inputs.dy), before, strict=True):
        assert torch.equal(now, then)


def test_large_sums_of_the_weight_gradient():
    """Ones everywhere: dbias is the number of pixels, exactly, beyond what bf16 or one fp32 chain would hold."""
    N, H, W = 4, 150, 130
    inputs = Inputs(torch.ones(N, H, W, 2), torch.zeros(1, 1, 7, 7), torch.zeros(1), torch.ones(N, H, W, 1))
    _, _, dweight, dbias = run(inputs, "identity")
    assert dbias.item() == N * H * W
    assert dweight[0, 0, 3, 3].item() == N * H * W
    assert dweight[0, 0, 0, 6].item() == N * (H - 3) * (W - 3)


def test_set_cpu_capability_refuses_what_is_not_there():
    with pytest.raises(ValueError, match=r"name must be one of: portable.*; got .avx1024."):
        _C.set_cpu_capability("avx1024")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": torch.zeros(1, 4, 4, 15)}, "u must be"),
        ({"u": torch.zeros(4, 4, 16)}, "u must be"),
        ({"u": torch.zeros(1, 4, 4, 16, dtype=torch.int32)}, "u must be float32"),
        ({"weight": torch.zeros(4, 1, 6, 6)}, "weight must be"),
        ({"weight": torch.zeros(4, 1, 33, 33)}, "weight must be"),
        ({"weight": torch.zeros(9, 1, 7, 7), "bias": torch.zeros(9)}, "weight must have at most"),
        ({"weight": torch.zeros(4, 1, 7, 7, dtype=torch.float16)}, "weight must have the dtype"),
        ({"bias": torch.zeros(5)}, "bias must be"),
        ({"act": 4}, "act must be"),
        ({"dy": torch.zeros(1, 4, 5, 8)}, "dy must be"),
        ({"dy": torch.zeros(1, 4, 4, 8, dtype=torch.bfloat16)}, "dy must have the dtype"),
    ],
)
def test_the_compiled_op_checks_for_itself(change, message):
    arguments = {
        "dy": torch.zeros(1, 4, 4, 8),
        "u": torch.zeros(1, 4, 4, 16),
        "weight": torch.zeros(4, 1, 7, 7),
        "bias": torch.zeros(4),
        "act": 0,
    } | change
    native = torch.ops.mambaout_kernels
    with pytest.raises(RuntimeError, match=message):
        native.gated_dwconv_backward_cpu(*arguments.values())
    if "dy" not in change:
        del arguments["dy"]
        with pytest.raises(RuntimeError, match=message):
            native.gated_dwconv_cpu(*arguments.values())


def test_status_says_that_the_kernels_are_there():
    assert backends.status()["cpu"] is None
    assert _C.cpu_capability() in _C.build_info()["isas"]
