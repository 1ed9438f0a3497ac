"""Every bad argument, one by one: the error names it, what was given and what is allowed; nothing is touched."""

import pytest
import torch

from mambaout_kernels import backends, gated_dwconv

GOOD = {
    "u": torch.zeros(2, 5, 6, 16),
    "weight": torch.zeros(4, 1, 7, 7),
    "bias": torch.zeros(4),
    "act": "gelu",
}
META = torch.device("meta")
BAD = [
    ({"u": torch.zeros(5, 6, 16)}, ValueError, r"u must have 4 dimensions .*got shape \(5, 6, 16\)"),
    ({"u": torch.zeros(1, 2, 5, 6, 16)}, ValueError, r"u must have 4 dimensions .*\(1, 2, 5, 6, 16\)"),
    ({"u": torch.zeros(2, 5, 6, 15)}, ValueError, r"u must have an even number of channels.*got 15"),
    ({"u": torch.zeros(2, 5, 6, 16, dtype=torch.int64)}, TypeError, r"u must be one of float32.*got torch.int64"),
    ({"u": torch.zeros(2, 5, 6, 16, dtype=torch.uint8)}, TypeError, r"u must be one of float32.*got torch.uint8"),
    ({"u": torch.zeros(2, 5, 6, 16, dtype=torch.bool)}, TypeError, r"u must be one of float32.*got torch.bool"),
    ({"u": torch.zeros(2, 5, 6, 16, dtype=torch.complex64)}, TypeError, r"u must be one of .*got torch.complex64"),
    (
        {"weight": torch.zeros(4, 7, 7)},
        ValueError,
        r"weight must have shape \(conv_channels, 1, K, K\); got \(4, 7, 7\)",
    ),
    ({"weight": torch.zeros(4, 1, 7, 7, 1)}, ValueError, r"weight must have shape .*got \(4, 1, 7, 7, 1\)"),
    ({"u": torch.zeros(2, 5, 6, 16, dtype=torch.float64)}, TypeError, r"weight must be torch.float64 beside u of"),
    ({"weight": torch.zeros(4, 2, 7, 7)}, ValueError, r"weight must have shape .*got \(4, 2, 7, 7\)"),
    ({"weight": torch.zeros(4, 1, 7, 5)}, ValueError, r"weight must have shape .*got \(4, 1, 7, 5\)"),
    ({"weight": torch.zeros(4, 1, 6, 6)}, ValueError, r"weight must have an odd kernel size from 1 to 31; got 6"),
    ({"weight": torch.zeros(4, 1, 0, 0)}, ValueError, r"weight must have an odd kernel size from 1 to 31; got 0"),
    ({"weight": torch.zeros(4, 1, 33, 33)}, ValueError, r"weight must have an odd kernel size from 1 to 31; got 33"),
    (
        {"weight": torch.zeros(9, 1, 7, 7), "bias": torch.zeros(9)},
        ValueError,
        r"weight must have at most hidden = 8 channels.*got 9",
    ),
    ({"weight": torch.zeros(4, 1, 7, 7, dtype=torch.float16)}, TypeError, r"weight must be torch.float32 .*float16"),
    ({"weight": torch.zeros(4, 1, 7, 7, dtype=torch.int32)}, TypeError, r"weight must be torch.float32 .*int32"),
    (
        {"weight": torch.zeros(4, 1, 7, 7, device=META)},
        RuntimeError,
        r"weight must be on the device of u, cpu; got meta",
    ),
    ({"bias": torch.zeros(4, 1)}, ValueError, r"bias must have shape \(4,\).*got \(4, 1\)"),
    ({"bias": torch.zeros(5)}, ValueError, r"bias must have shape \(4,\).*got \(5,\)"),
    ({"bias": torch.zeros(4, dtype=torch.float64)}, TypeError, r"bias must be torch.float32 .*got torch.float64"),
    ({"bias": torch.zeros(4, device=META)}, RuntimeError, r"bias must be on the device of u, cpu; got meta"),
    ({"act": "relu"}, ValueError, r"act must be one of gelu, gelu_tanh, silu, identity; got 'relu'"),
    ({"act": "GELU"}, ValueError, r"act must be one of gelu, gelu_tanh, silu, identity; got 'GELU'"),
]
IDS = [message.split(" must")[0] + "-" + str(i) for i, (_, _, message) in enumerate(BAD)]
BAD_DY = [
    (torch.zeros(2, 5, 6, 16), ValueError, r"dy must have shape \(2, 5, 6, 8\), as y; got \(2, 5, 6, 16\)"),
    (torch.zeros(5, 6, 8), ValueError, r"dy must have shape \(2, 5, 6, 8\), as y; got \(5, 6, 8\)"),
    (torch.zeros(2, 5, 6, 8, dtype=torch.float64), TypeError, r"dy must have the dtype of u, torch.float32; got"),
    (torch.zeros(2, 5, 6, 8, device=META), RuntimeError, r"dy must be on the device of u, cpu; got meta"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=IDS)
def test_public_function(change, error, message):
    with pytest.raises(error, match=message):
        gated_dwconv(**(GOOD | change))


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=IDS)
def test_on_the_reference(change, error, message):
    with backends.force("reference"), pytest.raises(error, match=message):
        gated_dwconv(**(GOOD | change))


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=IDS)
def test_backward_op(change, error, message):
    arguments = {"dy": torch.zeros(2, 5, 6, 8)} | GOOD | change
    with pytest.raises(error, match=message):
        torch.ops.mambaout_kernels.gated_dwconv_backward(*arguments.values())


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=IDS)
def test_under_fake_tensors(change, error, message):
    """What a compiler traces is checked with the same words."""
    mode = torch._subclasses.fake_tensor.FakeTensorMode()
    arguments = {k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in (GOOD | change).items()}
    with mode, pytest.raises(error, match=message):
        torch.ops.mambaout_kernels.gated_dwconv(*arguments.values())


