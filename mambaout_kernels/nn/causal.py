"""Causal token mixing, for the paper's ablation (arXiv 2405.07992, section 3.2): understanding wants to see everything.

In raster order a pixel then sees itself and those before it: the rows above, and its own row to the left.
"""

import torch
from torch import Tensor, nn


def causal_taps(kernel_size: int, device: torch.device | None = None) -> Tensor:
    """(K, K) of bool: the taps of a centred filter that read no pixel after the centre; K * K // 2 + 1 of them."""
    order = torch.arange(kernel_size * kernel_size, device=device).view(kernel_size, kernel_size)
    return order <= kernel_size * kernel_size // 2


class CausalConv2d(nn.Conv2d):
    """A convolution that uses only the causal taps of its filter; the others get no gradient. Its state_dict is plain.

    x (N, C, H, W) to (N, C, H, W), with the arguments of nn.Conv2d.
    """

    def filter(self) -> Tensor:
        """The weight with the taps after the centre at zero."""
        return self.weight * causal_taps(self.kernel_size[0], self.weight.device)

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.filter(), self.bias)
