"""Inputs for selective scans, what is exact, and how far from it a scan in float32 may be."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mambaout_kernels.comparators import reference

NAMES = ("y", "dx", "ddelta", "dA", "dB", "dC", "dskip", "ddelta_bias")


def make_inputs(N, G, L, D, S, shared=True, dtype=torch.float32, seed=0) -> tuple[list[Tensor], Tensor]:
    """(x, delta, A, B, C, skip, delta_bias), order. States that keep from a step to hundreds, as Mamba begins with."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    order = torch.stack([torch.randperm(L, generator=generator) for _ in range(G)]).int()
    parameter = torch.float64 if dtype == torch.float64 else torch.float32
    A = -(torch.arange(1, S + 1) * (0.5 + torch.rand(G, D, 1, generator=generator))).to(parameter)
    tokens = [normal(N, 1 if shared else G, L, D), normal(N, G, L, D) - 2, normal(N, G, L, S), normal(N, G, L, S)]
    x, delta, B, C = (t.to(dtype) for t in tokens)
    return [x, delta, A, B, C, normal(G, D).to(parameter), normal(G, D).to(parameter)], order


def results(function, arguments, order, dy, dtype=None) -> dict[str, Tensor]:
    """y and every gradient; in another dtype if one is given."""
    leaves = [(t if dtype is None else t.to(dtype)).detach().requires_grad_() for t in arguments]
    y = function(*leaves, order)
    return dict(zip(NAMES, (y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))), strict=True))


def exact(arguments, order, dy) -> dict[str, Tensor]:
    return results(reference.selective_scan, arguments, order, dy, torch.float64)


def forward_bound(arguments, order) -> Tensor:
    """Of each y's error, as of correct arithmetic in float32, carried along with the recurrence.

    u is a rounding. exp(step A) is off by three of its own and its exponent's, step by those of softplus, whose
    argument's rounding counts as much as it is large. What an error of h is at t, a_t of it is at t + 1.
    """
    u = 2.0**-24
    x, delta, A, B, C, skip, bias = (t.double() for t in arguments)
    N, G, L, D = delta.shape
    rows = order.long()[None, :, :, None]

    def in_order(t):
        return t.expand(N, G, L, t.shape[-1]).gather(2, rows.expand(N, G, L, t.shape[-1]))

    x, delta, B, C = (in_order(t) for t in (x, delta, B, C))
    z = delta + bias[:, None]
    step, of_step = F.softplus(z), (6 + delta.abs() + bias.abs()[:, None]) * u
    h = error = torch.zeros(N, G, D, A.shape[-1], dtype=torch.float64)
    found = []
    for t in range(L):
        exponent = step[:, :, t, :, None] * A
        decay = exponent.exp()
        of_decay = 4 * u + exponent.abs() * (4 * u + of_step[:, :, t, :, None])
        source = (step * x)[:, :, t, :, None].abs() * B[:, :, t, None].abs()
        error = decay * (error + h * (of_decay + u)) + source * (of_step[:, :, t, :, None] + 3 * u)
        h = decay * h + source
        C_t, S = C[:, :, t, None].abs(), A.shape[-1]
        found.append((C_t * (error + h * (S + 2) * u)).sum(-1) + (skip * x[:, :, t]).abs() * 3 * u)
    scattered = torch.zeros(N, G, L, D, dtype=torch.float64).scatter(
        2, rows.expand(N, G, L, D), torch.stack(found, dim=2)
    )
    return scattered


def y_bound(arguments, order, exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Of each y's error in a dtype: the scans', their sum's, and the rounding of the result."""
    bound = forward_bound(arguments, order)
    if exact.shape[1] == 1:
        bound = bound.sum(1, keepdim=True) + order.shape[0] * 2.0**-24 * _magnitude(arguments, order)
    info = torch.finfo(dtype)
    stored = info.eps / 2 if dtype != torch.float32 else 0.0
    smallest = info.tiny * (info.eps if dtype == torch.float16 else 1.0)
    return bound + stored * (exact.abs() + bound) + smallest


def _magnitude(arguments, order) -> Tensor:
    """The sum of what the scans give, whatever their signs."""
    x, delta, A, B, C, skip, bias = (t.double() for t in arguments)
    own = x.expand(delta.shape).abs()
    return reference.selective_scan(own, delta, A, B.abs(), C.abs(), skip.abs(), bias, order).sum(1, keepdim=True)
