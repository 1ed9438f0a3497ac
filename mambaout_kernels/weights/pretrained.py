"""Models with pretrained weights, from a file or by name from the Hugging Face hub."""

import math
import os
import re
from collections.abc import Callable
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..models import VARIANTS, MambaOut, create_model
from ..models.hub import CONFIG, WEIGHTS, read_config
from ..models.pretrained_cfg import PRETRAINED, from_json, pretrained_cfg
from .checkpoints import SUFFIXES, check_fit, classes_of, copy_into, describe, read_checkpoint, variants_of

# The names of all published weights, a variant's default ones before its others.
PUBLISHED = tuple(f"{variant}.{tag}" for variant, tags in PRETRAINED.items() for tag in tags if tag)
HUB_FILES = (WEIGHTS, "pytorch_model.bin")  # the first that a repository or folder has
_REPOSITORY = re.compile(r"hf[-_]hub:(.+)|(\w[\w.-]*/\w[\w.-]*)")
_FIRST_CONV = "downsample_layers.0.conv1.weight"
_CLASSIFIER = "head.fc2."


def from_pretrained(
    name_or_path: str | os.PathLike[str],
    num_classes: int | None = None,
    in_chans: int | None = None,
    *,
    variant: str | None = None,
    ema: bool = True,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    **overrides: Any,
) -> MambaOut:
    """A MambaOut with trained weights, in float32 on the CPU, in training mode as every new module.

    Args:
        name_or_path: a file of the authors or of timm, any that load_checkpoint reads; a folder with model.safetensors
            or pytorch_model.bin; a variant, "mambaout_tiny" or, with timm's tag, "mambaout_tiny.in1k"; or a repository
            of the hub, "owner/name" or "hf-hub:owner/name". The last two need huggingface_hub.
        num_classes: None for as many as the file has; another number for a new last linear, freshly initialised.
        in_chans: None for as many as the file has; another number adapts the first convolution of a file with 3 as
            timm does: its sum over the channels for 1, else the channels repeated in turn and scaled by 3 / in_chans.
        variant: the architecture. When None, it is found out from the name, from the config.json that
            MambaOut.save_pretrained writes beside the weights, or from the file's tensors.
        ema: take averaged weights if the file holds them beside the others.
        cache_dir, local_files_only: as huggingface_hub.hf_hub_download takes them.
        overrides: arguments of MambaOut, such as drop_path_rate.

    Raises:
        ValueError: an unknown name; a file that load_checkpoint refuses, or whose tensors are not the variant's; a
            config.json of save_pretrained's that was changed to hold something else.
        OSError: no such file (FileNotFoundError), or one that cannot be read (PermissionError, ...).
        ImportError: huggingface_hub or safetensors is needed and missing.
        RuntimeError: the hub's file can neither be found nor fetched.

    Takes the memory of the model, which is not made before the file's tensors are found to fit it; that of the file
    only in torch's format before 1.6.
    """
    named, tag, path = _locate(name_or_path, None if cache_dir is None else os.fspath(cache_dir), local_files_only)
    state_dict = read_checkpoint(path, ema, mmap=True)
    file_classes = classes_of(state_dict)
    num_classes = file_classes if num_classes is None else num_classes
    in_chans = _file_channels(state_dict) if in_chans is None else in_chans
    create = _maker(path, variant or named, state_dict)
    create = partial(create, num_classes=num_classes, in_chans=in_chans, **overrides)
    with torch.device("meta"):
        expected = create().state_dict()
    fresh = num_classes != file_classes  # the last linear, which stays as initialised
    if fresh:
        state_dict = {key: t for key, t in state_dict.items() if not key.startswith(_CLASSIFIER)}
        state_dict |= _classifier(expected)
    if _FIRST_CONV in state_dict:
        state_dict[_FIRST_CONV] = adapt_first_conv(state_dict[_FIRST_CONV], in_chans)
    check_fit(expected, state_dict, str(path))
    model = create()
    if fresh:
        state_dict |= _classifier(model.state_dict())
    copy_into(model, state_dict, str(path))
    if tag is not None:
        model.pretrained_cfg = pretrained_cfg(variant or named, tag, in_chans)
    return model


def _maker(path: Path, name: str | None, state_dict: dict[str, torch.Tensor]) -> Callable[..., MambaOut]:
    """What makes a model for these weights: variant `name`, else what config.json beside them says, or their shapes."""
    if name:
        return partial(create_model, name)
    config = path.with_name(CONFIG)
    if path.name in HUB_FILES and config.is_file():
        arguments = read_config(config, len(state_dict))
        if arguments is not None:
            return partial(_of_config, arguments)
    names = variants_of(state_dict)
    if not names:
        raise ValueError(
            f"name_or_path: {path} holds {describe(state_dict)}; for an architecture of your own, "
            f"create_model(name, ...) and checkpoints.load_into(model, path)"
        )
    return partial(create_model, names[0])


