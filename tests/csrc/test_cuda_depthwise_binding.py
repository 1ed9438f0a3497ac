"""depthwise_cuda of csrc/torch/gated_dwconv_cuda.cpp on the CPU (tests/cuda_binding): what it checks and calls; that
`supports_depthwise` says beforehand what it refuses."""

import itertools

import pytest
import torch
from cuda_binding import stand_in
from cuda_host import host
from cuda_host.depthwise import expected_of, make_inputs
from numerics import assert_accurate

from mambaout_kernels.backends import cuda

if stand_in.missing():
    pytest.skip(str(stand_in.missing()), allow_module_level=True)

DTYPES = list(host.DTYPES)
LOW = [torch.bfloat16, torch.float16]
SHAPE = (2, 5, 6, 24)


@pytest.fixture
def card(monkeypatch):
    loaded = stand_in.load()
    monkeypatch.setattr(cuda, "_ops", lambda: loaded.ops)
    monkeypatch.setattr(cuda, "supports", lambda x, weight: x.dtype in cuda._DTYPES)
    return loaded


def run(card, x, weight, bias, device=3, current=1, streams=0x5000):
    """s, and the launch: under a guard for the device, of which the runtime has been told, on its current stream."""
    assert cuda.supports_depthwise(x, weight)
    before = [t.clone() for t in (x, weight, bias)]
    card.begin(device, current, runtime=7, streams=streams)
    s = cuda.depthwise(x, weight, bias)
    assert card.current == current
    assert all(map(torch.equal, (x, weight, bias), before))
    assert (s.shape, s.dtype, s.is_contiguous()) == (x.shape, x.dtype, True)
    calls = card.calls
    assert [call["call"] for call in calls if call["call"] in ("guard", "release")] == ["guard", "release"]
    assert (calls[0]["call"], calls[-1]["call"]) == ("guard", "release")
    assert {call["current"] for call in calls[:-1]} == {device}
    assert {call["device"] for call in calls if "device" in call} == {device}
    launch = calls[-2]
    assert launch["call"] == "depthwise"
    assert (launch["runtime"], launch["stream"], launch["s"]) == (device, streams + device, s.data_ptr())
    assert (launch["multiprocessors"], launch["major"]) == (100 + device, 8 + device % 3)  # as stand_in.cpp has them
    return s, launch, [call for call in calls if call["call"] in ("aten::clone", "aten::contiguous")]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [SHAPE, (1, 1, 1, 8), (3, 7, 7, 40), (1, 9, 14, 64)], ids=str)
def test_against_fp64(card, shape, dtype):
    x, weight, bias = make_inputs(shape, dtype)
    s, launch, copies = run(card, x, weight, bias)
    assert_accurate(s, *expected_of(x, weight, bias))
    assert copies == []
    pointers = {"x": x, "weight": weight, "bias": bias}
    assert {name: launch[name] for name in pointers} == {name: t.data_ptr() for name, t in pointers.items()}
    assert launch["x_spacing"] == shape[3]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_slice_of_channels_is_read_where_it_lies(card, dtype):
    wide, weight, bias = make_inputs((2, 5, 6, 72), dtype)
    weight, bias = weight[:24], bias[:24]
    for first in (0, 16, 48):
        x = wide[..., first : first + 24]
        s, launch, copies = run(card, x, weight, bias)
        assert_accurate(s, *expected_of(x, weight, bias))
        assert copies == []
        assert (launch["x"], launch["x_spacing"]) == (x.data_ptr(), 72)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_each_parameter_may_be_fp32(card, dtype):
    x, *parameters = make_inputs(SHAPE, dtype, torch.float32)
    for low in itertools.product((False, True), repeat=2):
        weight, bias = (p.to(dtype) if is_low else p for p, is_low in zip(parameters, low, strict=True))
        assert_accurate(run(card, x, weight, bias)[0], *expected_of(x, weight, bias))


def test_parameters_are_passed_dense(card):
    x, weight, bias = make_inputs(SHAPE, torch.bfloat16)
    sparse = weight.transpose(2, 3).contiguous().transpose(2, 3), bias.repeat_interleave(2)[::2]
    s, launch, copies = run(card, x, *sparse)
    assert_accurate(s, *expected_of(x, weight, bias))
    assert [copy["from"] for copy in copies] == [t.data_ptr() for t in sparse]
    assert [launch["weight"], launch["bias"]] == [copy["to"] for copy in copies]


