"""classify: the most likely ImageNet classes of images, by pretrained weights."""

import argparse
import json
import os
from typing import Any

import torch

from .. import images
from ..benchmarking.workloads import DTYPES
from ..inference import optimize_for_inference
from ..models import VARIANTS, create_model
from ..weights.checkpoints import load_into
from .terminal import UsageError, WrongResult, one_of, positive, require, show_table

_LARGEST = 2048  # of --size; the largest model then takes 2 GB

_WHERE = (
    "download model.safetensors from https://huggingface.co/models?search=timm/{name}, "
    "or a .pth file from https://github.com/yuweihao/MambaOut/releases"
)


def add_to(commands: Any) -> None:
    command = commands.add_parser("classify", help="the most likely ImageNet classes of images")
    command.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    command.add_argument("--model", default="mambaout_tiny", type=one_of(list(VARIANTS)), help="default: %(default)s")
    command.add_argument("--weights", metavar="FILE", help="its weights, .safetensors or .pth, of timm or the authors")
    command.add_argument("--topk", type=positive, default=5, metavar="N", help="classes per image, default %(default)s")
    command.add_argument(
        "--size", type=positive, metavar="PIXELS", help="side of the square the model sees: 224 or 288"
    )
    command.add_argument("--dtype", type=one_of(["fp32", "bf16"]), default="fp32", help="default: %(default)s")
    command.add_argument("--json", action="store_true", help="as JSON on stdout")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.weights is None:
        raise UsageError(f"--weights FILE is required: {_WHERE.format(name=args.model)}")
    require("timm", "timm", "cli", "naming ImageNet's classes")
    require("PIL", "pillow", "cli", "reading images")
    size = args.size or (160 if args.model == "test_mambaout" else 224)
    if size > _LARGEST:
        raise UsageError(f"--size must be at most {_LARGEST}, got {size}")
    model = create_model(args.model).eval()
    try:
        load_into(model, args.weights)
    except FileNotFoundError as error:
        raise UsageError(f"--weights: {error}; {_WHERE.format(name=args.model)}") from None
    except (OSError, ValueError, ImportError) as error:
        raise UsageError(f"--weights: {error}") from None
    for path in args.images:
        if not os.path.isfile(path):
            raise UsageError(f"IMAGE {path} does not exist, or is no file")
    fast = optimize_for_inference(model, dtype=DTYPES[args.dtype])
    probabilities = torch.cat([_probabilities(fast, path, size, args.weights) for path in args.images])
    values, indices = probabilities.topk(min(args.topk, probabilities.shape[1]))
    names = _class_names()
    results = [
        {"image": path, "classes": [
            {"probability": value, "index": index, "name": names(index)}
            for value, index in zip(*per_image, strict=True)
        ]}
        for path, *per_image in zip(args.images, values.tolist(), indices.tolist(), strict=True)
    ]  # fmt: skip
    if args.json:
        print(json.dumps(results, indent=1, allow_nan=False))
        return 0
    for result in results:
        lines = [[f"{c['probability']:.1%}", c["name"], str(c["index"])] for c in result["classes"]]
        show_table(result["image"], ["probability", "class", "index"], lines)
    return 0


def _probabilities(model: Any, path: str, size: int, weights: str) -> torch.Tensor:
    """(1, classes)"""
    try:
        image = images.read(path, size)
    except OSError as error:
        raise UsageError(f"IMAGE {path} cannot be read as an image: {error}") from None
    with torch.inference_mode():
        logits = model(image[None]).float()
    if not logits.isfinite().all():
        raise WrongResult(f"IMAGE {path} cannot be classified: with --weights {weights} its logits are NaN or infinite")
    return logits.softmax(dim=1)


def _class_names() -> Any:
    from timm.data import ImageNetInfo

    return ImageNetInfo().index_to_description
