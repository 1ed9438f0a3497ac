"""The selective scan as a recurrence, step by step, in PyTorch: what every kernel is held to."""

import torch
import torch.nn.functional as F
from torch import Tensor


def selective_scan(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, skip: Tensor, delta_bias: Tensor, order: Tensor
) -> Tensor:
    """As comparators.selective_scan.selective_scan; any order of differentiation, any floating-point dtype."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    N, G, L, D = delta.shape
    tokens = order.long()[None, :, :, None]  # (1, G, L, 1)

    def in_order(t: Tensor) -> Tensor:
        return t.to(dtype).expand(N, G, L, t.shape[-1]).gather(2, tokens.expand(N, G, L, t.shape[-1]))

    x_t, B_t, C_t = in_order(x), in_order(B), in_order(C)
    step = F.softplus(in_order(delta) + delta_bias[:, None, :])
    h = x_t.new_zeros((N, G, D, A.shape[-1]))
    outputs = []
    for t in range(L):
        decay = torch.exp(step[:, :, t, :, None] * A)
        h = decay * h + (step[:, :, t] * x_t[:, :, t])[..., None] * B_t[:, :, t, None, :]
        outputs.append((h * C_t[:, :, t, None, :]).sum(-1))
    y = torch.stack(outputs, dim=2) + skip[:, None, :] * x_t
    y = torch.zeros_like(y).scatter(2, tokens.expand(N, G, L, D), y)
    return (y.sum(dim=1, keepdim=True) if x.shape[1] == 1 else y).to(x.dtype)