def _of_config(arguments: dict[str, Any], **overrides: Any) -> MambaOut:
    architecture = {key: value for key, value in arguments.items() if key != "pretrained_cfg"}
    model = MambaOut(**{**architecture, **overrides})
    model.pretrained_cfg |= from_json(arguments["pretrained_cfg"])
    for key in ("input_size", "test_input_size"):
        model.pretrained_cfg[key] = (model.in_chans, *model.pretrained_cfg[key][1:])
    return model


def _classifier(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: t for key, t in state_dict.items() if key.startswith(_CLASSIFIER)}


def _file_channels(state_dict: dict[str, torch.Tensor]) -> int:
    weight = state_dict.get(_FIRST_CONV)
    return weight.shape[1] if weight is not None and weight.ndim == 4 else 3


def adapt_first_conv(weight: torch.Tensor, in_chans: int) -> torch.Tensor:
    """(O, 3, K, K) to (O, in_chans, K, K) as timm adapts it. ValueError for a weight of another number of channels."""
    if weight.ndim != 4 or weight.shape[1] == in_chans:
        return weight
    if weight.shape[1] != 3:
        raise ValueError(f"in_chans: weights for {weight.shape[1]} channels can only be adapted from 3; got {in_chans}")
    if in_chans == 1:
        return weight.float().sum(dim=1, keepdim=True).to(weight.dtype)
    repeated = weight.float().repeat(1, math.ceil(in_chans / 3), 1, 1)[:, :in_chans]
    return (repeated * (3 / in_chans)).to(weight.dtype)


def _locate(
    name_or_path: str | os.PathLike[str], cache_dir: str | None, local_files_only: bool
) -> tuple[str | None, str | None, Path]:
    """(variant and tag if the name tells them, file)."""
    name = os.fspath(name_or_path)
    if not isinstance(name_or_path, str) or os.path.exists(name) or Path(name).suffix in SUFFIXES:
        path = Path(name)
        if os.path.isdir(path):
            found = [path / file for file in HUB_FILES if (path / file).is_file()]
            if not found:
                raise FileNotFoundError(f"name_or_path: folder {path} holds none of {', '.join(HUB_FILES)}")
            return None, None, found[0]
        return None, None, path
    match = _REPOSITORY.fullmatch(name)
    repository = match and (match[1] or match[2])
    variant, tag = _published(repository.removeprefix("timm/") if repository else name)
    if repository is None and variant is None:
        close = get_close_matches(name, [*VARIANTS, *PUBLISHED], n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(
            f"name_or_path: {name!r} is no file, and no pretrained variant{hint}; allowed: a file or folder, "
            f"owner/name of the hub, or {', '.join(PUBLISHED)}"
        )
    files = HUB_FILES if variant else (CONFIG, *HUB_FILES)
    return variant, tag, _fetch(repository or f"timm/{variant}.{tag}", files, cache_dir, local_files_only)


def _published(name: str) -> tuple[str | None, str | None]:
    """(variant, tag) of "mambaout_tiny" or "mambaout_tiny.in1k"; None of other names."""
    variant, _, tag = name.partition(".")
    full = next((full for full in PUBLISHED if full == name or (not tag and full.startswith(f"{variant}."))), None)
    return (variant, full.partition(".")[2]) if full else (None, None)


def _fetch(repository: str, files: tuple[str, ...], cache_dir: str | None, local_files_only: bool) -> Path:
    """The weights of a repository of the hub, in huggingface_hub's cache; beside config.json, if it is one of `files`
    and there."""
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    except ImportError:
        raise ImportError(
            f"name_or_path: fetching {repository} needs huggingface_hub: pip install huggingface_hub"
        ) from None
    reasons = []
    for file in files:
        try:
            path = Path(hf_hub_download(repository, file, cache_dir=cache_dir, local_files_only=local_files_only))
            if file != CONFIG:
                return path
        except (OSError, ValueError, RuntimeError) as error:  # huggingface_hub's own errors, and those of the network
            reasons.append(f"{file}: {type(error).__name__}: {str(error).strip().splitlines()[0]}")
            # A repository without this file may have the next; one that cannot be reached has none.
            unreached = isinstance(error, LocalEntryNotFoundError) and not local_files_only
            if unreached or not isinstance(error, EntryNotFoundError):
                break
    raise RuntimeError(
        f"name_or_path: {repository} could not be fetched from the hub ({'; '.join(reasons)}). Where there is no "
        f"network, download {HUB_FILES[0]} from https://huggingface.co/{repository} and give its path"
    )


MambaOut.from_pretrained = staticmethod(from_pretrained)
