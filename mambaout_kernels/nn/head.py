"""A classifier's head, after the pooled and normed features."""

import torch
from torch import Tensor, nn

from .linear import linear


class Head(nn.Module):
    """(N, dim) to (N, num_classes): fc1, GELU, norm unless None, dropout, fc2. GELU whatever the blocks use."""

    def __init__(self, dim: int, hidden: int, num_classes: int, norm: nn.Module | None, drop_rate: float):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.norm = norm
        self.fc2: nn.Module = nn.Linear(hidden, num_classes) if num_classes > 0 else nn.Identity()
        self.head_dropout = nn.Dropout(drop_rate)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.act(_linear(self.fc1, x))
        if self.norm is not None:
            x = self.norm(x)
        x = self.head_dropout(x)
        return x if pre_logits else _linear(self.fc2, x)


def _linear(fc: nn.Module, x: Tensor) -> Tensor:
    return fc(x) if torch.is_grad_enabled() else linear(fc, x, stream_weight=True)
