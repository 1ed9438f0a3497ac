"""Cases that hypothesis generates: of the op, of the whole block, of the downsampling and of the head."""

import copy
import functools
from collections import Counter
from dataclasses import dataclass
from functools import partial

import torch
from hypothesis import settings
from hypothesis import strategies as st
from numerics import Inputs, make_inputs
from torch import Tensor, nn

from mambaout_kernels import backends
from mambaout_kernels.nn.block import FusedGatedCNNBlock
from mambaout_kernels.nn.head import Head
from mambaout_kernels.reference import ACTIVATIONS

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LOW = (torch.bfloat16, torch.float16)
MOST_ELEMENTS = 60_000  # of y: a case takes milliseconds


RUN: Counter[str] = Counter()  # cases that ran to their end, by test; conftest.py prints how many


def number_of_cases(usual: int):
    """`usual` cases in `make test`, ten times as many in `make nightly` (the profiles of conftest.py)."""
    bounded = settings(max_examples=max(1, usual * settings().max_examples // 100))

    def decorate(test):
        inner = test.hypothesis.inner_test

        @functools.wraps(inner)
        def counted(*args, **kwargs):
            inner(*args, **kwargs)
            RUN[inner.__qualname__.partition(".")[0]] += 1

        test.hypothesis.inner_test = counted
        return bounded(test)

    return decorate


def _with_gaps(x: Tensor) -> Tensor:
    return torch.cat((x, x[..., :1].repeat(1, 1, 1, 3)), dim=-1)[..., : x.shape[3]] if x.shape[3] else x


def _misaligned(x: Tensor) -> Tensor:
    return torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)


# The same sizes in other memory; "expanded" and "one value" repeat values as well.
LAYOUTS = {
    "dense": lambda x: x,
    "channels of a wider tensor": _with_gaps,
    "misaligned": _misaligned,
    "rows and columns swapped": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "images innermost": lambda x: x.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3),
    "every other row": lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
    "expanded": lambda x: x[:1].expand(x.shape) if x.shape[0] else x,
    "one row for all": lambda x: x[:, :1].expand(x.shape) if x.shape[1] else x,
}
# Channels apart from each other: what the launch interface does not take, and the op copies.
CHANNELS_APART = {
    "NCHW memory": lambda x: x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
    "one value": lambda x: x[:1, :1, :1, :1].expand(x.shape) if x.numel() else x,
    "every other channel": lambda x: x.repeat_interleave(2, dim=3)[..., ::2],
}
WEIGHT_LAYOUTS = {
    "dense": lambda w: w,
    "turned": lambda w: w.transpose(2, 3).contiguous().transpose(2, 3),
    "channels innermost": lambda w: w.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
}


@dataclass(frozen=True)
class OpCase:
    shape: tuple[int, ...]  # N, H, W, D, C, K
    act: str
    dtype: torch.dtype
    parameters: torch.dtype
    layouts: tuple[str, str, str]  # of u, dy, weight
    seed: int
    isa: str
    threads: int
    at_begin: bool

    @property
    def inputs(self) -> Inputs:
        of_maps = LAYOUTS | CHANNELS_APART
        plain = make_inputs(*self.shape, self.dtype, self.parameters, self.seed)
        u, dy, weight = self.layouts
        return Inputs(of_maps[u](plain.u), WEIGHT_LAYOUTS[weight](plain.weight), plain.bias, of_maps[dy](plain.dy))


