"""The bounds of generated cases: correct arithmetic is within them, and faults are not."""

import copy
import functools

import error_bounds
import pytest
import torch
from generated import DownsamplingCase, downsampling_and_outputs
from numerics import OUTPUTS, Inputs, assert_no_worse_in_any_case, eager, exact, make_inputs

from mambaout_kernels import backends
from mambaout_kernels.block import FusedGatedCNNBlock

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
            assert_no_worse_in_any_case(*four)


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
    with pytest.raises(AssertionError, match="of correct sums at most"):
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
    with pytest.raises(AssertionError, match="root mean square"):
        judge((y, *theirs[1:]), torch.float32, ["y"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_block_and_downsampling(dtype):
    """By PyTorch's own modules they are within; with the last input channel left out they are not."""
    block = FusedGatedCNNBlock(24, ls_init_value=0.5).to(dtype)
    x = torch.randn(2, 5, 6, 24).to(dtype)
    case = DownsamplingCase((2, 5, 6, 24), 20, True, "affine", "silu", dtype, "dense", 1, "", 1, False)
    conv, norm, theirs, truth = downsampling_and_outputs(case)
    bound = error_bounds.of_downsampling(conv, norm, "silu", case.x)
    assert_no_worse_in_any_case(theirs, theirs, truth, bound)
    fewer = copy.deepcopy(conv)
    fewer.weight.data[:, -1] = 0
    wrong = torch.nn.functional.silu(norm(fewer(case.x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))).detach()
    with pytest.raises(AssertionError):
        assert_no_worse_in_any_case(wrong, theirs, truth, bound)

    def run(of):
        with backends.force("reference"), torch.no_grad():
            return of(x.to(next(of.parameters()).dtype))

    theirs, truth, bound = run(block), run(copy.deepcopy(block).double()), error_bounds.of_block(block, x)
    assert_no_worse_in_any_case(theirs, theirs, truth, bound)
    fewer = copy.deepcopy(block)
    fewer.fc2.weight.data[:, -1] = 0
    with pytest.raises(AssertionError):
        assert_no_worse_in_any_case(run(fewer), theirs, truth, bound)
