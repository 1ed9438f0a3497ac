"""timm's MambaOut models with fused blocks, under names of their own: timm.create_model("fused_mambaout_tiny").

Importing this module registers `fused_` + the name of every variant; timm's own names stay timm's. Such a model is
timm's class, with timm's state_dict, pretrained weights, features_only and all else; its blocks are patched. With
`scriptable=True` it is timm's model unchanged, because torch.jit.script cannot compile the fused op.

A script that cannot be changed is run by `python -m mambaout_kernels.integrations.timm SCRIPT` (__main__.py).
"""

from dataclasses import asdict, replace
from typing import Any

from timm.layers import is_scriptable, register_notrace_module
from timm.models import DefaultCfg, build_model_with_cfg, mambaout, register_model
from torch import nn

from ...models import VARIANTS
from ...nn import FusedGatedCNNBlock
from ..patching import fused_class, patch

PREFIX = "fused_"

# register_model looks here for where the weights are: the same files as timm's.
default_cfgs: dict[str, DefaultCfg] = {}


class FusedMambaOut(mambaout.MambaOut):
    """timm's MambaOut, patched before anything is made of it."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        patch(self)


def _configurations(name: str) -> DefaultCfg:
    configurations = mambaout.default_cfgs[name]
    cfgs = {
        tag: replace(cfg, hf_hub_id=f"timm/{name}.{tag}") if cfg.hf_hub_id == "timm/" else cfg
        for tag, cfg in configurations.cfgs.items()
    }
    return DefaultCfg(configurations.tags.copy(), cfgs, configurations.is_pretrained)


def _register(name: str) -> None:
    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return build_model_with_cfg(
            mambaout.MambaOut if is_scriptable() else FusedMambaOut,
            name,
            pretrained,
            pretrained_filter_fn=mambaout.checkpoint_filter_fn,
            feature_cfg={"out_indices": (0, 1, 2, 3), "flatten_sequential": True},
            **{**asdict(VARIANTS[name]), **kwargs},
        )

    create.__name__ = create.__qualname__ = PREFIX + name
    create.__doc__ = f"timm's {name} with fused blocks."
    default_cfgs[PREFIX + name] = _configurations(name)
    register_model(create)


for _name in VARIANTS:
    _register(_name)

# torch.fx cannot trace through the checks of a fused block: it is a leaf, as timm's notrace modules are.
for _block in (FusedGatedCNNBlock, fused_class(mambaout.GatedConvBlock)):
    register_notrace_module(_block)
