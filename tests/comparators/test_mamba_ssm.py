"""The way to mamba_ssm's kernel and back, with a plain recurrence in its place: mamba_ssm needs a GPU to be built."""

import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from mambaout_kernels.comparators import mamba_ssm, reference, scan_orders

INTERFACE = "mamba_ssm.ops.selective_scan_interface"


def recurrence(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
    """u, delta (N, channels, L); A (channels, S); B, C (N, groups, S, L), a group for so many channels in turn."""
    assert u.is_contiguous()
    assert delta.is_contiguous()
    assert z is None
    assert delta_softplus
    step = F.softplus(delta + delta_bias[:, None])
    B, C = (t.repeat_interleave(u.shape[1] // t.shape[1], dim=1) for t in (B, C))
    h, outputs = torch.zeros(*u.shape[:2], A.shape[1], dtype=u.dtype), []
    for t in range(u.shape[2]):
        h = torch.exp(step[:, :, t, None] * A) * h + (step * u)[:, :, t, None] * B[..., t]
        outputs.append((h * C[..., t]).sum(-1))
    return torch.stack(outputs, -1) + D[:, None] * u


@pytest.fixture
def stand_in(monkeypatch):
    module = ModuleType(INTERFACE)
    module.selective_scan_fn = recurrence
    for name in ("mamba_ssm", "mamba_ssm.ops"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, INTERFACE, module)


def given(shared, order):
    generator = torch.Generator().manual_seed(0)
    (G, L), N, D, S = order.shape, 2, 5, 3

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x = normal(N, 1 if shared else G, L, D)
    return (x, normal(N, G, L, D), -normal(G, D, S).abs(), normal(N, G, L, S), normal(N, G, L, S), normal(G, D),
            normal(G, D), order)  # fmt: skip


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("order", [scan_orders.cross(3, 4), scan_orders.local(4, 4, 2)], ids=["cross", "local"])
@pytest.mark.usefixtures("stand_in")
def test_as_the_reference(shared, order):
    *tensors, order = given(shared, order)
    leaves = [t.requires_grad_() for t in tensors]
    found, expected = (f(*leaves, order) for f in (mamba_ssm.selective_scan, reference.selective_scan))
    torch.testing.assert_close(found, expected)
    dy = torch.randn(found.shape, dtype=found.dtype, generator=torch.Generator().manual_seed(1))
    for ours, theirs in zip(*(torch.autograd.grad(y, leaves, dy) for y in (found, expected)), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.usefixtures("stand_in")
def test_a_wrong_shape_does_not_reach_it():
    arguments = given(True, scan_orders.bidirectional(2, 2))
    with pytest.raises(ValueError, match="A must be"):
        mamba_ssm.selective_scan(*arguments[:2], arguments[2][:1], *arguments[3:])


@pytest.mark.parametrize(
    ("installed", "device", "found"),
    [(False, True, "not installed"), (True, False, "no CUDA device"), (True, True, "cannot be imported")],
)
def test_why_it_cannot_be_used(installed, device, found, monkeypatch):
    monkeypatch.setattr(mamba_ssm, "find_spec", lambda _name: object() if installed else None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device)
    monkeypatch.setitem(sys.modules, "mamba_ssm", None)  # an import fails
    assert found in mamba_ssm.unavailable()


@pytest.mark.usefixtures("stand_in")
def test_where_it_can_be_used(monkeypatch):
    monkeypatch.setattr(mamba_ssm, "find_spec", lambda _name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert mamba_ssm.unavailable() is None