@pytest.mark.parametrize(("dy", "error", "message"), BAD_DY, ids=range(len(BAD_DY)))
def test_gradient(dy, error, message):
    with pytest.raises(error, match=message):
        torch.ops.mambaout_kernels.gated_dwconv_backward(dy, *GOOD.values())


def test_the_good_arguments_are_good():
    assert gated_dwconv(**GOOD).shape == (2, 5, 6, 8)


@pytest.mark.parametrize("wrong", [None, 3, "u"])
def test_not_a_tensor(wrong):
    with pytest.raises((TypeError, RuntimeError, AttributeError)):
        gated_dwconv(wrong, GOOD["weight"], GOOD["bias"])


META_CALLS = {
    "linear": lambda x, w: torch.ops.mambaout_kernels.linear(x, w, None),
    "linear_dx": lambda x, w: torch.ops.mambaout_kernels.linear_dx(x, w.t()),
    "linear_dweight": lambda x, w: torch.ops.mambaout_kernels.linear_dweight(x, w),
}


@pytest.mark.parametrize("name", META_CALLS)
def test_a_tensor_without_memory_beside_one_with_is_an_error(name):
    """Not a result that nobody has written."""
    with pytest.raises(RuntimeError, match="all tensors must be on one device; got cpu, meta"):
        META_CALLS[name](torch.zeros(3, 4), torch.zeros(3, 4, device=META))


def test_a_complex_u_is_refused_where_the_reference_would_compute_it():
    u = torch.zeros(1, 2, 2, 8, dtype=torch.complex64)
    weight, bias = torch.zeros(2, 1, 3, 3, dtype=torch.complex64), torch.zeros(2, dtype=torch.complex64)
    with pytest.raises(TypeError, match="u must be one of float32"):
        torch.ops.mambaout_kernels.gated_dwconv(u, weight, bias, "identity")
    with pytest.raises(TypeError, match="u must be one of float32"):
        torch.ops.mambaout_kernels.gated_dwconv_backward(u[..., :4], u, weight, bias, "identity")
