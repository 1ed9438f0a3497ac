"""csrc/torch/gated_dwconv_cuda.cpp on the CPU (tests/cuda_binding): what it checks, copies, allocates and calls, on
which device, in which order; its results by the kernels of tests/cuda_host."""

import ctypes
import itertools
import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from cuda_binding import stand_in
from cuda_host import host
from generated import CHANNELS_APART, LAYOUTS, WEIGHT_LAYOUTS
from numerics import Inputs, case, check_outputs, expected_of, make_inputs
from processes import python

from mambaout_kernels.backends import cuda
from mambaout_kernels.reference import ACTIVATIONS

if stand_in.missing():
    pytest.skip(str(stand_in.missing()), allow_module_level=True)

DTYPES = list(host.DTYPES)
LOW = [torch.bfloat16, torch.float16]
ODD_SIZES = (2, 5, 6, 19, 12, 7)
SHAPES = [ODD_SIZES, (1, 4, 5, 64, 40, 3), (1, 1, 1, 8, 8, 5), (2, 3, 4, 16, 0, 7), (1, 6, 5, 21, 8, 9)]
COPIES = ("aten::clone", "aten::contiguous")
LAUNCHES = ("forward", "backward")


@pytest.fixture
def card(monkeypatch):
    loaded = stand_in.load()
    monkeypatch.setattr(cuda, "_ops", lambda: loaded.ops)
    return loaded


def called(calls, *names):
    return [call for call in calls if call["call"] in names]


def check_calls(calls, device, streams):
    """All under a guard for the device; the runtime is told of it before the launch, which gets its current stream."""
    assert [call["call"] for call in called(calls, "guard", "release")] == ["guard", "release"]
    assert calls[0]["call"] == "guard"
    assert calls[-1]["call"] == "release"
    assert {call["current"] for call in calls[:-1]} == {device}
    assert {call["device"] for call in calls if "device" in call} == {device}
    for launch in called(calls, *LAUNCHES):
        assert launch is calls[-2]
        assert launch["runtime"] == device
        assert launch["stream"] == streams + device


def run(card, inputs, act="gelu", device=3, current=1, streams=0x5000):
    """(y, du, dweight, dbias), and the calls of forward and of backward."""
    tensors = [*inputs, inputs.dy]
    before = [t.clone() for t in tensors]
    results, made = [], []
    for op in (
        lambda: cuda.gated_dwconv(*inputs, act),
        lambda: cuda.gated_dwconv_backward(inputs.dy, *inputs, act),
    ):
        card.begin(device, current, runtime=7, streams=streams)
        results.append(op())
        assert card.current == current
        made.append(card.calls)
        check_calls(made[-1], device, streams)
    assert all(map(torch.equal, tensors, before))
    return (results[0], *results[1]), *made


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_fp64(card, shape, dtype):
    for act in ACTIVATIONS:
        inputs, expected = case(shape, dtype, act)
        check_outputs("cuda", run(card, inputs, act)[0], inputs, act, expected)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_fp32_parameters_beside_low_precision(card, dtype):
    inputs, expected = case(ODD_SIZES, dtype, "silu", torch.float32)
    for weight, bias in itertools.product((True, False), repeat=2):
        mixed = Inputs(
            inputs.u,
            inputs.weight if weight else inputs.weight.to(dtype),
            inputs.bias if bias else inputs.bias.to(dtype),
            inputs.dy,
        )
        found = run(card, mixed, "silu")[0]
        check_outputs("cuda", found, mixed, "silu", expected if weight and bias else None)
        assert (found[2].dtype, found[3].dtype) == (mixed.weight.dtype, mixed.bias.dtype)


def test_dense_tensors_are_passed_as_they_are(card):
    inputs, _ = case(ODD_SIZES, torch.bfloat16, "gelu")
    (y, du, dweight, dbias), forward, backward = run(card, inputs)
    assert not called(forward + backward, *COPIES, "aten::zero_")
    for calls in (forward, backward):
        launch = calls[-2]
        for name in ("u", "weight", "bias"):
            assert launch[name] == getattr(inputs, name).data_ptr()
        assert launch["u_spacing"] == 2 * 19
    assert forward[-2]["y"] == y.data_ptr()
    assert (backward[-2]["dy"], backward[-2]["dy_spacing"]) == (inputs.dy.data_ptr(), 19)
    for name, output in (("du", du), ("dweight", dweight), ("dbias", dbias)):
        assert backward[-2][name] == output.data_ptr()


