"""The depthwise kernel of csrc/cuda, executed on the CPU (tests/cuda_host): numerics, memory and races."""

import functools

import pytest
import torch
from cuda_host import depthwise, host
from cuda_host.depthwise import expected_of, make_inputs
from cuda_host.host import Device, Fault, Schedule
from numerics import assert_accurate

from mambaout_kernels.benchmarking.error_bounds import dwconv

if host.missing():
    pytest.skip(str(host.missing()), allow_module_level=True)

DTYPES = list(host.DTYPES)
LOW = [torch.bfloat16, torch.float16]
FEW = Device(multiprocessors=1)  # then a block takes one image after the other
TWO_CHANNELS = Device(148, 10)  # to a thread

# N, H, W, C: each reaches a branch of its own
SHAPES = {
    "several images, a partial strip": (2, 9, 11, 24),
    "filter larger than the image": (2, 2, 3, 16),
    "filter as high as the image and its halo": (3, 4, 5, 8),
    "one pixel": (1, 1, 1, 64),
    "one row": (1, 1, 65, 16),
    "one column": (1, 33, 1, 16),
    "segments of an image": (1, 30, 15, 16),
    "the last chunk partly": (1, 6, 8, 40),
    "more chunks than a block has": (2, 5, 7, 168),
}
STAGES = {
    "stage 1": (1, 56, 56, 96),
    "stage 2": (1, 28, 28, 192),
    "stage 3": (2, 14, 14, 384),
    "stage 4": (3, 7, 7, 576),
}


@functools.cache
def case(shape, dtype, parameters=None):
    inputs = make_inputs(shape, dtype, parameters)
    return inputs, expected_of(*inputs)


def run(x, *rest, kind="plain", **how):
    return depthwise.run(depthwise.build(kind, (x.dtype,)), x, *rest, **how)


def check(shape, dtype, parameters=None, **how):
    inputs, expected = case(shape, dtype, parameters)
    assert_accurate(run(*inputs, **how), *expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES.values(), *STAGES.values()], ids=[*SHAPES, *STAGES])
def test_against_fp64(shape, dtype):
    for device in (Device(), TWO_CHANNELS):
        check(shape, dtype, device=device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", [FEW, Device(1, 10), Device(108, 8)], ids=str)
def test_several_images_of_a_block(device, dtype):
    for shape in ((9, 4, 5, 40), (5, 1, 3, 16), SHAPES["several images, a partial strip"]):
        check(shape, dtype, device=device)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_fp32_parameters_beside_low_precision(dtype):
    for weight_offset in (0, 1):
        check((2, 5, 7, 168), dtype, torch.float32, weight_offset=weight_offset)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_slice_of_channels(dtype):
    """NaN is between the pixels: nothing of it is used."""
    for spare, shape in ((8, (2, 9, 11, 24)), (64, (3, 7, 7, 40)), (16, (1, 1, 1, 64))):
        check(shape, dtype, spare=spare)
        check(shape, dtype, spare=spare, device=Device(1, 10))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_schedule_and_device_gives_the_same_bits(dtype):
    inputs, _ = case((9, 4, 5, 40), dtype)
    first = run(*inputs)
    for device in (FEW, TWO_CHANNELS):
        for schedule in (Schedule(0, True), Schedule(1, False), Schedule(2, True)):
            assert torch.equal(first, run(*inputs, schedule=schedule, device=device))


@pytest.mark.parametrize("device", [Device(), TWO_CHANNELS], ids=str)
def test_an_impulse_returns_the_filter(device):
    x, weight, bias = torch.zeros(1, 9, 9, 8), make_inputs((1, 1, 1, 8), torch.float32)[1], torch.zeros(8)
    x[0, 4, 4] = 1
    s = run(x, weight, bias, device=device)
    assert torch.equal(s[0, 1:8, 1:8].permute(2, 0, 1), weight[:, 0].flip(-1, -2))
    assert not s[0, :, [0, 8]].any()
    assert not s[0, [0, 8]].any()


def test_the_bias_is_added_last():
    """To a sum of small terms, which a large bias would have swallowed one by one."""
    x, weight, bias = torch.full((1, 7, 7, 8), 2.0**-13), torch.ones(8, 1, 7, 7), torch.full((8,), 2.0**12)
    s = run(x, weight, bias)
    assert torch.equal(s, dwconv(x, weight) + bias)
    assert s[0, 3, 3, 0] > 2.0**12


@pytest.mark.parametrize("shape", [(0, 4, 4, 8), (2, 0, 4, 8), (2, 4, 0, 8), (1, 4, 4, 0)], ids=str)
def test_zero_sizes_touch_nothing(shape):
    assert run(*make_inputs(shape, torch.bfloat16)).shape == shape


def test_beyond_2_to_the_31_elements():
    """Of a tensor so large that its other images, zeros, exist as addresses only."""
    H, W, C = 3, 5, 16384
    images = 2**31 // (H * W * C) + 1
    inputs, expected = case((2, H, W, C), torch.bfloat16)
    assert_accurate(run(*inputs, images_before=images, last_blocks=C // 128), *expected)


def test_too_many_pixels_are_refused():
    inputs = make_inputs((1, 1, 1, 8), torch.bfloat16)
    with pytest.raises(Fault, match="not supported"):
        run(*inputs, images_before=2**31 - 1024)


CHECKED = {name: SHAPES[name] for name in SHAPES if name != "segments of an image"} | {"many images": (9, 4, 5, 40)}


@pytest.mark.parametrize("shape", CHECKED.values(), ids=CHECKED)
@pytest.mark.parametrize("kind", host.SANITIZERS)
def test_memory_and_races(kind, shape):
    """As in test_cuda_host.py."""
    dtype = torch.bfloat16
    schedule = Schedule(order=2, late_copies=kind == "memory")
    for device in (FEW, TWO_CHANNELS):
        check(shape, dtype, kind=kind, schedule=schedule, device=device)
    check(shape, dtype, kind=kind, schedule=schedule, spare=8, weight_offset=1)
