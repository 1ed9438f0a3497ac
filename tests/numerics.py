"""The one tolerance policy, and inputs for the op, for all tests and for `mambaout-kernels check`'s own."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mambaout_kernels import backends, reference
from mambaout_kernels.benchmarking import accuracy

OUTPUTS = ("y", "du", "dweight", "dbias")


def assert_no_worse(actual: Tensor, eager: Tensor, exact: Tensor, slack: float = accuracy.SLACK) -> None:
    """Our error against fp64 is within `slack` of eager's, plus one rounding."""
    assert actual.dtype == eager.dtype
    assert actual.shape == eager.shape
    found = accuracy.compare("actual", actual, eager, exact, slack)
    assert found.passed, f"error {found.error:.3e}, allowed {found.allowed:.3e}"


def assert_no_worse_in_any_case(actual: Tensor, eager: Tensor, exact: Tensor, terms: int = 0) -> None:
    """`assert_no_worse` for generated cases, some of which are so small that eager's largest error is left to chance.

    Of thousands of them some see it exceeded by more than twice. Then the root mean square must be within the policy,
    and the largest error within twice of it. A gradient of a parameter, a sum of `terms` of order one to three, may be
    a single number, whose mean is no better: it may be off by four roundings at the size that such a sum grows to.
    """
    if accuracy.compare("actual", actual, eager, exact).passed:
        return
    grown = 4 * torch.finfo(torch.float32).eps * 3 * terms**0.5 if actual.dtype != torch.float64 else 0.0
    largest = accuracy.compare("actual", actual, eager, exact, slack=2 * accuracy.SLACK)
    assert largest.error <= largest.allowed + grown, f"error {largest.error:.3e}, allowed {largest.allowed + grown:.3e}"
    ours, theirs = (t.double().sub(exact).square().mean().sqrt().item() for t in (actual, eager))
    floor = 0.5 * torch.finfo(actual.dtype).eps * exact.abs().max().item()
    assert ours <= accuracy.SLACK * theirs + floor + grown, f"rms error {ours:.3e}, eager's {theirs:.3e}"


@dataclass
class Inputs:
    u: Tensor
    weight: Tensor
    bias: Tensor
    dy: Tensor

    def __iter__(self):
        return iter((self.u, self.weight, self.bias))


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


def check_outputs(name: str, found, inputs: Inputs, act: str, expected=None, policy=assert_no_worse) -> None:
    """(y, du, dweight, dbias) against fp64 and beside eager; expected: (eager, exact), if known."""
    theirs_of, truth_of = expected or (eager(inputs, act), exact(inputs, act))
    for output, ours, theirs, truth in zip(OUTPUTS, found, theirs_of, truth_of, strict=True):
        try:
            assert ours.is_contiguous()
            if policy is assert_no_worse_in_any_case and output in ("dweight", "dbias"):
                policy(ours, theirs, truth, terms=inputs.dy.shape[:3].numel())
            else:
                policy(ours, theirs, truth)
        except AssertionError as error:
            raise AssertionError(f"{name}: {output}: {error}") from None


def check_backend(name: str, inputs: Inputs, act: str, expected=None, policy=assert_no_worse) -> None:
    """Forward and every gradient of a backend; as `check_outputs`."""
    backend = backends.load(name)
    y = backend.gated_dwconv(*inputs, act)
    gradients = backend.gated_dwconv_backward(inputs.dy, *inputs, act)
    check_outputs(name, (y, *gradients), inputs, act, expected, policy)
