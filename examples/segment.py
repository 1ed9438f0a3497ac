"""Segmentation in the manner of UPerNet on a fused MambaOut: the class of every pixel.

    python examples/segment.py --out runs/segment --steps 300

Trains on the scenes of shapes.py; writes loss.csv, loss.png and prediction.png. For ADE20K, the paper's settings are
AdamW 1e-4, batch 16, 160k iterations.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from backbone import Backbone
from shapes import CLASSES, Scene, Shapes
from steps import add_arguments, optimise
from torch import nn

IGNORED = 255  # of pixels beyond an image's border, in a batch of several sizes


def conv_block(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
    groups = nn.GroupNorm(8, outputs)  # batches are small here; UPerNet has BatchNorm
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False), groups, nn.ReLU())


def resized(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=False)


class UPerHead(nn.Module):
    """Pyramid pooling on the last map, a feature pyramid over all, both joined at a quarter of the image's size.

    Maps (N, dims[i], H/2^(i+2), W/2^(i+2)) to logits (N, classes, H/4, W/4). After arXiv 1807.10221.
    """

    def __init__(self, dims: tuple[int, ...], classes: int, channels: int, scales: tuple[int, ...] = (1, 2, 3, 6)):
        super().__init__()
        self.scales = scales
        self.pooled = nn.ModuleList(conv_block(dims[-1], channels, 1) for _ in scales)
        self.bottleneck = conv_block(dims[-1] + len(scales) * channels, channels, 3)
        self.lateral = nn.ModuleList(conv_block(dim, channels, 1) for dim in dims[:-1])
        self.smooth = nn.ModuleList(conv_block(channels, channels, 3) for _ in dims[:-1])
        self.fuse = conv_block(len(dims) * channels, channels, 3)
        self.classify = nn.Conv2d(channels, classes, 1)

    def forward(self, maps: list[torch.Tensor]) -> torch.Tensor:
        last = maps[-1]
        pools = [
            resized(block(F.adaptive_avg_pool2d(last, scale)), last)
            for scale, block in zip(self.scales, self.pooled, strict=True)
        ]
        levels = [block(y) for block, y in zip(self.lateral, maps[:-1], strict=True)]
        levels.append(self.bottleneck(torch.cat([last, *pools], dim=1)))
        for level in range(len(levels) - 1, 0, -1):
            levels[level - 1] = levels[level - 1] + resized(levels[level], levels[level - 1])
        smoothed = [block(y) for block, y in zip(self.smooth, levels[:-1], strict=True)] + levels[-1:]
        return self.classify(self.fuse(torch.cat([resized(y, smoothed[0]) for y in smoothed], dim=1)))


class Segmenter(nn.Module):
    """(N, 3, H, W) to logits (N, classes, H, W), for any H and W."""

    def __init__(self, backbone: Backbone, classes: int, channels: int):
        super().__init__()
        self.backbone = backbone
        self.head = UPerHead(backbone.dims, classes, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = (x - 0.45) / 0.225  # about ImageNet's mean and deviation
        return resized(self.head(list(self.backbone(normed).values())), x)


def batch_of(scenes: list[Scene]) -> tuple[torch.Tensor, torch.Tensor]:
    """(images, classes of pixels), padded to the largest height and width."""
    height, width = (max(s.image.shape[axis] for s in scenes) for axis in (1, 2))
    images = torch.zeros(len(scenes), 3, height, width)
    classes = torch.full((len(scenes), height, width), IGNORED)
    for number, scene in enumerate(scenes):
        h, w = scene.image.shape[1:]
        images[number, :, :h, :w], classes[number, :h, :w] = scene.image, scene.semantic
    return images, classes


def mean_iou(model: nn.Module, scenes: list[Scene]) -> float:
    """Intersection over union, averaged over the classes; every image at its own size."""
    counts = torch.zeros(len(CLASSES), len(CLASSES))
    with torch.inference_mode():
        for scene in scenes:
            guess = model(scene.image[None]).argmax(1)[0]
            counts += torch.bincount(
                scene.semantic.flatten() * len(CLASSES) + guess.flatten(), minlength=len(CLASSES) ** 2
            ).view_as(counts)
    both = counts.diag()
    return (both / (counts.sum(0) + counts.sum(1) - both)).mean().item()


def picture(model: nn.Module, scenes: list[Scene], path: Path) -> None:
    """Above the images, in the middle the truth, below what the model says."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3 * len(scenes), 8), layout="constrained")
    for column, scene in zip(figure.subplots(3, len(scenes)).T, scenes, strict=True):
        with torch.inference_mode():
            guess = model(scene.image[None]).argmax(1)[0]
        column[0].imshow(scene.image.permute(1, 2, 0).numpy())
        for axes, classes in zip(column[1:], (scene.semantic, guess), strict=True):
            axes.imshow(classes.numpy(), vmin=0, vmax=len(CLASSES) - 1, cmap="viridis", interpolation="nearest")
        for axes, title in zip(column, ("image", "truth", "prediction"), strict=True):
            axes.set_axis_off()
            axes.set_title(title)
    figure.savefig(path, dpi=90)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="UPerNet-style segmentation on a fused MambaOut.")
    add_arguments(parser, steps=300)
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    data = Shapes(seed=args.seed)
    model = Segmenter(Backbone(args.model, args.weights), len(CLASSES), channels=64)
    held_out = [data[10**6 + number] for number in range(args.held_out)]

    def loss(step: int) -> torch.Tensor:
        images, classes = batch_of([data[step * args.batch + number] for number in range(args.batch)])
        return F.cross_entropy(model(images), classes, ignore_index=IGNORED)

    first, last = optimise(model, loss, args)
    model.eval()
    iou = mean_iou(model, held_out)
    picture(model, held_out[:5], args.out / "prediction.png")
    print(f"loss {first:.3f} -> {last:.3f}; mean IoU {iou:.3f} on {len(held_out)} held-out scenes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
