"""classify: the most likely ImageNet classes of images, by pretrained weights."""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch

from .. import images
from ..benchmarking.workloads import DTYPES
from ..inference import optimize_for_inference
from ..models import VARIANTS, MambaOut
from ..weights.pretrained import PUBLISHED, from_pretrained
from .terminal import UsageError, WrongResult, one_of, positive, progress, require, show_table

_LARGEST = 2048  # of --size; the largest model then takes 2 GB


def add_to(commands: Any) -> None:
    command = commands.add_parser(
        "classify",
        help="the most likely ImageNet classes of images",
        description="Without --weights those that timm publishes for --model are fetched from the Hugging Face hub, "
        "once. Images are prepared as it was done for the weights.",
    )
    command.add_argument("images", nargs="+", metavar="IMAGE", help="image files, or folders of them")
    command.add_argument("--model", type=one_of([*VARIANTS, *PUBLISHED]), metavar="NAME",
                         help=f"default: what the weights are of, else mambaout_tiny; of {', '.join(VARIANTS)}, with "
                         "a tag or without, as in mambaout_tiny.in1k")  # fmt: skip
    command.add_argument("--weights", metavar="FILE", help=".safetensors or .pth, of timm or the authors; a folder "
                         "with such a file; or hf-hub:owner/name")  # fmt: skip
    command.add_argument("--topk", type=positive, default=5, metavar="N", help="classes per image, default %(default)s")
    command.add_argument("--size", type=positive, metavar="PIXELS", help="side of the square the model sees; default: "
                         "224, but of mambaout_base_plus_rw.sw_e150_r384_in12k_ft_in1k 384, of test_mambaout 160; "
                         "timm tests at 288 (192), too")  # fmt: skip
    command.add_argument("--dtype", type=one_of(["fp32", "bf16"]), default="fp32", help="default: %(default)s")
    command.add_argument("--json", action="store_true", help="as JSON on stdout")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    require("timm", "timm", "cli", "naming ImageNet's classes")
    require("PIL", "pillow", "cli", "reading images")
    if args.size is not None and args.size > _LARGEST:
        raise UsageError(f"--size must be at most {_LARGEST}, got {args.size}")
    paths = [path for given in args.images for path in _files(given)]
    model = _model(args)
    cfg = model.pretrained_cfg
    settings = images.settings(cfg, args.size)
    fast = optimize_for_inference(model.eval(), dtype=DTYPES[args.dtype])
    names = images.class_names(model.num_classes)
    results: list[dict[str, Any]] = []
    with progress(len(paths)) as step:
        for path in paths:
            step(path)
            try:
                image = images.read(path, *settings)
            except OSError as error:
                raise UsageError(f"IMAGE {path} cannot be read as an image: {error}") from None
            probabilities = _probabilities(fast, image, f"IMAGE {path} cannot be classified by {_described(args, cfg)}")
            likely = zip(*(t.tolist() for t in probabilities.topk(min(args.topk, len(probabilities)))), strict=True)
            classes = [{"probability": value, "index": index, "name": names(index)} for value, index in likely]
            results.append({"image": path, "classes": classes})
    if args.json:
        print(json.dumps(results, indent=1, allow_nan=False))
        return 0
    lines = [
        [result["image"] if rank == 0 else "", f"{c['probability']:.1%}", c["name"], str(c["index"])]
        for result in results
        for rank, c in enumerate(result["classes"])
    ]
    side = settings[0]
    show_table(f"{_described(args, cfg)}; images at {side} x {side}", ["image", "probability", "class", "index"], lines)
    return 0


def _described(args: argparse.Namespace, cfg: dict[str, Any]) -> str:
    if args.weights is None:
        return f"{cfg['architecture']}.{cfg['tag']}"
    return f"{cfg['architecture'] or 'a MambaOut'} with the weights of {args.weights}"


def _files(given: str) -> list[str]:
    """The file, or the image files anywhere in a folder."""
    from PIL import Image

    if os.path.isfile(given):
        return [given]
    if not os.path.isdir(given):
        raise UsageError(f"IMAGE {given} does not exist, or is no file or folder")
    suffixes = Image.registered_extensions()
    found = sorted(str(p) for p in Path(given).rglob("*") if p.suffix.lower() in suffixes and p.is_file())
    if not found:
        raise UsageError(f"IMAGE {given} holds no image file")
    return found


def _model(args: argparse.Namespace) -> MambaOut:
    name = args.model or "mambaout_tiny"
    try:
        if args.weights is None:
            return from_pretrained(name, in_chans=3)
        variant = None if args.model is None else args.model.partition(".")[0]
        return from_pretrained(args.weights, variant=variant, in_chans=3)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        which = f"--model {name}" if args.weights is None else "--weights"
        raise UsageError(f"{which}: {str(error).removeprefix('name_or_path: ')}") from None


def _probabilities(model: Any, image: torch.Tensor, otherwise: str) -> torch.Tensor:
    """(classes)"""
    with torch.inference_mode():
        [logits] = model(image[None]).float()
    if not logits.isfinite().all():
        raise WrongResult(f"{otherwise}: its logits are NaN or infinite")
    return logits.softmax(dim=0)
