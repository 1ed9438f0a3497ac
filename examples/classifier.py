"""Bytes of pictures in, the most likely classes out: what serve.py does with a batch, without a server."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image, UnidentifiedImageError

import mambaout_kernels as mk
from mambaout_kernels import images

MOST_BYTES = 10 << 20
MOST_PIXELS = 50_000_000  # of a picture, however small its file; reading one takes up to 16 bytes for each
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_KINDS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")  # what JPEG and PNG begin with


class BadImage(ValueError):
    """The bytes are no picture that is taken; the text says why."""


@dataclass(frozen=True)
class Answer:
    """The likeliest classes of a picture, and how many pictures were computed at once."""

    classes: list[dict[str, object]]
    batch: int


def decode(body: bytes, size: int, crop_pct: float = 1.0, squash: bool = False) -> torch.Tensor:
    """A JPEG or PNG as images.read prepares it. BadImage for other bytes, and for too many pixels."""
    if not body.startswith(_KINDS):
        raise BadImage("the body must be a JPEG or PNG file")
    try:
        with Image.open(io.BytesIO(body), formats=("JPEG", "PNG")) as opened:
            width, height = opened.size
        if width * height <= MOST_PIXELS:
            return images.read(io.BytesIO(body), size, crop_pct, squash)
    except UnidentifiedImageError:
        raise BadImage("the body cannot be read as an image: its header is damaged") from None
    except Exception as error:  # of nearly any type, by format and damage
        raise BadImage(f"the body cannot be read as an image: {error}") from None
    raise BadImage(f"the picture must have at most {MOST_PIXELS} pixels, got {width} x {height}")


def load(weights: str | None, random: str | None, dtype: str) -> mk.InferenceModel:
    """From a file, folder or name that from_pretrained takes; or this variant with random weights, always the same."""
    if random is not None:
        torch.manual_seed(0)
        model = mk.create_model(random)
    else:
        assert weights is not None
        model = mk.from_pretrained(weights)
    return mk.optimize_for_inference(model, dtype=DTYPES[dtype])


class Classifier:
    """What calls a model on bodies of requests.

    Args:
        model: (N, 3, size, size) to logits (N, classes).
        settings: how images are prepared: images.settings(model.pretrained_cfg), as the weights were tested.
        topk: classes in an answer.
        name: of a class, by its index.
    """

    def __init__(
        self,
        model: Callable[[torch.Tensor], torch.Tensor],
        settings: tuple[int, float, bool],
        topk: int = 5,
        name: Callable[[int], str] = str,
    ):
        self.model, self.settings, self.topk, self.name = model, settings, topk, name

    def answers(self, bodies: Sequence[bytes]) -> list[Answer | BadImage]:
        """In the order of `bodies`. What is no image gets its BadImage, and the others are computed without it."""
        decoded = [self._decoded(body) for body in bodies]
        batch = [picture for picture in decoded if isinstance(picture, torch.Tensor)]
        classes = iter(self._classes(torch.stack(batch)) if batch else [])
        return [picture if isinstance(picture, BadImage) else Answer(next(classes), len(batch)) for picture in decoded]

    def _decoded(self, body: bytes) -> torch.Tensor | BadImage:
        try:
            return decode(body, *self.settings)
        except BadImage as error:
            return error

    def _classes(self, batch: torch.Tensor) -> list[list[dict[str, object]]]:
        with torch.inference_mode():
            probabilities = self.model(batch).float().softmax(dim=1)
        values, indices = probabilities.topk(min(self.topk, probabilities.shape[1]))
        return [
            [{"index": i, "name": self.name(i), "probability": p} for p, i in zip(*of_one, strict=True)]
            for of_one in zip(values.tolist(), indices.tolist(), strict=True)
        ]


def classifier_of(model: mk.InferenceModel, size: int | None = None, topk: int = 5) -> Classifier:
    """Prepares images as for the model's weights, at their size or another.

    The classes have ImageNet's names where the model has its classes and timm is there to tell them, else empty ones.
    """
    settings = images.settings(model.pretrained_cfg, size)
    num_classes = model(torch.zeros(1, 3, 32, 32)).shape[1]  # of any size
    try:
        return Classifier(model, settings, topk, images.class_names(num_classes))
    except ImportError:
        return Classifier(model, settings, topk, lambda index: "")
