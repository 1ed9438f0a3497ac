"""FlopCounterMode counts our ops as PyTorch's modules in their place."""

import subprocess

import pytest
import torch
from processes import python
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import mambaout_kernels as mk
from mambaout_kernels import backends
from mambaout_kernels.backends import cpu
from mambaout_kernels.comparators import flops as comparators  # noqa: F401
from mambaout_kernels.ops import flops  # noqa: F401

OPS = torch.ops.mambaout_kernels
needs_cpu = pytest.mark.skipif(cpu.unavailable() is not None, reason="needs the compiled CPU kernels")


def counted(function, *args):
    with FlopCounterMode(display=False) as counter:
        function(*args)
    return counter.get_total_flops()


def by_pytorch(function, *args):
    with backends.force("reference"):
        return counted(function, *args)


def timms(name, size, training=False, **options):
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, num_classes=10, **options).train(training)
    return counted(model if not training else lambda x: model(x).sum().backward(), torch.randn(2, 3, size, size))


def test_an_optimized_model_is_counted_without_an_import():
    code = """
import torch, mambaout_kernels as mk
from torch.utils.flop_counter import FlopCounterMode
fast = mk.optimize_for_inference(mk.create_model("test_mambaout").eval())
with FlopCounterMode(display=False) as counter:
    fast(torch.randn(1, 3, 64, 64))
assert counter.get_total_flops() > 0
"""
    subprocess.run([python(), "-c", code], check=True)


@pytest.mark.parametrize(
    ("name", "options"),
    [("mambaout_femto", {}), ("test_mambaout", {}), ("mambaout_base_plus_rw", {"depths": (1, 1, 2, 1)})],
)
def test_models_count_as_timms(name, options):
    size = 64
    model, x = mk.create_model(name, num_classes=10, **options).eval(), torch.randn(2, 3, size, size)
    expected = timms(name, size, **options)
    assert expected > 0
    with torch.no_grad():
        assert counted(model, x) == expected
        assert counted(mk.optimize_for_inference(model), x) == pytest.approx(expected, rel=1e-3)


def test_training_counts_as_timms():
    expected = timms("mambaout_femto", 64, training=True)
    model = mk.create_model("mambaout_femto", num_classes=10)
    x = torch.randn(2, 3, 64, 64)
    assert counted(lambda x: model(x).sum().backward(), x) == pytest.approx(expected, rel=1e-3)


@needs_cpu
@pytest.mark.parametrize("act", ["gelu", "silu"])
def test_the_op_and_its_gradients(act):
    u = torch.randn(2, 5, 6, 24, requires_grad=True)
    weight, bias = torch.randn(8, 1, 7, 7, requires_grad=True), torch.randn(8, requires_grad=True)

    def step():
        mk.gated_dwconv(u, weight, bias, act).sum().backward()

    assert counted(step) == 3 * 2 * 60 * 8 * 49
    assert by_pytorch(step) == (2 + 8) * 2 * 60 * 8 * 49  # the weight's gradient as of a convolution without groups
    dy = torch.randn(2, 5, 6, 12)
    rows = u.detach().flatten(0, 2)
    assert counted(OPS.gated_dwconv_backward.default, dy, rows, weight.detach(), bias.detach(), act) == 4 * 60 * 8 * 49


@needs_cpu
def test_linear_layers():
    x, weight, bias, dy = torch.randn(4, 6, 16), torch.randn(24, 16), torch.randn(24), torch.randn(4, 6, 24)
    product = 2 * 24 * 24 * 16
    assert counted(OPS.linear.default, x, weight, bias) == product
    assert counted(OPS.linear_dx.default, dy.flatten(0, 1), weight) == product
    assert counted(OPS.linear_dweight.default, dy.flatten(0, 1), x.flatten(0, 1)) == product


@pytest.mark.parametrize(
    "op", ["split_gated_cnn_block", "conv3x3s2_norm_act", "layer_norm_act", "layer_norm_act_backward"]
)
def test_ops_of_a_gpu(op):
    """Their kernels for fake tensors are enough to count by."""
    dim, hidden, C = 16, 40, 16
    given = {
        "split_gated_cnn_block": (
            (2, 5, 6, dim), (dim,), (dim,), (2 * hidden, dim), (2 * hidden,), (C, 1, 7, 7), (C,), (50, 32),
            (dim, hidden), (dim,), None, 1e-6, "gelu",
        ),
        "conv3x3s2_norm_act": ((2, 3, 9, 8), (27, dim), (dim,), (dim,), (dim,), 1e-6, "gelu"),
        "layer_norm_act": ((2, 5, 6, dim), None, (dim,), (dim,), 1e-6, "gelu"),
        "layer_norm_act_backward": ((2, 5, 6, dim), (2, 5, 6, dim), (dim,), (dim,), 1e-6, "gelu", True),
    }[op]  # fmt: skip
    expected = {
        "split_gated_cnn_block": 2 * 60 * (3 * hidden * dim + C * 49), "conv3x3s2_norm_act": 2 * 2 * 5 * 4 * 27 * dim,
        "layer_norm_act": 0, "layer_norm_act_backward": 0,
    }[op]  # fmt: skip
    arguments = [torch.empty(a, device="meta") if isinstance(a, tuple) else a for a in given]
    assert counted(getattr(OPS, op).default, *arguments) == expected


def test_every_op_that_computes_has_a_formula():
    names = {n.partition("::")[2].partition(".")[0] for n in torch._C._dispatch_get_all_op_names()
             if n.startswith("mambaout_kernels::")}  # fmt: skip
    # They are called by another op's implementation, inside of what is counted.
    kernels = {"selective_scan_cpu", "selective_scan_backward_cpu", "gated_dwconv_cpu", "gated_dwconv_backward_cpu",
               "gated_dwconv_cuda", "gated_dwconv_backward_cuda", "gated_dwconv_backward_cuda_by",
               "depthwise_cuda"}  # fmt: skip
    packing = {n for n in names if n.startswith(("pack_", "repack_", "runs_packed_", "join_packed"))}
    uncounted = {n for n in names if getattr(OPS, n) not in flop_registry}
    assert uncounted == (kernels | packing) & names
