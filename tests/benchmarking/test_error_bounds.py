"""The bounds of errors: correct arithmetic is within them, and faults are not."""

import copy
import functools

import pytest
import torch
from generated import DownsamplingCase, downsampling_and_outputs
from numerics import OUTPUTS, Inputs, assert_accurate, eager, exact, make_inputs

from mambaout_kernels import backends
from mambaout_kernels.benchmarking import accuracy, error_bounds
from mambaout_kernels.benchmarking.inputs import enlivened
from mambaout_kernels.nn.block import FusedGatedCNNBlock

SHAPE = (2, 11, 13, 24, 16, 7)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@functools.cache
def case(dtype):
    inputs = make_inputs(*SHAPE, dtype)
    return inputs, eager(inputs, "gelu"), exact(inputs, "gelu")


def judge(found, dtype, outputs=OUTPUTS):
    inputs, theirs, truth = case(dtype)
    bounds = error_bounds.of_op(*inputs, inputs.dy, "gelu")
    for output, *four in zip(OUTPUTS, found, theirs, truth, bounds, strict=True):
        if output in outputs:
            assert_accurate(*four)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_truth_rounded_once_is_within(dtype):
    judge([t.to(dtype) for t in case(dtype)[2]], dtype)


def drop_a_tap(inputs):
    weight = inputs.weight.clone()
    weight[:, 0, 0, 6] = 0
    return Inputs(inputs.u, weight, inputs.bias, inputs.dy)


def turn_the_filter(inputs):
    return Inputs(inputs.u, inputs.weight.flip(2), inputs.bias, inputs.dy)


def miss_a_row(inputs):
    dy = inputs.dy.clone()
    dy[:, 3] = 0
    return Inputs(inputs.u, inputs.weight, inputs.bias, dy)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("fault", "outputs"),
    [(drop_a_tap, ["y", "du"]), (turn_the_filter, ["y", "du"]), (miss_a_row, ["du", "dweight", "dbias"])],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_faults_are_beyond(fault, outputs, dtype):
    """Each output alone: computed exactly, but of something else."""
    found = [t.to(dtype) for t in exact(fault(case(dtype)[0]), "gelu")]
    for output in outputs:
        with pytest.raises(AssertionError):
            judge(found, dtype, [output])


def test_one_wrong_element_is_beyond():
    """By a few roundings of its own, where others of the tensor are a thousand times as large."""
    inputs, _, truth = case(torch.float32)
    y = truth[0].float()
    bound = error_bounds.of_op(*inputs, inputs.dy, "gelu")[0]
    place = (bound / (1 + truth[0].abs())).flatten().argmin()
    y.view(-1)[place] += 2 * bound.flatten()[place].float()
    with pytest.raises(AssertionError, match="what correct arithmetic can be off by"):
        judge((y, *case(torch.float32)[1][1:]), torch.float32, ["y"])


def test_sums_in_fewer_bits_are_beyond():
    """bf16 sums of bf16 products, as they would be without an fp32 accumulator."""
    inputs, theirs, _ = case(torch.bfloat16)
    D, C = SHAPE[3:5]
    c = torch.nn.functional.pad(inputs.u[..., 2 * D - C :], (0, 0, 3, 3, 3, 3))
    s = inputs.bias.clone()
    for kh in range(7):
        for kw in range(7):
            s = s + inputs.weight[:, 0, kh, kw] * c[:, kh : kh + SHAPE[1], kw : kw + SHAPE[2]]
    y = theirs[0].clone()
    y[..., D - C :] = torch.nn.functional.gelu(inputs.u[..., D - C : D]) * s
    with pytest.raises(AssertionError):
        judge((y, *theirs[1:]), torch.bfloat16, ["y"])