@pytest.mark.parametrize(("device", "current"), [(0, 2), (1, 1), (5, 0)])
def test_every_call_is_for_the_device_and_stream_of_x(card, device, current):
    for streams in (0x5000, 0x9000):
        run(card, *make_inputs(SHAPE, torch.bfloat16), device=device, current=current, streams=streams)


@pytest.mark.parametrize("shape", [(0, 4, 4, 8), (2, 0, 4, 8), (2, 4, 0, 8), (1, 4, 4, 0)], ids=str)
def test_empty(card, shape):
    x, weight, bias = make_inputs(shape, torch.bfloat16)
    card.begin(3, 1)
    s = cuda.depthwise(x, weight, bias)
    assert (s.shape, s.dtype) == (x.shape, x.dtype)
    assert [call for call in card.calls if call["call"] == "depthwise"] == []
    assert cuda.supports_depthwise(x, weight)


def offset(x, elements):
    """The same values, so many elements from a multiple of 16 bytes."""
    memory = x.new_empty(x.numel() + elements)
    return memory[elements:].view(x.shape).copy_(x)


def spaced(elements):
    return lambda x: torch.cat((x, x.new_zeros(*x.shape[:3], elements)), dim=3)[..., : x.shape[3]]


def far_apart(x):
    spacing = 2**24 + 8
    memory = x.new_empty((x.shape[1] - 1) * spacing + x.shape[3])
    return memory.as_strided(x[:1, :, :1].shape, (1, spacing, 1, 1)).copy_(x[:1, :, :1])


