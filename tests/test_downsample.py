"""What the downsampling op does not compute is left to the modules, whose result it would change."""

from functools import partial

import pytest
import torch
from torch import nn

from mambaout_kernels import backends, downsample, packs
from mambaout_kernels.block import LAYER_NORM
from mambaout_kernels.models import Downsample

pytestmark = pytest.mark.skipif(backends.status()["cpu"] is not None, reason="no compiled CPU kernels")

usual = partial(nn.Conv2d, kernel_size=3, stride=2, padding=1)


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def hooked():
    conv = usual(8, 12)
    conv.register_forward_hook(lambda module, args, output: 2 * output)
    return conv


UNSUITED = {
    "groups": lambda: (usual(8, 12, groups=4), LAYER_NORM(12)),
    "padding mode": lambda: (usual(8, 12, padding_mode="reflect"), LAYER_NORM(12)),
    "dilation": lambda: (usual(8, 12, dilation=2, padding=2), LAYER_NORM(12)),
    "padding": lambda: (usual(8, 12, padding=0), LAYER_NORM(12)),
    "stride": lambda: (usual(8, 12, stride=1), LAYER_NORM(12)),
    "filter": lambda: (usual(8, 12, kernel_size=5, padding=2), LAYER_NORM(12)),
    "subclass": lambda: (Doubled(8, 12, 3, stride=2, padding=1), LAYER_NORM(12)),
    "hook": lambda: (hooked(), LAYER_NORM(12)),
    "norm over rows": lambda: (usual(8, 12), nn.LayerNorm((6, 12))),
    "another norm": lambda: (usual(8, 12), nn.RMSNorm(12)),
    "dtype": lambda: (usual(8, 12).double(), LAYER_NORM(12).double()),
}


@pytest.mark.parametrize("unsuited", UNSUITED)
def test_left_to_the_modules(unsuited):
    module = Downsample(8, 12, False, LAYER_NORM)
    module.conv, module.norm = UNSUITED[unsuited]()
    x = torch.randn(2, 11, 11, 8).to(module.conv.weight.dtype)
    with torch.no_grad():
        assert not downsample.applies(module.conv, module.norm, None, "identity", x)
        found = module(x)
        assert torch.equal(found, module.norm(module.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)))


def test_usual_modules_are_not():
    with torch.no_grad():
        assert downsample.applies(usual(8, 12), LAYER_NORM(12), nn.SiLU(), "silu", torch.randn(2, 11, 11, 8))
    assert not downsample.applies(
        usual(8, 12), LAYER_NORM(12), None, "identity", torch.randn(2, 11, 11, 8)
    )  # gradients


def test_an_activation_with_a_hook_or_without_a_name_is_left_to_the_modules():
    x, act = torch.randn(1, 5, 5, 8), nn.SiLU()
    with torch.no_grad():
        assert not downsample.applies(usual(8, 12), None, nn.Softplus(), None, x)
        act.register_forward_hook(lambda module, args, output: 2 * output)
        assert not downsample.applies(usual(8, 12), None, act, "silu", x)


def test_norm_without_parameters_and_convolution_without_bias():
    conv, norm = usual(8, 12, bias=False), nn.LayerNorm(12, elementwise_affine=False)
    x = torch.randn(1, 5, 7, 8)
    with torch.no_grad():
        assert downsample.applies(conv, norm, None, "identity", x)
        found = downsample.run(conv, norm, "identity", x, packs.Pack(), nn.ModuleList([conv]))
        torch.testing.assert_close(found, norm(conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)), rtol=1e-4, atol=1e-5)


def test_maps_whose_channels_lie_apart():
    conv, norm = usual(12, 20), LAYER_NORM(20)
    x = torch.randn(2, 12, 9, 11).permute(0, 2, 3, 1)
    with torch.no_grad():
        apart, together = (
            downsample.run(conv, norm, "identity", y, packs.Pack(), nn.ModuleList([conv])) for y in (x, x.contiguous())
        )
    assert torch.equal(apart, together)
