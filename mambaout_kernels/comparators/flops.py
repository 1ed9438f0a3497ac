"""What torch.utils.flop_counter.FlopCounterMode counts of a selective scan, and a model's MACs as papers print them.

Mamba's authors count 9 operations of each state and 1 of the skip connection, of each token and channel
(github.com/state-spaces/mamba, issue 110), and papers add that to the multiply-adds of the rest, as fvcore counts
them. The formula is twice that, so that half of FlopCounterMode's total is the papers' figure; fvcore's few operations
of norms are not in it. Backward counts as twice forward; that it computes the states again is not counted.

Formulas are registered when this module is imported.
"""

from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from .. import backends
from ..backends.namespace import ops
from . import selective_scan  # noqa: F401 - it defines the op

Shape = tuple[int, ...]


@register_flop_formula(ops.selective_scan)
def _selective_scan(x: Shape, delta: Shape, A: Shape, *_: Any, **__: Any) -> int:
    return 2 * torch.Size(delta).numel() * (9 * A[-1] + 1)


@register_flop_formula(ops.selective_scan_backward)
def _selective_scan_backward(dy: Shape, *arguments: Any, **__: Any) -> int:
    return 2 * _selective_scan(*arguments)


def macs(model: nn.Module, height: int = 224, width: int = 224) -> int:
    """Of one image (1, 3, height, width), for a model made under `torch.device("meta")`."""
    image = torch.empty(1, 3, height, width, device="meta")
    with FlopCounterMode(display=False) as counter, backends.force("reference"), torch.no_grad():
        model.eval()(image)
    return counter.get_total_flops() // 2