def wider(channels):
    return lambda x: torch.cat((x, x.new_zeros(*x.shape[:3], channels)), dim=3)[..., : x.shape[3]]


def far_apart(x):
    """The pixels of a column, more elements apart than the kernels can count."""
    spacing = 2**24 + 2
    memory = x.new_empty((x.shape[1] - 1) * spacing + x.shape[3])
    return memory.as_strided(x[:1, :, :1].shape, (1, spacing, 1, 1)).copy_(x[:1, :, :1])


def one_pixel(x):
    return x[:1, :1, :1].expand(1, *x.shape[1:])


# The layout, and whether u and dy are copied: in any dtype, in two-byte ones, never.
ALWAYS, LOW_ONLY, NEVER = 1, 2, 3
COPIED = {
    "dense": (LAYOUTS["dense"], NEVER, NEVER),
    "gaps, even": (wider(6), NEVER, NEVER),
    "gaps, odd": (wider(3), LOW_ONLY, NEVER),
    "an element off": (LAYOUTS["misaligned"], LOW_ONLY, LOW_ONLY),
    "every other column": (lambda x: x.repeat_interleave(2, dim=2)[:, :, ::2], NEVER, NEVER),
    "one pixel for all": (one_pixel, NEVER, NEVER),
    "images apart": (lambda x: x.repeat_interleave(2, dim=0)[::2, :, :4], ALWAYS, ALWAYS),
    "far apart": (far_apart, ALWAYS, ALWAYS),
    **{
        name: (layout, ALWAYS, ALWAYS)
        for name, layout in (LAYOUTS | CHANNELS_APART).items()
        if name not in ("dense", "misaligned", "channels of a wider tensor")
    },
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", COPIED)
def test_what_the_kernels_cannot_read_is_copied_and_nothing_else(card, name, dtype):
    layout, u_copied, dy_copied = COPIED[name]
    plain = make_inputs(*ODD_SIZES, dtype)
    u, dy = (layout(x).clone(memory_format=torch.contiguous_format) for x in (plain.u, plain.dy))
    dense = Inputs(u, plain.weight, plain.bias, dy)
    expected = expected_of(dense, "gelu")
    for which, copied, calls_of in (("u", u_copied, (1, 2)), ("dy", dy_copied, (2,))):
        inputs = Inputs(**{**vars(dense), which: layout(getattr(plain, which))})
        laid_out = getattr(inputs, which)
        found = run(card, inputs)
        check_outputs("cuda", found[0], inputs, "gelu", expected)
        for calls in (found[index] for index in calls_of):
            copies = called(calls, *COPIES)
            if copied == ALWAYS or (copied == LOW_ONLY and dtype in LOW):
                assert [copy["from"] for copy in copies] == [laid_out.data_ptr()]
                assert copies[0]["to"] == calls[-2][which] != laid_out.data_ptr()
                assert calls[-2][f"{which}_spacing"] == laid_out.shape[3]
            else:
                assert copies == []
                assert calls[-2][which] == laid_out.data_ptr()


def test_one_channel_has_no_stride(card):
    inputs = make_inputs(1, 3, 4, 1, 1, 3)
    inputs.dy = inputs.dy.as_strided(inputs.dy.shape, (*inputs.dy.stride()[:3], 5))
    found, _, backward = run(card, inputs)
    check_outputs("cuda", found, inputs, "gelu")
    assert not called(backward, *COPIES)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parameters_are_passed_dense(card, dtype):
    plain, expected = case(ODD_SIZES, dtype, "gelu")
    for layout in WEIGHT_LAYOUTS.values():
        every_other = plain.bias.repeat_interleave(2)[::2]
        inputs = Inputs(plain.u, layout(plain.weight), every_other, plain.dy)
        found = run(card, inputs)
        check_outputs("cuda", found[0], inputs, "gelu", expected)
        for calls in found[1:]:
            wanted = {t.data_ptr() for t in (inputs.weight, inputs.bias) if not t.is_contiguous()}
            assert {copy["from"] for copy in called(calls, *COPIES)} == wanted


@pytest.mark.parametrize("parameters", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(0, 4, 4, 8, 4, 7), (2, 0, 4, 8, 4, 7), (2, 4, 0, 8, 4, 7), (1, 4, 4, 0, 0, 7)])
def test_empty(card, shape, parameters):
    inputs = make_inputs(*shape, torch.bfloat16, parameters)
    (y, du, dweight, dbias), _, backward = run(card, inputs)
    assert (y.shape, y.dtype) == (inputs.dy.shape, torch.bfloat16)
    assert (du.shape, du.dtype) == (inputs.u.shape, torch.bfloat16)
    for gradient, of in ((dweight, inputs.weight), (dbias, inputs.bias)):
        assert (gradient.shape, gradient.dtype) == (of.shape, parameters)
        assert torch.equal(gradient, torch.zeros_like(of))
    assert not called(backward, "backward")


