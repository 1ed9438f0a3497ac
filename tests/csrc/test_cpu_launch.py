"""The CPU kernels through their launch interface, without torch (tests/cpu_launch): between guard pages with the flags
of the module, and under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer.

`make test` runs the guard pages on every instruction set, and under AddressSanitizer the unit of AMX, whose tile
instructions are C++ there; `make sanitize` all of it.
"""

import copy
import functools

import pytest
import torch
from cpu_launch import launch
from cpu_launch.launch import Fault, Where
from generated import (
    LAYOUTS,
    BlockCase,
    block_and_outputs,
    block_cases,
    downsampling_and_outputs,
    downsampling_cases,
    head_and_outputs,
    head_cases,
    number_of_cases,
    op_cases,
)
from hypothesis import given
from numerics import Inputs, assert_accurate, case, check_outputs, expected_of, make_inputs
from torch import nn

from mambaout_kernels import backends, reference
from mambaout_kernels.backends import cpu
from mambaout_kernels.benchmarking import error_bounds
from mambaout_kernels.reference import ACTIVATIONS

if launch.missing() or cpu.unavailable():
    pytest.skip(str(launch.missing() or cpu.unavailable()), allow_module_level=True)

from mambaout_kernels import _C

ISAS = _C.supported_cpu_capabilities()
DTYPES = list(launch.DTYPES)
BF16_ISAS = ("avx512_bf16", "amx_bf16")  # which multiply bfloat16

# N, H, W, D, C, K: each reaches a branch of its own
SHAPES = {
    "filter wider than the image": (2, 5, 3, 19, 19, 7),
    "no conv channels": (1, 4, 4, 10, 0, 7),
    "no identity channels": (1, 8, 9, 32, 32, 7),
    "base's odd hidden": (1, 9, 15, 341, 128, 7),
    "one pixel": (1, 1, 1, 8, 3, 7),
    "two columns of tiles": (1, 16, 70, 20, 5, 5),
    "three strips, small filter": (2, 30, 15, 33, 16, 3),
    "largest filter": (1, 3, 40, 12, 7, 31),
    "pointwise filter": (1, 5, 6, 9, 4, 1),
    "one column": (1, 33, 1, 16, 16, 7),
    "no pixel": (2, 0, 4, 8, 4, 7),
}


def cases(shapes, on_amx: bool) -> list:
    """(kind, isa, shape); those of the sanitizers on every instruction set are for make sanitize.

    on_amx: whether AMX has kernels for it.
    """
    return [
        pytest.param(
            kind,
            isa,
            name,
            id=f"{kind}-{isa}-{name}",
            marks=() if kind in launch.USUAL else pytest.mark.sanitize,
        )
        for kind in launch.FLAGS
        for isa in launch.isas_of(kind, ISAS)
        for name in shapes
        if on_amx or isa != "amx_bf16"
    ]


RUNNING: dict[str, launch.Program] = {}


def program(kind: str) -> launch.Program:
    if kind not in RUNNING:
        RUNNING[kind] = launch.Program(kind)
    return RUNNING[kind]


@pytest.fixture(scope="module", autouse=True)
def _programs_end_well():
    """A leak, too, is reported at the end."""
    yield
    for running in RUNNING.values():
        running.close()


@functools.cache
def laid_out_case(shape, dtype, act, layout):
    dense, expected = case(shape, dtype, act)
    inputs = Inputs(LAYOUTS[layout](dense.u), dense.weight, dense.bias, LAYOUTS[layout](dense.dy))
    if torch.equal(inputs.u, dense.u) and torch.equal(inputs.dy, dense.dy):
        return inputs, expected
    return inputs, expected_of(inputs, act)


