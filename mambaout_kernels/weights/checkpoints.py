"""Weights in and out: files of the authors or of timm, read safely; key names translated both ways without loss.

The package's own layout is the authors'. timm's, for the same tensors:

    downsample_layers.0.*   stem.*                    norm.*        head.norm.*
    downsample_layers.N.*   stages.N.downsample.*     head.fc1.*    head.pre_logits.fc.*
    stages.N.M.*            stages.N.blocks.M.*       head.norm.*   head.pre_logits.norm.*
                                                      head.fc2.*    head.fc.*
"""

import argparse
import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..models import VARIANTS, MambaOut

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".tar", ".ckpt")
# Where training scripts keep the weights, averaged ones first.
_EMA_WRAPPERS = ("state_dict_ema", "model_ema")
_WRAPPERS = ("state_dict", "model", "module")
# Left in key names by DistributedDataParallel and torch.compile.
_KEY_PREFIXES = re.compile(r"^(?:module\.|_orig_mod\.)+")

_TO_TIMM = (
    (r"downsample_layers\.0\.(.+)", r"stem.\1"),
    (r"downsample_layers\.(\d+)\.(.+)", r"stages.\1.downsample.\2"),
    (r"stages\.(\d+)\.(\d+)\.(.+)", r"stages.\1.blocks.\2.\3"),
    (r"norm\.(.+)", r"head.norm.\1"),
    (r"head\.fc1\.(.+)", r"head.pre_logits.fc.\1"),
    (r"head\.norm\.(.+)", r"head.pre_logits.norm.\1"),
    (r"head\.fc2\.(.+)", r"head.fc.\1"),
)
_TO_AUTHORS = (
    (r"stem\.(.+)", r"downsample_layers.0.\1"),
    (r"stages\.(\d+)\.downsample\.(.+)", r"downsample_layers.\1.\2"),
    (r"stages\.(\d+)\.blocks\.(\d+)\.(.+)", r"stages.\1.\2.\3"),
    (r"head\.norm\.(.+)", r"norm.\1"),
    (r"head\.pre_logits\.fc\.(.+)", r"head.fc1.\1"),
    (r"head\.pre_logits\.norm\.(.+)", r"head.norm.\1"),
    (r"head\.fc\.(.+)", r"head.fc2.\1"),
)


def _translate(state_dict: Mapping[str, Any], rules: tuple[tuple[str, str], ...], layout: str) -> dict[str, Any]:
    translated = {}
    for key, value in state_dict.items():
        for pattern, replacement in rules:
            if match := re.fullmatch(pattern, key):
                translated[match.expand(replacement)] = value
                break
        else:
            raise ValueError(f"state_dict: key {key!r} does not belong to a MambaOut in {layout} layout")
    return translated


