"""From the last map to the logits as one op, for inference on the CPU.

    out = fc2(norm(gelu(fc1(layer_norm(mean over H and W of x)))))

For one image it takes as long as reading its weights does, if nothing else has to be fetched for it: its layers, called
one after the other, take twice that. csrc/torch/head.cpp defines the op; weights are read as they lie.
"""

from typing import Any

import torch
from torch import Tensor

from ..backends import cpu
from ..backends.checks import check_devices
from ..backends.namespace import NAMESPACE, ops


def head(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    mid_weight: Tensor | None,
    mid_bias: Tensor | None,
    fc2_weight: Tensor | None,
    fc2_bias: Tensor | None,
    eps: float,
    mid_eps: float,
    mid_normed: bool,
    dtype: torch.dtype,
) -> Tensor:
    """x (N, H, W, channels), float32 or bfloat16, any strides, to (N, classes) in `dtype`; (N, hidden) without fc2.

    Args:
        fc1_weight: (hidden, channels). fc2_weight: (classes, hidden). norm_*: (channels,). mid_*: (hidden,), of the
            norm after fc1, which is there if mid_normed. All in one dtype, float32 or bfloat16; None for what is not
            there. Everything is computed in float32.

    Raises:
        RuntimeError: a wrong shape or dtype.
    """
    return ops.head.default(
        x, norm_weight, norm_bias, fc1_weight, fc1_bias, mid_weight, mid_bias, fc2_weight, fc2_bias, eps, mid_eps,
        mid_normed, dtype,
    )  # fmt: skip


def _fake(x: Tensor, *arguments: Any) -> Tensor:
    check_devices(x, *(a for a in arguments if isinstance(a, Tensor)))
    fc1_weight, fc2_weight, dtype = arguments[2], arguments[6], arguments[11]
    outputs = fc1_weight.shape[0] if fc2_weight is None else fc2_weight.shape[0]
    return x.new_empty((x.shape[0], outputs), dtype=dtype)


if cpu.unavailable() is None:
    torch.library.register_fake(f"{NAMESPACE}::head", _fake)
