"""Token mixers timed over the number of tokens, and where one becomes slower than another."""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .. import backends
from ..benchmarking.timing import Contender, by_cuda_events, by_host, interleave
from ..inference import optimize_for_inference
from . import flops  # noqa: F401 - it registers formulas
from .ledger import Ledger
from .mixers import create_layer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
QUADRATIC = ("attention", "attention-causal")  # in the number of tokens; the others are linear
CHECKED_TOKENS = 64  # the reference's scan takes a step of Python for each
SHARES = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 1e-2}  # of the largest value, that an output may be off by


@dataclass(frozen=True)
class Setting:
    """What all layers of a sweep have in common. block: with norm and shortcut, and an MLP where one belongs."""

    batch: int = 1
    dtype: str = "fp32"
    mode: str = "fwd"
    device: str = "cpu"
    block: bool = False


@dataclass(frozen=True)
class Row:
    """One layer at one length. Without times, `left_out` says why."""

    mixer: str
    dim: int
    tokens: int
    macs: int  # of one image
    parameters: int
    moved_bytes: int | None = None  # as operations read and write: ledger.py
    peak_bytes: int | None = None
    min_s: float | None = None
    median_s: float | None = None
    repetitions: int = 0
    left_out: str | None = None


def side(tokens: int) -> int:
    """Of the smallest square map with so many tokens or more."""
    return math.isqrt(tokens - 1) + 1


def count(name: str, dim: int, tokens: int, block: bool = False) -> tuple[int, int]:
    """(MACs of one image, parameters), without memory.

    Of a scan as flops.py tells; of causal attention as if a token saw all others.
    """
    with torch.device("meta"), torch.no_grad(), backends.force("reference"):
        layer, x = create_layer(name, dim, block).eval(), torch.empty(1, side(tokens), side(tokens), dim)
        with FlopCounterMode(display=False) as counter:
            layer(x)
    return counter.get_total_flops() // 2, sum(p.numel() for p in layer.parameters())


class Timed:
    """A layer and its input, ready to run: in mode fwd frozen, where an inference would freeze it."""

    def __init__(self, name: str, dim: int, tokens: int, setting: Setting) -> None:
        torch.manual_seed(0)
        self.setting = setting
        self.plain = create_layer(name, dim, setting.block).to(setting.device, DTYPES[setting.dtype]).eval()
        self.layer: nn.Module = self.plain
        if setting.mode == "fwd" and setting.block and name.startswith("gated-conv"):
            self.layer = optimize_for_inference(self.plain)
        x = torch.randn(2, setting.batch, side(tokens), side(tokens), dim).to(setting.device, DTYPES[setting.dtype])
        self.x, self.dy = x.unbind()
        if setting.mode == "train":
            self.layer.train()
            self.x.requires_grad_()

    def run(self) -> object:
        """The output; in mode train the gradients of the input and of every parameter."""
        if self.setting.mode == "fwd":
            with torch.inference_mode():
                return self.layer(self.x)
        return torch.autograd.grad(self.layer(self.x), [self.x, *self.layer.parameters()], self.dy)


def check(name: str, dim: int, setting: Setting) -> float:
    """How far a layer's output is from float64's on the reference, as a share of the largest value; of a small map.

    Raises ValueError if that is more than SHARES allows.
    """
    timed = Timed(name, dim, CHECKED_TOKENS, replace(setting, batch=1, mode="fwd"))
    with torch.inference_mode():
        actual = timed.layer(timed.x).double()
    with torch.no_grad(), backends.force("reference"):
        exact = copy.deepcopy(timed.plain).double()(timed.x.double())
    share = float((actual - exact).abs().max() / exact.abs().max())
    if not share <= SHARES[setting.dtype]:
        raise ValueError(f"{name} of dim {dim} is off by {share:.1e} of its largest value, and so is not timed")
    return share


