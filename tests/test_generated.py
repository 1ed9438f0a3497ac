"""Cases from hypothesis, 200 and more in `make test`, ten times as many in `make nightly`.

Here the op on every backend that runs here, its gradients through autograd, the whole block, the downsampling and the
head. The launch interface's are in test_cpu_launch.py, Triton's under the interpreter in
triton_interpreter/test_triton_generated.py.
"""

import pytest
import torch
from cuda_host import host
from generated import (
    LOW,
    block_and_outputs,
    block_cases,
    downsampling_and_outputs,
    downsampling_cases,
    head_and_outputs,
    head_cases,
    number_of_cases,
    op_cases,
)
from hypothesis import assume, given
from numerics import assert_accurate, check_backend, check_outputs, eager

import mambaout_kernels as mk
from mambaout_kernels import backends
from mambaout_kernels.backends import cpu
from mambaout_kernels.benchmarking import error_bounds
from mambaout_kernels.inference.parts import FusedHead, PackedBlocks, _pack_conv
from mambaout_kernels.models import ACTIVATION_LAYERS
from mambaout_kernels.nn.eligibility import conv3x3s2_reason, gated_cnn_block_reason, head_reason
from mambaout_kernels.ops.conv3x3s2 import conv3x3s2

pytestmark = pytest.mark.generated
needs_module = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))
ISAS = [] if cpu.unavailable() else cpu.module.supported_cpu_capabilities()


class on_cpu:
    """On this instruction set and number of threads."""

    def __init__(self, case):
        self.wanted = case.isa, case.threads

    def __enter__(self):
        self.before = cpu.module.cpu_capability(), torch.get_num_threads()
        cpu.module.set_cpu_capability(self.wanted[0])
        torch.set_num_threads(self.wanted[1])

    def __exit__(self, *error):
        cpu.module.set_cpu_capability(self.before[0])
        torch.set_num_threads(self.before[1])


@needs_module
@number_of_cases(80)
@given(op_cases(ISAS))
def test_cpu(case):
    inputs = case.inputs
    with on_cpu(case):
        check_backend("cpu", inputs, case.act)


@number_of_cases(40)
@given(op_cases())
def test_reference_backward_is_autograds(case):
    """The closed form, which defines the gradient for every backend, in fp64."""
    inputs = exact_inputs(case)
    closed = backends.load("reference").gated_dwconv_backward(inputs.dy, *inputs, case.act)
    for ours, truth in zip(closed, eager(inputs, case.act)[1:], strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-10 * (1 + truth.abs().sum().item() ** 0.5))


def exact_inputs(case):
    inputs = case.inputs
    return type(inputs)(*(t.double() for t in (*inputs, inputs.dy)))


@needs_module
@number_of_cases(40)
@given(op_cases(ISAS))
def test_public_op_and_autograd(case):
    """What a user calls: y and every gradient, whose dtype and shape are their tensors', and no input written."""
    inputs = case.inputs
    before = [t.clone() for t in (*inputs, inputs.dy)]
    leaves = [t.detach().requires_grad_() for t in inputs]
    with on_cpu(case):
        y = mk.gated_dwconv(*leaves, case.act)
        gradients = torch.autograd.grad(y, leaves, inputs.dy)
    gradients = [g.contiguous() for g in gradients]
    check_outputs("op", (y.detach(), *gradients), inputs, case.act)
    for now, then in zip((*inputs, inputs.dy), before, strict=True):
        assert torch.equal(now, then)


@needs_module
@number_of_cases(40)
@given(block_cases(ISAS))
def test_whole_block(case):
    block, theirs, truth = block_and_outputs(case)
    x = case.x
    with on_cpu(case), torch.no_grad():
        assert gated_cnn_block_reason(block.eval(), x.dtype) is None
        packed = PackedBlocks([block], x.dtype)
        ours, again = packed(x), packed(x.contiguous())
    assert ours.is_contiguous()
    assert torch.equal(ours, again)
    assert_accurate(ours, theirs, truth, error_bounds.of_block(block, case.x)["y"])


@needs_module
@number_of_cases(20)
@given(block_cases(ISAS))
def test_trained_block(case):
    """Module by module, with the fused op in the middle: the output, and that of the whole block, agree with fp64."""
    block, theirs, truth = block_and_outputs(case)
    x = case.x.requires_grad_() if case.x.is_leaf else case.x.detach().requires_grad_()
    with on_cpu(case):
        y = block(x)
    assert_accurate(y.detach(), theirs, truth, error_bounds.of_block(block, case.x)["y"])
    assert y.grad_fn is not None


@needs_module
@number_of_cases(40)
@given(downsampling_cases(ISAS))
def test_downsampling(case):
    """The stem's convolutions and those between the stages, on packed weights."""
    conv, norm, theirs, truth = downsampling_and_outputs(case)
    x = case.x
    with on_cpu(case), torch.no_grad():
        act = ACTIVATION_LAYERS[case.act]()
        assert conv3x3s2_reason(conv, norm, act, x.dtype) is None
        ours = conv3x3s2(x, _pack_conv(conv, norm, act, x.dtype), conv.out_channels, x.dtype)
    assert ours.is_contiguous()
    bound = error_bounds.of_downsampling((conv, norm, case.act), x)
    assert_accurate(ours, theirs, truth, bound)


@needs_module
@number_of_cases(40)
@given(head_cases(ISAS))
def test_head(case):
    """From the last map to the logits as one op."""
    norm, head, theirs, truth = head_and_outputs(case)
    dtype = case.x.dtype
    parts = norm, head.fc1, head.act, head.norm, head.head_dropout, head.fc2
    with on_cpu(case), torch.no_grad():
        assert head_reason(*parts, dtype) is None
        ours = FusedHead(norm, head.fc1, head.norm, head.fc2, dtype)(case.x)
    assert ours.is_contiguous()
    assert_accurate(ours, theirs, truth, error_bounds.of_head(norm, head, case.x))


@pytest.mark.skipif(host.missing() is not None, reason=str(host.missing()))
@number_of_cases(10)
@given(op_cases(dtypes=(torch.float32, *LOW), most_channels=40, kernel_sizes=(1, 3, 5, 7, 9)))
def test_cuda_on_the_host(case):
    inputs = case.inputs
    assume(0 < inputs.dy.numel() <= 6000)  # empty calls end in the binding
    found = host.run(host.build(), inputs, case.act)
    check_outputs("cuda", found, inputs, case.act)
