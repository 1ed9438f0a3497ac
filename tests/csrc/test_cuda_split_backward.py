"""The split backward of csrc/cuda, executed on the CPU (tests/cuda_host): numbers, memory, races, when it is taken."""

import itertools

import numerics
import pytest
import torch
from cuda_host import host
from cuda_host.host import FUSED, SPLIT, Device, Fault, Schedule
from numerics import OUTPUTS, Inputs, activations_of, assert_accurate, assert_alike, make_inputs

from mambaout_kernels.audit import cuda as audit
from mambaout_kernels.reference import ACTIVATIONS

if host.missing():
    pytest.skip(str(host.missing()), allow_module_level=True)

DTYPES = list(host.DTYPES)
LOW = [torch.bfloat16, torch.float16]
FEW, TWO_CHANNELS = Device(multiprocessors=1), Device(148, 10)

# N, H, W, D, C: each reaches a branch of its own
SHAPES = {
    "odd sizes": (2, 9, 11, 40, 24),
    "one pixel": (1, 1, 1, 64, 40),
    "one row": (1, 1, 65, 24, 16),
    "one column": (1, 33, 1, 24, 16),
    "filter larger than the image": (2, 2, 3, 24, 16),
    "no identity channels": (1, 8, 9, 32, 32),
    "a packet of channels": (3, 5, 6, 8, 8),
    "a strip beyond the image": (1, 5, 30, 16, 8),
    "a chunk beyond the channels": (1, 4, 5, 168, 160),
    "more packets than a block has": (2, 1, 2, 8456, 8),
    "segments of an image": (1, 30, 15, 24, 16),
    "several images of a block": (792, 2, 3, 16, 8),  # 3: the stages of the ring come round between two
    "one row of several images": (530, 1, 2, 8, 8),
}
LONG = ("several images of a block", "one row of several images", "more packets than a block has")
STAGES = {
    "stage 1": (1, 56, 56, 128, 96),
    "stage 2": (1, 28, 28, 136, 104),
    "stage 3": (2, 14, 14, 64, 32),
    "stage 4": (3, 7, 7, 96, 96),
}


def case(shape, dtype, act, weight_dtype=None):
    return numerics.case((*shape, 7), dtype, act, weight_dtype)


def gradients(inputs, act="gelu", path=SPLIT, kind="plain", dtypes=tuple(DTYPES), **how):
    return host.run(host.build(kind, dtypes), inputs, act, path=path, **how)[1:]


def check(shape, dtype, act="gelu", weight_dtype=None, **how):
    inputs, expected = case(shape, dtype, act, weight_dtype)
    found = gradients(inputs, act, **how)
    for output, ours, *beside in zip(OUTPUTS[1:], found, *(each[1:] for each in expected), strict=True):
        try:
            assert_accurate(ours, *beside)
        except AssertionError as error:
            raise AssertionError(f"{act}: {output}: {error}") from None
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_against_fp64(name, dtype):
    for act in ["gelu"] if name in LONG else activations_of(dtype, SHAPES[name], SHAPES.values()):
        check(SHAPES[name], dtype, act)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("shape", list(STAGES.values())[1:], ids=list(STAGES)[1:])  # the first takes a while
def test_stages(shape, dtype):
    for device in (Device(), TWO_CHANNELS):
        check(shape, dtype, device=device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [SHAPES["odd sizes"], SHAPES["segments of an image"], STAGES["stage 3"]], ids=str)
def test_beside_the_one_kernel(shape, dtype):
    """The same sums in the same order, but for dg, where s is rounded once more, and for the weights' gradients."""
    D, C = shape[3:]
    for act in ACTIVATIONS:
        inputs, _ = case(shape, dtype, act)
        (du, *parameters), (fused, *of_fused) = gradients(inputs, act), gradients(inputs, act, FUSED)
        assert torch.equal(du[..., D:], fused[..., D:])
        assert torch.equal(du[..., : D - C], fused[..., : D - C])
        for ours, theirs in zip((du, *parameters), (fused, *of_fused), strict=True):
            assert_alike(ours, theirs, 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_fp32_parameters_beside_low_precision(dtype):
    for weight_offset in (0, 1):
        found = check(SHAPES["odd sizes"], dtype, weight_dtype=torch.float32, weight_offset=weight_offset)
        assert found[1].dtype == found[2].dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [{"spare": (16, 8)}, {"spare": (0, 24)}, {"offset": (8, 16)}], ids=str)
