"""Real input: the photographs that scikit-image ships inside its package; nothing is downloaded."""

from collections.abc import Sequence
from importlib.resources import as_file, files
from pathlib import Path

import torch

NAMES = (
    "astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg",
    "motorcycle_left.png", "hubble_deep_field.jpg", "camera.png", "clock_motion.png",
)  # fmt: skip
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def read(path: Path | str, size: int) -> torch.Tensor:
    """An image file as a normalised (3, size, size): the short side resized (bicubic), the centre cropped.

    What timm's evaluation transform does at crop_pct 1. Raises OSError for a file that is missing or cannot be read as
    an image.
    """
    import numpy
    from PIL import Image

    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
    except (SyntaxError, ValueError, Image.DecompressionBombError) as error:  # damaged or hostile, by format
        raise OSError(f"{path}: {error}") from error
    short = min(image.size)
    width, height = (size * side // short for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2), round((height - size) / 2)
    image = image.crop((left, top, left + size, top + size))
    pixels = torch.from_numpy(numpy.array(image)).permute(2, 0, 1).float() / 255
    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def load(count: int, size: int, names: Sequence[str] = NAMES) -> torch.Tensor:
    """(count, 3, size, size) float32; more images than photographs: the rest are the same ones, mirrored in turn.

    Raises ImportError without scikit-image or Pillow, FileNotFoundError when it ships none of `names`.
    """
    folder = files("skimage") / "data"
    found = [name for name in names if (folder / name).is_file()]
    if not found:
        raise FileNotFoundError(f"scikit-image ships none of the photographs {', '.join(names)}")
    images = []
    for index in range(count):
        with as_file(folder / found[index % len(found)]) as path:
            image = read(path, size)
        images.append(image.flip(2) if index // len(found) % 2 else image)
    return torch.stack(images)
