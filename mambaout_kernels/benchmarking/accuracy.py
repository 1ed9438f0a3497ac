"""The tolerance policy: our error against fp64 is within twice that of same-dtype PyTorch, plus one rounding."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

SLACK = 2.0


@dataclass(frozen=True)
class Comparison:
    """Largest absolute errors of one tensor against fp64, and the error that is allowed, in the tensor's own unit."""

    name: str
    error: float
    eager_error: float
    allowed: float
    difference: float  # between ours and eager's, as a share of the largest exact value
    mean_error: float = math.nan
    eager_mean_error: float = math.nan

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed  # False for NaN

    @property
    def excess(self) -> float:
        """The error as a multiple of the allowed one; infinite for NaN."""
        if self.passed:
            return self.error / self.allowed if self.allowed else 0.0
        return max(self.error / self.allowed, 1.0) if self.allowed and not math.isnan(self.error) else float("inf")


def _largest(t: Tensor) -> float:
    return t.abs().max().item() if t.numel() else 0.0


def _mean(t: Tensor) -> float:
    return t.abs().mean().item() if t.numel() else 0.0


def compare(name: str, actual: Tensor, eager: Tensor, exact: Tensor, slack: float = SLACK) -> Comparison:
    """`actual` against `exact` (fp64), beside `eager`, which has the dtype and the shape that `actual` must have.

    In fp64 eager is the truth itself, and any other order of the sums differs from it: 100 roundings are allowed.
    """
    if actual.dtype != eager.dtype or actual.shape != eager.shape:
        return Comparison(name, float("inf"), 0.0, 0.0, float("inf"))
    exact = exact.double()
    largest = _largest(exact)
    ours, theirs = actual.double() - exact, eager.double() - exact
    error, eager_error = _largest(ours), _largest(theirs)
    allowed = (100 if eager.dtype == torch.float64 else 0.5) * torch.finfo(eager.dtype).eps * largest
    if math.isfinite(eager_error):  # eager's overflow does not excuse ours
        allowed += slack * eager_error
    difference = _largest(actual.double() - eager.double())
    share = difference / largest if largest else difference
    return Comparison(name, error, eager_error, allowed, share, _mean(ours), _mean(theirs))


def compare_all(
    actual: Mapping[str, Tensor], eager: Mapping[str, Tensor], exact: Mapping[str, Tensor]
) -> list[Comparison]:
    """One comparison for each tensor of `exact`."""
    return [compare(name, actual[name], eager[name], truth) for name, truth in exact.items()]


def worst(comparisons: list[Comparison]) -> Comparison:
    """The comparison nearest to failing, or furthest beyond."""
    return max(comparisons, key=lambda comparison: comparison.excess)
