"""The selective scan through mamba_ssm's own CUDA kernel: tokens permuted into scan order, scanned, and put back.

A contender for timings, and no default: its layout is (N, channels, L), so that every tensor is copied on the way in.
"""

from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

from .selective_scan import check

_INTERFACE = "mamba_ssm.ops.selective_scan_interface"


def unavailable() -> str | None:
    """Why mamba_ssm's kernel cannot be used here; None where it can."""
    if find_spec("mamba_ssm") is None:
        return "mamba_ssm is not installed: pip install mamba-ssm"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    try:
        import_module(_INTERFACE)
    except ImportError as error:
        return f"mamba_ssm cannot be imported: {error}"
    return None


def selective_scan(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, skip: Tensor, delta_bias: Tensor, order: Tensor
) -> Tensor:
    """As comparators.selective_scan.selective_scan, for float32, bfloat16 and float16. Differentiable by autograd."""
    check(x, delta, A, B, C, skip, delta_bias, order)
    scan = import_module(_INTERFACE).selective_scan_fn
    N, G, L, D = delta.shape
    tokens = order.long()[None, :, :, None]

    def in_order(t: Tensor) -> Tensor:
        """(N, G, channels, L), contiguous."""
        shape = (N, G, L, t.shape[-1])
        return t.expand(shape).gather(2, tokens.expand(shape)).transpose(2, 3).contiguous()

    y = scan(
        in_order(x).flatten(1, 2), in_order(delta).flatten(1, 2), A.flatten(0, 1), in_order(B), in_order(C),
        skip.flatten(), z=None, delta_bias=delta_bias.flatten(), delta_softplus=True,
    )  # fmt: skip
    step_of = order.argsort(1)[None, :, :, None].expand(N, G, L, D)
    y = y.unflatten(1, (G, D)).transpose(2, 3).gather(2, step_of)
    return y.sum(1, keepdim=True) if x.shape[1] == 1 else y