@pytest.mark.parametrize(("kind", "isa", "shape"), cases(SHAPES, on_amx=False))
def test_op(kind, isa, shape):
    for i, (dtype, layout) in enumerate((d, y) for d in DTYPES for y in LAYOUTS):
        act = ACTIVATIONS[(DTYPES.index(dtype) + list(SHAPES).index(shape)) % len(ACTIVATIONS)]
        inputs, expected = laid_out_case(SHAPES[shape], dtype, act, layout)
        found = program(kind).op(inputs, act, Where(isa, threads=1 + i % 4, at_begin=i % 2 == 1))
        check_outputs(isa, found, inputs, act, expected)


# N, H, W, dim, conv_ratio, expansion_ratio, K
BLOCKS = {
    "filter wider than the image": (2, 5, 3, 19, 1.0, 8 / 3, 7),
    "no conv channels": (1, 4, 4, 10, 0.0, 8 / 3, 7),
    "no identity channels": (1, 8, 9, 12, 2.0, 2.0, 7),
    "base's odd hidden": (1, 4, 9, 128, 1.0, 8 / 3, 7),
    "two columns of tiles": (1, 5, 170, 16, 1.0, 2.0, 5),
    "one pixel": (1, 1, 1, 8, 1.0, 8 / 3, 7),
    "one pixel of many channels": (1, 1, 1, 96, 1.0, 8 / 3, 7),
    "largest filter": (1, 3, 40, 12, 1.0, 8 / 3, 31),
    "pointwise filter": (3, 5, 6, 9, 1.0, 8 / 3, 1),
    "no pixel": (2, 0, 4, 8, 1.0, 8 / 3, 7),
}


def parameters_of(block):
    named = dict(block.named_parameters())
    given = {name: named.get(".".join(name.rsplit("_", 1))) for name in launch.PARAMETERS}
    given["scale"] = named.get("ls.gamma")
    if given["conv_weight"] is None:
        given["conv_weight"], given["conv_bias"] = torch.empty(0, 1, 1, 1), torch.empty(0)
    return {name: None if p is None else p.detach().float() for name, p in given.items()}


@functools.cache
def block_case(shape, dtype, layout):
    N, H, W, dim, conv_ratio, expansion_ratio, K = shape
    arguments = {
        "conv_ratio": conv_ratio,
        "expansion_ratio": expansion_ratio,
        "kernel_size": K,
        "ls_init_value": 0.5,
    }
    case = BlockCase((N, H, W, dim), tuple(arguments.items()), "gelu", dtype, layout, 4, "", 1, False)
    block, theirs, truth = block_and_outputs(case)
    return case.x, block, theirs, truth, error_bounds.of_block(block, case.x)["y"]


@pytest.mark.parametrize(("kind", "isa", "shape"), cases(BLOCKS, on_amx=True))
def test_block(kind, isa, shape):
    for i, layout in enumerate(LAYOUTS):
        for dtype in (torch.float32, torch.bfloat16):
            x, block, *beside = block_case(BLOCKS[shape], dtype, layout)
            low_precision = dtype == torch.bfloat16 and isa in BF16_ISAS
            where = Where(isa, threads=1 + i, at_begin=i % 2 == 1)
            ours = program(kind).block(x, parameters_of(block), "gelu", block.norm.eps, low_precision, where)
            assert_accurate(ours, *beside)


# N, H, W, in_channels, out_channels, normed
DOWNSAMPLINGS = {
    "stem": (2, 13, 18, 3, 24, False),
    "between stages": (1, 7, 10, 20, 37, True),
    "one pixel": (1, 1, 1, 8, 5, True),
    "wide": (1, 3, 171, 5, 16, True),
    "no pixel": (0, 4, 4, 8, 16, True),
}
CHANNELS = {
    "NHWC": lambda x: x,
    "NCHW": lambda x: x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
    "with gaps": LAYOUTS["channels of a wider tensor"],
}


