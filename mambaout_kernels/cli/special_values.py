"""check --full: NaN, Inf, subnormals, signed zeros and very large values, in the gate and in the branch it gates."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .terminal import show_table

KINDS = ("NaN", "Inf", "subnormal", "+-0", "largest", "+-30, +-100")
PLACES = ("gate", "branch")

# Where the tables of a compiled gate end, the rest is taken for 0 or x: an absolute error on values of order one.
_TABLES_END = 1.2e-8

Outputs = dict[str, Tensor]


@dataclass(frozen=True)
class Special:
    """What became of one kind of value: "as eager", or what differs. Not to be finite where eager is, is a failure."""

    kind: str
    place: str
    act: str
    outcome: str

    @property
    def failed(self) -> bool:
        return self.outcome.startswith("FAILED")


BySubject = dict[tuple[str, str], list[Special]]  # by backend and dtype


def values(kind: str, dtype: torch.dtype) -> list[float]:
    info = torch.finfo(dtype)
    return {
        "NaN": [math.nan],
        "Inf": [math.inf, -math.inf],
        "subnormal": [info.tiny / 4, -info.tiny / 4],
        "+-0": [0.0, -0.0],
        "largest": [info.max, -info.max],
        "+-30, +-100": [30.0, -30.0, 100.0, -100.0],
    }[kind]


def inputs(kind: str, place: str, convolved: bool, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    """u, weight, bias, dy: an image of one pixel and one channel for each value, 1 opposite to it, a filter of ones."""
    special = torch.tensor(values(kind, dtype), dtype=dtype, device=device).view(-1, 1, 1, 1)
    ones = torch.ones_like(special)
    u = torch.cat((special, ones) if place == "gate" else (ones, special), dim=-1)
    C = int(convolved)
    return u, u.new_ones(C, 1, 7, 7), u.new_zeros(C), ones


def judge(ours: Tensor, eager: Tensor, exact: Tensor, zeros: bool, of_finite: bool = False) -> str:
    """One output of the values of a kind. of_finite: of finite inputs, where NaN, in fp64 too, is eager's overflow."""
    finite, overflows = ours.isfinite(), exact.isfinite() & ~eager.isfinite()
    if of_finite:
        overflows |= eager.isnan()
    if not torch.equal(finite | overflows, eager.isfinite() | overflows):
        return f"FAILED: {_listed(ours)}, eager {_listed(eager)}"
    better = bool((finite & overflows).any())
    finite = finite & eager.isfinite()
    ours, eager, exact = ours[finite], eager[finite], exact[finite]
    if zeros and not torch.equal(ours.signbit()[eager == 0], eager.signbit()[eager == 0]):
        return "the sign of a zero differs"
    info = torch.finfo(eager.dtype)
    # No sums: of three products and an activation at most, each of one rounding. In fp64 eager is the truth itself.
    roundings, tables_end = (200, 0.0) if eager.dtype == torch.float64 else (4, _TABLES_END)
    allowed = roundings * info.eps / 2 * exact.abs() + info.tiny + tables_end
    if ((ours.double() - exact).abs() > allowed).any():
        return f"FAILED: {_listed(ours)}, eager {_listed(eager)}"
    if ((ours == 0) & (eager != 0) & (eager.abs() < info.tiny)).any():
        return "flushed to 0"
    return "finite, eager overflows" if better else "as eager"


def _listed(t: Tensor) -> str:
    return " ".join(f"{value:.3g}" for value in t.flatten().tolist())


def examine(
    act: str,
    dtype: torch.dtype,
    device: str,
    run: Callable[[tuple[Tensor, ...]], Outputs],
    eager: Callable[[tuple[Tensor, ...]], Outputs],
    exact: Callable[[tuple[Tensor, ...]], Outputs],
) -> list[Special]:
    """Every kind in both places, in the convolved and in the identity branch, over y and du; the worst outcome of each.

    run, eager, exact: (u, weight, bias, dy) to y, du and the rest, by name.
    """
    found = []
    for kind in KINDS:
        for place in PLACES:
            outcomes = []
            for convolved in (False, True):
                given = inputs(kind, place, convolved, dtype, device)
                ours, theirs, truth = run(given), eager(given), exact(given)
                finite = kind not in ("NaN", "Inf")
                outcomes += [
                    judge(ours[name], theirs[name], truth[name], kind == "+-0", finite) for name in ("y", "du")
                ]
            found.append(Special(kind, place, act, max(outcomes, key=_badness)))
    return found


def _badness(outcome: str) -> int:
    return 0 if outcome == "as eager" else 2 if outcome.startswith("FAILED") else 1


def show(special: BySubject) -> None:
    lines = []
    for (subject, dtype), found in special.items():
        for place in PLACES:
            cells = []
            for kind in KINDS:
                other = [f"{s.act}: {s.outcome}" for s in found
                         if (s.kind, s.place) == (kind, place) and s.outcome != "as eager"]  # fmt: skip
                cells.append("; ".join(other) or "as eager")
            lines.append([subject, dtype, place, *cells])
    show_table("special values, in y and du", ["backend", "dtype", "in the", *KINDS], lines)
    print("as eager: finite where eager is, then off by roundings; a number below the smallest normal one may become 0")