def test_slices(layout, dtype):
    """NaN is between the pixels: nothing of it is used."""
    check(SHAPES["odd sizes"], dtype, **layout)
    if dtype == torch.bfloat16:  # how images follow each other is the same in all
        check(SHAPES["several images of a block"], dtype, **layout)


@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=str)
def test_every_schedule_and_device_gives_the_same_bits(dtype):
    schedules = (Schedule(), Schedule(0, True), Schedule(1, False), Schedule(2, True))
    every = list(itertools.product(schedules, (Device(), FEW, TWO_CHANNELS)))
    for shape, pairs in ((SHAPES["odd sizes"], every), (SHAPES["several images of a block"], every[1::4])):
        inputs, _ = case(shape, dtype, "gelu")
        first = gradients(inputs)
        for schedule, device in pairs:
            assert all(map(torch.equal, first, gradients(inputs, schedule=schedule, device=device)))


@pytest.mark.parametrize("error", [-1, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_largest_error_of_the_approximate_instructions(dtype, error):
    for act in ACTIVATIONS:
        check(SHAPES["odd sizes"], dtype, act, schedule=Schedule(error=error))


CHECKED = {name: SHAPES[name] for name in SHAPES if name not in LONG}


@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", CHECKED.values(), ids=CHECKED)
@pytest.mark.parametrize("kind", host.SANITIZERS)
def test_memory_and_races(kind, shape, dtype):
    """As in test_cuda_host.py."""
    how = {"kind": kind, "dtypes": (dtype,), "schedule": Schedule(2, kind == "memory")}
    for device in (FEW, TWO_CHANNELS):
        check(shape, dtype, device=device, **how)
    check(shape, dtype, spare=(16, 8), weight_offset=1, **how)


@pytest.mark.parametrize("device", [FEW, pytest.param(TWO_CHANNELS, marks=pytest.mark.nightly)], ids=str)
@pytest.mark.parametrize("kind", host.SANITIZERS)
def test_memory_and_races_of_several_images(kind, device):
    """Of a slice: it takes as long as all the others."""
    how = {"kind": kind, "dtypes": (torch.bfloat16,), "schedule": Schedule(2, kind == "memory")}
    check((530, 1, 1, 8, 8), torch.bfloat16, spare=(16, 8), weight_offset=1, device=device, **how)


def test_beyond_2_to_the_31_elements():
    """Of du: all channels of the last images, a pixel to a block of the gates."""
    H, W, D = 3, 5, 16384
    inputs, expected = case((2, H, W, D, 16), torch.bfloat16, "gelu")
    images = 2**31 // (H * W * D) + 1
    du = gradients(inputs, dtypes=(torch.bfloat16,), images_before=images, last_blocks=2 * H * W)[0]
    assert_accurate(du, *(each[1] for each in expected))


def test_beyond_2_to_the_31_elements_of_e():
    """The last two blocks of every kernel: both begin beyond 2^31. More take minutes, with 10^4 images to each."""
    H, W, C = 5, 6, 32  # every tap meets pixels
    inputs, expected = case((2, H, W, C, C), torch.bfloat16, "gelu")
    images = (2**31 + 2**25) // (H * W * C)
    found = gradients(inputs, dtypes=(torch.bfloat16,), images_before=images, last_blocks=2)
    # Those of sum_partials_kernel have the last tap and dbias; the slots of the images before are zeros.
    du, dweight, dbias = zip(found, *(each[1:] for each in expected), strict=True)
    assert_accurate(*du)
    assert_accurate(*(each[:, :, -1, -1] for each in dweight))
    assert_accurate(*dbias)


# N * H * W * C of 2^20, and one packet of channels less
MOST, LESS = (32, 16, 16, 64, 64), (32, 16, 16, 64, 56)


def path_taken(inputs):
    """The one with the bits of the call's own choice, in the last blocks; what the others would write is NaN."""
    chosen, fused, split = (gradients(inputs, path=path, last_blocks=2)[0].nan_to_num() for path in (0, FUSED, SPLIT))
    assert not torch.equal(fused, split)
    assert torch.equal(chosen, fused) or torch.equal(chosen, split)
    return FUSED if torch.equal(chosen, fused) else SPLIT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "expected"), [(MOST, SPLIT), (LESS, FUSED)], ids=["enough", "less"])
