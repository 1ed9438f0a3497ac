"""The same bits in every run, at every number of threads, and for an image whatever it comes with.

The op's own on every shape of task are in test_cpu_kernels.py; these are of whole calls: op, whole block, model.
"""

import functools

import pytest
import torch
from numerics import OUTPUTS, Inputs, assert_no_worse, eager, exact, make_inputs

import mambaout_kernels as mk
from mambaout_kernels import whole_block
from mambaout_kernels.backends import cpu

if cpu.unavailable():
    pytest.skip(str(cpu.unavailable()), allow_module_level=True)

THREADS = range(1, 9)
DTYPES = [torch.float32, torch.bfloat16]


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.uint8)


def op(inputs: Inputs):
    return (cpu.gated_dwconv(*inputs, "gelu"), *cpu.gated_dwconv_backward(inputs.dy, *inputs, "gelu"))


def make_block(dtype, dim=48):
    torch.manual_seed(1)
    return mk.FusedGatedCNNBlock(dim, ls_init_value=0.5).to(dtype).eval()


def make_x(dtype, dim=48):
    return torch.randn(5, 19, 23, dim, generator=torch.Generator().manual_seed(2)).to(dtype)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16, torch.float64], ids=str)
def test_op_at_every_number_of_threads_and_in_every_run(isa, dtype):
    inputs = make_inputs(3, 29, 33, 72, 48, 7, dtype)
    torch.set_num_threads(1)
    first = op(inputs)
    for threads in (*THREADS, 1):
        torch.set_num_threads(threads)
        for name, now, then in zip(OUTPUTS, op(inputs), first, strict=True):
            assert torch.equal(bits(now), bits(then)), f"{name} with {threads} threads"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_block_at_every_number_of_threads_and_in_every_run(isa, dtype):
    block, x = make_block(dtype), make_x(dtype)
    with torch.no_grad():
        assert whole_block.applies(block, x)
        torch.set_num_threads(1)
        first = block(x)
        for threads in (*THREADS, 1):
            torch.set_num_threads(threads)
            assert torch.equal(bits(block(x)), bits(first)), f"with {threads} threads"


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_image_3_of_a_batch_is_image_3_alone(isa, dtype, threads):
    torch.set_num_threads(threads)
    inputs = make_inputs(5, 19, 23, 72, 48, 7, dtype)
    y, du, *_ = op(inputs)
    alone = op(Inputs(inputs.u[3:4], inputs.weight, inputs.bias, inputs.dy[3:4]))
    assert torch.equal(bits(y[3:4]), bits(alone[0]))
    assert torch.equal(bits(du[3:4]), bits(alone[1]))
    block, x = make_block(dtype), make_x(dtype)
    with torch.no_grad():
        assert torch.equal(bits(block(x)[3:4]), bits(block(x[3:4])))
        halves = torch.cat((block(x[:2]), block(x[2:])))
        assert torch.equal(bits(halves), bits(block(x)))


@functools.cache
def expected(dtype):
    inputs = make_inputs(3, 29, 33, 72, 48, 7, dtype)
    return inputs, eager(inputs, "gelu"), exact(inputs, "gelu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_instruction_sets_differ_within_the_tolerance_only(isa, dtype):
    """Each within the policy of fp64, so any two within twice of it of each other."""
    inputs, theirs_of, truth_of = expected(dtype)
    for ours, theirs, truth in zip(op(inputs), theirs_of, truth_of, strict=True):
        assert_no_worse(ours, theirs, truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_training_step_of_a_model_is_the_same_again(dtype):
    """The package's ops in it; the library's matrix products beside them are PyTorch's, at one number of threads."""
    torch.set_num_threads(2)

    def step():
        torch.manual_seed(3)
        model = mk.create_model("test_mambaout", num_classes=5).to(dtype)
        model(torch.randn(3, 3, 64, 64).to(dtype)).float().square().sum().backward()
        return [p.grad for p in model.parameters()]

    for now, then in zip(step(), step(), strict=True):
        assert torch.equal(bits(now), bits(then))
