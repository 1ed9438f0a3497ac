"""What the examples train on: scikit-learn's digits, which its package ships, or a folder with train/ and val/."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

DIGITS = "digits"


class Digits(Dataset):
    """1797 handwritten digits of 8 x 8 pixels, as RGB images; one in five, of every class alike, is held out."""

    classes = tuple("0123456789")

    def __init__(self, train: bool, transform: Any, size: int = 32):
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        parts = train_test_split(digits.images, digits.target, test_size=0.2, stratify=digits.target, random_state=0)
        images, self.targets = (parts[0], parts[2]) if train else (parts[1], parts[3])
        self.images = [self._to_rgb(image, size) for image in images]
        self.transform = transform

    @staticmethod
    def _to_rgb(image: np.ndarray, size: int) -> Image.Image:
        """Grey values from 0 to 16."""
        grey = Image.fromarray((image * (255 / 16)).astype(np.uint8))
        return grey.resize((size, size), Image.Resampling.BICUBIC).convert("RGB")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(self.images[index]), int(self.targets[index])


def transforms(recipe: dict[str, Any]) -> tuple[Any, Any]:
    """timm's transforms of a recipe, for training and for evaluation."""
    from timm.data import create_transform

    shared = {key: recipe[key] for key in ("interpolation", "mean", "std")}
    train = create_transform(
        recipe["image_size"],
        is_training=True,
        color_jitter=recipe["color_jitter"],
        auto_augment=recipe["auto_augment"],
        re_prob=recipe["random_erasing"],
        re_mode="pixel",
        hflip=recipe["hflip"],
        scale=tuple(recipe["crop_scale"]),
        **shared,
    )
    return train, create_transform(recipe["image_size"], crop_pct=recipe["crop_pct"], **shared)


def datasets(name: str, recipe: dict[str, Any]) -> tuple[Dataset, Dataset, int]:
    """(training, validation, number of classes) of "digits", or of a folder of images by class."""
    train, evaluation = transforms(recipe)
    if name == DIGITS:
        size = recipe["image_size"]
        return Digits(True, train, size), Digits(False, evaluation, size), len(Digits.classes)
    if not (Path(name) / "train").is_dir() or not (Path(name) / "val").is_dir():
        raise argparse.ArgumentTypeError(f"--data: {name} is neither {DIGITS!r} nor a folder with train/ and val/")
    from timm.data import create_dataset

    parts = [create_dataset("", root=name, split=split) for split in ("train", "val")]
    for part, transform in zip(parts, (train, evaluation), strict=True):
        part.transform = transform
    return parts[0], parts[1], len(parts[0].reader.class_to_idx)