def test_an_error_within_the_bounds_but_far_beyond_eagers_fails():
    """Of n terms the bound grows with n; errors of many elements that do so too are not those of eager's sums."""
    inputs, theirs, truth = case(torch.float32)
    bound = error_bounds.of_op(*inputs, inputs.dy, "gelu")[0]
    y = (truth[0] + 0.7 * bound * torch.randn(truth[0].shape).sign()).float()
    with pytest.raises(AssertionError, match="mean error"):
        judge((y, *theirs[1:]), torch.float32, ["y"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_block_and_downsampling(dtype):
    """By PyTorch's own modules they are within; with the last input channel left out they are not."""
    block = FusedGatedCNNBlock(24, ls_init_value=0.5).to(dtype)
    x = torch.randn(2, 5, 6, 24).to(dtype)
    case = DownsamplingCase((2, 5, 6, 24), 20, True, "affine", "silu", dtype, "dense", 1, "", 1, False)
    conv, norm, theirs, truth = downsampling_and_outputs(case)
    bound = error_bounds.of_downsampling((conv, norm, "silu"), case.x)
    assert_accurate(theirs, theirs, truth, bound)
    fewer = copy.deepcopy(conv)
    fewer.weight.data[:, -1] = 0
    wrong = torch.nn.functional.silu(norm(fewer(case.x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))).detach()
    with pytest.raises(AssertionError):
        assert_accurate(wrong, theirs, truth, bound)

    def run(of):
        with backends.force("reference"), torch.no_grad():
            return of(x.to(next(of.parameters()).dtype))

    theirs, truth, bound = run(block), run(copy.deepcopy(block).double()), error_bounds.of_block(block, x)["y"]
    assert_accurate(theirs, theirs, truth, bound)
    fewer = copy.deepcopy(block)
    fewer.fc2.weight.data[:, -1] = 0
    with pytest.raises(AssertionError):
        assert_accurate(run(fewer), theirs, truth, bound)


def results_of(block, x, dy, low=None):
    """y and every gradient, by PyTorch's modules."""
    x = x.detach().requires_grad_()
    names, parameters = zip(*block.named_parameters(), strict=True)
    with backends.force("reference"), torch.autocast("cpu", low or torch.bfloat16, enabled=low is not None):
        y = block(x)
    gradients = torch.autograd.grad(y, [x, *parameters], dy.to(y.dtype))
    return {"y": y.detach(), **dict(zip(("x", *names), gradients, strict=True))}


TRAINED = {
    "float32": (torch.float32, None, {"ls_init_value": 0.5}),
    "bfloat16": (torch.bfloat16, None, {}),
    "autocast": (torch.float32, torch.bfloat16, {"ls_init_value": 0.5}),
    "RMSNorm": (torch.float32, None, {"norm_layer": torch.nn.RMSNorm}),
    "no norm, no convolution": (torch.float32, None, {"norm_layer": lambda _: torch.nn.Identity(), "conv_ratio": 0.0}),
}


@pytest.mark.parametrize("precision", TRAINED)
def test_gradients_of_a_block(precision):
    """PyTorch's own are within; with a fifth of the pixels left out, or a residual forgotten, they are not.

    Through the layers of a block bounds in two bytes are wide, and some gradients have few elements: together with the
    others these show.
    """
    dtype, low, arguments = TRAINED[precision]
    block = enlivened(FusedGatedCNNBlock(24, **arguments)).to(dtype)
    x, dy = torch.randn(2, 5, 6, 24).to(dtype), torch.randn(2, 5, 6, 24).to(dtype)
    exact_block = copy.deepcopy(block).double()
    exact = results_of(exact_block, x.double(), dy.double())
    eager, bounds = results_of(block, x, dy, low), error_bounds.of_block(block, x, dy, low)
    assert exact.keys() == bounds.keys()
    for name, truth in exact.items():
        assert_accurate(eager[name], eager[name], truth, bounds[name])
    fewer = dy.double()
    fewer[:, 2] = 0
    wrong = {**results_of(exact_block, x.double(), fewer), "y": exact["y"] - x.double()}
    for name, truth in exact.items():
        results = {**eager, name: wrong[name].to(eager[name].dtype)}
        alone = accuracy.compare(name, results[name], eager[name], truth, bounds[name])
        assert not (alone.passed and all(one.passed for one in accuracy.compare_model(results, eager, exact)))


@pytest.mark.parametrize("name", ["y", "x", "norm.weight", "norm.bias", "layer.weight", "layer.bias"])
def test_norm_and_linear(name):
    """Computed in float32 they are within, but not with an eps of another size, nor of other pixels."""
    norm, layer = enlivened(torch.nn.LayerNorm(12, eps=1e-3)), enlivened(torch.nn.Linear(12, 20))
    x, dy = torch.randn(40, 12), torch.randn(40, 20)

    def results(norm, layer, x, dy):
        x = x.requires_grad_()
        y = layer(norm(x))
        gradients = torch.autograd.grad(y, [x, *norm.parameters(), *layer.parameters()], dy)
        named = dict(zip(("x", "norm.weight", "norm.bias", "layer.weight", "layer.bias"), gradients, strict=True))
        return {"y": y.detach(), **named}[name]

    bound = error_bounds.of_norm_linear(norm, layer, x, dy)[name]
    theirs = results(norm, layer, x.clone(), dy)
    double = copy.deepcopy(norm).double(), copy.deepcopy(layer).double(), x.double(), dy.double()
    truth = results(*double)
    assert_accurate(theirs, theirs, truth, bound)
    other_norm = copy.deepcopy(double[0])
    other_norm.eps = 1.1e-3
    wrong = results(other_norm, *double[1:3], double[3] * (1 + 1e-4 * (name in ("norm.bias", "layer.bias"))))
    assert not accuracy.compare(name, wrong.float(), theirs, truth, bound).passed


@pytest.mark.parametrize("terms", [1, 96, 4096])
def test_products(terms):
    a, b, bias = torch.randn(30, terms), torch.randn(terms, 20), torch.randn(20)
    bound = error_bounds.of_product(a, b, bias)
    theirs, truth = torch.addmm(bias, a, b), torch.addmm(bias.double(), a.double(), b.double())
    assert_accurate(theirs, theirs, truth, bound)
    without_bias, without_a_term = truth - bias, truth - a[:, -1:].double() * b[-1:]
    for wrong in (without_bias, without_a_term):
        assert not accuracy.compare("y", wrong.float(), theirs, truth, bound).passed
