"""classify: the most likely ImageNet classes of images, by pretrained weights."""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from ..benchmarking import photographs
from ..benchmarking.workloads import DTYPES
from ..inference import optimize_for_inference
from ..models import VARIANTS, create_model
from ..weights.checkpoints import load_into
from .terminal import UsageError, one_of, positive, require, show_table

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
    model = create_model(args.model).eval()
    try:
        load_into(model, args.weights)
    except FileNotFoundError as error:
        raise UsageError(f"--weights: {error}; {_WHERE.format(name=args.model)}") from None
    except (ValueError, ImportError) as error:
        raise UsageError(f"--weights: {error}") from None
    batch = torch.stack([_read(path, size) for path in args.images])
    fast = optimize_for_inference(model, dtype=DTYPES[args.dtype])
    with torch.inference_mode():
        probabilities = torch.cat([fast(image[None]).float().softmax(dim=1) for image in batch])
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
        print(json.dumps(results, indent=1))
        return 0
    for result in results:
        lines = [[f"{c['probability']:.1%}", c["name"], str(c["index"])] for c in result["classes"]]
        show_table(result["image"], ["probability", "class", "index"], lines)
    return 0


def _read(path: str, size: int) -> torch.Tensor:
    if not Path(path).is_file():
        raise UsageError(f"IMAGE {path} does not exist, or is no file")
    try:
        return photographs.read(path, size)
    except OSError as error:
        raise UsageError(f"IMAGE {path} cannot be read as an image: {error}") from None


def _class_names() -> Any:
    from timm.data import ImageNetInfo

    return ImageNetInfo().index_to_description