# What is made of x (2, 5, 6, 24), and what the op says of it; None: it takes it.
EVENLY = "x must have its pixels evenly spaced, at most 16777216 elements apart; got strides"
CHANNELS = "x must have its channels side by side; got a stride of 30"
MULTIPLES = "x must have pixels that begin and end at multiples of 16 bytes; got"
LAYOUTS = {
    "dense": (lambda x: x, None),
    "every other column": (lambda x: x.repeat_interleave(2, dim=2)[:, :, ::2], None),
    "one pixel for all": (lambda x: x[:1, :1, :1].expand(1, *x.shape[1:]), None),
    "one image of several": (lambda x: x[1:], None),
    "one column": (lambda x: x[:, :, 2:3], None),
    "8 channels more": (spaced(8), None),
    "2 channels more": (spaced(2), rf"{MULTIPLES} 24 channels, 26 elements from pixel to pixel, of \d bytes"),
    "a channel off": (lambda x: offset(x, 1), rf"{MULTIPLES} .* the first at \d bytes beyond such a multiple"),
    "half of 16 bytes off": (lambda x: offset(x, 8 // x.element_size()), rf"{MULTIPLES} .* the first at 8 bytes"),
    "16 bytes off": (lambda x: offset(x, 16 // x.element_size()), None),
    "22 channels of 24": (lambda x: x[..., :22], f"{MULTIPLES} 22 channels"),
    "NCHW memory": (lambda x: x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1), CHANNELS),
    "images apart": (lambda x: x.repeat_interleave(2, dim=0)[::2], EVENLY),
    "rows apart": (lambda x: x.repeat_interleave(2, dim=1)[:, ::2], EVENLY),
    "columns and rows exchanged": (lambda x: x.transpose(1, 2), EVENLY),
    "far apart": (far_apart, EVENLY),
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_what_is_supported_is_taken_and_nothing_else(card, name, dtype):
    layout, message = LAYOUTS[name]
    x = layout(make_inputs(SHAPE, dtype)[0])
    weight, bias = (t[: x.shape[3]] for t in make_inputs(SHAPE, dtype)[1:])
    assert cuda.supports_depthwise(x, weight) is (message is None)
    if message is None:
        s, _, copies = run(card, x, weight, bias)
        assert_accurate(s, *expected_of(x, weight, bias))
        assert copies == []
    else:
        refused(card, (x, weight, bias), message)


def refused(card, arguments, message):
    card.begin(3, 1)
    with pytest.raises(RuntimeError, match=message):
        cuda.depthwise(*arguments)
    assert card.calls == []
    assert card.current == 1


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


def far(*shape):
    """As large as it says, of one value in memory."""
    return torch.zeros((), dtype=torch.bfloat16).expand(shape)


BF16 = {"weight": zeros(8, 1, 7, 7, dtype=torch.bfloat16), "bias": zeros(8, dtype=torch.bfloat16)}
MANY = 2**20 + 8
WEIGHT = r"weight must be \(C, 1, 7, 7\) for the 8 channels of x; got"
DTYPE = "must be float32 or have the dtype of x, float32; got bfloat16"
MOST = r"x must have at most 1048576 channels, 2147482624 pixels, and fewer than 2\^31 values in a row of pixels; got"
# What differs from x (2, 5, 6, 8) and its parameters, in fp32; what the op says; whether supports_depthwise sees it.
BAD = [
    ({"x": zeros(5, 6, 8)}, r"x must be \(N, H, W, C\); got \(5, 6, 8\)", False),
    ({"x": zeros(1, 2, 5, 6, 8)}, r"x must be \(N, H, W, C\); got \(1, 2, 5, 6, 8\)", False),
    ({"x": zeros(2, 5, 6, 8, dtype=torch.float64)}, "x must be float32, bfloat16 or float16 .* got float64", True),
    ({"x": zeros(2, 5, 6, 8, dtype=torch.int32)}, "x must be float32, bfloat16, float16", True),
    ({"weight": zeros(8, 7, 7)}, rf"{WEIGHT} \(8, 7, 7\)", True),
    ({"weight": zeros(4, 1, 7, 7)}, rf"{WEIGHT} \(4, 1, 7, 7\)", True),
    ({"weight": zeros(8, 2, 7, 7)}, rf"{WEIGHT} \(8, 2, 7, 7\)", True),
    ({"weight": zeros(8, 1, 5, 5)}, rf"{WEIGHT} \(8, 1, 5, 5\)", True),
    ({"weight": zeros(8, 1, 7, 5)}, rf"{WEIGHT} \(8, 1, 7, 5\)", True),
    ({"weight": BF16["weight"]}, f"weight {DTYPE}", True),
    ({"weight": zeros(8, 1, 7, 7, dtype=torch.int32)}, "weight must be float32, bfloat16", True),
    ({"bias": zeros(4)}, r"bias must be \(C,\) for the 8 channels of x; got \(4\)", False),
    ({"bias": zeros(8, 1)}, r"bias must be \(C,\) for the 8 channels of x; got \(8, 1\)", False),
    ({"bias": BF16["bias"]}, f"bias {DTYPE}", False),
    ({"x": far(2**31 - 1023, 1, 1, 8), **BF16}, MOST, True),
    ({"x": far(1, 1, 1, MANY), "weight": far(MANY, 1, 7, 7), "bias": far(MANY)}, MOST, True),
    ({"x": far(1, 1, 2**28, 8), **BF16}, MOST, True),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message", "seen"), BAD, ids=range(len(BAD)))
def test_bad_arguments_are_refused_before_anything_is_done(card, changes, message, seen):
    arguments = {"x": zeros(2, 5, 6, 8), "weight": zeros(8, 1, 7, 7), "bias": zeros(8)} | changes
    refused(card, arguments.values(), message)
    if seen:
        assert not cuda.supports_depthwise(arguments["x"], arguments["weight"])


@pytest.mark.parametrize(("device", "got"), [(0, "got 0"), (2, "got 2"), (None, "got another kind of device")])
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_another_device_is_refused_before_anything_is_done(card, name, device, got):
    arguments = dict(zip(("x", "weight", "bias"), make_inputs(SHAPE, torch.float32), strict=True))
    card.begin(3, 1)
    card.put(arguments[name], device)
    with pytest.raises(RuntimeError, match=f"{name} must be on the CUDA device of x, 3; {got}"):
        cuda.depthwise(**arguments)
    assert card.calls == []


def test_x_on_the_cpu_is_refused(card):
    arguments = make_inputs(SHAPE, torch.float32)
    card.begin(3, 1)
    card.put(arguments[0], None)
    with pytest.raises(RuntimeError, match="x must be on a CUDA device"):
        cuda.depthwise(*arguments)
    assert card.calls == []


@pytest.mark.parametrize(
    ("failing", "message"),
    [
        ("cudaSetDevice", "CUDA device 3 does not answer"),
        ("stream", "no current CUDA stream"),
        ("launch", "launch: out of luck"),
        ("guard", "create_device_guard"),
    ],
)
def test_what_fails_is_an_error_and_the_guard_is_released(card, failing, message):
    inputs = make_inputs(SHAPE, torch.float32)
    card.begin(3, 1, failing=failing)
    with pytest.raises(RuntimeError, match=message):
        cuda.depthwise(*inputs)
    assert card.current == 1
    found = [call["call"] for call in card.calls]
    assert found.count("guard") == found.count("release") == (failing != "guard")
    assert_accurate(run(card, *inputs)[0], *expected_of(*inputs))


def test_on_the_cpu_nothing_is_supported():
    x, weight, _ = make_inputs(SHAPE, torch.float32)
    assert not cuda.supports_depthwise(x, weight)
