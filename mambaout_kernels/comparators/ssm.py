"""Token mixers of vision's state space models, on one selective scan. A map (N, H, W, dim) to another, channels last.

    x, z = in_proj(x);   y = scan(silu(conv(x)));   out = out_proj(norm(y) * silu(z))

They differ in the order in which a map's tokens are scanned, in which of them a scan sees, and in the norm. Parameters
are named and shaped as in VMamba's repository, except where a class tells otherwise.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.linear import linear
from ..nn.plain import Weights
from . import mamba_ssm, scan_orders
from .layers import Linear
from .selective_scan import selective_scan

DELTA_RANGE = (1e-3, 1e-1)  # of the step size at initialisation


class SelectiveSSM(nn.Module):
    """The parameters of G selective scans, and the scans of tokens (Mamba, arXiv 2312.00752, algorithm 2).

    Args:
        channels: D, of a token.
        scans: G, each with parameters of its own.
        states: S, of each channel.
        rank: R, of the step size's projection.

    Parameters:
        x_proj_weight (G, R + 2 * S, D): a token to its step size of rank R, its B and its C.
        dt_projs_weight (G, D, R), dt_projs_bias (G, D): to the step size of each channel. The bias starts where
            softplus(bias) is log-uniform in [1e-3, 1e-1].
        A_logs (G * D, S): A = -exp(A_logs), which starts as -1 to -S (S4D-real).
        Ds (G * D,): the skip connection, which starts as 1.
    """

    scan_op = staticmethod(selective_scan)

    def __init__(self, channels: int, scans: int, states: int, rank: int):
        super().__init__()
        self.scans, self.states, self.rank = scans, states, rank
        self.x_proj_weight = nn.Parameter(_uniform(channels**-0.5, scans, rank + 2 * states, channels))
        self.dt_projs_weight = nn.Parameter(_uniform(rank**-0.5, scans, channels, rank))
        low, high = (math.log(delta) for delta in DELTA_RANGE)
        delta = torch.exp(low + (high - low) * torch.rand(scans, channels))
        self.dt_projs_bias = nn.Parameter(delta + torch.log(-torch.expm1(-delta)))  # softplus's inverse
        self.A_logs = nn.Parameter(torch.log(torch.arange(1.0, states + 1).repeat(scans * channels, 1)))
        self.Ds = nn.Parameter(torch.ones(scans * channels))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """delta (N, G, L, D) before bias and softplus, B and C (N, G, L, S), of x (N, 1 or G, L, D).

        Tokens are projected where they lie, those that all scans read by one matrix product. Nothing is copied.
        """
        weight = self.x_proj_weight
        if x.shape[1] == 1:
            projected = linear(Weights(weight.flatten(0, 1), None), x.squeeze(1))
            projected = projected.unflatten(-1, weight.shape[:2]).transpose(1, 2)
        else:
            projected = _per_scan(x, weight)
        delta, B, C = projected.split((self.rank, self.states, self.states), dim=-1)
        return _per_scan(delta, self.dt_projs_weight), B, C

    def scan_parameters(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A (G, D, S), skip (G, D) and delta_bias (G, D), in the dtype that the op takes beside x."""
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        A = -torch.exp(self.A_logs.to(dtype))
        return A.unflatten(0, (self.scans, -1)), self.Ds.to(dtype).view(self.scans, -1), self.dt_projs_bias.to(dtype)

    def scan(self, x: Tensor, order: Tensor, merge: bool = True) -> Tensor:
        """The scans of x (N, 1, L, D), read by all, or (N, G, L, D), each scan's own, in order (G, L).

        Returns the sum over the scans, (N, 1, L, D), if x is shared and merge is True; else (N, G, L, D).
        """
        delta, B, C = self.project(x)
        A, skip, delta_bias = self.scan_parameters(x)
        x = x if merge else x.expand_as(delta)
        return self.scan_op(x, delta, A, B, C, skip, delta_bias, order)


def _per_scan(x: Tensor, weight: Tensor) -> Tensor:
    """x (N, G, L, in) by weight (G, out, in): (N, G, L, out), a batched product without copies."""
    N, _, L, _ = x.shape
    rows = x.transpose(0, 1).flatten(1, 2)  # (G, N * L, in)
    return torch.bmm(rows, weight.transpose(1, 2)).unflatten(1, (N, L)).transpose(0, 1)


def _uniform(bound: float, *shape: int) -> Tensor:
    return torch.empty(shape).uniform_(-bound, bound)


def _depthwise(channels: int, kernel_size: int) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)