@pytest.mark.parametrize(("device", "current"), [(3, 1), (0, 2), (1, 1)])
def test_every_call_is_for_the_device_and_stream_of_u(card, device, current):
    inputs, _ = case(ODD_SIZES, torch.bfloat16, "gelu")
    inputs = Inputs(CHANNELS_APART["NCHW memory"](inputs.u), inputs.weight, inputs.bias, inputs.dy)
    for streams in (0x5000, 0x9000):
        _, forward, backward = run(card, inputs, device=device, current=current, streams=streams)  # check_calls
        for calls in (forward, backward):
            assert len(called(calls, "cudaSetDevice")) == len(called(calls, "stream")) == 1
            assert called(calls, *COPIES)
        for launch in (forward[-2], backward[-2]):
            assert launch["multiprocessors"] == 100 + device  # as stand_in.cpp has them
            assert launch["major"] == 8 + device % 3


@pytest.mark.parametrize("shape", [*SHAPES, (3, 9, 30, 40, 33, 7)], ids=str)
def test_the_workspace_is_as_large_as_asked_for(card, shape):
    inputs = make_inputs(*shape, torch.bfloat16)
    _, _, backward = run(card, inputs)
    launch = backward[-2]
    sizes = [call["bytes"] for call in called(backward, "aten::new_empty") if call["to"] == launch["workspace"]]
    assert launch["workspace_bytes"] in sizes
    assert launch["workspace_bytes"] % 4 == 0
    assert (launch["workspace_bytes"] > 0) == (shape[4] > 0)


@pytest.mark.parametrize("path", [0, 1, 2])
def test_backward_takes_the_path_that_is_named(card, path):
    inputs, expected = case((2, 5, 6, 24, 16, 7), torch.bfloat16, "gelu")
    card.begin(3, 1)
    found = card.ops[3](inputs.dy, *inputs, 0, path)
    check_outputs("cuda", (expected[0][0], *found), inputs, "gelu", expected)
    launch = card.calls[-2]
    assert launch["path"] == path
    assert launch["workspace_bytes"] >= (path == 2) * 2 * 2 * 5 * 6 * 16 + 50 * 16 * 4  # e, and a slot of sums


def test_an_unknown_path_is_refused(card):
    arguments = good()
    card.begin(3, 1)
    for path in (-1, 3):
        refused(card, 3, (zeros(2, 5, 6, 8), *arguments.values(), path), "path must be 0 .chosen., 1 .fused. or 2")


def test_the_public_op_lets_the_kernels_choose(card):
    _, _, backward = run(card, case(ODD_SIZES, torch.bfloat16, "gelu")[0])
    assert backward[-2]["path"] == 0


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


def far(*shape):
    """As large as it says, of one value in memory."""
    return torch.zeros((), dtype=torch.bfloat16).expand(shape)