def _sizes(draw, most_channels: int) -> tuple[int, int, int, int]:
    """(N, H, W, channels); seldom empty, seldom wider than one task."""
    N = draw(st.sampled_from((1, 2, 3, 1, 2, 0)))
    H = draw(st.integers(0, 3) | st.integers(1, 34))
    W = draw(st.integers(0, 3) | st.integers(1, 34) | st.integers(60, 180))
    channels = draw(st.integers(1, 70) | st.sampled_from((96, 128, 341)))
    return N, H, W, max(1, min(channels, most_channels, MOST_ELEMENTS // max(1, N * H * W)))


def _how_to_run(draw, isas) -> dict:
    return {
        "seed": draw(st.integers(0, 2**31)),
        "isa": draw(st.sampled_from(tuple(isas))),
        "threads": draw(st.integers(1, 5)),
        "at_begin": draw(st.booleans()),
    }


@st.composite
def op_cases(draw, isas=("",), launched=False, dtypes=DTYPES, most_channels=341, kernel_sizes=(1, 3, 5, 7, 9, 11, 31)):
    """launched: for the launch interface, which takes no channels apart from each other."""
    N, H, W, D = _sizes(draw, most_channels)
    C = draw(st.sampled_from((0, D)) | st.integers(0, D))
    K = draw(st.just(7) | st.sampled_from(kernel_sizes))
    dtype = draw(st.sampled_from(dtypes))
    parameters = draw(st.sampled_from((dtype, torch.float32))) if dtype in LOW else dtype
    maps = st.sampled_from(tuple(LAYOUTS if launched else LAYOUTS | CHANNELS_APART))
    return OpCase(
        shape=(N, H, W, D, C, K),
        act=draw(st.sampled_from(ACTIVATIONS)),
        dtype=dtype,
        parameters=parameters,
        layouts=(draw(maps), draw(maps), draw(st.sampled_from(tuple(WEIGHT_LAYOUTS)))),
        **_how_to_run(draw, isas),
    )


class _OfImages:
    """A case with a shape, a dtype, a layout and a seed."""

    @property
    def x(self) -> Tensor:
        x = torch.randn(self.shape, generator=torch.Generator().manual_seed(self.seed)).to(self.dtype)
        return (LAYOUTS | CHANNELS_APART)[self.layout](x)


@dataclass(frozen=True)
class BlockCase(_OfImages):
    shape: tuple[int, int, int, int]  # N, H, W, dim
    arguments: tuple[tuple[str, float], ...]  # of FusedGatedCNNBlock
    act: str
    dtype: torch.dtype
    layout: str
    seed: int
    isa: str
    threads: int
    at_begin: bool


_ACT_LAYERS = dict(zip(ACTIVATIONS, (nn.GELU, partial(nn.GELU, approximate="tanh"), nn.SiLU, nn.Identity), strict=True))


def block_and_outputs(case: BlockCase) -> tuple[FusedGatedCNNBlock, Tensor, Tensor]:
    """The block, none of whose parameters has a special value; its output by its modules in its dtype, and in fp64."""
    block = FusedGatedCNNBlock(case.shape[3], act_layer=_ACT_LAYERS[case.act], **dict(case.arguments))
    generator = torch.Generator().manual_seed(case.seed)
    with torch.no_grad():
        for name, p in block.named_parameters():
            around = 1.0 if name in ("norm.weight", "ls.gamma") else 0.0
            p.copy_(around + 0.3 * torch.randn(p.shape, generator=generator))
    block.to(case.dtype)

    def by_modules(dtype: torch.dtype) -> Tensor:
        large_filter = dict(case.arguments).get("kernel_size", 7) > 9  # as in numerics.eager
        with backends.force("reference"), torch.no_grad(), torch.backends.mkldnn.flags(enabled=not large_filter):
            return copy.deepcopy(block).to(dtype)(case.x.to(dtype))

    return block, by_modules(case.dtype), by_modules(torch.float64)


@st.composite
def block_cases(draw, isas=("",), launched=False):
    N, H, W, dim = _sizes(draw, 140)
    expansion = draw(st.sampled_from((8 / 3, 2.0, 1.0, 3.5)))
    arguments = {
        "expansion_ratio": expansion,
        "conv_ratio": draw(st.sampled_from((1.0, 0.0, 0.5, expansion))),
        "kernel_size": draw(st.sampled_from((7, 7, 1, 3, 5, 9, 13))),
        "ls_init_value": draw(st.sampled_from((None, 0.5))),
    }
    return BlockCase(
        shape=(N, H, W, dim),
        arguments=tuple(arguments.items()),
        act=draw(st.sampled_from(ACTIVATIONS)),
        dtype=draw(st.sampled_from((torch.float32, torch.bfloat16))),
        layout=draw(st.sampled_from(tuple(LAYOUTS if launched else LAYOUTS | CHANNELS_APART))),
        **_how_to_run(draw, isas),
    )


@dataclass(frozen=True)
class DownsamplingCase(_OfImages):
    shape: tuple[int, int, int, int]  # N, H, W, channels
    out_channels: int
    has_bias: bool
    norm: str  # "none", "plain" or "affine"
    act: str
    dtype: torch.dtype
    layout: str
    seed: int
    isa: str
    threads: int
    at_begin: bool


def downsampling_and_outputs(case: DownsamplingCase) -> tuple[nn.Conv2d, nn.LayerNorm | None, Tensor, Tensor]:
    """The convolution and the norm; act(norm(conv(x))) by the modules in their dtype, and in fp64."""
    conv = nn.Conv2d(case.shape[3], case.out_channels, 3, stride=2, padding=1, bias=case.has_bias)
    norm = None
    if case.norm != "none":
        norm = nn.LayerNorm(case.out_channels, eps=1e-6, elementwise_affine=case.norm == "affine")
    generator = torch.Generator().manual_seed(case.seed)
    with torch.no_grad():
        conv.weight.copy_(torch.randn(conv.weight.shape, generator=generator) / (3 * case.shape[3] ** 0.5))
        for p in (conv.bias, *(() if norm is None else norm.parameters())):
            if p is not None:
                p.copy_(0.5 + 0.3 * torch.randn(p.shape, generator=generator))
    modules = nn.ModuleList([conv] if norm is None else [conv, norm]).to(case.dtype)

    def by_modules(dtype: torch.dtype) -> Tensor:
        N, H, W, _ = case.shape
        if N * H * W == 0:  # which conv2d refuses
            return torch.empty(N, (H + 1) // 2, (W + 1) // 2, case.out_channels, dtype=dtype)
        first, *rest = copy.deepcopy(modules).to(dtype)
        with torch.no_grad():
            y = first(case.x.to(dtype).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            for each in rest:
                y = each(y)
            return _ACT_LAYERS[case.act]()(y)

    return conv, norm, by_modules(case.dtype), by_modules(torch.float64)


@st.composite
def downsampling_cases(draw, isas=("",)):
    """In whatever layout: this op takes channels apart from each other too, as an image's are."""
    N, H, W, channels = _sizes(draw, 70)
    return DownsamplingCase(
        shape=(N, H, W, draw(st.just(channels) | st.just(min(3, channels)))),
        out_channels=draw(st.integers(1, 70) | st.sampled_from((96, 128))),
        has_bias=draw(st.booleans()),
        norm=draw(st.sampled_from(("affine", "affine", "plain", "none"))),
        act=draw(st.sampled_from(ACTIVATIONS)),
        dtype=draw(st.sampled_from((torch.float32, torch.bfloat16))),
        layout=draw(st.sampled_from(tuple(LAYOUTS | CHANNELS_APART))),
        **_how_to_run(draw, isas),
    )


@dataclass(frozen=True)
class HeadCase(_OfImages):
    shape: tuple[int, int, int, int]  # N, H, W, channels
    hidden: int
    classes: int
    norm: str  # of the one between: "none", "plain" or "affine"
    dtype: torch.dtype
    layout: str
    seed: int
    isa: str
    threads: int
    at_begin: bool


def head_and_outputs(case: HeadCase) -> tuple[nn.LayerNorm, Head, Tensor, Tensor]:
    """The norm and the head; head(norm(mean of x)) by the modules in their dtype, and in fp64."""
    mid = None if case.norm == "none" else nn.LayerNorm(case.hidden, eps=1e-6, elementwise_affine=case.norm == "affine")
    modules = nn.ModuleList(
        [nn.LayerNorm(case.shape[3], eps=1e-6), Head(case.shape[3], case.hidden, case.classes, mid, 0.0)]
    )
    generator = torch.Generator().manual_seed(case.seed)
    with torch.no_grad():
        for p in modules.parameters():
            p.copy_(0.3 + 0.3 * torch.randn(p.shape, generator=generator))
    norm, head = modules.to(case.dtype)

    def by_modules(dtype: torch.dtype) -> Tensor:
        first, second = copy.deepcopy(modules).to(dtype)
        with backends.force("reference"), torch.no_grad():
            return second(first(case.x.to(dtype).mean((1, 2))))

    return norm, head, by_modules(case.dtype), by_modules(torch.float64)


@st.composite
def head_cases(draw, isas=("",), launched=False):
    N, H, W, channels = _sizes(draw, 140)
    return HeadCase(
        shape=(N, max(1, H), max(1, min(W, 34)), max(2, channels)),
        hidden=draw(st.integers(2, 70) | st.sampled_from((96, 341))),
        classes=draw(st.just(0) | st.integers(1, 70) | st.just(1000)),
        norm=draw(st.sampled_from(("affine", "affine", "plain", "none"))),
        dtype=draw(st.sampled_from((torch.float32, torch.bfloat16))),
        layout=draw(st.sampled_from(tuple(LAYOUTS if launched else LAYOUTS | CHANNELS_APART))),
        **_how_to_run(draw, isas),
    )
