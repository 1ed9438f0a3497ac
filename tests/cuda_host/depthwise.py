"""The depthwise kernel of csrc/cuda on the CPU, as host.py runs those of the op."""

import struct
from dataclasses import astuple
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mambaout_kernels.benchmarking.error_bounds import Bounded, dwconv

from . import host
from .host import Device, Schedule


def make_inputs(shape, dtype, parameters=None) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and bias; parameters: their dtype."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(s, generator=generator, dtype=torch.float64) for s in (shape, (shape[3], 1, 7, 7), shape[3:])
    )
    return (2 * x).to(dtype), (weight / 7).to(parameters or dtype), bias.to(parameters or dtype)


def expected_of(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(eager, exact, bound)"""
    exact = dwconv(x.double(), weight.double()) + bias.double()
    bounded = Bounded.exactly(x).sums(49, dwconv, Bounded.exactly(weight), Bounded.exactly(bias))
    eager = F.conv2d(x.permute(0, 3, 1, 2), weight.to(x.dtype), bias.to(x.dtype), padding=3, groups=x.shape[3])
    return eager.permute(0, 2, 3, 1), exact, bounded.stored(x.dtype).error


def build(check: str, dtypes: tuple[torch.dtype, ...]) -> Path:
    return host.build(check, dtypes, caller="depthwise_program")


def run(
    program: Path,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    schedule: Schedule = Schedule(),  # noqa: B008
    device: Device = Device(),  # noqa: B008
    spare: int = 0,
    images_before: int = 0,
    last_blocks: int = 0,
    weight_offset: int = 0,
) -> Tensor:
    """s. The arguments are those of host.run; spare: elements between the pixels of x."""
    N, H, W, C = x.shape
    call = struct.pack(
        "15q", N + images_before, H, W, C, *(host.DTYPES[t.dtype] for t in (x, weight, bias)), C + spare,
        *astuple(device), *astuple(schedule)[:2], images_before, last_blocks, weight_offset,
    )  # fmt: skip
    stream = call + host.spread(x, C + spare) + host.bytes_of(weight) + host.bytes_of(bias)
    output = host.output_of(program, stream)
    assert len(output) == x.numel() * x.element_size()
    return torch.frombuffer(bytearray(output), dtype=x.dtype).reshape(x.shape) if output else torch.empty_like(x)
