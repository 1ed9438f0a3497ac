"""What backbones are asked for beside logits: maps of every stage, gradient checkpointing, groups of layers.

The interface is timm's (forward_intermediates, feature_info, set_grad_checkpointing, group_matcher), on the authors'
layout of modules: `downsample_layers` and `stages`, one of each per stage.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

OUTPUT_FORMATS = ("NCHW", "NHWC")


class Stages(nn.Module):
    """The backbone of MambaOut: every stage's downsampling and blocks; channels last."""

    downsample_layers: nn.ModuleList
    stages: nn.ModuleList
    in_chans: int
    grad_checkpointing = False

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether a block's inner tensors are computed again in backward instead of being kept.

        In training, blocks with `recompute` do that themselves, once, whatever is set here.
        """
        self.grad_checkpointing = enable

    def run_stage(self, stage: int, x: torch.Tensor) -> torch.Tensor:
        """Images, or the map of the stage before, to this stage's map, (N, H, W, dims[stage])."""
        x = self.downsample_layers[stage](x)
        blocks: Any = self.stages[stage]
        if not (self.grad_checkpointing and torch.is_grad_enabled()):
            return blocks(x)
        for block in blocks if isinstance(blocks, nn.Sequential) else (blocks,):  # a wrapped stage as a whole
            own = block.training and getattr(block, "recompute", False)
            x = block(x) if own else checkpoint(block, x, use_reentrant=False)
        return x

    def check_images(self, x: torch.Tensor) -> None:
        if x.ndim != 4 or x.shape[1] != self.in_chans or 0 in x.shape[2:]:
            raise ValueError(f"x must be (N, {self.in_chans}, H, W) with H, W >= 1, got {tuple(x.shape)}")

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_chans, H, W) to (N, H/32, W/32, dims[-1]), each halving rounded up; channels last, not normed."""
        self.check_images(x)
        for stage in range(len(self.stages)):
            x = self.run_stage(stage, x)
        return x

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """The last map, (N, H/32, W/32, dims[-1]), and a list of maps of the stages that `indices` names.

        Args:
            x: (N, in_chans, H, W).
            indices: the last n stages for an int, all for None, else stages counted from 0 or, negative, from the end.
            norm: for timm's sake; MambaOut has no norm for intermediate maps, so it changes nothing.
            stop_early: skip the stages after the last one wanted; then the first result is that stage's map.
            output_fmt: "NCHW" (contiguous) or "NHWC", of the list.
            intermediates_only: return the list alone.

        Raises ValueError for an index out of range or another format.
        """
        if output_fmt not in OUTPUT_FORMATS:
            raise ValueError(f"output_fmt must be one of {', '.join(OUTPUT_FORMATS)}, got {output_fmt!r}")
        wanted = stage_indices(indices, len(self.stages))
        self.check_images(x)
        intermediates = []
        for stage in range(max(wanted) + 1 if stop_early else len(self.stages)):
            x = self.run_stage(stage, x)
            if stage in wanted:
                intermediates.append(x)
        if output_fmt == "NCHW":
            intermediates = [y.permute(0, 3, 1, 2).contiguous() for y in intermediates]
        return intermediates if intermediates_only else (x, intermediates)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of parameter names for timm.models.group_parameters: layer-wise learning rates and freezing."""
        if coarse:  # a stage is a group, its downsampling with it
            return {"stem": r"^downsample_layers\.0\.", "blocks": [(r"^(?:downsample_layers|stages)\.(\d+)", None)]}
        return {
            "stem": r"^downsample_layers\.0\.",
            "blocks": [(r"^downsample_layers\.(\d+)", (0,)), (r"^stages\.(\d+)\.(\d+)", None)],
        }


def stage_indices(indices: int | Sequence[int] | None, stages: int) -> set[int]:
    """The stages that `forward_intermediates` is asked for. ValueError for one that is not there."""
    if indices is None:
        return set(range(stages))
    if isinstance(indices, int):
        if not 1 <= indices <= stages:
            raise ValueError(f"indices must be in 1 to {stages} as a number of stages, got {indices}")
        return set(range(stages - indices, stages))
    if not indices or not all(-stages <= index < stages for index in indices):
        raise ValueError(f"indices must be stages from {-stages} to {stages - 1}, at least one; got {list(indices)}")
    return {index % stages for index in indices}
