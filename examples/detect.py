"""Mask R-CNN (torchvision's, with FPN) on a fused MambaOut: objects, their boxes and masks.

    python examples/detect.py --out runs/detect --steps 300

Trains on the scenes of shapes.py; writes loss.csv, loss.png and prediction.png. For COCO, the paper's settings are
AdamW 1e-4, batch 16, 12 epochs, short side 800, long side at most 1333.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from backbone import Backbone
from shapes import CLASSES, Scene, Shapes
from steps import add_arguments, optimise
from torch import nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool


class PyramidBackbone(nn.Module):
    """Backbone and feature pyramid, as torchvision's detectors take one."""

    def __init__(self, backbone: Backbone, channels: int):
        super().__init__()
        self.backbone = backbone
        self.fpn = FeaturePyramidNetwork(list(backbone.dims), channels, LastLevelMaxPool())
        self.out_channels = channels

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.fpn(self.backbone(x))


def mask_rcnn(backbone: Backbone, classes: int, channels: int, low: int, high: int, anchor: int) -> MaskRCNN:
    """All heads are in proportion to `channels`: at 256 they are torchvision's, the paper's.

    `anchor` is the side of the smallest anchors; they double from level to level. Images are scaled to a short side of
    `low`, or a long side of `high`.
    """
    levels = len(backbone.dims) + 1
    anchors = AnchorGenerator(tuple((anchor << level,) for level in range(levels)), ((0.5, 1.0, 2.0),) * levels)
    return MaskRCNN(
        PyramidBackbone(backbone, channels),
        min_size=low,
        max_size=high,
        rpn_anchor_generator=anchors,
        rpn_batch_size_per_image=64,
        box_head=TwoMLPHead(channels * 7 * 7, 4 * channels),
        box_predictor=FastRCNNPredictor(4 * channels, classes),
        box_batch_size_per_image=64,
        mask_head=MaskRCNNHeads(channels, (channels,) * 4, 1),
        mask_predictor=MaskRCNNPredictor(channels, channels, classes),
        size_divisible=1,  # MambaOut takes any size
    )


def targets(scenes: list[Scene]) -> list[dict[str, torch.Tensor]]:
    return [{"boxes": s.boxes, "labels": s.labels, "masks": s.masks.to(torch.uint8)} for s in scenes]


def precision_and_recall(model: nn.Module, scenes: list[Scene], threshold: float = 0.5) -> tuple[float, float]:
    """Of the guesses with a score above 0.5, those that are right: an object's class, a box of IoU above `threshold`,
    and the best guess at that object; and the share of objects that one of them finds."""
    from torchvision.ops import box_iou

    right, guesses, objects = 0, 0, 0
    with torch.inference_mode():
        for scene in scenes:
            [guess] = model([scene.image])
            sure = guess["scores"] > 0.5
            hits = box_iou(scene.boxes, guess["boxes"][sure]) > threshold
            hits &= scene.labels[:, None] == guess["labels"][sure]
            right, guesses = right + int(hits.any(1).sum()), guesses + int(sure.sum())
            objects += len(scene.labels)
    return right / max(1, guesses), right / objects


def picture(model: nn.Module, scenes: list[Scene], path: Path) -> None:
    """Scenes with the truth, and below with what the model found in them; of guesses at one place the surest."""
    from matplotlib.figure import Figure
    from torchvision.ops import nms

    figure = Figure(figsize=(3.2 * len(scenes), 6.6), layout="constrained")
    for (truth, found), scene in zip(figure.subplots(2, len(scenes), squeeze=False).T, scenes, strict=True):
        _draw(truth, scene.image, scene.labels, scene.boxes, scene.masks.bool(), [CLASSES[c] for c in scene.labels])
        with torch.inference_mode():
            [guess] = model([scene.image])
        kept = nms(guess["boxes"], guess["scores"], 0.5)
        kept = kept[guess["scores"][kept] > 0.5]
        labels, boxes, scores = (guess[name][kept] for name in ("labels", "boxes", "scores"))
        names = [f"{CLASSES[c]} {score:.2f}" for c, score in zip(labels, scores, strict=True)]
        _draw(found, scene.image, labels, boxes, guess["masks"][kept, 0] > 0.5, names)
        truth.set_title("truth", fontsize=9)
        found.set_title("found", fontsize=9)
    figure.savefig(path, dpi=130)


def _draw(
    axes: Any, image: torch.Tensor, labels: torch.Tensor, boxes: torch.Tensor, masks: torch.Tensor, names: list[str]
) -> None:
    from matplotlib.patches import Rectangle
    from torchvision.utils import draw_segmentation_masks

    colours = [("", "#d62728", "#2ca02c", "#1f77b4")[label] for label in labels.tolist()]
    pixels = (image * 255).to(torch.uint8)
    axes.imshow((draw_segmentation_masks(pixels, masks, 0.45, colours) if colours else pixels).permute(1, 2, 0).numpy())
    for (left, top, right, bottom), colour, name in zip(boxes.tolist(), colours, names, strict=True):
        axes.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=colour, linewidth=1.5))
        axes.text(left, top, name, fontsize=7, color="white", va="bottom", clip_on=True,
                  bbox={"facecolor": colour, "edgecolor": "none", "pad": 1})  # fmt: skip
    axes.set_axis_off()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Mask R-CNN on a fused MambaOut.")
    add_arguments(parser, steps=300)
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    data = Shapes(seed=args.seed)
    model = mask_rcnn(Backbone(args.model, args.weights), len(CLASSES), channels=64, low=112, high=168, anchor=12)
    held_out = [data[10**6 + number] for number in range(args.held_out)]

    def loss(step: int) -> torch.Tensor:
        scenes = [data[step * args.batch + number] for number in range(args.batch)]
        return sum(model([s.image for s in scenes], targets(scenes)).values())

    first, last = optimise(model, loss, args)
    model.eval()
    precision, recall = precision_and_recall(model, held_out)
    picture(model, held_out[:4], args.out / "prediction.png")
    print(
        f"loss {first:.3f} -> {last:.3f}; precision {precision:.1%}, recall {recall:.1%} on {len(held_out)} "
        f"held-out scenes"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
