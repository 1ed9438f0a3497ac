"""Real input: the photographs that scikit-image ships inside its package; nothing is downloaded."""

from collections.abc import Sequence
from importlib.resources import as_file, files

import torch

from .. import images

NAMES = (
    "astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg",
    "motorcycle_left.png", "hubble_deep_field.jpg", "camera.png", "clock_motion.png",
)  # fmt: skip


def load(count: int, size: int, names: Sequence[str] = NAMES) -> torch.Tensor:
    """(count, 3, size, size) float32; more images than photographs: the rest are the same ones, mirrored in turn.

    Raises ImportError without scikit-image or Pillow, FileNotFoundError when it ships none of `names`.
    """
    folder = files("skimage") / "data"
    found = [name for name in names if (folder / name).is_file()]
    if not found:
        raise FileNotFoundError(f"scikit-image ships none of the photographs {', '.join(names)}")
    loaded = []
    for index in range(count):
        with as_file(folder / found[index % len(found)]) as path:
            image = images.read(path, size)
        loaded.append(image.flip(2) if index // len(found) % 2 else image)
    return torch.stack(loaded)