def test_which_path_is_chosen(shape, expected, dtype):
    assert path_taken(make_inputs(*shape, 7, dtype)) == expected


def test_the_one_kernel_is_chosen_otherwise():
    """Where the split one would have enough work: with other filters, and where something is not aligned."""
    for K, how in ((5, {}), (7, {"spare": (2, 0)})):
        inputs = make_inputs(*MOST, K, torch.bfloat16)
        chosen, fused = (gradients(inputs, path=path, last_blocks=2, **how)[0] for path in (0, FUSED))
        assert torch.equal(chosen.nan_to_num(), fused.nan_to_num())
        assert chosen.nan_to_num().any()


@pytest.mark.parametrize(
    ("shape", "how"),
    [
        ((1, 4, 5, 16, 8, 5), {}),
        ((1, 4, 5, 16, 8, 9), {}),
        ((1, 4, 5, 16, 0, 7), {}),
        ((1, 4, 5, 20, 8, 7), {}),
        ((1, 4, 5, 16, 4, 7), {}),
        ((1, 4, 5, 16, 8, 7), {"spare": (2, 0)}),
        ((1, 4, 5, 16, 8, 7), {"offset": (0, 2)}),
    ],
    ids=str,
)
def test_what_it_does_not_take_is_refused(shape, how):
    with pytest.raises(Fault, match="the split backward does not take this call"):
        gradients(make_inputs(*shape, torch.bfloat16), **how)


def test_no_sizes_touch_nothing():
    inputs = make_inputs(0, 4, 4, 16, 8, 7, torch.bfloat16)
    du, *parameters = gradients(inputs)
    assert du.numel() == 0
    assert all(each.isnan().all() for each in parameters)  # the caller's


def test_dbias_and_dweight_of_ones_are_counts():
    """Of the pixels that a tap meets within the image."""
    N, H, W, C = 3, 9, 10, 8
    ones = torch.ones(N, H, W, 2 * C)
    inputs = Inputs(ones, torch.zeros(C, 1, 7, 7), torch.zeros(C), torch.ones(N, H, W, C))
    _, dweight, dbias = gradients(inputs, "identity")
    rows, columns = (torch.tensor([float(size - abs(k - 3)) for k in range(7)]) for size in (H, W))
    assert torch.equal(dweight, (N * rows[:, None] * columns).expand(C, 1, 7, 7))
    assert torch.equal(dbias, torch.full((C,), float(N * H * W)))


@pytest.mark.skipif(audit.module_path() is None, reason="the CUDA module is not built: no nvcc")
def test_small_images_share_a_block_of_the_weight_gradient():
    """At the stages of mambaout_tiny a multiprocessor of an H100 has three blocks; and whatever the device."""
    from mambaout_kernels import _C_cuda

    for sizes in ((56, 56, 256, 96), (28, 28, 512, 192), (14, 14, 1024, 384), (7, 7, 1536, 576)):
        plan, other = (
            _C_cuda.launch_plans((128, *sizes, 7), 2, multiprocessors, 9)["weight_gradient"]
            for multiprocessors in (132, 1)
        )
        assert plan == other
        assert 2 * 132 < plan["blocks"] <= 3 * 132
    assert "weight_gradient" not in _C_cuda.launch_plans((128, 7, 7, 64, 32, 5), 2, 132, 9)
    assert _C_cuda.launch_plans((1, 56, 56, 256, 96, 7), 2, 132, 9)["weight_gradient"]["segments"] > 1