LOW_FILTER = {"weight": zeros(4, 1, 7, 7, dtype=torch.bfloat16), "bias": zeros(4, dtype=torch.bfloat16)}
SMALL_FILTER = {name: t[:1] for name, t in LOW_FILTER.items()}
U = r"u must be \(N, H, W, 2 \* hidden\)"
WEIGHT = r"weight must be \(conv_channels, 1, K, K\) with K odd, 1 to 31"
PARAMETER = "must have the dtype of u, or float32 beside a low-precision u"
DY = r"dy must be \(N, H, W, hidden\), as y"
MOST = "u must have at most 1048576 channels of gate, 2147482624 pixels, and fewer than 2\\^31 values of gate in a row"
BAD = [
    ({"u": zeros(5, 6, 16)}, U),
    ({"u": zeros(2, 2, 5, 6, 16)}, U),
    ({"u": zeros(2, 5, 6, 15)}, U),
    ({"u": zeros(2, 5, 6, 16, dtype=torch.int32)}, "u must be float32, bfloat16, float16"),
    ({"u": zeros(2, 5, 6, 16, dtype=torch.float64)}, "u must be float32, bfloat16 or float16 on CUDA"),
    ({"weight": zeros(4, 7, 7)}, WEIGHT),
    ({"weight": zeros(4, 2, 7, 7)}, WEIGHT),
    ({"weight": zeros(4, 1, 7, 5)}, WEIGHT),
    ({"weight": zeros(4, 1, 6, 6)}, WEIGHT),
    ({"weight": zeros(4, 1, 33, 33)}, WEIGHT),
    ({"weight": zeros(4, 1, 0, 0)}, WEIGHT),
    ({"weight": zeros(9, 1, 7, 7), "bias": zeros(9)}, "weight must have at most hidden channels"),
    ({"weight": zeros(4, 1, 7, 7, dtype=torch.int32)}, "weight must be float32, bfloat16, float16"),
    ({"weight": zeros(4, 1, 7, 7, dtype=torch.bfloat16)}, f"weight {PARAMETER}"),
    ({"weight": zeros(4, 1, 7, 7, dtype=torch.float64)}, f"weight {PARAMETER}"),
    ({"bias": zeros(4, 1)}, r"bias must be \(conv_channels,\)"),
    ({"bias": zeros(5)}, r"bias must be \(conv_channels,\)"),
    ({"bias": zeros(4, dtype=torch.int32)}, "bias must be float32, bfloat16, float16"),
    ({"bias": zeros(4, dtype=torch.float16)}, f"bias {PARAMETER}"),
    ({"u": zeros(2, 5, 6, 16, dtype=torch.bfloat16), "bias": zeros(4, dtype=torch.float16)}, f"bias {PARAMETER}"),
    ({"act": 4}, "act must be 0 to 3"),
    ({"act": -1}, "act must be 0 to 3"),
    ({"u": far(1, 1, 1, 2**21 + 2), **LOW_FILTER}, MOST),
    ({"u": far(2**31 - 1023, 1, 1, 2), **SMALL_FILTER}, MOST),
    ({"u": far(1, 1, 2**21, 2**11), **LOW_FILTER}, MOST),
]
BAD_DY = [
    (zeros(2, 5, 6, 16), DY),
    (zeros(5, 6, 8), DY),
    (zeros(1, 5, 6, 8), DY),
    (zeros(2, 4, 6, 8), DY),
    (zeros(2, 5, 7, 8), DY),
    (zeros(2, 5, 6, 8, dtype=torch.float64), "dy must have the dtype of u"),
    (zeros(2, 5, 6, 8, dtype=torch.int32), "dy must be float32, bfloat16, float16"),
]


def good():
    return {"u": zeros(2, 5, 6, 16), "weight": zeros(4, 1, 7, 7), "bias": zeros(4), "act": 0}


