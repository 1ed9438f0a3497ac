"""What a call of the op costs in Python: the time of `gated_dwconv` less that of the compiled op it ends in."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .. import backends
from ..backends.namespace import ops
from ..ops import gated_dwconv
from .timing import Contender

CALLS = 2000  # per repetition: one call is too short for the clock


def _repeat(call: Callable[[], Tensor], _prepared: None) -> None:
    for _ in range(CALLS):
        call()


def contenders() -> list[Contender]:
    """On one pixel of two channels, under inference_mode. RuntimeError where the compiled CPU kernels are not there."""
    reason = backends.status()["cpu"]
    if reason is not None:
        raise RuntimeError(f"the overhead is measured over the compiled CPU op: {reason}")
    u, weight, bias = torch.randn(1, 1, 1, 2), torch.randn(1, 1, 7, 7), torch.randn(1)
    native = ops.gated_dwconv_cpu.default
    calls = {
        "gated_dwconv": lambda: gated_dwconv(u, weight, bias, "gelu"),
        "native": lambda: native(u, weight, bias, 0),
    }
    return [Contender(name, partial(_repeat, call), context=torch.inference_mode) for name, call in calls.items()]
