"""Tensors of more than 2^31 elements on the CPU kernels: up to 14 GiB of memory, so only in `make nightly`.

Rows of the inputs repeat every 16: so does all but the border of the outputs, which a small image tells.
"""

import os

import pytest
import torch

import mambaout_kernels as mk
from mambaout_kernels.backends import cpu
from mambaout_kernels.benchmarking.inputs import enlivened
from mambaout_kernels.nn.block import LAYER_NORM
from mambaout_kernels.nn.downsample import Downsample, Stem

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable())),
    pytest.mark.skipif(not os.path.exists("/proc/meminfo"), reason="reads how much memory there is as Linux tells it"),
]

H, PERIOD = 8192, 16
PERIODS = H // PERIOD


def needs(elements: int) -> None:
    """Skips where there is no memory for so many elements of two bytes."""
    with open("/proc/meminfo") as file:
        available = next(int(line.split()[1]) for line in file if line.startswith("MemAvailable")) / 2**20
    needed = elements * 2 / 2**30 + 3
    if available < needed:
        pytest.skip(f"needs {needed:.0f} GiB of memory")


def rows(W: int, channels: int, seed: int) -> torch.Tensor:
    """One period, (1, PERIOD, W, channels)."""
    return torch.randn(1, PERIOD, W, channels, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


def repeated(t: torch.Tensor, periods: int) -> torch.Tensor:
    return t.repeat(1, periods, 1, 1)


def check(large: torch.Tensor, small: torch.Tensor, period: int = PERIOD) -> None:
    """The first rows, one period after the other in between, and the last ones; `small` has three periods."""
    assert torch.equal(large[:, :period], small[:, :period])
    for begin in range(period, large.shape[1] - period, period):
        assert torch.equal(large[:, begin : begin + period], small[:, period : 2 * period]), begin
    assert torch.equal(large[:, -period:], small[:, -period:])


def test_forward_and_backward():
    W, D, C = 4097, 32, 16
    assert H * W * 2 * D > 2**31
    needs(H * W * (2 * D + 2 * D + D))  # u, du and dy
    u, dy = rows(W, 2 * D, 0), rows(W, D, 1)
    generator = torch.Generator().manual_seed(2)
    parameters = torch.randn(C, 1, 7, 7, generator=generator) / 7, torch.randn(C, generator=generator)

    def gradients(periods):
        return cpu.gated_dwconv_backward(repeated(dy, periods), repeated(u, periods), *parameters, "gelu")

    y = cpu.gated_dwconv(repeated(u, PERIODS), *parameters, "gelu")
    assert y.numel() > 2**30
    check(y, cpu.gated_dwconv(repeated(u, 3), *parameters, "gelu"))
    del y
    three, four, large = gradients(3), gradients(4), gradients(PERIODS)
    assert large[0].numel() > 2**31
    check(large[0], three[0])
    for found, of_four, of_three in zip(large[1:], four[1:], three[1:], strict=True):
        of_one = of_four.double() - of_three.double()
        expected = of_three.double() + (PERIODS - 3) * of_one
        # The difference of two sums in fp32, times 509.
        allowed = 509 * 4 * torch.finfo(torch.float32).eps * of_four.abs().max().item()
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=allowed)


def test_block():
    W, dim = 8193, 32
    assert H * W * dim > 2**31
    needs(2 * H * W * dim)
    block = enlivened(mk.FusedGatedCNNBlock(dim)).bfloat16().eval()
    x = rows(W, dim, 3)
    with torch.no_grad():
        block = mk.optimize_for_inference(block)
        check(block(repeated(x, PERIODS)), block(repeated(x, 3)))


def test_downsampling():
    W, channels, out_channels = 8193, 32, 16
    assert H * W * channels > 2**31
    needs(H * W * (channels + out_channels // 4))
    module = mk.optimize_for_inference(enlivened(Downsample(channels, out_channels, False, LAYER_NORM)).bfloat16())
    x = rows(W, channels, 4)
    with torch.no_grad():
        check(module(repeated(x, PERIODS)), module(repeated(x, 3)), PERIOD // 2)


def test_stem_of_an_image_whose_channels_lie_apart():
    """NCHW: the last channel begins beyond 2^30 elements, and ends beyond 2^31."""
    W, dim = 87400, 8
    assert 3 * H * W > 2**31
    needs(H * W * (2 * 3 + dim // 2 // 4 + 2))
    module = mk.optimize_for_inference(enlivened(Stem(3, dim, True, LAYER_NORM, torch.nn.GELU)).bfloat16())
    image = rows(W, 3, 5).permute(0, 3, 1, 2).contiguous()  # (1, 3, PERIOD, W)
    with torch.no_grad():
        check(module(image.repeat(1, 1, PERIODS, 1)), module(image.repeat(1, 1, 3, 1)), PERIOD // 4)
