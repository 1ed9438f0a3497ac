"""The tolerance policy: every element within what is proved of correct arithmetic, and no worse than eager on average.

The bound (error_bounds.py) knows nothing of eager, nor of the processor. That alone would let an error grow with the
number of terms where errors grow with its square root, so that the root mean square of a tensor's errors may be at
most twice that of PyTorch in the same dtype, and one rounding of every element: of independent errors squares add.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

SLACK = 2.0

# The mean of m independent squares has a standard deviation of sqrt(2 / m) of itself, the logarithm of the ratio of two
# such means 2 / sqrt(m): a quarter at m = 64, and a ratio of SLACK ** 2 is 5.5 of these, one in fifty million. With
# fewer errors than that, eager's may be next to nothing by luck, and the bound alone decides.
FEW = 64


@dataclass(frozen=True)
class Comparison:
    """One tensor against fp64, in its own unit; `share`: the largest error as a share of its element's bound."""

    name: str
    error: float  # the largest
    eager_error: float
    mean_error: float  # root mean square
    eager_mean_error: float
    allowed: float  # mean error; infinite where eager's means nothing
    share: float = 0.0
    difference: float = math.nan  # between ours and eager's, as a share of the largest exact value, or of the norm

    @property
    def passed(self) -> bool:
        return self.share <= 1.0 and self.mean_error <= self.allowed  # False for NaN

    @property
    def excess(self) -> float:
        """The error as a multiple of what is allowed, of one element or on average; infinite for NaN."""
        found = max(self.share, _ratio(self.mean_error, self.allowed), key=lambda x: (math.isnan(x), x))
        return math.inf if math.isnan(found) else found

    def __str__(self) -> str:
        if self.share > 1.0:
            return f"{self.name}: an error is {self.share:.3g} times what correct arithmetic can be off by"
        return f"{self.name}: mean error {self.mean_error:.3e}, allowed {self.allowed:.3e}"


def _ratio(error: float, allowed: float) -> float:
    return error / allowed if allowed else math.inf if error else 0.0


def _largest(t: Tensor) -> float:
    return t.abs().max().item() if t.numel() else 0.0


def _mean(t: Tensor) -> float:
    """The root mean square."""
    return t.square().mean().sqrt().item() if t.numel() else 0.0


def _independent(errors: Tensor, exact: Tensor) -> float:
    """How many independent errors: of numbers that differ, as many as carry the mean, (sum e^2)^2 / sum e^4."""
    if not errors.numel():
        return 0.0
    differing = exact.unique().numel() / exact.numel()
    return differing * (errors.square().sum() ** 2 / errors.pow(4).sum()).item()


def compare(
    name: str, actual: Tensor, eager: Tensor, exact: Tensor, bound: Tensor | None = None, slack: float = SLACK
) -> Comparison:
    """`actual` against `exact` (fp64), beside `eager`, which has the dtype and the shape that `actual` must have.

    `bound`: of each element's error; without one (a whole model's outputs, whose bounds say nothing) the mean alone
    decides, however few there are. In fp64 eager is the truth itself: the bound decides, or 100 roundings.
    """
    if actual.dtype != eager.dtype or actual.shape != eager.shape:
        return Comparison(name, math.inf, 0.0, math.inf, 0.0, 0.0, math.inf)
    exact = exact.double()
    ours, theirs = actual.double() - exact, eager.double() - exact
    own, eager_own, largest = _mean(ours), _mean(theirs), _largest(exact)
    is_truth = eager.dtype == torch.float64
    allowed = (100 if is_truth else 0.5) * torch.finfo(eager.dtype).eps * _mean(exact)
    if math.isfinite(eager_own):  # eager's overflow does not excuse ours
        allowed = math.hypot(slack * eager_own, allowed)  # independent errors: their squares add
    share = 0.0
    if bound is not None:
        share = _largest(torch.where(ours == 0, 0.0, ours / bound))
        enough = not is_truth and (
            own <= allowed or all(_independent(errors, exact) >= FEW for errors in (ours, theirs))
        )
        allowed = allowed if enough else math.inf
    difference = _largest(actual.double() - eager.double())
    difference = difference / largest if largest else difference
    return Comparison(name, _largest(ours), _largest(theirs), own, eager_own, allowed, share, difference)


def compare_all(
    actual: Mapping[str, Tensor],
    eager: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
    bounds: Mapping[str, Tensor] | None = None,
) -> list[Comparison]:
    """One comparison for each tensor of `exact`."""
    return [
        compare(name, actual[name], eager[name], truth, None if bounds is None else bounds[name])
        for name, truth in exact.items()
    ]


def compare_model(
    actual: Mapping[str, Tensor], eager: Mapping[str, Tensor], exact: Mapping[str, Tensor]
) -> list[Comparison]:
    """A whole model's output, "y", and all its gradients as one: the mean of each one's error relative to its norm.

    As one, because what reaches a gradient has been rounded by every layer above it, and many have a handful of
    elements. Bounds through that many layers would say nothing.
    """
    found = [compare("y", actual["y"], eager["y"], exact["y"])]
    names = [name for name in exact if name != "y"]
    if names:
        own, eager_own = (_relative(results, exact, exact, names) for results in (actual, eager))
        eps = max(torch.finfo(eager[name].dtype).eps for name in names)
        roundings = 100 if eps == torch.finfo(torch.float64).eps else 0.5
        allowed = math.hypot(SLACK * eager_own if math.isfinite(eager_own) else 0.0, roundings * eps)
        difference = _relative(actual, eager, exact, names)
        found.append(Comparison("gradients", own, eager_own, own, eager_own, allowed, difference=difference))
    return found


def _relative(
    results: Mapping[str, Tensor], others: Mapping[str, Tensor], exact: Mapping[str, Tensor], names: list[str]
) -> float:
    return _mean(torch.stack([(results[n].double() - others[n].double()).norm() / exact[n].norm() for n in names]))


def worst(comparisons: list[Comparison]) -> Comparison:
    """The comparison nearest to failing, or furthest beyond."""
    return max(comparisons, key=lambda comparison: comparison.excess)