def _convolved(conv: nn.Module, x: Tensor) -> Tensor:
    """silu(conv(x)) of a map (N, H, W, D)."""
    return F.silu(conv(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)


class SS2D(SelectiveSSM):
    """VMamba's mixer of its first version (arXiv 2401.10166v1): every scan sees the whole map, and their sum is normed.

    The scans go by rows and by columns, ahead and back.

    Args:
        dim: of the map.
        expansion_ratio: int(expansion_ratio * dim) channels are scanned.
        states: S, of each channel.
        kernel_size: of the depthwise convolution, odd.
        scans: G.
    """

    def __init__(self, dim: int, expansion_ratio: float = 2.0, states: int = 16, kernel_size: int = 3, scans: int = 4):
        channels = int(expansion_ratio * dim)
        super().__init__(channels, scans, states, rank=math.ceil(dim / 16))
        self.in_proj = Linear(dim, 2 * channels, bias=False)
        self.conv2d = _depthwise(channels, kernel_size)
        self.out_norm = nn.LayerNorm(channels)
        self.out_proj = Linear(channels, dim, bias=False)

    def scan_map(self, x: Tensor) -> Tensor:
        """The scans of a map x (N, H, W, D), merged into one."""
        size = x.shape[1:3]
        y = self.scan(x.flatten(1, 2).unsqueeze(1), scan_orders.cached(scan_orders.cross, x, *size))
        return y.squeeze(1).unflatten(1, size)

    def forward(self, x: Tensor) -> Tensor:
        x, z = self.in_proj(x).chunk(2, dim=-1)
        y = self.scan_map(_convolved(self.conv2d, x))
        return self.out_proj(self.out_norm(y) * F.silu(z))


class SS2DByMambaSSM(SS2D):
    """SS2D whose scans are mamba_ssm's CUDA kernel, where that is installed: for timings beside ours."""

    scan_op = staticmethod(mamba_ssm.selective_scan)


class ChannelGate(nn.Module):
    """x (N, ..., dim) times one factor per sample and channel, as squeeze and excitation has it, of the normed x.

    BiAttn in the code of LocalMamba (arXiv 2403.09338) and EfficientVMamba (arXiv 2403.09977). LocalMamba's paper gates
    each token as well; its code, from which its checkpoints are, does not.
    """

    def __init__(self, dim: int, ratio: float = 1 / 8):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.global_reduce = Linear(dim, int(ratio * dim))
        self.channel_select = Linear(int(ratio * dim), dim)

    def forward(self, x: Tensor) -> Tensor:
        mean = self.norm(x).flatten(1, -2).mean(1)  # (N, dim)
        gate = torch.sigmoid(self.channel_select(F.gelu(self.global_reduce(mean))))
        return x * gate.view(-1, *[1] * (x.ndim - 2), x.shape[-1])


class LocalScan(SS2D):
    """LocalVMamba's mixer (arXiv 2403.09338): scans by windows among the others; each scan is gated before their sum.

    Args:
        directions: a name of scan_orders.named for each scan.
        dim, expansion_ratio, states, kernel_size: as SS2D's.

    Where a side is no multiple of a window, the authors scan zeros beyond it, in which states decay; here the last
    windows are smaller. Of 224 x 224, that is windows of 2 in the last stage. On maps that are not square, the authors'
    code puts what it scanned by columns back in other places; here it is put back where it was.
    """

    def __init__(
        self,
        dim: int,
        directions: tuple[str, ...] = ("h", "h_flip", "w7", "w7_flip"),
        expansion_ratio: float = 2.0,
        states: int = 16,
        kernel_size: int = 3,
    ):
        super().__init__(dim, expansion_ratio, states, kernel_size, scans=len(directions))
        scan_orders.named(1, 1, tuple(directions))  # refuses a name that is none
        self.directions = tuple(directions)
        self.multi_scan = nn.ModuleDict({"attn": ChannelGate(int(expansion_ratio * dim))})  # the authors' name

    def scan_map(self, x: Tensor) -> Tensor:
        size = x.shape[1:3]
        order = scan_orders.cached(scan_orders.named, x, *size, self.directions)
        y = self.scan(x.flatten(1, 2).unsqueeze(1), order, merge=False)  # (N, G, L, D)
        gated = self.multi_scan["attn"](y.flatten(0, 1)).unflatten(0, y.shape[:2])
        return gated.sum(1).unflatten(1, size)

    def extra_repr(self) -> str:
        return f"directions={self.directions}"


class AtrousScan(SS2D):
    """EfficientVMamba's mixer (ES2D, arXiv 2403.09977): each of four scans has a quarter of the pixels, 2 apart.

    Arguments are SS2D's, without `scans`. Odd sides are padded by zeros, which are scanned too, as the authors do.
    """

    def __init__(self, dim: int, expansion_ratio: float = 2.0, states: int = 16, kernel_size: int = 3):
        super().__init__(dim, expansion_ratio, states, kernel_size)

    def scan_map(self, x: Tensor) -> Tensor:
        H, W = x.shape[1:3]
        if H % 2 or W % 2:
            x = F.pad(x, (0, 0, 0, W % 2, 0, H % 2))
        quarters = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).permute(4, 2, 0, 1, 3, 5)  # (2, 2, N, H/2, W/2, D)
        size = quarters.shape[3:5]
        order = scan_orders.cached(scan_orders.atrous, x, *size)
        y = self.scan(quarters.flatten(3, 4).flatten(0, 1).transpose(0, 1), order)  # (N, 4, L/4, D)
        y = y.unflatten(2, size).unflatten(1, (2, 2)).permute(0, 3, 2, 4, 1, 5)  # (N, H/2, 2, W/2, 2, D)
        return y.flatten(3, 4).flatten(1, 2)[:, :H, :W]


