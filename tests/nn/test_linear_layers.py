"""Which linear layers are products of this package, and where the norm before one is computed again in backward."""

import pytest
import torch
from torch import nn

from mambaout_kernels import backends
from mambaout_kernels.backends import cpu
from mambaout_kernels.nn import linear as module
from mambaout_kernels.nn.linear import linear, norm_linear
from mambaout_kernels.nn.plain import Weights

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))


@pytest.fixture
def calls(monkeypatch):
    """The names of the ops that are called."""
    called = []
    for where, name in ((module.ops, "linear"), (module, "norm_linear_op")):
        op = getattr(where, name)

        def watched(*args, op=op, name=name):
            called.append(name)
            return op(*args)

        monkeypatch.setattr(where, name, watched)
    return called


def changed(layer, **attributes):
    for name, value in attributes.items():
        setattr(layer, name, value)
    return layer


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class CenteredNorm(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x) - 1


def test_a_plain_layer_is_our_product(calls):
    fc, x = nn.Linear(8, 6), torch.randn(3, 8)
    torch.testing.assert_close(linear(fc, x), fc(x))
    torch.testing.assert_close(linear(Weights(fc.weight, fc.bias), x), fc(x))
    assert calls == ["linear"] * 2


@pytest.mark.parametrize("fc", [Scaled(8, 6), nn.Sequential(nn.Linear(8, 6)), nn.Identity()], ids=repr)
def test_another_layer_is_called(calls, fc):
    x = torch.randn(3, 8)
    torch.testing.assert_close(linear(fc, x), fc(x))
    assert calls == []


def test_under_autocast_a_layer_is_called(calls):
    fc, x = nn.Linear(8, 6), torch.randn(3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(fc, x).dtype == torch.bfloat16
        assert linear(Weights(fc.weight, fc.bias), x).dtype == torch.bfloat16
    assert calls == []


def test_another_number_of_features_is_pytorchs_error(calls):
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear(nn.Linear(8, 6), torch.randn(3, 7))
    assert calls == []


def test_on_another_device_a_layer_is_called(calls):
    fc, x = nn.Linear(8, 6, device="meta"), torch.randn(3, 8, device="meta")
    assert linear(fc, x).shape == linear(Weights(fc.weight, fc.bias), x).shape == (3, 6)
    assert calls == []


@pytest.mark.parametrize("stream_weight", [False, True])
def test_a_compiler_sees_the_product_where_it_does_better(stream_weight):
    fc, x = nn.Linear(8, 6), torch.randn(3, 8)
    graphs = []

    def see(graph, _):
        graphs.append(str(graph.graph))
        return graph

    torch.compile(lambda x: linear(fc, x, stream_weight), backend=see, fullgraph=True)(x)
    assert ["mambaout_kernels.linear" in graph for graph in graphs] == [stream_weight]


NORM, FC = nn.LayerNorm(8, eps=1e-3), nn.Linear(8, 6)
NOT_PLAIN = {
    "another norm": (CenteredNorm(8), FC),
    "another layer": (NORM, Scaled(8, 6)),
    "a norm without weights": (nn.LayerNorm(8, elementwise_affine=False), FC),
    "a norm over more": (nn.LayerNorm((3, 8)), FC),
    "a hooked norm": (changed(nn.LayerNorm(8), forward=torch.cos), FC),
}


def test_in_training_the_norm_is_not_kept(calls):
    x = torch.randn(2, 3, 8)
    for fc in (FC, Weights(FC.weight, FC.bias)):
        torch.testing.assert_close(norm_linear(NORM, fc, x), FC(NORM(x)))
    assert calls == ["norm_linear_op"] * 2


@pytest.mark.parametrize("case", NOT_PLAIN)
def test_what_is_not_plain_is_called(calls, case):
    norm, fc = NOT_PLAIN[case]
    x = torch.randn(2, 3, 8)
    torch.testing.assert_close(norm_linear(norm, fc, x), fc(norm(x)))
    assert "norm_linear_op" not in calls


@pytest.mark.parametrize("low", ["norm", "x"])
def test_of_several_dtypes_the_norm_is_called(calls, low):
    norm = nn.LayerNorm(8, dtype=torch.bfloat16 if low == "norm" else None)
    x = torch.randn(2, 3, 8, dtype=torch.bfloat16 if low == "x" else None)
    with pytest.raises(RuntimeError):  # as from PyTorch
        norm_linear(norm, FC, x)
    assert "norm_linear_op" not in calls


def test_outside_training_under_autocast_and_on_the_reference_the_norm_is_called(calls):
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        norm_linear(NORM, FC, x)
    with torch.autocast("cpu", torch.bfloat16):
        norm_linear(NORM, FC, x)
    with backends.force("reference"):
        norm_linear(NORM, FC, x)
    assert "norm_linear_op" not in calls


def test_a_compiler_decides_itself_what_is_kept():
    graphs = []

    def see(graph, _):
        graphs.append(str(graph.graph))
        return graph

    torch.compile(lambda x: norm_linear(NORM, FC, x), backend=see, fullgraph=True)(torch.randn(2, 3, 8))
    assert len(graphs) == 1
    assert "autograd" not in graphs[0]