@pytest.mark.parametrize(("kind", "isa", "shape"), cases(DOWNSAMPLINGS, on_amx=True))
def test_downsampling(kind, isa, shape):
    N, H, W, channels, out_channels, normed = DOWNSAMPLINGS[shape]
    torch.manual_seed(6)
    conv = nn.Conv2d(channels, out_channels, 3, stride=2, padding=1)
    norm = nn.LayerNorm(out_channels, eps=1e-6) if normed else None

    def by_modules(x, dtype):
        with torch.no_grad():
            y = copy.deepcopy(conv).to(dtype)(x.to(dtype).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            return reference.activation(copy.deepcopy(norm).to(dtype)(y) if normed else y, act)

    for i, (dtype, layout) in enumerate((d, y) for d in (torch.float32, torch.bfloat16) for y in CHANNELS):
        if dtype == torch.bfloat16:
            conv, norm = (m and m.to(dtype).float() for m in (conv, norm))  # parameters that the dtype has
        act = ACTIVATIONS[i % len(ACTIVATIONS)]
        x = CHANNELS[layout](torch.randn(N, H, W, channels).to(dtype))
        low_precision = dtype == torch.bfloat16 and isa in BF16_ISAS
        ours = program(kind).downsample(x, conv, norm, act, low_precision, Where(isa, 1 + i % 3, i % 2 == 1))
        bound = error_bounds.of_downsampling((conv, norm, act), x)
        assert_accurate(ours, by_modules(x, dtype), by_modules(x, torch.float64), bound)


# M, N, K: tails of tiles, panels and depths; one of each; no terms, no columns, no rows
PRODUCTS = {
    "tails": (37, 45, 261),
    "between stages": (29, 96, 130),
    "several tasks": (700, 70, 20),
    "one pixel": (1, 1, 1),
    "one row": (1, 67, 90),
    "no terms": (5, 40, 0),
    "no columns": (5, 0, 40),
    "no pixel": (0, 5, 40),
}


@pytest.mark.parametrize(("kind", "isa", "shape"), cases(PRODUCTS, on_amx=True))
def test_products(kind, isa, shape):
    """Of training's linear layers, with either factor turned, or part of a wider matrix; and of rows."""
    M, N, K = PRODUCTS[shape]
    torch.manual_seed(7)
    bias = torch.randn(N)
    layouts = ((lambda t: t), (lambda t: torch.cat((t, t), dim=1)[:, : t.shape[1]]))
    for i, (layout, a_turned, b_turned) in enumerate((y, a, b) for y in layouts for a in (0, 1) for b in (0, 1)):
        a = layout(torch.randn(K, M)).t() if a_turned else layout(torch.randn(M, K))
        b = layout(torch.randn(N, K)).t() if b_turned else layout(torch.randn(K, N))
        where = Where(isa, threads=1 + i % 3, at_begin=i % 2 == 1)
        sums = a_turned == 1
        eager = torch.addmm(bias, a, b), a.sum(dim=1) if sums else a.new_empty(0)
        truth = torch.addmm(bias.double(), a.double(), b.double()), a.double().sum(dim=1) if sums else a.new_empty(0)
        bounds = error_bounds.of_product(a, b, bias), error_bounds.of_product(a, a.new_ones(K, 1))[:, 0]
        found = program(kind).product(a, b, bias, sums, False, where)
        assert_accurate(found[0], eager[0], truth[0], bounds[0])
        if sums:
            assert_accurate(found[1], eager[1], truth[1], bounds[1])
        if b_turned and not a_turned:
            of_rows = program(kind).product(a, b, bias, False, True, where)[0]
            assert_accurate(of_rows, eager[0], truth[0], bounds[0])


CASES = {"plain": 40, "memory": 12, "races": 12, "amx-memory": 12, "amx-undefined": 12, "amx-races": 12}


@pytest.mark.generated
@pytest.mark.parametrize("kind", launch.kinds(on_amx=False))
def test_generated_calls_of_the_op(kind):
    """Arbitrary sizes, layouts, dtypes, threads and instruction sets, straight to the launch interface."""

    @given(op_cases(launch.isas_of(kind, ISAS), launched=True))
    def launched(case):
        inputs = case.inputs
        found = program(kind).op(inputs, case.act, Where(case.isa, case.threads, case.at_begin))
        check_outputs(case.isa, found, inputs, case.act)

    number_of_cases(CASES[kind])(launched)()


@pytest.mark.generated
@pytest.mark.parametrize("kind", launch.kinds(on_amx=True))
def test_generated_calls_of_the_block(kind):
    @given(block_cases(launch.isas_of(kind, ISAS), launched=True))
    def launched(case):
        low_precision = case.dtype == torch.bfloat16 and case.isa in BF16_ISAS
        block, theirs, truth = block_and_outputs(case)
        where = Where(case.isa, case.threads, case.at_begin)
        ours = program(kind).block(case.x, parameters_of(block), case.act, block.norm.eps, low_precision, where)
        assert_accurate(ours, theirs, truth, error_bounds.of_block(block, case.x)["y"])

    number_of_cases(CASES[kind] // 2)(launched)()


@pytest.mark.generated
@pytest.mark.parametrize("kind", launch.kinds(on_amx=True))
def test_generated_calls_of_the_downsampling(kind):
    @given(downsampling_cases(launch.isas_of(kind, ISAS)))
    def launched(case):
        low_precision = case.dtype == torch.bfloat16 and case.isa in BF16_ISAS
        conv, norm, theirs, truth = downsampling_and_outputs(case)
        where = Where(case.isa, case.threads, case.at_begin)
        ours = program(kind).downsample(case.x, conv, norm, case.act, low_precision, where)
        bound = error_bounds.of_downsampling((conv, norm, case.act), case.x)
        assert_accurate(ours, theirs, truth, bound)

    number_of_cases(CASES[kind] // 2)(launched)()


@pytest.mark.generated
@pytest.mark.parametrize("kind", launch.kinds(on_amx=False))
def test_generated_calls_of_the_head(kind):
    @given(head_cases(launch.isas_of(kind, ISAS), launched=True))
    def launched(case):
        norm, head, theirs, truth = head_and_outputs(case)
        ours = program(kind).head(case.x, norm, head, Where(case.isa, case.threads, case.at_begin))
        assert_accurate(ours, theirs, truth, error_bounds.of_head(norm, head, case.x))

    number_of_cases(CASES[kind])(launched)()


SANITIZERS = {"AddressSanitizer": "memory", "ThreadSanitizer": "races"}


@pytest.mark.parametrize("kind", launch.kinds(on_amx=True))
def test_the_sanitizer_is_in_the_program(kind):
    """What it says of a read beyond x tells whether the flags have reached the compiler."""
    x, conv = torch.randn(2, 5, 6, 20), nn.Conv2d(20, 16, 3, stride=2, padding=1)
    isa = launch.isas_of(kind, ISAS)[-1]
    with pytest.raises(Fault) as found:
        launch.Program(kind).downsample(x, conv, None, "gelu", False, Where(isa), stride_n=2000 * x.stride(0))
    said_by = [name for name in SANITIZERS if name in str(found.value)]
    assert said_by == [name for name, of in SANITIZERS.items() if kind.endswith(of)]


@pytest.mark.parametrize("at_begin", [False, True])
def test_what_lies_beside_a_buffer_is_guarded(at_begin):
    """Told that the images are further apart than they are, the kernel reads beyond u: the program must not survive."""
    inputs = make_inputs(2, 5, 6, 20, 12, 7)
    running = launch.Program("plain")
    good = running.op(inputs, "gelu", Where(at_begin=at_begin))
    far = inputs.u.stride(0) * (-2000 if at_begin else 2000)
    with pytest.raises(Fault):
        running.op(inputs, "gelu", Where(at_begin=at_begin), stride_n=far)
    # and a new one takes over
    for ours, before in zip(running.op(inputs, "gelu", Where(at_begin=at_begin)), good, strict=True):
        assert torch.equal(ours, before)
    running.close()


@pytest.mark.parametrize("isa", ISAS)
def test_block_of_pixels_whose_channels_are_alike(isa):
    """Their norm is the rounding of their mean over sqrt(eps): eager's is 0, and so must ours be."""
    case = BlockCase((1, 3, 4, 96), (("ls_init_value", 0.5),), "gelu", torch.float32, "dense", 5, "", 1, False)
    block, _, _ = block_and_outputs(case)
    x = 2.5 * torch.arange(1, 13).view(1, 3, 4, 1).expand(case.shape) / 7

    def by_modules(dtype):
        with backends.force("reference"), torch.no_grad():
            return copy.deepcopy(block).to(dtype)(x.to(dtype))

    ours = program("plain").block(x.contiguous(), parameters_of(block), "gelu", block.norm.eps, False, Where(isa))
    bound = error_bounds.of_block(block, x)["y"]
    assert_accurate(ours, by_modules(torch.float32), by_modules(torch.float64), bound)


def _with(x, *values):
    for i, value in enumerate(values):
        x[0, i % x.shape[1], (3 * i) % x.shape[2], (7 * i) % x.shape[3]] = value
    return x


# Of the image, and a factor of the weights.
SPECIAL = {
    "infinity": (lambda x: _with(x, torch.inf), 1.0),
    "both infinities": (lambda x: _with(x, torch.inf, -torch.inf, torch.inf), 1.0),
    "NaN": (lambda x: _with(x, torch.nan), 1.0),
    "infinite weights": (lambda x: x, torch.inf),
    "the largest": (lambda x: _with(x, torch.finfo(torch.float32).max, -3.395e38, 3.39e38), 1e-3),
    "huge": (lambda x: x * 2.0**126, 2.0**-60),
    "tiny": (lambda x: x * 2.0**-118, 1.0),
    "subnormal": (lambda x: x * 2.0**-135, 1.0),
    "tiny weights": (lambda x: x, 2.0**-118),
    "both tiny": (lambda x: x * 2.0**-60, 2.0**-60),
    "apart": (lambda x: x * 2.0 ** torch.randint(-60, 20, x.shape), 1.0),
}


@pytest.mark.parametrize("channels", [3, 40])
@pytest.mark.parametrize(("kind", "isa", "special"), cases(SPECIAL, on_amx=True))
def test_special_values(kind, isa, special, channels):
    """Infinite and NaN where eager is; elsewhere within the bound, and as near as eager, down to what tiles hold."""
    torch.manual_seed(8)
    conv = nn.Conv2d(channels, 33, 3, stride=2, padding=1)
    make, factor = SPECIAL[special]
    conv.weight.data *= factor
    conv.bias.data.zero_()
    x = make(torch.randn(1, 13, 15, channels))

    def by_modules(dtype):
        with torch.no_grad():
            return copy.deepcopy(conv).to(dtype)(x.to(dtype).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    eager = by_modules(torch.float32)
    ours = program(kind).downsample(x, conv, None, "identity", False, Where(isa))
    finite = eager.isfinite()
    torch.testing.assert_close(ours[~finite], eager[~finite], equal_nan=True, rtol=0, atol=0)
    if not finite.any():
        return
    known = torch.where(x.isfinite(), x, 0.0)
    exact, bound = by_modules(torch.float64), error_bounds.of_downsampling((conv, None, "identity"), known)
    if isa == "amx_bf16" and special in ("tiny", "subnormal", "tiny weights", "both tiny"):
        # Of each term, the third part of both factors and six products may be below 2^-126, which is zero.
        largest = known.abs().max().item() + conv.weight.abs().max().item()
        bound = bound + 9 * channels * torch.finfo(torch.float32).tiny * (6 + largest)
        assert ((ours - exact).abs() <= bound).all()
    else:
        assert_accurate(*(torch.where(finite, t, 0.0) for t in (ours, eager, exact, bound)))
