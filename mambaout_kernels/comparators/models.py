"""What is compared, and what the papers report of it: accuracy, parameters and MACs of 224 x 224 images.

Figures are those printed; nothing here is computed or trained. Rows without a factory are models of timm, by its names.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from .. import models
from . import efficient_vmamba, local_vmamba, vmamba


@dataclass(frozen=True)
class Model:
    """A model that can be made here (`factory`) or in timm (None), and its row in a paper's table.

    top1: percent of ImageNet-1K's validation images, after training on ImageNet-1K at 224 x 224.
    parameters: in millions. macs: in 1e9, as papers print them (comparators/flops.py tells what of a scan).
    source: the paper that reports this, and its table or where else its authors print it.
    """

    factory: Callable[..., nn.Module] | None
    top1: float
    parameters: float
    macs: float
    source: str


# VMamba's parameters are without the head; assets/performance.md in its repository has 23, 44 and 76 with it.
_VMAMBA = "arXiv 2401.10166v1; MACs as corrected in the authors' assets/performance.md; arXiv 2405.07992, table 1"
_LOCAL = "arXiv 2403.09338, README of the authors' repository"
_EFFICIENT = "arXiv 2403.09977, README of the authors' repository"
_MAMBAOUT = "arXiv 2405.07992, table 1"
_METAFORMER = "arXiv 2210.13452, README of the authors' repository"
_INCEPTIONNEXT = "arXiv 2303.16900, README of the authors' repository"

MODELS: dict[str, Model] = {
    "mambaout_femto": Model(partial(models.create_model, "mambaout_femto"), 78.9, 7, 1.2, _MAMBAOUT),
    "mambaout_tiny": Model(partial(models.create_model, "mambaout_tiny"), 82.7, 27, 4.5, _MAMBAOUT),
    "mambaout_small": Model(partial(models.create_model, "mambaout_small"), 84.1, 48, 9.0, _MAMBAOUT),
    "mambaout_base": Model(partial(models.create_model, "mambaout_base"), 84.2, 85, 15.8, _MAMBAOUT),
    "efficientvmamba_small": Model(efficient_vmamba.efficientvmamba_small, 78.7, 11, 1.3, _EFFICIENT),
    "vmamba_tiny": Model(vmamba.vmamba_tiny, 82.2, 22, 5.6, _VMAMBA),
    "vmamba_small": Model(vmamba.vmamba_small, 83.5, 44, 11.2, _VMAMBA),
    "vmamba_base": Model(vmamba.vmamba_base, 83.7, 75, 18.0, _VMAMBA),
    "localvmamba_tiny": Model(local_vmamba.localvmamba_tiny, 82.7, 26, 5.7, _LOCAL),
    "localvmamba_small": Model(local_vmamba.localvmamba_small, 83.7, 50, 11.4, _LOCAL),
    "swin_tiny_patch4_window7_224": Model(None, 81.3, 29, 4.5, "arXiv 2103.14030, table 1"),
    "deit_small_patch16_224": Model(None, 79.8, 22, 4.6, "arXiv 2012.12877; MACs of arXiv 2103.14030, table 1"),
    "convnext_tiny": Model(None, 82.1, 29, 4.5, "arXiv 2201.03545, table 1"),
    "inception_next_tiny": Model(None, 82.3, 28, 4.2, _INCEPTIONNEXT),
    "caformer_s18": Model(None, 83.6, 26, 4.1, _METAFORMER),
    "caformer_m36": Model(None, 85.2, 56, 13.2, _METAFORMER),
}


def create_model(name: str, **overrides: Any) -> nn.Module:
    """The model of MODELS[name], with random weights; `overrides` are arguments of its factory, such as `num_classes`.

    Raises ValueError for a name without a factory; it tells those with one.
    """
    factory = MODELS[name].factory if name in MODELS else None
    if factory is None:
        allowed = ", ".join(name for name, model in MODELS.items() if model.factory)
        raise ValueError(f"name: {name!r} cannot be made here; allowed: {allowed}")
    return factory(**overrides)
