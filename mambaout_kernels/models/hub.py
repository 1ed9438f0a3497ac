"""A model as a repository of the Hugging Face hub: config.json, its architecture, and model.safetensors, its weights.

`from_pretrained` (weights/pretrained.py) loads it. huggingface_hub has a mixin for this, which takes longer to import
than this package, loads weights that do not fit, and does not see a classifier that was replaced: so this one.
"""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import NoneType
from typing import Any, ClassVar

import torch
from torch import nn

CONFIG, WEIGHTS = "config.json", "model.safetensors"
LIBRARY = {"library_name": "mambaout-kernels"}  # tells such a config from timm's
_NUMBER = (int, float)
_MOST = 10**6
# Of what `architecture` gives, and of pretrained_cfg, as JSON has it.
_TYPES: dict[str, tuple[type, ...]] = {
    "in_chans": (int,), "num_classes": (int,), "depths": (list,), "dims": (list,), "kernel_size": (int,),
    "expansion_ratio": _NUMBER, "conv_ratio": _NUMBER, "ls_init_value": (*_NUMBER, NoneType),
    "drop_path_rate": _NUMBER, "drop_rate": _NUMBER, "stem_mid_norm": (bool,), "causal": (bool,),
    "downsample": (str,), "head_fn": (str,), "act_layer": (str,), "pretrained_cfg": (dict,),
}  # fmt: skip


class HubModel(nn.Module):
    """save_pretrained and push_to_hub, of models that `architecture` describes."""

    # MambaOut.from_pretrained is mambaout_kernels.from_pretrained, which stands above and sets it.
    from_pretrained: ClassVar[Callable[..., Any]]
    pretrained_cfg: dict[str, Any]

    def architecture(self) -> dict[str, Any] | None:
        raise NotImplementedError

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write config.json and model.safetensors, which `mambaout_kernels.from_pretrained(folder)` loads.

        Raises:
            ValueError: a model that a config cannot describe: with a norm_layer or act_layer that is no name, or with
                modules that were replaced.
            ImportError: without the safetensors package.
        """
        architecture = self.architecture()
        if architecture is None:
            raise ValueError(
                "a config cannot describe this model: its norm_layer or act_layer is the caller's. Save its state_dict"
            )
        state = {key: t.detach().contiguous() for key, t in self.state_dict().items()}
        with torch.device("meta"):
            described = {key: t.shape for key, t in type(self)(**architecture).state_dict().items()}
        if described != {key: t.shape for key, t in state.items()}:
            raise ValueError("a config cannot describe this model: modules were replaced. Save its state_dict")
        try:
            import safetensors.torch
        except ImportError:
            raise ImportError("save_pretrained needs the safetensors package: pip install safetensors") from None
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file(state, folder / WEIGHTS, {"format": "pt"})
        config = json.dumps({**LIBRARY, **architecture, "pretrained_cfg": self.pretrained_cfg}, indent=2)
        (folder / CONFIG).write_text(config + "\n", encoding="utf-8")

    def push_to_hub(
        self,
        repository: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        commit_message: str = "MambaOut of mambaout-kernels",
    ) -> str:
        """Upload what `save_pretrained` writes to a repository of models, "owner/name", which is made if need be.

        Args:
            private, token, revision, commit_message: as huggingface_hub.HfApi takes them.

        Returns:
            The address of the commit.

        Raises what save_pretrained raises; ImportError without huggingface_hub, and what that raises.
        """
        try:
            from huggingface_hub import HfApi
        except ImportError:
            raise ImportError("push_to_hub needs huggingface_hub: pip install huggingface_hub") from None
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            api = HfApi(token=token)
            name = api.create_repo(repository, private=private, exist_ok=True).repo_id
            commit = api.upload_folder(
                repo_id=name, folder_path=folder, revision=revision, commit_message=commit_message
            )
        return str(commit.commit_url)


def read_config(path: Path, tensors: int) -> dict[str, Any] | None:
    """Arguments of MambaOut, and its pretrained_cfg, in a config.json beside so many tensors; None of another library.

    Raises ValueError for a file that is no JSON, and for arguments that are unknown, missing or of a wrong type.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"path: {path} is not JSON: {error}") from None
    if not isinstance(config, dict) or config.items().isdisjoint(LIBRARY.items()):
        return None
    arguments = {key: value for key, value in config.items() if key not in LIBRARY}
    for key in sorted(arguments.keys() ^ _TYPES.keys()):
        known = f"it has to have {', '.join(_TYPES)}"
        raise ValueError(f"path: {path} {'has an unknown' if key in arguments else 'lacks'} {key!r}; {known}")
    for key, value in arguments.items():
        if type(value) not in _TYPES[key] or not _is_in_range(value):
            allowed = " or ".join("null" if kind is NoneType else kind.__name__ for kind in _TYPES[key])
            raise ValueError(f"path: {path}: {key} must be {allowed}, of numbers from 0 to {_MOST}; got {value!r}")
    if sum(arguments["depths"]) > tensors:
        raise ValueError(f"path: {path}: depths {arguments['depths']} are more blocks than there are tensors")
    return arguments


def _is_in_range(value: Any) -> bool:
    """Numbers, and lists of whole ones. No product of them is too large for the size of a tensor."""
    if isinstance(value, list):
        return all(type(item) is int and 0 <= item <= _MOST for item in value)
    return not isinstance(value, _NUMBER) or 0 <= value <= _MOST