class Bidirectional(SelectiveSSM):
    """Vim's mixer (arXiv 2401.09417, algorithm 1; "v2" in its code): tokens row by row, and back.

    Each way has a causal convolution of its own, which sees a token and those scanned before it. No norm. The authors'
    models halve the sum of the two ways (`if_divide_out`), which the paper does not, nor does this.

    Args:
        dim, expansion_ratio, states: as SS2D's.
        kernel_size: taps of the convolutions.

    conv1d and conv1d_b are the authors'; their A_log and A_b_log, and so on, are one parameter's two parts here.
    """

    def __init__(self, dim: int, expansion_ratio: float = 2.0, states: int = 16, kernel_size: int = 4):
        channels = int(expansion_ratio * dim)
        super().__init__(channels, 2, states, rank=math.ceil(dim / 16))
        self.in_proj = Linear(dim, 2 * channels, bias=False)
        self.conv1d = nn.Conv1d(channels, channels, kernel_size, padding=kernel_size - 1, groups=channels)
        self.conv1d_b = nn.Conv1d(channels, channels, kernel_size, padding=kernel_size - 1, groups=channels)
        self.out_proj = Linear(channels, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[1:3]
        x, z = self.in_proj(x).chunk(2, dim=-1)
        tokens = x.flatten(1, 2).transpose(1, 2)  # (N, D, L)
        L = tokens.shape[2]
        ahead = self.conv1d(tokens)[..., :L]
        back = self.conv1d_b(tokens.flip(2))[..., :L].flip(2)
        both = F.silu(torch.stack((ahead, back), dim=1)).transpose(2, 3)  # (N, 2, L, D)
        y = self.scan(both, scan_orders.cached(scan_orders.bidirectional, x, *size)).sum(1)
        return self.out_proj(y.unflatten(1, size) * F.silu(z))


class ContinuousScan(SelectiveSSM):
    """PlainMamba's mixer (arXiv 2403.17695): four scans, each step to a neighbour, and B knows where it came from.

        h = exp(delta A) h + delta x (B + Theta[direction]),   direction of start, right, left, up, down

    The scans share all parameters but Theta, `direction_Bs` (5, S). No norm.

    Arguments are SS2D's, without `scans`.

    As in the paper, delta, B and C are those of the token that is visited. The authors' code reorders x alone: it pairs
    the t-th token of a scan with the t-th delta, B and C of the rows.
    """

    def __init__(self, dim: int, expansion_ratio: float = 2.0, states: int = 16, kernel_size: int = 7):
        channels = int(expansion_ratio * dim)
        super().__init__(channels, 1, states, rank=math.ceil(dim / 16))
        self.in_proj = Linear(dim, 2 * channels, bias=False)
        self.conv2d = _depthwise(channels, kernel_size)
        self.out_proj = Linear(channels, dim, bias=False)
        self.direction_Bs = nn.Parameter(nn.init.trunc_normal_(torch.empty(5, states), std=0.02))

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[1:3]
        x, z = self.in_proj(x).chunk(2, dim=-1)
        x = _convolved(self.conv2d, x)
        order = scan_orders.cached(scan_orders.continuous, x, *size)  # (4, L)
        directions = scan_orders.cached(scan_orders.continuous_directions, x, *size)  # (4, L)
        tokens = x.flatten(1, 2).unsqueeze(1)  # (N, 1, L, D)
        delta, B, C = (t.expand(-1, 4, -1, -1) for t in self.project(tokens))
        B = B + self.direction_Bs.to(B.dtype)[directions]
        A, skip, delta_bias = (t.expand(4, *t.shape[1:]) for t in self.scan_parameters(x))
        y = selective_scan(tokens, delta, A, B, C, skip, delta_bias, order)
        return self.out_proj(y.squeeze(1).unflatten(1, size) * F.silu(z))