def free_bytes(device: str) -> int | None:
    """Of the device's memory; None where that is not known."""
    if device != "cpu":
        return torch.cuda.mem_get_info()[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None


def _growth(name: str, row: Row, tokens: int) -> float:
    """By which a layer's time grows from a row's length to another."""
    return (side(tokens) ** 2 / side(row.tokens) ** 2) ** (2 if name in QUADRATIC else 1)


def _reason(last: Row | None, name: str, tokens: int, longest_s: float, setting: Setting) -> str | None:
    """Why a layer is not run at a length, going by what it took at the last."""
    if last is None:
        return None
    if last.left_out is not None or last.median_s is None or last.peak_bytes is None:
        return last.left_out
    seconds = last.median_s * _growth(name, last, tokens)
    if seconds > longest_s:
        return f"would take some {seconds:.0f} s"
    needed, free = last.peak_bytes * side(tokens) ** 2 / side(last.tokens) ** 2, free_bytes(setting.device)
    if free is not None and needed > 0.8 * free:
        return f"would need some {needed / 1e9:.1f} GB of memory, of which {free / 1e9:.1f} GB are free"
    return None


def _memory(timed: Timed) -> tuple[int, int]:
    """(bytes moved, bytes at the peak), both of one run."""
    if timed.setting.device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if timed.setting.device != "cpu" else 0
    with Ledger() as ledger:
        timed.run()
    if timed.setting.device == "cpu":
        return ledger.moved, ledger.peak
    torch.cuda.synchronize()
    return ledger.moved, torch.cuda.max_memory_allocated() - before


def _itself(timed: Timed) -> Timed:
    return timed


def sweep(
    names: Sequence[str],
    dims: Sequence[int],
    lengths: Sequence[int],
    setting: Setting,
    budget_s: float,
    longest_s: float,
    announce: Callable[[str], object],
) -> Iterator[list[Row]]:
    """Rows of one dim and length after the other; layers take turns. budget_s: of each; longest_s: of one run."""
    for dim in dims:
        last: dict[str, Row] = {}
        for tokens in sorted(lengths):
            announce(f"dim {dim}, {tokens} tokens")
            rows, ready = {}, {}
            for name in names:
                rows[name] = Row(name, dim, side(tokens) ** 2, *count(name, dim, tokens, setting.block))
                reason = _reason(last.get(name), name, tokens, longest_s, setting)
                if reason is not None:
                    rows[name] = replace(rows[name], left_out=reason)
                    continue
                ready[name] = Timed(name, dim, tokens, setting)
                moved, peak = _memory(ready[name])
                rows[name] = replace(rows[name], moved_bytes=moved, peak_bytes=peak)
            contenders = [Contender(name, Timed.run, partial(_itself, timed)) for name, timed in ready.items()]
            stopwatch = by_cuda_events() if setting.device != "cpu" else by_host()
            for name, timing in interleave(contenders, budget_s, stopwatch=stopwatch).items():
                rows[name] = replace(
                    rows[name], min_s=timing.minimum, median_s=timing.median, repetitions=len(timing.seconds)
                )
            last |= rows
            yield list(rows.values())


def crossing(slow: Sequence[Row], other: Sequence[Row]) -> float | None:
    """The number of tokens from which on `slow` takes longer than `other`, between two that were measured.

    On straight lines of the logarithms. 0 if it takes longer at all lengths, infinity at none; None if lengths in
    common are missing. If the lines cross more than once, the last counts.
    """
    times = {row.tokens: row.median_s for row in other if row.median_s}
    found = [
        (row.tokens, math.log(row.median_s / times[row.tokens])) for row in slow if row.median_s and row.tokens in times
    ]
    if not found:
        return None
    if found[-1][1] <= 0:
        return math.inf
    for (before, ratio), (after, next_ratio) in reversed(list(pairwise(found))):
        if ratio <= 0 < next_ratio:
            share = -ratio / (next_ratio - ratio)
            return math.exp((1 - share) * math.log(before) + share * math.log(after))
    return 0.0
