"""Pictures in files, as the model sees them; and what its classes are called."""

import math
import os
from collections.abc import Callable
from typing import Any, BinaryIO

import torch

from .models.pretrained_cfg import MEAN, STD

_CLASSES = {1000: "imagenet-1k", 11821: "imagenet-12k"}  # by the number of them, timm's name for the set
_LONGEST = 4  # times the short side: of a longer picture only the middle is resized


def settings(pretrained_cfg: dict[str, Any], size: int | None = None) -> tuple[int, float, bool]:
    """size, crop_pct and squash of `read`, as the weights were tested; `size` in pixels: other than they were at.

    `pretrained_cfg` is a model's, as of timm.
    """
    cfg = pretrained_cfg
    size = size or cfg["input_size"][1]
    crop = cfg.get("test_crop_pct", cfg["crop_pct"]) if size == cfg["test_input_size"][1] else cfg["crop_pct"]
    return size, crop, cfg["crop_mode"] == "squash"


def class_names(num_classes: int) -> Callable[[int], str]:
    """A function from a class's index to its name, empty where the classes are not ImageNet's. Asks timm."""
    if num_classes not in _CLASSES:
        return lambda index: ""
    from timm.data import ImageNetInfo

    return ImageNetInfo(_CLASSES[num_classes]).index_to_description


def read(
    path: str | os.PathLike[str] | BinaryIO, size: int, crop_pct: float = 1.0, squash: bool = False
) -> torch.Tensor:
    """An image file or its path as a normalised (3, size, size): resized (bicubic), the centre cropped.

    The short side is resized to size / crop_pct; with `squash` both sides are.

    What timm's evaluation transform does, but that grey values of 16 bits become their upper 8, as Pillow
    reads colours of 16 bits; timm, as Pillow's conversion, makes every value from 255 on white. Takes up to 16 bytes
    for each pixel of the file, of which Pillow allows 179 million, and of the at most 4 * (size / crop_pct)^2 after the
    resize.

    Raises OSError for a file that cannot be read as an image, and for values of which no format states what is white.
    """
    import numpy
    from PIL import Image

    try:
        with Image.open(path) as opened:
            image = _upper_bits(opened).convert("RGB")
    except OSError:
        raise
    except Exception as error:  # of nearly any type, by format and damage
        raise OSError(str(error)) from None
    if not squash:
        limit = _LONGEST * min(image.size)
        left, top = (max(side - limit, 0) // 2 for side in image.size)
        image = image.crop((left, top, left + min(image.width, limit), top + min(image.height, limit)))
    short, resized = min(image.size), math.floor(size / crop_pct)
    width, height = (resized if squash else resized * side // short for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2), round((height - size) / 2)
    image = image.crop((left, top, left + size, top + size))
    pixels = torch.from_numpy(numpy.array(image)).permute(2, 0, 1).float() / 255
    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def _upper_bits(image: Any) -> Any:
    """Grey of 16 bits as grey of 8; other images as they are."""
    import numpy
    from PIL import Image

    # Pillow reads a PGM of more than 8 bits as 32, scaled to 16.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        return Image.fromarray((numpy.asarray(image) >> 8).astype(numpy.uint8))
    if image.mode in ("I", "F"):
        kind = "integers of 32 bits" if image.mode == "I" else "floating point"
        raise OSError(f"its values are {kind}, of which white is not known; allowed: 8 or 16 bits")
    return image
