"""A small data set for detection and segmentation: squares, discs and triangles on photographs, drawn on the fly.

Image number n is the same every time. Sizes vary and are no multiples of 32.
"""

from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw

CLASSES = ("background", "square", "disc", "triangle")


@dataclass(frozen=True)
class Scene:
    image: torch.Tensor  # (3, H, W) in [0, 1]
    boxes: torch.Tensor  # (objects, 4), x0 y0 x1 y1
    labels: torch.Tensor  # (objects,), from 1
    masks: torch.Tensor  # (objects, H, W), bool; where one hides another, only what is seen

    @property
    def semantic(self) -> torch.Tensor:
        """(H, W), the class of every pixel; 0 is background."""
        return (self.masks * self.labels.view(-1, 1, 1)).sum(0)


def photographs() -> list[torch.Tensor]:
    """(3, H, W) in [0, 1], those that scikit-image ships."""
    from skimage import data

    return [
        torch.from_numpy(image.copy()).permute(2, 0, 1).float() / 255 for image in (data.chelsea(), data.astronaut())
    ]


class Shapes:
    """Scenes of `low` to `high` pixels a side."""

    def __init__(self, low: int = 90, high: int = 130, objects: int = 4, seed: int = 0):
        self.low, self.high, self.objects, self.seed = low, high, objects, seed
        self.photographs = photographs()

    def __getitem__(self, index: int) -> Scene:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)

        def integer(low: int, high: int) -> int:
            return int(torch.randint(low, high, (), generator=generator))

        height, width = integer(self.low, self.high + 1), integer(self.low, self.high + 1)
        photograph = self.photographs[index % len(self.photographs)]
        top, left = integer(0, photograph.shape[1] - height), integer(0, photograph.shape[2] - width)
        image = 0.6 * photograph[:, top : top + height, left : left + width].clone()
        owner = torch.zeros(height, width, dtype=torch.long)  # the number of the object on top, from 1
        labels = []
        for number in range(1, integer(2, self.objects + 1) + 1):
            label, side = integer(1, len(CLASSES)), integer(20, 46)
            x, y = integer(0, width - side), integer(0, height - side)
            mask = draw(label, x, y, side, height, width)
            colour = 0.3 + 0.7 * torch.rand(3, 1, generator=generator)
            image[:, mask] = colour + 0.05 * torch.randn(3, int(mask.sum()), generator=generator)
            owner[mask] = number
            labels.append(label)
        masks = torch.stack([owner == number for number in range(1, len(labels) + 1)])
        seen = masks.flatten(1).sum(1) > 60  # what is hidden all but a bit is no object
        masks, kept = masks[seen], torch.tensor(labels)[seen]
        return Scene(image.clamp(0, 1), boxes_of(masks), kept, masks)


def draw(label: int, x: int, y: int, side: int, height: int, width: int) -> torch.Tensor:
    """(height, width) of bool: one shape, inside the square at (x, y)."""
    canvas = Image.new("L", (width, height))
    pen, right, bottom = ImageDraw.Draw(canvas), x + side - 1, y + side - 1
    if CLASSES[label] == "square":
        pen.rectangle((x, y, right, bottom), fill=1)
    elif CLASSES[label] == "disc":
        pen.ellipse((x, y, right, bottom), fill=1)
    else:
        pen.polygon([(x, bottom), (right, bottom), (x + side // 2, y)], fill=1)
    return torch.tensor(list(canvas.tobytes()), dtype=torch.uint8).view(height, width).bool()


def boxes_of(masks: torch.Tensor) -> torch.Tensor:
    """(objects, H, W) to (objects, 4), x1 and y1 exclusive."""
    from torchvision.ops import masks_to_boxes

    return masks_to_boxes(masks) + torch.tensor([0.0, 0.0, 1.0, 1.0])
