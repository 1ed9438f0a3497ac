"""The one tolerance policy, and inputs for the op, for all tests and for `mambaout-kernels check`'s own."""

from dataclasses import dataclass

import error_bounds
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


def assert_alike(ours: Tensor, theirs: Tensor, share: float = 1e-5) -> None:
    """The same computation by other means: no further apart than a share of the largest value."""
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    assert (ours.double() - theirs.double()).abs().max() <= share * theirs.double().abs().max()


FEW = 64  # independent errors, whose mean square is left to chance
COMPARED = {"tensors": 0, "too few errors to compare": 0}  # of generated cases


def assert_no_worse_in_any_case(actual: Tensor, eager: Tensor, exact: Tensor, bound: Tensor) -> None:
    """For generated cases: every element within its `bound`, and the tensor `assert_no_worse` where that says anything.

    `bound` is what can be proved of any correct computation (error_bounds.py), element by element, without regard to
    eager. That alone would let an error grow with n where errors grow with sqrt(n), so that of the whole tensor is
    compared with eager's as well: the largest, or else the root mean square. Among thousands of generated cases some
    have a handful of numbers, in which eager's error happens to be next to nothing; twice of it says nothing then.

    The mean of m independent squares has a standard deviation of sqrt(2 / m) of itself, the logarithm of the ratio of
    two of them 2 / sqrt(m): a quarter at m = 64, and a ratio of 2 ** 2 is 5.5 of these, one in fifty million. Below
    that the bound alone decides. How many are independent: numbers that differ, and of them as many as carry the mean,
    (sum e^2)^2 / sum e^4. In fp64 eager is the truth itself, and has no error to compare with.
    """
    assert actual.dtype == eager.dtype
    assert actual.shape == eager.shape == bound.shape
    COMPARED["tensors"] += 1
    ours, theirs = ((t.double() - exact).flatten() for t in (actual, eager))
    within = ours.abs() <= bound.flatten()
    if not within.all():
        place = (~within).nonzero()[0].item()
        raise AssertionError(f"error {ours[place].abs():.3e}, of correct sums at most {bound.flatten()[place]:.3e}")
    if accuracy.compare("actual", actual, eager, exact).passed:
        return
    differing = exact.unique().numel() / exact.numel()
    counts = [differing * (e.square().sum() ** 2 / e.pow(4).sum()).item() for e in (ours, theirs)]
    if actual.dtype == torch.float64 or not min(counts) >= FEW:  # NaN, where eager has no error
        COMPARED["too few errors to compare"] += 1
        return
    mean, eager_mean = (e.square().mean().sqrt().item() for e in (ours, theirs))
    allowed = accuracy.SLACK * eager_mean + 0.5 * torch.finfo(actual.dtype).eps * exact.abs().max().item()
    assert mean <= allowed, f"root mean square of the error {mean:.3e}, allowed {allowed:.3e}"


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


def check_outputs(name: str, found, inputs: Inputs, act: str, expected=None, any_case: bool = False) -> None:
    """(y, du, dweight, dbias) against fp64 and beside eager; expected: (eager, exact), if known.

    any_case: by `assert_no_worse_in_any_case`.
    """
    theirs_of, truth_of = expected or (eager(inputs, act), exact(inputs, act))
    bounds = error_bounds.of_op(*inputs, inputs.dy, act) if any_case else [None] * 4
    for output, ours, theirs, truth, bound in zip(OUTPUTS, found, theirs_of, truth_of, bounds, strict=True):
        try:
            assert ours.is_contiguous()
            if bound is None:
                assert_no_worse(ours, theirs, truth)
            else:
                assert_no_worse_in_any_case(ours, theirs, truth, bound)
        except AssertionError as error:
            raise AssertionError(f"{name}: {output}: {error}") from None


def check_backend(name: str, inputs: Inputs, act: str, expected=None, any_case: bool = False) -> None:
    """Forward and every gradient of a backend; as `check_outputs`."""
    backend = backends.load(name)
    y = backend.gated_dwconv(*inputs, act)
    gradients = backend.gated_dwconv_backward(inputs.dy, *inputs, act)
    check_outputs(name, (y, *gradients), inputs, act, expected, any_case)
