"""The CUDA C++ kernels, executed on the CPU (tests/cuda_host): numerics, memory and races, with planted faults."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from cuda_host import host
from cuda_host.host import Device, Fault, Schedule
from numerics import OUTPUTS, Inputs, activations_of, assert_accurate, case, eager, make_inputs

from mambaout_kernels.reference import ACTIVATIONS

if host.missing():
    pytest.skip(str(host.missing()), allow_module_level=True)

DTYPES = list(host.DTYPES)
LOW = [torch.bfloat16, torch.float16]

# N, H, W, D, C, K: each reaches a branch of its own
SHAPES = {
    "several images, odd sizes": (2, 9, 11, 40, 24, 7),
    "filter larger than the image": (2, 5, 3, 19, 19, 7),
    "one pixel": (1, 1, 1, 64, 40, 7),
    "two columns of tiles": (1, 6, 70, 24, 8, 5),
    "segments of an image": (1, 30, 15, 33, 16, 3),
    "no conv channels": (1, 4, 4, 16, 0, 7),
    "no identity channels": (1, 8, 9, 32, 32, 7),
    "an odd number of channels": (2, 7, 7, 41, 17, 7),
    "chunks without conv channels": (1, 3, 4, 131, 31, 7),
    "two chunks, the last one partly": (1, 5, 6, 64, 48, 5),
    "any odd filter": (1, 6, 5, 21, 8, 9),
    "largest filter": (1, 2, 11, 24, 3, 31),
    "pointwise filter": (1, 5, 6, 40, 24, 1),
    "one row": (1, 1, 65, 24, 16, 7),
    "one column": (1, 33, 1, 24, 16, 3),
}
# Few multiprocessors: then a block takes one image after the other.
FEW = Device(multiprocessors=1)
MANY_IMAGES = (9, 4, 5, 24, 16, 7)


def check(program, shape, dtype, act="gelu", weight_dtype=None, **how):
    inputs, beside = case(shape, dtype, act, weight_dtype)
    results = host.run(program, inputs, act, **how)
    for output, ours, *three in zip(OUTPUTS, results, *beside, strict=True):
        try:
            assert_accurate(ours, *three)
        except AssertionError as error:
            raise AssertionError(f"{act}: {output}: {error}") from None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_against_fp64(shape, dtype):
    program = host.build()
    for act in activations_of(dtype, shape, SHAPES.values()):
        check(program, shape, dtype, act)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", [Device(108, 8), Device(132, 9), Device(148, 10), FEW], ids=str)
def test_devices(device, dtype):
    for shape in (MANY_IMAGES, SHAPES["several images, odd sizes"], SHAPES["two chunks, the last one partly"]):
        check(host.build(), shape, dtype, device=device)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_fp32_parameters_beside_low_precision(dtype):
    for shape in (SHAPES["several images, odd sizes"], SHAPES["any odd filter"]):
        check(host.build(), shape, dtype, weight_dtype=torch.float32)


# spare: elements between pixels of u and dy; offset: of their first elements from 16 bytes
LAYOUTS = {
    "spaced, aligned": {"spare": (16, 8)},
    "spaced, not aligned": {"spare": (2, 1)},
    "not aligned": {"offset": (2, 2)},
    "dy alone not aligned": {"offset": (0, 2)},
    "dy alone spaced": {"spare": (0, 8)},
    "weights not aligned": {"weight_offset": 1},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(layout, dtype):
    for shape in (SHAPES["several images, odd sizes"], SHAPES["an odd number of channels"], SHAPES["any odd filter"]):
        check(host.build(), shape, dtype, **layout)


@pytest.mark.parametrize("K", [7, 9], ids=["own kernel", "any filter"])
@pytest.mark.parametrize("device", [Device(132, 9), Device(148, 10)], ids=str)
def test_the_bias_is_added_last(device, K):
    """To a sum of small terms, which a large bias would have swallowed one by one; in y, and in dg."""
    C, large, small = 8, 2.0**12, 2.0**-13
    u = torch.ones(1, 9, 9, 2 * C)
    u[..., C:] = small
    given = Inputs(u, torch.ones(C, 1, K, K), torch.full((C,), large), torch.ones(1, 9, 9, C))
    y, du, *_ = host.run(host.build(), given, "identity", device=device)
    taps = F.conv2d(torch.ones(1, 1, 9, 9), torch.ones(1, 1, K, K), padding=K // 2).view(1, 9, 9, 1)
    assert torch.equal(y, (taps * small + large).expand(y.shape))
    assert torch.equal(du[..., :C], y)
    assert y.max() > large


@pytest.mark.parametrize(
    "shape", [(0, 4, 4, 8, 4, 7), (2, 0, 4, 8, 4, 7), (2, 4, 0, 8, 4, 7), (1, 4, 4, 0, 0, 7)], ids=str
)
def test_zero_sizes_touch_nothing(shape):
    inputs = make_inputs(*shape)
    y, du, dweight, dbias = host.run(host.build(), inputs, "gelu")
    assert y.numel() == du.numel() == 0
    assert dweight.isnan().all()  # the caller's
    assert dbias.isnan().all()


def check_the_last_images(check_name, shape, images_before, last_blocks, dtype, backward):
    """Of a tensor so large that its other images, zeros, exist as addresses only; overflow traps in "memory"."""
    inputs, beside = case(shape, dtype, "gelu")
    program = host.build(check_name, tuple(host.DTYPES) if check_name == "plain" else (dtype,))
    how = {"images_before": images_before, "last_blocks": last_blocks, "backward": backward}
    results = host.run(program, inputs, "gelu", **how)
    for index in range(2 if backward else 1):
        assert_accurate(results[index], *(each[index] for each in beside))


@pytest.mark.parametrize(
    ("K", "dtype"),
    [(7, torch.bfloat16), (9, torch.bfloat16), *(pytest.param(K, torch.float32, marks=pytest.mark.nightly)
                                                 for K in (7, 9))],
)  # fmt: skip
def test_beyond_2_to_the_31_elements(K, dtype):
    H, W, D = 3, 5, 16384
    images = 2**31 // (H * W * D) + 1
    # All channels of the last images: a block for each KiB of a pixel's identity channels, or for each 256 values.
    blocks = 2 * D * dtype.itemsize // 1024 if K == 7 else 2 * H * -(-W * D // 256)
    check_the_last_images("memory", (2, H, W, D, 16, K), images, blocks, dtype, backward=False)
    if K == 7:
        check_the_last_images("plain", (2, H, W, D, 16, K), images, blocks, dtype, backward=True)


@pytest.mark.parametrize("K", [7, 9])
def test_the_most_pixels(K):
    H, W = 3, 5
    images = (2**31 - 1024) // (H * W)
    last = 2 * H if K == 9 else 4
    check_the_last_images("memory", (2, H, W, 8, 8, K), images - 2, last, torch.bfloat16, backward=False)
    with pytest.raises(Fault, match="not supported"):
        check_the_last_images("memory", (2, H, W, 8, 8, K), images - 1, last, torch.bfloat16, backward=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_schedule_gives_the_same_bits(dtype):
    inputs = make_inputs(*MANY_IMAGES, dtype)
    first = host.run(host.build(), inputs, "gelu", device=FEW)
    for schedule in (Schedule(0, True), Schedule(1, False), Schedule(1, True), Schedule(2, True)):
        for ours, again in zip(first, host.run(host.build(), inputs, "gelu", schedule, FEW), strict=True):
            assert torch.equal(ours, again)


def test_gradients_of_parameters_do_not_depend_on_the_device():
    inputs = make_inputs(*MANY_IMAGES)
    one, other = (host.run(host.build(), inputs, "gelu", device=device) for device in (FEW, Device(148, 10)))
    assert torch.equal(one[2], other[2])
    assert torch.equal(one[3], other[3])


@pytest.mark.parametrize("error", [-1, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_largest_error_of_the_approximate_instructions(dtype, error):
    for act in ACTIVATIONS:
        check(host.build(), SHAPES["several images, odd sizes"], dtype, act, schedule=Schedule(error=error))


@pytest.mark.parametrize("K", [3, 5, 7, 9])
def test_an_impulse_returns_the_filter(K):
    inputs = make_inputs(1, 9, 9, 8, 8, K)
    inputs.bias.zero_()
    inputs.u.zero_()
    inputs.u[..., :8] = 1  # act(g) = g = 1
    inputs.u[0, 4, 4, 8:] = 1
    y = host.run(host.build(), inputs, "identity")[0]
    R = K // 2
    found = y[0, 4 - R : 5 + R, 4 - R : 5 + R].permute(2, 0, 1)
    assert torch.equal(found, inputs.weight[:, 0].flip(-1, -2))


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gates_at_infinity_and_nan(dtype, act):
    gates = torch.tensor([0.0, -0.0, 1e4, -1e4, 90.0, -90.0, -8.0, 8.0, 1e-7, torch.inf, -torch.inf, torch.nan])
    inputs = make_inputs(1, 1, 1, len(gates), 0, 3, dtype)
    inputs.u[..., : len(gates)] = gates
    inputs.u[..., len(gates) :] = 1
    ours = host.run(host.build(), inputs, act)[0].flatten()
    torch.testing.assert_close(ours[:-3], eager(inputs, act)[0].flatten()[:-3], rtol=1e-2, atol=1e-6)
    limits = [torch.inf, -torch.inf if act == "identity" else torch.nan, torch.nan]  # as PyTorch on CUDA
    torch.testing.assert_close(ours[-3:], torch.tensor(limits, dtype=dtype), equal_nan=True)


CHECKED = {name: SHAPES[name] for name in SHAPES if name not in ("two columns of tiles", "segments of an image")}
CHECKED["many images"] = MANY_IMAGES


@pytest.mark.parametrize("shape", CHECKED.values(), ids=CHECKED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.nightly)], ids=str)
@pytest.mark.parametrize("kind", host.SANITIZERS)
def test_memory_and_races(kind, shape, dtype):
    """AddressSanitizer over global and shared memory; and no two threads at one byte without a barrier between."""
    program = host.build(kind, (dtype,))
    schedule = Schedule(order=2, late_copies=kind == "memory")
    check(program, shape, dtype, schedule=schedule, device=FEW)
    if shape[-1] in (3, 5, 7):  # no other filter's kernels depend on the device
        check(program, shape, dtype, schedule=schedule, device=Device(148, 10))
    check(program, shape, dtype, schedule=schedule, spare=(2, 1), weight_offset=1)


def planted(tmp_path, file, right, wrong):
    """A copy of the kernels with one fault."""
    shutil.copytree(host.KERNELS, tmp_path / "csrc")
    path = tmp_path / "csrc" / "cuda" / file
    text = path.read_text()
    assert text.count(right) == 1, f"{file} no longer has {right!r} once"
    path.write_text(text.replace(right, wrong))
    return tmp_path / "csrc" / "cuda"


def fault_of(kind, kernels, unit, shape, schedule=Schedule()):  # noqa: B008
    inputs, beside = case(shape, torch.float32, "gelu")
    program = host.build(kind, (torch.float32,), (unit,), kernels)
    beside = [each[0] for each in beside]
    with pytest.raises(AssertionError) as found:
        assert_accurate(host.run(program, inputs, "gelu", schedule, backward=False)[0], *beside)
    return found


@pytest.mark.nightly
def test_a_write_out_of_bounds_is_caught(tmp_path):
    kernels = planted(
        tmp_path, "forward.cuh", "if (s < pixels && c < channels) value.store", "if (c < channels) value.store"
    )
    found = fault_of("memory", kernels, "forward.cu", (1, 3, 5, 17, 17, 7))
    assert found.type is Fault
    assert "heap-buffer-overflow" in str(found.value)
    assert "WRITE of size 4" in str(found.value)


@pytest.mark.nightly
def test_a_write_out_of_bounds_in_shared_memory_is_caught(tmp_path):
    kernels = planted(tmp_path, "staging.cuh", "i < bytes; i += blockDim.x * 16", "i <= bytes; i += blockDim.x * 16")
    found = fault_of("memory", kernels, "forward.cu", SHAPES["one pixel"])
    assert found.type is Fault
    assert "heap-buffer-overflow" in str(found.value)
    assert "clear_shared" in str(found.value)


def test_a_missing_barrier_is_caught(tmp_path):
    kernels = planted(
        tmp_path, "forward.cuh", "wait_copies<kStages - 2>();\n    __syncthreads();", "wait_copies<kStages - 2>();"
    )
    found = fault_of("races", kernels, "forward.cu", SHAPES["several images, odd sizes"])
    assert found.type is Fault
    assert "no barrier between" in str(found.value)


@pytest.mark.nightly
def test_a_missing_wait_is_caught(tmp_path):
    """By the NaN with which shared memory starts, or by what the slot held before."""
    kernels = planted(tmp_path, "forward.cuh", "wait_copies<kStages - 2>()", "wait_copies<kStages - 1>()")
    fault_of("plain", kernels, "forward.cu", SHAPES["several images, odd sizes"], Schedule(late_copies=True))


@pytest.mark.nightly
def test_a_swapped_index_is_caught(tmp_path):
    kernels = planted(tmp_path, "conv_rows.cuh", "tap = (K - 1 - k) * K + kw", "tap = kw * K + (K - 1 - k)")
    found = fault_of("plain", kernels, "forward.cu", SHAPES["several images, odd sizes"])
    assert found.type is AssertionError
