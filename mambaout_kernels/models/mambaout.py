"""The MambaOut family: one class, and a table of what its published variants are made of.

Sources: the authors' repository (femto to base), timm's mambaout.py (the `_rw` variants and test_mambaout). Parameters
are named as the authors name them, in every variant; checkpoints.py translates timm's names.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from ..nn.block import LAYER_NORM, FusedGatedCNNBlock, refuse_unknown
from ..nn.downsample import Downsample, Stem
from ..nn.head import Head
from .features import Stages
from .hub import HubModel
from .pretrained_cfg import pretrained_cfg

ACTIVATION_LAYERS: dict[str, Callable[..., nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
    "silu": nn.SiLU,
    "identity": nn.Identity,
}
HEAD_RATIO = 4  # head.fc1 widens by this


@dataclass(frozen=True)
class Variant:
    """Arguments of MambaOut that make up an architecture; field names are its argument names."""

    depths: tuple[int, ...] = (3, 3, 9, 3)
    dims: tuple[int, ...] = (96, 192, 384, 576)
    expansion_ratio: float = 8 / 3
    conv_ratio: float = 1.0
    kernel_size: int = 7
    act_layer: str = "gelu"
    stem_mid_norm: bool = True
    downsample: str = "conv"
    head_fn: str = "default"
    ls_init_value: float | None = None


_rw = partial(Variant, stem_mid_norm=False, downsample="conv_nf", head_fn="norm_mlp", ls_init_value=1e-6)
_NARROW, _WIDE = (48, 96, 192, 288), (128, 256, 512, 768)

VARIANTS: dict[str, Variant] = {
    "mambaout_femto": Variant(dims=_NARROW),
    "mambaout_kobe": Variant((3, 3, 15, 3), _NARROW),
    "mambaout_tiny": Variant(),
    "mambaout_small": Variant((3, 4, 27, 3)),
    "mambaout_base": Variant((3, 4, 27, 3), _WIDE),
    "mambaout_small_rw": _rw((3, 4, 27, 3)),
    "mambaout_base_short_rw": _rw((3, 3, 25, 3), _WIDE, 3.0, 1.25),
    "mambaout_base_tall_rw": _rw((3, 4, 30, 3), _WIDE, 2.5, 1.25),
    "mambaout_base_wide_rw": _rw((3, 4, 27, 3), _WIDE, 3.0, 1.5, act_layer="silu"),
    "mambaout_base_plus_rw": _rw((3, 4, 30, 3), _WIDE, 3.0, 1.5, act_layer="silu"),
    "test_mambaout": _rw((1, 1, 3, 1), (16, 32, 48, 64), 3.0, act_layer="silu", ls_init_value=1e-4),
}


class MambaOut(Stages, HubModel):
    """MambaOut image classifier: (N, in_chans, H, W) of any size to (N, num_classes), in any floating dtype.

    Args:
        in_chans, num_classes: `num_classes=0` leaves out the last linear: the output is (N, 4 * dims[-1]).
        depths, dims: blocks and width of each stage; one entry per stage, any number of stages.
        expansion_ratio, conv_ratio, kernel_size, ls_init_value, causal: of every FusedGatedCNNBlock.
        norm_layer: called with a width; used everywhere.
        act_layer: of the stem and the blocks: "gelu", "gelu_tanh", "silu", "identity", or a callable giving a module.
        stem_mid_norm: a norm between the stem's two convolutions.
        downsample: "conv" (convolution, then norm) or "conv_nf" (norm first).
        head_fn: "default" (with a norm after the head's activation) or "norm_mlp" (without).
        drop_path_rate: stochastic depth of the last block, rising linearly from 0 at the first.
        drop_rate: dropout before the last linear.
        recompute: of every FusedGatedCNNBlock: in training each keeps its input alone, and computes again in backward.

    Raises:
        TypeError: an unknown argument. ValueError: an argument out of range, or an input of the wrong shape.

    `forward(x) == forward_head(forward_features(x))`. `forward_features` returns the last stage's map, (N, H/32, W/32,
    dims[-1]), not yet normed: timm's convention. The authors' returns `norm(map.mean((1, 2)))`, (N, dims[-1]), which
    `pool` gives here. `forward_intermediates` gives the maps of all stages, for dense tasks.

    `pretrained_cfg` is what `timm.data.resolve_model_data_config(model)` reads: size, crop, mean and std of images.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        depths: Sequence[int] = Variant.depths,
        dims: Sequence[int] = Variant.dims,
        norm_layer: Callable[..., nn.Module] = LAYER_NORM,
        act_layer: str | Callable[..., nn.Module] = Variant.act_layer,
        conv_ratio: float = Variant.conv_ratio,
        kernel_size: int = Variant.kernel_size,
        drop_path_rate: float = 0.0,
        drop_rate: float = 0.0,
        expansion_ratio: float = Variant.expansion_ratio,
        ls_init_value: float | None = Variant.ls_init_value,
        stem_mid_norm: bool = Variant.stem_mid_norm,
        downsample: str = Variant.downsample,
        head_fn: str = Variant.head_fn,
        causal: bool = False,
        recompute: bool = False,
        **unknown: Any,
    ):
        super().__init__()
        refuse_unknown("MambaOut", unknown, list(inspect.signature(MambaOut).parameters)[:-1])
        depths, dims = tuple(depths), tuple(dims)
        if not depths or len(depths) != len(dims) or min(depths) < 0 or min(dims) < 2:
            raise ValueError(f"depths and dims must have one entry per stage, dims >= 2; got {depths} and {dims}")
        if in_chans < 1 or num_classes < 0:
            raise ValueError(f"in_chans must be >= 1 and num_classes >= 0, got {in_chans} and {num_classes}")
        if not 0.0 <= drop_path_rate < 1.0:
            raise ValueError(f"drop_path_rate must be in [0, 1), got {drop_path_rate}")
        _check_choice("downsample", downsample, ("conv", "conv_nf"))
        _check_choice("head_fn", head_fn, ("default", "norm_mlp"))
        act_name = act_layer if isinstance(act_layer, str) else None
        if isinstance(act_layer, str):
            _check_choice("act_layer", act_layer, ACTIVATION_LAYERS)
            act_layer = ACTIVATION_LAYERS[act_layer]

        self._arguments = {
            "expansion_ratio": expansion_ratio, "conv_ratio": conv_ratio, "kernel_size": kernel_size,
            "ls_init_value": ls_init_value, "stem_mid_norm": stem_mid_norm, "downsample": downsample,
            "head_fn": head_fn, "causal": causal, "drop_path_rate": drop_path_rate, "drop_rate": drop_rate,
            "act_layer": act_name,
        }  # fmt: skip
        self._buildable = norm_layer is LAYER_NORM and act_name is not None
        self.in_chans, self.num_classes = in_chans, num_classes
        self.depths, self.dims = depths, dims
        self.pretrained_cfg = pretrained_cfg(in_chans=in_chans)
        self.num_features = dims[-1]
        self.head_hidden_size = HEAD_RATIO * dims[-1]
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**i, "module": f"stages.{i}"} for i, dim in enumerate(dims)
        ]

        downsamples: list[nn.Module] = [Stem(in_chans, dims[0], stem_mid_norm, norm_layer, act_layer)]
        for in_dim, dim in pairwise(dims):
            downsamples.append(Downsample(in_dim, dim, downsample == "conv_nf", norm_layer))
        self.downsample_layers = nn.ModuleList(downsamples)

        drop_paths = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        block = partial(
            FusedGatedCNNBlock,
            expansion_ratio=expansion_ratio,
            kernel_size=kernel_size,
            conv_ratio=conv_ratio,
            norm_layer=norm_layer,
            act_layer=act_layer,
            ls_init_value=ls_init_value,
            causal=causal,
            recompute=recompute,
        )
        self.stages = nn.ModuleList(
            nn.Sequential(*(block(dim, drop_path=next(drop_paths)) for _ in range(depth)))
            for depth, dim in zip(depths, dims, strict=True)
        )
        self.norm = norm_layer(dims[-1])
        head_norm = norm_layer(self.head_hidden_size) if head_fn == "default" else None
        self.head = Head(dims[-1], self.head_hidden_size, num_classes, head_norm, drop_rate)
        self.apply(_init_weights)

    def architecture(self) -> dict[str, Any] | None:
        """Arguments that make a MambaOut of this architecture; None if it has modules of the caller's making.

        Without `recompute`, which changes no result.
        """
        if not self._buildable:
            return None
        sizes = {"in_chans": self.in_chans, "num_classes": self.num_classes, "depths": self.depths, "dims": self.dims}
        return {**sizes, **self._arguments}

    def no_weight_decay(self) -> set[str]:
        return {"norm"}

    def get_classifier(self) -> nn.Module:
        """The last linear; nn.Identity when num_classes is 0."""
        return self.head.fc2

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the last linear by a freshly initialised one, on the model's device and dtype; 0 removes it."""
        if num_classes < 0:
            raise ValueError(f"num_classes must be >= 0, got {num_classes}")
        old = self.head.fc1.weight
        self.num_classes = num_classes
        self.head.fc2 = nn.Identity()
        if num_classes > 0:
            self.head.fc2 = nn.Linear(self.head_hidden_size, num_classes, device=old.device, dtype=old.dtype)
            _init_weights(self.head.fc2)
        self.head.fc2.train(self.training)

    def pool(self, x: torch.Tensor) -> torch.Tensor:
        """Map (N, H, W, dims[-1]) to pooled and normed features, (N, dims[-1])."""
        return self.norm(x.mean((1, 2)))

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Map (N, H, W, dims[-1]) to logits, or to what the last linear sees, (N, 4 * dims[-1])."""
        return self.head(self.pool(x), pre_logits=pre_logits)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


def create_model(name: str, **overrides: Any) -> MambaOut:
    """A MambaOut with the architecture of VARIANTS[name]; `overrides` are arguments of MambaOut.

    Raises ValueError for an unknown name, TypeError for an unknown argument; both tell the closest and the allowed.
    """
    _check_choice("name", name, VARIANTS)
    model = MambaOut(**{**asdict(VARIANTS[name]), **overrides})
    model.pretrained_cfg = pretrained_cfg(name, in_chans=model.in_chans)
    return model


def _check_choice(argument: str, value: str, allowed: Any) -> None:
    if value not in allowed:
        match = get_close_matches(str(value), allowed, n=1)
        hint = f" (did you mean {match[0]!r}?)" if match else ""
        raise ValueError(f"{argument}: unknown {value!r}{hint}; allowed: {', '.join(allowed)}")


def _init_weights(module: nn.Module) -> None:
    """The authors' initialisation."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
