"""The published weights of each variant, and how images are prepared for them: what `timm.data` reads of a model.

Source: default_cfgs in timm's mambaout.py.
"""

from typing import Any

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

_USUAL: dict[str, dict[str, Any]] = {"in1k": {}}
_AS_TRAINED = {"crop_pct": 0.95, "test_crop_pct": 1.0}

# By variant and tag, timm's default tag first: what is not as in pretrained_cfg. The weights of a tag are
# huggingface.co/timm/<variant>.<tag>; test_mambaout has none.
PRETRAINED: dict[str, dict[str, dict[str, Any]]] = {
    "mambaout_femto": _USUAL,
    "mambaout_kobe": _USUAL,
    "mambaout_tiny": _USUAL,
    "mambaout_small": _USUAL,
    "mambaout_base": _USUAL,
    "mambaout_small_rw": {"sw_e450_in1k": {}},
    "mambaout_base_short_rw": {"sw_e500_in1k": _AS_TRAINED},
    "mambaout_base_tall_rw": {"sw_e500_in1k": _AS_TRAINED},
    "mambaout_base_wide_rw": {"sw_e500_in1k": _AS_TRAINED},
    "mambaout_base_plus_rw": {
        "sw_e150_in12k_ft_in1k": {},
        "sw_e150_r384_in12k_ft_in1k": {
            "input_size": (3, 384, 384), "test_input_size": (3, 384, 384), "crop_mode": "squash",
        },
        "sw_e150_in12k": {"num_classes": 11821},
    },
    "test_mambaout": {"": {"input_size": (3, 160, 160), "test_input_size": (3, 192, 192)}},
}  # fmt: skip


def pretrained_cfg(variant: str | None = None, tag: str | None = None, in_chans: int = 3) -> dict[str, Any]:
    """Of the weights of a tag, the variant's default one if None; without a variant of ImageNet at 224 x 224.

    KeyError for an unknown variant or tag.
    """
    tags = _USUAL if variant is None else PRETRAINED[variant]
    tag = next(iter(tags)) if tag is None else tag
    found: dict[str, Any] = {
        "architecture": variant,
        "tag": tag,
        "input_size": (3, 224, 224),
        "test_input_size": (3, 288, 288),
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": "center",
        "mean": MEAN,
        "std": STD,
        "num_classes": 1000,
        "first_conv": "downsample_layers.0.conv1",
        "classifier": "head.fc2",
        **tags[tag],
    }
    for key in ("input_size", "test_input_size"):
        found[key] = (in_chans, *found[key][1:])
    return found


def from_json(cfg: dict[str, Any]) -> dict[str, Any]:
    """A pretrained_cfg as it was before it became JSON, which has no tuples."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in cfg.items()}
