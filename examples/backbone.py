"""A fused MambaOut as the backbone of dense models: maps of all stages, each normed, for any size of image."""

from collections import OrderedDict

import torch
from torch import nn

import mambaout_kernels as mk
from mambaout_kernels.weights.checkpoints import load_checkpoint


class Backbone(nn.Module):
    """(N, 3, H, W) to {"0": (N, dims[0], H/4, W/4), ..., "3": (N, dims[3], H/32, W/32)}, each division rounded up.

    Every map has a LayerNorm of its own, as is usual where heads are put on un-normed residual streams.
    """

    def __init__(self, name: str, weights: str | None = None, drop_path_rate: float = 0.0, checkpointing: bool = False):
        super().__init__()
        # From scratch a layer scale of 1e-4 or less leaves the blocks idle for the first thousands of steps.
        options = {} if weights else {"ls_init_value": None}
        self.body = mk.create_model(name, num_classes=0, drop_path_rate=drop_path_rate, **options)
        if weights is not None:
            own = self.body.state_dict()
            self.body.load_state_dict({key: load_checkpoint(weights)[key] for key in own})
        self.body.norm, self.body.head = nn.Identity(), nn.Identity()  # of classification; unused here
        self.body.set_grad_checkpointing(checkpointing)
        self.dims = self.body.dims
        self.norms = nn.ModuleList(nn.LayerNorm(dim, eps=1e-6) for dim in self.dims)

    def forward(self, x: torch.Tensor) -> "OrderedDict[str, torch.Tensor]":
        maps = self.body.forward_intermediates(x, output_fmt="NHWC", intermediates_only=True)
        normed = [norm(y).permute(0, 3, 1, 2) for norm, y in zip(self.norms, maps, strict=True)]
        return OrderedDict((str(stage), y) for stage, y in enumerate(normed))
