"""The small layers of a Gated CNN block: stochastic depth and layer scale, as timm has them."""

import torch
from torch import nn


class DropPath(nn.Module):
    """Stochastic depth per sample: in training, a sample's branch is zeroed with probability `drop_prob`.

    Draws (N,1,1,1) in the branch's own dtype, as timm does: the same seed drops the same samples.
    """

    def __init__(self, drop_prob: float = 0.0, scale_by_keep: bool = True):
        super().__init__()
        self.drop_prob = drop_prob
        self.scale_by_keep = scale_by_keep

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.drop_prob == 0.0:
            return x
        keep_prob = 1.0 - self.drop_prob
        keep = torch.empty((x.shape[0], *[1] * (x.ndim - 1)), dtype=x.dtype, device=x.device).bernoulli_(keep_prob)
        if self.scale_by_keep and keep_prob > 0.0:
            keep = keep.div_(keep_prob)
        return x * keep

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:.3f}"


class LayerScale(nn.Module):
    """x * gamma, one learned factor per channel of the last dimension."""

    def __init__(self, dim: int, init_value: float):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), float(init_value)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gamma