def refused(card, op, arguments, message):
    with pytest.raises(RuntimeError, match=message):
        card.ops[op](*arguments)
    assert card.calls == []
    assert card.current == 1


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[f"{'-'.join(c)}-{i}" for i, (c, _) in enumerate(BAD)])
def test_bad_arguments_are_refused_before_anything_is_done(card, changes, message):
    arguments = (good() | changes).values()
    card.begin(3, 1)
    refused(card, 0, arguments, message)
    refused(card, 1, (zeros(2, 5, 6, 8), *arguments), message)


@pytest.mark.parametrize(("dy", "message"), BAD_DY, ids=range(len(BAD_DY)))
def test_bad_dy_is_refused_before_anything_is_done(card, dy, message):
    card.begin(3, 1)
    refused(card, 1, (dy, *good().values()), message)


@pytest.mark.parametrize("device", [0, 2, None])
@pytest.mark.parametrize("name", ["weight", "bias", "dy"])
def test_another_device_is_refused_before_anything_is_done(card, name, device):
    arguments = {"dy": zeros(2, 5, 6, 8), **good()}
    card.begin(3, 1)
    card.put(arguments[name], device)
    message = f"{name} must be on the CUDA device of u"
    refused(card, 1, arguments.values(), message)
    if name != "dy":
        refused(card, 0, list(arguments.values())[1:], message)


def test_u_on_the_cpu_is_refused(card):
    arguments = good()
    card.begin(3, 1)
    card.put(arguments["u"], None)
    refused(card, 0, arguments.values(), "u must be on a CUDA device")
    refused(card, 1, (zeros(2, 5, 6, 8), *arguments.values()), "u must be on a CUDA device")


@pytest.mark.parametrize(
    ("failing", "message"),
    [
        ("cudaSetDevice", "gated_dwconv: CUDA device 3 does not answer"),
        ("multiprocessors", "gated_dwconv: CUDA device 3 does not answer"),
        ("major", "gated_dwconv: CUDA device 3 does not answer"),
        ("stream", "gated_dwconv: no current CUDA stream"),
        ("launch", "gated_dwconv: launch: out of luck"),
        ("guard", "create_device_guard"),
    ],
)
def test_what_fails_is_an_error_and_the_guard_is_released(card, failing, message):
    inputs, expected = case(ODD_SIZES, torch.float32, "gelu")
    for op, arguments in ((0, (*inputs, 0)), (1, (inputs.dy, *inputs, 0))):
        card.begin(3, 1, failing=failing)
        with pytest.raises(RuntimeError, match=message):
            card.ops[op](*arguments)
        assert card.current == 1
        assert len(called(card.calls, "guard")) == len(called(card.calls, "release")) == (failing != "guard")
        assert failing == "launch" or not called(card.calls, *LAUNCHES)
    check_outputs("cuda", run(card, inputs)[0], inputs, "gelu", expected)


FIRST_CALL = """
import json, sys
from cuda_binding import stand_in
from numerics import make_inputs
card = stand_in.load()
card.begin(3, 1, failing=sys.argv[1])
error = ""
try:
    card.ops[0](*make_inputs(1, 2, 2, 8, 4, 3), 0)
except RuntimeError as raised:
    error = str(raised)
print(json.dumps([card.calls, card.current, error]))
"""


def first_call(failing):
    """The calls of a process's first op, which looks up the function for the stream; the device after; the error."""
    tests = Path(__file__).resolve().parents[1]
    path = os.pathsep.join([str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")])
    command = [python(), "-c", FIRST_CALL, failing]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("failing", ["dlopen", "dlsym"])
def test_a_torch_without_cuda_is_an_error(failing):
    calls, current, error = first_call(failing)
    assert "gated_dwconv: this torch has no CUDA" in error
    assert current == 1
    assert not called(calls, "forward")


def test_the_function_for_the_stream_is_in_libtorch_cuda():
    calls, _, error = first_call("")
    assert error == ""
    library, function = (call for call in calls if call["call"].startswith(("lib", "aoti_")))
    assert library["flags"] == os.RTLD_LAZY | os.RTLD_NOLOAD
    if not (Path(torch.__file__).parent / "lib" / library["call"]).exists():
        pytest.skip("this torch is one for CPUs")
    assert hasattr(ctypes.CDLL(library["call"], mode=library["flags"]), function["call"])
