"""Tensors of more than 2^31 elements on the CPU kernels: some 20 GiB of memory, so only in `make nightly`."""

import os

import pytest
import torch

from mambaout_kernels.backends import cpu

pytestmark = pytest.mark.nightly

H, W, D, C, PERIOD = 8192, 4097, 32, 16, 16


def available_gib() -> float:
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("MemAvailable")) / 2**20


@pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))
@pytest.mark.skipif(not os.path.exists("/proc/meminfo"), reason="reads how much memory there is as Linux tells it")
def test_forward_and_backward():
    """Rows of u and dy repeat every 16: so does all but the border of y and du, which a small image tells."""
    assert H * W * 2 * D > 2**31
    needed = H * W * (2 * D + 2 * D + D) * 2 / 2**30 + 3  # u, du and dy in bf16
    if available_gib() < needed:
        pytest.skip(f"needs {needed:.0f} GiB of memory")
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(1, PERIOD, W, 2 * D, generator=generator).to(torch.bfloat16)
    dy = torch.randn(1, PERIOD, W, D, generator=generator).to(torch.bfloat16)
    parameters = torch.randn(C, 1, 7, 7, generator=generator) / 7, torch.randn(C, generator=generator)

    def repeated(t, periods):
        return t.repeat(1, periods, 1, 1)

    def gradients(periods):
        return cpu.gated_dwconv_backward(repeated(dy, periods), repeated(u, periods), *parameters, "gelu")

    def check(large, small):
        """The first rows, one period after the other in between, and the last ones."""
        assert large.numel() > 2**30
        assert torch.equal(large[:, :PERIOD], small[:, :PERIOD])
        for begin in range(PERIOD, H - 2 * PERIOD, PERIOD):
            assert torch.equal(large[:, begin : begin + PERIOD], small[:, PERIOD : 2 * PERIOD]), begin
        assert torch.equal(large[:, -PERIOD:], small[:, -PERIOD:])

    periods = H // PERIOD
    check(
        cpu.gated_dwconv(repeated(u, periods), *parameters, "gelu"),
        cpu.gated_dwconv(repeated(u, 3), *parameters, "gelu"),
    )
    three, four, large = gradients(3), gradients(4), gradients(periods)
    assert large[0].numel() > 2**31
    check(large[0], three[0])
    for found, of_four, of_three in zip(large[1:], four[1:], three[1:], strict=True):
        of_one = of_four.double() - of_three.double()
        expected = of_three.double() + (periods - 3) * of_one
        # The difference of two sums in fp32, times 509.
        allowed = 509 * 4 * torch.finfo(torch.float32).eps * of_four.abs().max().item()
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=allowed)
