"""Mixed and low precision on whole models: what timm's eager model gives, module by module."""

import copy

import pytest
import torch
from numerics import assert_model_accurate

from mambaout_kernels import patch
from mambaout_kernels.nn.block import FusedGatedCNNBlock

timm = pytest.importorskip("timm")

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")),
]
LOW = [torch.bfloat16, torch.float16]
LAYOUTS = {
    "default": {"ls_init_value": None, "downsample": "conv", "head_fn": "default", "act_layer": "gelu"},
    "rw": {},
}


def pair(layout, device="cpu"):
    """timm's model and a patched copy, with the same weights."""
    eager = timm.create_model("test_mambaout", num_classes=5, depths=(1, 1, 1, 1), **LAYOUTS[layout])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in eager.named_parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator) + (0.5 if "gamma" in name else 0.0))
    eager.to(device)
    return eager, patch(copy.deepcopy(eager))


def images(device="cpu", n=2):
    return torch.randn(n, 3, 64, 64, generator=torch.Generator().manual_seed(1)).to(device)


def observe(model, x, target=None, **autocast):
    """Output, gradients of all parameters, and the dtypes that every block and module outside of blocks gave."""
    inner = {m for block in model.modules() if _is_block(block) for m in block.modules() if m is not block}
    seen, handles = {}, []
    for name, module in model.named_modules():
        if module not in inner:
            handles.append(
                module.register_forward_hook(lambda m, i, y, name=name: seen.update({name: (i[0].dtype, y.dtype)}))
            )
    with torch.autocast(x.device.type, **autocast) if autocast else torch.enable_grad():
        y = model(x)
        loss = y.double().square().mean()
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    for handle in handles:
        handle.remove()
    names = [name for name, _ in model.named_parameters()]
    return {"y": y.detach(), **dict(zip(names, gradients, strict=True))}, seen


def _is_block(module):
    return isinstance(module, timm.models.mambaout.GatedConvBlock)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_autocast_dtype_by_dtype(dtype, layout, device):
    eager, fused = pair(layout, device)
    assert all(isinstance(m, FusedGatedCNNBlock) for m in fused.modules() if _is_block(m))
    exact, _ = observe(copy.deepcopy(eager).double(), images(device).double())
    expected, expected_dtypes = observe(eager, images(device), dtype=dtype)
    actual, dtypes = observe(fused, images(device), dtype=dtype)
    assert dtypes == expected_dtypes
    assert {torch.float32, dtype} <= {d for pair in dtypes.values() for d in pair}
    assert_model_accurate(actual, expected, exact)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [*LOW, torch.float64], ids=str)
def test_converted_models(dtype, layout, device):
    eager, fused = pair(layout, device)
    exact_model = copy.deepcopy(eager).to(dtype).double()  # of the rounded parameters
    eager, fused = eager.to(dtype), fused.to(dtype)
    exact, _ = observe(exact_model, images(device).to(dtype).double())
    (expected, expected_dtypes), (actual, dtypes) = (observe(m, images(device).to(dtype)) for m in (eager, fused))
    assert dtypes == expected_dtypes
    assert_model_accurate(actual, expected, exact)


@pytest.mark.parametrize("method", ["half", "bfloat16", "double", "float"])
def test_conversion_methods(method):
    _, fused = pair("rw")
    model = getattr(fused, method)()
    dtype = next(model.parameters()).dtype
    assert model(images().to(dtype)).dtype == dtype


@pytest.mark.parametrize("device", DEVICES)
def test_grad_scaler(device):
    """fp16 autocast with a scaler: a step that overflows is skipped and the scale halved, the others are eager's."""
    steps = []
    for model in pair("default", device):
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        scaler = torch.amp.GradScaler(device, init_scale=2.0**20, growth_interval=2)
        scales, norms = [], []
        for number in range(5):
            optimizer.zero_grad()
            with torch.autocast(device, torch.float16):
                loss = model(images(device)).float().square().mean() * (1e5 if number == 2 else 1.0)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
        steps.append((scales, norms, [p.detach().clone() for p in model.parameters()]))
    (eager_scales, eager_norms, eager), (scales, norms, fused) = steps
    assert scales == eager_scales
    assert min(scales) < 2.0**20
    assert not all(torch.tensor(norms).isfinite())
    assert norms == pytest.approx(eager_norms, rel=0.02, nan_ok=True)
    for ours, theirs in zip(fused, eager, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