def to_timm(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The same values under timm's key names. ValueError for a key that is not of the authors' layout."""
    return _translate(state_dict, _TO_TIMM, "the authors'")


def to_authors(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The same values under the authors' key names, ours. ValueError for a key that is not of timm's layout."""
    return _translate(state_dict, _TO_AUTHORS, "timm's")


def load_checkpoint(path: str | os.PathLike[str], ema: bool = True) -> dict[str, torch.Tensor]:
    """The state_dict in a file, on the CPU, in the authors' layout, whichever of the two layouts the file has.

    A .safetensors file, or one of torch.save (.pth, .pt, .bin, .tar, .ckpt) holding a state_dict, bare or wrapped in a
    training checkpoint ("state_dict", "model", ...). If it holds averaged weights too, `ema` chooses them. Nothing in
    the file is executed: only tensors and plain containers are unpickled.

    Raises FileNotFoundError; ValueError for a file that is truncated, is of another kind, holds pickled code, or holds
    no MambaOut; ImportError for a .safetensors file without the safetensors package.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path: {path} does not exist, or is no file")
    if path.suffix not in SUFFIXES:
        raise ValueError(f"path: {path} ends in {path.suffix!r}; allowed: {', '.join(SUFFIXES)}")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    state_dict = {_KEY_PREFIXES.sub("", key): value for key, value in _unwrap(content, path, ema).items()}
    try:
        if any(key.startswith("stem.") for key in state_dict):
            state_dict = to_authors(state_dict)
        else:
            to_timm(state_dict)  # every key must be one of the authors'
    except ValueError as error:
        raise ValueError(f"path: {path} is not a MambaOut checkpoint: {error}") from None
    return state_dict


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise ImportError(f"path: reading {path} needs the safetensors package: pip install safetensors") from None
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"path: {path} is not a complete safetensors file: {error}") from error


def _read_pickle(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # training scripts save their arguments alongside
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's own message goes on to recommend weights_only=False
        if refused := re.search(r"GLOBAL (\S+)", str(error)):
            raise ValueError(
                f"path: {path} refused: it holds a pickled {refused[1]}, and unpickling anything but tensors and plain "
                f"containers could run any code"
            ) from None
        raise ValueError(f"path: {path} is damaged, or was not written by torch.save") from None
    except (EOFError, RuntimeError, OSError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise ValueError(f"path: {path} is truncated, damaged, or was not written by torch.save: {error!r}") from error


def _unwrap(content: Any, path: Path, ema: bool) -> dict[str, torch.Tensor]:
    wrappers = _EMA_WRAPPERS + _WRAPPERS if ema else _WRAPPERS + _EMA_WRAPPERS
    if isinstance(content, Mapping):
        content = next((content[key] for key in wrappers if isinstance(content.get(key), Mapping)), content)
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"path: {path} holds no state_dict, but {_described(content)}")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise ValueError(f"path: {path} holds no state_dict: its {key!r} is a {type(value).__name__}, not a tensor")
    return dict(content)


def _described(content: Any) -> str:
    return "an empty dict" if isinstance(content, Mapping) else f"a {type(content).__name__}"


def load_into(model: MambaOut, path: str | os.PathLike[str], ema: bool = True) -> None:
    """Load a file's weights into `model`, in place, cast to the model's dtypes and devices.

    Every name, shape and dtype is checked before the first tensor is copied: on any error the model is as it was.
    Raises what load_checkpoint raises, and ValueError when the file's tensors are not the model's.
    """
    copy_into(model, load_checkpoint(path, ema), os.fspath(path))


def copy_into(model: MambaOut, state_dict: Mapping[str, torch.Tensor], source: str) -> None:
    """Load a state_dict in the authors' layout, strictly; ValueError, before anything is copied, if it does not fit."""
    expected = model.state_dict()
    problems = [f"{key} is missing" for key in expected if key not in state_dict]
    problems += [f"{key} is not in the model" for key in state_dict if key not in expected]
    for key in state_dict.keys() & expected.keys():
        given, own = state_dict[key], expected[key]
        if given.shape != own.shape:
            problems.append(f"{key} is {tuple(given.shape)}, the model's {tuple(own.shape)}")
        elif given.dtype.is_floating_point != own.dtype.is_floating_point:
            problems.append(f"{key} is of {given.dtype}, the model's of {own.dtype}")
    if problems:
        shown = "; ".join(sorted(problems)[:4]) + ("; ..." if len(problems) > 4 else "")
        raise ValueError(
            f"path: {source} does not fit the model in {len(problems)} of {len(expected)} tensors: {shown}. "
            f"It holds {describe(state_dict)}; the model is {describe(expected)}"
        )
    model.load_state_dict(state_dict)


def classes_of(state_dict: Mapping[str, torch.Tensor]) -> int:
    """How many classes a state_dict in the authors' layout tells apart; 0 without a classifier."""
    return len(state_dict.get("head.fc2.bias", ()))


def _stages(state_dict: Mapping[str, torch.Tensor]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(depths, dims)."""
    blocks = {(int(m[1]), int(m[2])) for key in state_dict if (m := re.match(r"stages\.(\d+)\.(\d+)\.", key))}
    depths = tuple(sum(stage == s for s, _ in blocks) for stage in sorted({s for s, _ in blocks}))
    return depths, tuple(len(state_dict.get(f"stages.{stage}.0.fc2.bias", ())) for stage in range(len(depths)))


def variants_of(state_dict: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of the variants that a state_dict in the authors' layout can belong to."""
    depths, dims = _stages(state_dict)
    # Of the first block: (hidden, convolved channels, layer scale)
    block = (
        len(state_dict.get("stages.0.0.fc1.bias", ())) // 2,
        len(state_dict.get("stages.0.0.conv.bias", ())),
        "stages.0.0.ls.gamma" in state_dict,
    )
    return [
        name
        for name, v in VARIANTS.items()
        if (v.depths, v.dims) == (depths, dims)
        and block == (int(v.expansion_ratio * dims[0]), int(v.conv_ratio * dims[0]), v.ls_init_value is not None)
    ]


def describe(state_dict: Mapping[str, torch.Tensor]) -> str:
    """What a state_dict in the authors' layout is, in words: its variants, depths, dims and number of classes."""
    depths, dims = _stages(state_dict)
    classes = f"{classes_of(state_dict)} classes" if classes_of(state_dict) else "no classifier"
    names = " or ".join(variants_of(state_dict)) or "no known variant"
    return f"{names} (depths {depths}, dims {dims}, {classes})"
