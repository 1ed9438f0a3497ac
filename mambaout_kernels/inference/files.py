"""Inference models in files: one safetensors file, with what it was packed for and, of our models, how to build one."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..backends import cpu
from ..models import MambaOut
from ..models.pretrained_cfg import from_json
from ..nn.plain import has_hooks
from ..ops import gated_cnn_blocks
from ..version import __version__
from .model import InferenceModel
from .optimize import optimize_for_inference
from .parts import PackedPart
from .split_blocks import SplitBlock

_FORMAT = "mambaout_kernels inference model"
_SETTINGS = (bool, int, float, str, tuple)
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
}


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError:
        raise ImportError("inference models in files need the safetensors package: pip install safetensors") from None
    return safetensors


def save(model: InferenceModel, path: str | os.PathLike[str]) -> None:
    if any(isinstance(part, SplitBlock) for part in model.modules()) or any(t.is_cuda for t in model.buffers()):
        raise RuntimeError(
            "inference models in files are for the CPU: on a GPU nothing is packed; save the weights of the model that "
            "this one was made from"
        )
    metadata = {
        "format": _FORMAT,
        "version": __version__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "modules": json.dumps(_described(model.model)),
        "instruction_set": "" if cpu.unavailable() else cpu.instruction_set(),
    }
    network = model.model
    if type(network) is MambaOut and network.architecture() is not None and not any(map(has_hooks, network.modules())):
        metadata["architecture"] = json.dumps(network.architecture())
        metadata["pretrained_cfg"] = json.dumps(network.pretrained_cfg)
    state = {name: t.contiguous() for name, t in model.model.state_dict().items()}
    _safetensors().torch.save_file(_untied(state), os.fspath(path), metadata)


def _described(model: nn.Module) -> dict[str, Any]:
    """What of a network its tensors do not tell: by name, the class of a module and the settings of a leaf."""
    described = {}
    for name, module in model.named_modules():
        kind = type(module).__name__
        if kind in ("Dropout", "DropPath"):  # which do nothing
            kind = "Identity"
        leaf = kind != "Identity" and not any(module.children())
        settings = {k: v for k, v in vars(module).items() if leaf and k[0] != "_" and isinstance(v, _SETTINGS)}
        described[name] = [kind, settings]
    found: dict[str, Any] = json.loads(json.dumps(described))  # as a file gives it
    return found


def _check_described(own: dict[str, Any], described: dict[str, Any], path: Path) -> None:
    absent: Any = ("absent", {})
    for name in sorted(own.keys() | described.keys()):
        (kind, settings), (own_kind, own_settings) = described.get(name, absent), own.get(name, absent)
        if kind != own_kind:
            raise ValueError(f"path: {path} does not fit the model: {name or 'it'} is {kind}, not {own_kind}")
        for key in settings.keys() & own_settings.keys():  # another torch may have others
            if settings[key] != own_settings[key]:
                raise ValueError(
                    f"path: {path} does not fit the model: {name}.{key} is {settings[key]!r}, not {own_settings[key]!r}"
                )


def _untied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """safetensors takes no two tensors on the same memory."""
    known: set[int] = set()
    untied = {}
    for name, t in state.items():
        address = t.untyped_storage().data_ptr()
        untied[name] = t.clone() if address in known and t.numel() else t
        known.add(address)
    return untied


def load_inference_model(path: str | os.PathLike[str], model: nn.Module | None = None) -> InferenceModel:
    """The InferenceModel in a file that `InferenceModel.save` wrote, on the CPU.

    Weights that were packed for another instruction set are packed again for this one; nothing in the file is executed.

    Args:
        path: the file.
        model: a model of the same architecture, whose weights do not matter. None where the file says how to build one:
            those made from this package's MambaOut with its own norms and an act_layer given by name.

    Raises:
        FileNotFoundError: no such file. ImportError: without the safetensors package.
        ValueError: another file, one whose weights do not fit, or one that needs `model`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path: {path} does not exist, or is no file")
    st = _safetensors()
    try:
        with st.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (st.SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"path: {path} is not a complete safetensors file: {error}") from error
    if metadata.get("format") != _FORMAT:
        raise ValueError(
            f"path: {path} is not an inference model; from_pretrained and load_checkpoint read the weights of models"
        )
    if model is None and "architecture" not in metadata:
        raise ValueError(f"model must be given for {path}: it does not say how to build one")
    try:
        dtype = _DTYPES[metadata["dtype"]]
        described = {name: (str(kind), dict(own)) for name, (kind, own) in json.loads(metadata["modules"]).items()}
        if model is None:
            model = _skeleton(json.loads(metadata["architecture"]), sum(t.nbytes for t in state.values()), dtype)
            model.pretrained_cfg |= from_json(json.loads(metadata.get("pretrained_cfg", "{}")))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"path: {path} holds damaged metadata: {error!r}") from error
    loaded = optimize_for_inference(model, dtype=dtype)
    _assign(loaded.model, state, path)
    _check_described(_described(loaded.model), described, path)
    return loaded


def _skeleton(architecture: dict[str, Any], held: int, dtype: torch.dtype) -> MambaOut:
    """A model of this architecture, if a file that holds so many bytes of weights can have all of its weights."""
    blocks = sum(architecture.get("depths", ()))
    if blocks * 128 <= held:  # what packed weights of nothing take
        with torch.device("meta"):
            skeleton = MambaOut(**architecture)
        if sum(p.numel() for p in skeleton.parameters()) * dtype.itemsize <= held:
            # As to_empty, which imports a compiler for shapes on the way: seconds.
            return skeleton._apply(lambda t: torch.empty(t.shape, dtype=t.dtype))
    raise ValueError(f"an architecture with more weights than the {held} bytes that there are")


def _assign(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """The file's tensors in place of the model's; ValueError where they do not fit."""
    own = model.state_dict()
    if own.keys() != state.keys():
        different = sorted(own.keys() ^ state.keys())
        raise ValueError(f"path: {path} does not fit the model in {len(different)} tensors: {', '.join(different[:4])}")
    parts = {prefix: part for prefix, part in model.named_modules() if isinstance(part, PackedPart)}
    packed = {
        f"{prefix}.{name}".lstrip("."): (part, name) for prefix, part in parts.items() for name in part.packed_names
    }
    wanted = {name: gated_cnn_blocks.shapes(own[name]) for name in packed}
    try:
        for full_name, (part, name) in packed.items():
            # Memory of its own: packed weights begin at a multiple of 64 bytes, in huge pages where there are any.
            setattr(part, name, gated_cnn_blocks.join([state.pop(full_name)]))
        for part in parts.values():
            part.adapt()
    except RuntimeError as error:
        raise ValueError(f"path: {path} holds damaged weights: {error}") from error
    for full_name, (part, name) in packed.items():
        found = gated_cnn_blocks.shapes(getattr(part, name))
        if found != wanted[full_name]:
            raise ValueError(f"path: {path} does not fit the model: {full_name} is {found}, not {wanted[full_name]}")
    for name, t in state.items():
        if t.shape != own[name].shape:
            raise ValueError(
                f"path: {path} does not fit the model: {name} is {tuple(t.shape)}, not {tuple(own[name].shape)}"
            )
    model.load_state_dict({name: t.clone() for name, t in state.items()}, strict=False, assign=True)
