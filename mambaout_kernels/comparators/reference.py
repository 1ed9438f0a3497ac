"""The selective scan as a recurrence, step by step, in PyTorch: what every kernel is held to."""

import torch
import torch.nn.functional as F
from torch import Tensor


def selective_scan(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, skip: Tensor, delta_bias: Tensor, order: Tensor
) -> Tensor:
    """As comparators.selective_scan.selective_scan; any order of differentiation, any floating-point dtype."""
    x_t, z, B_t, C_t = _in_order(x, delta, A, B, C, delta_bias, order)
    step = F.softplus(z)
    h = x_t.new_zeros((x.shape[0], *A.shape))
    outputs = []
    for t in range(delta.shape[2]):
        h = torch.exp(step[:, :, t, :, None] * A) * h + (step * x_t)[:, :, t, :, None] * B_t[:, :, t, None, :]
        outputs.append((h * C_t[:, :, t, None, :]).sum(-1))
    y = _where_tokens_are(torch.stack(outputs, dim=2) + skip[:, None, :] * x_t, order)
    return (y.sum(dim=1, keepdim=True) if x.shape[1] == 1 else y).to(x.dtype)


def selective_scan_backward(
    dy: Tensor, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, skip: Tensor, delta_bias: Tensor,
    order: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    """(dx, ddelta, dA, dB, dC, dskip, ddelta_bias), each in the dtype and shape of its input."""
    x_t, z, B_t, C_t = _in_order(x, delta, A, B, C, delta_bias, order)
    dy_t = _visited(dy.to(x_t.dtype), order)
    step, steps = F.softplus(z), delta.shape[2]
    states = [x_t.new_zeros((x.shape[0], *A.shape))]
    decays = []
    for t in range(steps):
        decays.append(torch.exp(step[:, :, t, :, None] * A))
        states.append(decays[t] * states[t] + (step * x_t)[:, :, t, :, None] * B_t[:, :, t, None, :])
    carried = torch.zeros_like(states[0])  # a_{t+1} dh_{t+1}
    dA = torch.zeros_like(states[0])
    found: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for t in reversed(range(steps)):
        dh = carried + C_t[:, :, t, None, :] * dy_t[:, :, t, :, None]
        carried = decays[t] * dh
        dexponent = carried * states[t]
        dA = dA + dexponent * step[:, :, t, :, None]
        dC = (dy_t[:, :, t, :, None] * states[t + 1]).sum(2)
        dB = (dh * (step * x_t)[:, :, t, :, None]).sum(2)
        found.append(((dh * B_t[:, :, t, None, :]).sum(-1), (dexponent * A).sum(-1), dB, dC))
    dinput, drate, dB, dC = (torch.stack(each[::-1], dim=2) for each in zip(*found, strict=True))
    slope = torch.where(z > 20, 1.0, torch.sigmoid(z))  # of softplus, as PyTorch has it
    dz = (drate + x_t * dinput) * slope
    dx = _where_tokens_are(step * dinput + skip[:, None, :] * dy_t, order)
    return (
        (dx.sum(dim=1, keepdim=True) if x.shape[1] == 1 else dx).to(x.dtype),
        _where_tokens_are(dz, order).to(x.dtype),
        dA.sum(0),
        *(_where_tokens_are(d, order).to(x.dtype) for d in (dB, dC)),
        (dy_t * x_t).sum((0, 2)),
        dz.sum((0, 2)),
    )


def _in_order(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, delta_bias: Tensor, order: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, delta + delta_bias, B and C, (N, G, L, .) as the scans visit them, in the dtype that is computed in."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    x, delta, B, C = (_visited(t.to(dtype), order) for t in (x, delta, B, C))
    return x, delta + delta_bias[:, None, :], B, C


def _rows(t: Tensor, order: Tensor) -> Tensor:
    return order.long()[None, :, :, None].expand(t.shape[0], *order.shape, t.shape[-1])


def _visited(t: Tensor, order: Tensor) -> Tensor:
    rows = _rows(t, order)
    return t.expand(rows.shape).gather(2, rows)


def _where_tokens_are(t: Tensor, order: Tensor) -> Tensor:
    return torch.zeros_like(t).scatter(2, _rows(t, order), t)
