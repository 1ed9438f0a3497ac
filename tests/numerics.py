"""The one tolerance policy, and inputs for the op."""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mambaout_kernels import backends, reference
from mambaout_kernels.benchmarking import accuracy, error_bounds
from mambaout_kernels.reference import ACTIVATIONS

OUTPUTS = ("y", "du", "dweight", "dbias")


def assert_accurate(
    actual: Tensor, eager: Tensor, exact: Tensor, bound: Tensor | None = None, slack: float = accuracy.SLACK
) -> None:
    """The one policy: mambaout_kernels/benchmarking/accuracy.py. No bound: outputs of whole models only."""
    assert actual.dtype == eager.dtype
    assert actual.shape == eager.shape
    found = accuracy.compare("actual", actual, eager, exact, bound, slack)
    COMPARED["tensors"] += 1
    COMPARED["too few errors to compare"] += math.isinf(found.allowed)
    assert found.passed, str(found)


COMPARED = {"tensors": 0, "too few errors to compare": 0}


def assert_model_accurate(actual: Mapping, eager: Mapping, exact: Mapping) -> None:
    """The output of a model, and its gradients as one, by the same policy; each in the dtype that eager gives it."""
    assert {name: t.dtype for name, t in actual.items()} == {name: t.dtype for name, t in eager.items()}
    found = accuracy.compare_model(actual, eager, exact)
    assert all(comparison.passed for comparison in found), "; ".join(map(str, found))


def activation_bounds(gates: Tensor, act: str, tables_end: float) -> tuple[Tensor, Tensor]:
    """Of act(g) and act'(g) by the kernels, in g's dtype: three roundings of float32, and one of the dtype.

    act(g) / g may be an exp(a) of an argument that is off by one rounding: by |a| roundings. tables_end: where the
    tables of it and of the slope end, they are off by this.
    """
    x = gates.double()
    value, slope = reference.activation(x, act), reference.activation_slope(x, act)
    share = (value / x).nan_to_num(0.5)
    info = torch.finfo(gates.dtype)
    stored = info.eps / 2 if gates.dtype != torch.float32 else 0.0
    own = 2.0**-24 * (3 + share.clamp_min(1e-99).log().abs())
    smallest = info.tiny * (info.eps if gates.dtype == torch.float16 else 1.0)
    of_value = (own + stored) * value.abs() + tables_end * x.abs() + smallest
    return of_value, own * (1 + x.abs()) * share + (own + stored) * slope.abs() + tables_end + smallest


def assert_alike(ours: Tensor, theirs: Tensor, share: float = 1e-5) -> None:
    """The same computation by other means: no further apart than a share of the largest value."""
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    assert (ours.double() - theirs.double()).abs().max() <= share * theirs.double().abs().max()


@dataclass
class Inputs:
    u: Tensor
    weight: Tensor
    bias: Tensor
    dy: Tensor

    def __iter__(self):
        return iter((self.u, self.weight, self.bias))


def activations_of(dtype: torch.dtype, shape: tuple[int, ...], shapes) -> tuple[str, ...]:
    """For a test of many shapes: all of float32, of other dtypes one in turn."""
    if dtype == torch.float32:
        return ACTIVATIONS
    return (ACTIVATIONS[list(shapes).index(shape) % len(ACTIVATIONS)],)


def make_inputs(N, H, W, D, C, K, dtype=torch.float32, weight_dtype=None, seed=0) -> Inputs:
    """Gates over [-6, 6] and filters whose sum keeps s of order one."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    parameter = weight_dtype or dtype
    return Inputs(
        (2 * normal(N, H, W, 2 * D)).to(dtype),
        (normal(C, 1, K, K) / K).to(parameter),
        normal(C).to(parameter),
        normal(N, H, W, D).to(dtype),
    )


def eager(inputs: Inputs, act: str) -> tuple[Tensor, ...]:
    """(y, du, dweight, dbias) of the plain PyTorch composition by autograd."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    # oneDNN generates code for depthwise filters beyond 9 x 9 for minutes
    with torch.backends.mkldnn.flags(enabled=inputs.weight.shape[-1] <= 9):
        y = reference.gated_dwconv(*leaves, act)
        gradients = torch.autograd.grad(y, leaves, inputs.dy, allow_unused=True)
    return (y.detach(), *(torch.zeros_like(t) if g is None else g for g, t in zip(gradients, leaves, strict=True)))


def exact(inputs: Inputs, act: str) -> tuple[Tensor, ...]:
    """The same in fp64, of the same rounded inputs."""
    return eager(Inputs(*(t.double() for t in (*inputs, inputs.dy))), act)


def check_outputs(name: str, found, inputs: Inputs, act: str, expected=None) -> None:
    """(y, du, dweight, dbias) against fp64 and beside eager; expected: (eager, exact, bounds), if known."""
    for output, ours, *beside in zip(OUTPUTS, found, *(expected or expected_of(inputs, act)), strict=True):
        try:
            assert ours.is_contiguous()
            assert_accurate(ours, *beside)
        except AssertionError as error:
            raise AssertionError(f"{name}: {output}: {error}") from None


def expected_of(inputs: Inputs, act: str) -> tuple[tuple[Tensor, ...], ...]:
    """(eager, exact, bounds), each of (y, du, dweight, dbias)."""
    return eager(inputs, act), exact(inputs, act), error_bounds.of_op(*inputs, inputs.dy, act)


@functools.cache
def case(shape: tuple[int, ...], dtype: torch.dtype, act: str, parameters: torch.dtype | None = None):
    """(inputs, what is expected of them), for all tests of a process: nothing of it may be written to."""
    inputs = make_inputs(*shape, dtype, parameters)
    return inputs, expected_of(inputs, act)


def check_backend(name: str, inputs: Inputs, act: str, expected=None) -> None:
    """Forward and every gradient of a backend; as `check_outputs`."""
    backend = backends.load(name)
    y = backend.gated_dwconv(*inputs, act)
    gradients = backend.gated_dwconv_backward(inputs.dy, *inputs, act)
    check_outputs(name, (y, *gradients), inputs, act, expected)
