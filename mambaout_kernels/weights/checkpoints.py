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
import stat
import zipfile
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
    the file is executed: only tensors and plain containers are unpickled. It takes no more memory than the file's size.

    Raises:
        OSError: FileNotFoundError, IsADirectoryError, PermissionError or what else keeps the file from being read.
        ValueError: a file that is truncated or damaged, is of another kind, holds pickled code, holds no MambaOut, or
            holds a tensor that is not dense or has more elements than memory (expanded).
        ImportError: a .safetensors file without the safetensors package.
    """
    return read_checkpoint(path, ema, mmap=False)


def read_checkpoint(path: str | os.PathLike[str], ema: bool, mmap: bool) -> dict[str, torch.Tensor]:
    """load_checkpoint; with `mmap`, tensors to copy from at once, which are views of the file if it can be mapped."""
    path = Path(path)
    _check_readable(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"path: {path} ends in {path.suffix!r}; allowed: {', '.join(SUFFIXES)}")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path, mmap)
    state_dict = {_KEY_PREFIXES.sub("", key): value for key, value in _unwrap(content, path, ema).items()}
    try:
        if any(key.startswith("stem.") for key in state_dict):
            state_dict = to_authors(state_dict)
        else:
            to_timm(state_dict)  # every key must be one of the authors'
    except ValueError as error:
        raise ValueError(f"path: {path} is not a MambaOut checkpoint: {error}") from None
    return state_dict


def _check_readable(path: Path) -> None:
    try:
        mode = path.stat().st_mode
        if stat.S_ISREG(mode):
            path.open("rb").close()
    except FileNotFoundError:
        raise FileNotFoundError(f"path: {path} does not exist") from None
    except OSError as error:
        raise type(error)(f"path: {path} cannot be read: {error.strerror}") from None
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(f"path: {path} is a folder, not a file")
    if not stat.S_ISREG(mode):
        raise OSError(f"path: {path} is not a regular file")


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        import safetensors.torch
    except ImportError:
        raise ImportError(f"path: reading {path} needs the safetensors package: pip install safetensors") from None
    try:
        content: dict[str, torch.Tensor] = safetensors.torch.load_file(path)
        return content
    except Exception as error:  # of several types, by where the damage is
        raise ValueError(f"path: {path} is not a complete safetensors file: {error}") from None


def _read_pickle(path: Path, mmap: bool) -> Any:
    try:
        is_zip = zipfile.is_zipfile(path)
        if is_zip:
            _refuse_compressed(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # training scripts save their arguments alongside
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and is_zip)
    except pickle.UnpicklingError as error:
        # torch's own message goes on to recommend weights_only=False
        if refused := re.search(r"GLOBAL (\S+)", str(error)):
            raise ValueError(
                f"path: {path} refused: it holds a pickled {refused[1]}, and unpickling anything but tensors and plain "
                f"containers could run any code"
            ) from None
        raise ValueError(f"path: {path} is damaged, or was not written by torch.save") from None
    except Exception as error:  # of nearly any type, by where the damage is
        reason = str(error).partition("\n")[0] or type(error).__name__
        if "weights_only" in reason:  # torch recommends to run what the file holds
            reason = "TorchScript and torch's old .tar files are not read"
        raise ValueError(f"path: {path} is truncated, damaged, or was not written by torch.save: {reason}") from None


def _refuse_compressed(path: Path) -> None:
    """torch.save does not compress; a small file that unpacks to a large one was made to exhaust the memory."""
    with zipfile.ZipFile(path) as file:
        if any(record.compress_type != zipfile.ZIP_STORED for record in file.infolist()):
            raise ValueError("its records are compressed")


def _unwrap(content: Any, path: Path, ema: bool) -> dict[str, torch.Tensor]:
    wrappers = _EMA_WRAPPERS + _WRAPPERS if ema else _WRAPPERS + _EMA_WRAPPERS
    if isinstance(content, Mapping):
        content = next((content[key] for key in wrappers if isinstance(content.get(key), Mapping)), content)
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"path: {path} holds no state_dict, but {_described(content)}")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise ValueError(f"path: {path} holds no state_dict: its {key!r} is a {type(value).__name__}, not a tensor")
        if (reason := _not_plain(value)) is not None:
            raise ValueError(f"path: {path} holds {key!r} {reason}; allowed: dense tensors with all of their elements")
    return dict(content)


def _described(content: Any) -> str:
    return "an empty dict" if isinstance(content, Mapping) else f"a {type(content).__name__}"


def _not_plain(t: torch.Tensor) -> str | None:
    """Why a tensor is not simply a block of memory that can be read and written, or None."""
    if type(t) not in (torch.Tensor, torch.nn.Parameter):
        return f"as a {type(t).__name__}"
    if t.is_nested or t.is_quantized:
        return "as a nested tensor" if t.is_nested else "as a quantized tensor"
    if t.layout != torch.strided:
        return f"in layout {t.layout}"
    if t.is_meta:
        return "on the meta device, without values"
    if any(step == 0 and length > 1 for step, length in zip(t.stride(), t.shape, strict=True)):
        return "expanded: elements share memory"
    stored = t.untyped_storage().nbytes() // t.element_size() - t.storage_offset()
    return f"with {t.numel()} elements in memory for {stored}" if t.numel() > stored else None


def load_into(model: MambaOut, path: str | os.PathLike[str], ema: bool = True) -> None:
    """Load a file's weights into `model`, in place, cast to the model's dtypes and devices.

    Every tensor is checked and cast before the first is copied: on any error the model is as it was. Where dtypes or
    devices differ, takes the memory of the model once more; that of the file only in torch's format before 1.6.

    Raises what load_checkpoint raises, and ValueError when the file's tensors are not the model's, or when a tensor of
    the model cannot be written: on the meta device, expanded, without memory, or an inference tensor.
    """
    copy_into(model, read_checkpoint(path, ema, mmap=True), os.fspath(path))


def check_fit(expected: Mapping[str, torch.Tensor], state_dict: Mapping[str, torch.Tensor], source: str) -> None:
    """ValueError unless a state_dict has the names, shapes and kinds of dtype of `expected`, which may be on meta."""
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


def copy_into(model: MambaOut, state_dict: Mapping[str, torch.Tensor], source: str) -> None:
    """Load a state_dict in the authors' layout, strictly; ValueError, before anything is copied, if it cannot be."""
    expected = model.state_dict()
    check_fit(expected, state_dict, source)
    cast = {}
    for key, own in expected.items():
        reason = _not_plain(own)
        if own.is_inference() and not torch.is_inference_mode_enabled():
            reason = "as an inference tensor, which only torch.inference_mode() can write"
        if reason is not None:
            raise ValueError(f"model has {key!r} {reason}: {source} cannot be loaded into it")
        try:
            cast[key] = state_dict[key].to(own.device, own.dtype)
        except NotImplementedError:
            raise ValueError(
                f"path: {source} holds {key!r} of {state_dict[key].dtype}, which torch cannot cast to {own.dtype}"
            ) from None
    model.load_state_dict(cast)


def classes_of(state_dict: Mapping[str, torch.Tensor]) -> int:
    """How many classes a state_dict in the authors' layout tells apart; 0 without a classifier."""
    return _length(state_dict, "head.fc2.bias")


def _length(state_dict: Mapping[str, torch.Tensor], key: str) -> int:
    """Of a vector; 0 where there is none."""
    return state_dict[key].shape[0] if key in state_dict and state_dict[key].ndim else 0


def _stages(state_dict: Mapping[str, torch.Tensor]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(depths, dims)."""
    blocks = {(int(m[1]), int(m[2])) for key in state_dict if (m := re.match(r"stages\.(\d+)\.(\d+)\.", key))}
    depths = tuple(sum(stage == s for s, _ in blocks) for stage in sorted({s for s, _ in blocks}))
    return depths, tuple(_length(state_dict, f"stages.{stage}.0.fc2.bias") for stage in range(len(depths)))


def variants_of(state_dict: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of the variants that a state_dict in the authors' layout can belong to."""
    depths, dims = _stages(state_dict)
    # Of the first block: (hidden, convolved channels, layer scale)
    block = (
        _length(state_dict, "stages.0.0.fc1.bias") // 2,
        _length(state_dict, "stages.0.0.conv.bias"),
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
