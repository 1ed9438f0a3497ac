"""The same bits in every run, at every number of threads, and for an image whatever it comes with.

The op's own on every shape of task are in test_cpu_kernels.py; these are of whole calls: op, and on
packed weights block, stem, downsampling, model.
"""

import functools
from collections import Counter

import pytest
import torch
from numerics import OUTPUTS, Inputs, assert_accurate, expected_of, make_inputs
from torch import nn
from watch import Watch

import mambaout_kernels as mk
from mambaout_kernels.backends import cpu
from mambaout_kernels.benchmarking.inputs import enlivened
from mambaout_kernels.nn.block import LAYER_NORM
from mambaout_kernels.nn.downsample import Downsample, Stem

if cpu.unavailable():
    pytest.skip(str(cpu.unavailable()), allow_module_level=True)

THREADS = range(1, 9)
DTYPES = [torch.float32, torch.bfloat16]


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.uint8)


def op(inputs: Inputs):
    return (cpu.gated_dwconv(*inputs, "gelu"), *cpu.gated_dwconv_backward(inputs.dy, *inputs, "gelu"))


def image(*size):
    return torch.randn(5, *size, generator=torch.Generator().manual_seed(2))


# What runs as one op for inference, and a model of them; how often which op runs.
PARTS = {
    "block": (lambda: mk.FusedGatedCNNBlock(48, ls_init_value=0.5), image(19, 23, 48), {"gated_cnn_blocks": 1}),
    "wide block": (lambda: mk.FusedGatedCNNBlock(20, kernel_size=3), image(4, 170, 20), {"gated_cnn_blocks": 1}),
    "stem": (lambda: Stem(3, 40, True, LAYER_NORM, nn.GELU), image(3, 37, 50), {"conv3x3s2": 2}),
    "stem without norm": (lambda: Stem(3, 40, False, LAYER_NORM, nn.SiLU), image(3, 37, 50), {"conv3x3s2": 2}),
    "downsample": (lambda: Downsample(40, 72, False, LAYER_NORM), image(19, 23, 40), {"conv3x3s2": 1}),
    "downsample, norm first": (lambda: Downsample(40, 72, True, LAYER_NORM), image(19, 23, 40), {"conv3x3s2": 1}),
    "model": (
        lambda: mk.create_model("test_mambaout", num_classes=5),
        image(3, 70, 90),
        {"gated_cnn_blocks": 4, "conv3x3s2": 5, "head": 1},
    ),
}


@pytest.fixture(params=PARTS)
def part(request):
    """A part by name, as the instruction set at hand will run it: a maker, x, calls of one forward by op."""
    make, x, expected = PARTS[request.param]
    return enlivened(make()), x, expected


def runner(part, dtype):
    """(run, x): `run` computes on the packed ops, and sees to it that it did."""
    module, x, expected = part
    fast, x = mk.optimize_for_inference(module, dtype=dtype), x.to(dtype)

    def run(x):
        with Watch() as watch:
            y = fast(x)
        calls = Counter(name.removeprefix("mambaout_kernels::") for name in watch.names if "mambaout" in name)
        assert calls == expected
        return y

    return run, x


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
def test_part_at_every_number_of_threads_and_in_every_run(isa, part, dtype):
    run, x = runner(part, dtype)
    torch.set_num_threads(1)
    first = run(x)
    for threads in (*THREADS, 1):
        torch.set_num_threads(threads)
        assert torch.equal(bits(run(x)), bits(first)), f"with {threads} threads"


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16, torch.float64], ids=str)
def test_op_on_image_3_of_a_batch_is_image_3_alone(isa, dtype, threads):
    torch.set_num_threads(threads)
    inputs = make_inputs(5, 19, 23, 72, 48, 7, dtype)
    y, du, *_ = op(inputs)
    alone = op(Inputs(inputs.u[3:4], inputs.weight, inputs.bias, inputs.dy[3:4]))
    assert torch.equal(bits(y[3:4]), bits(alone[0]))
    assert torch.equal(bits(du[3:4]), bits(alone[1]))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_part_on_image_3_of_a_batch_is_image_3_alone(isa, part, dtype, threads):
    torch.set_num_threads(threads)
    run, x = runner(part, dtype)
    together = run(x)
    assert torch.equal(bits(together[3:4]), bits(run(x[3:4])))
    assert torch.equal(bits(torch.cat((run(x[:2]), run(x[2:])))), bits(together))


@functools.cache
def expected(dtype):
    inputs = make_inputs(3, 29, 33, 72, 48, 7, dtype)
    return inputs, *expected_of(inputs, "gelu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_instruction_sets_differ_within_the_tolerance_only(isa, dtype):
    """Each within the policy of fp64, so any two within twice of it of each other."""
    inputs, *beside = expected(dtype)
    for ours, *three in zip(op(inputs), *beside, strict=True):
        assert_accurate(ours, *three)


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
