"""Weights that others put in the place of a linear layer's: torchao's quantized ones, peft's LoRA."""

import pytest
import torch
from torch import nn

import mambaout_kernels as mk
from mambaout_kernels import backends
from tests.numerics import assert_alike

timm = pytest.importorskip("timm")

MODELS = {
    "native": lambda: mk.create_model("test_mambaout", num_classes=5),
    "timm's, patched": lambda: mk.patch(timm.create_model("test_mambaout", num_classes=5)),
}


def images():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def make(kind):
    """A model whose blocks count: their layer scales begin at 1e-4."""
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    for name, p in model.named_parameters():
        if name.endswith("gamma"):
            nn.init.constant_(p, 0.5)
    return model


def assert_blocks_are_modules(fast, said):
    """None of a model's blocks is fused, and every reason says this."""
    parts = [part for part in fast.report() if part.kind.startswith("block")]
    assert len(parts) == 6, str(fast.report())
    for part in parts:
        assert not part.fused, part
        assert said in part.reason, part


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("kind", MODELS)
def test_quantized_weights_of_torchao(kind):
    quantization = pytest.importorskip("torchao.quantization")
    model, plain = make(kind), make(kind)
    for each in (model, plain):
        quantization.quantize_(each, quantization.Int8WeightOnlyConfig())
    fused = make(kind)
    x = images()
    with torch.no_grad():
        with backends.force("reference"):
            expected = plain(x)
            assert (fused(x) - expected).abs().max() > 1e-3 * expected.abs().max()  # it was quantized
        assert_alike(model(x), expected)
        fast = mk.optimize_for_inference(model)
        assert_blocks_are_modules(fast, "fc1.weight is a ")
        assert_alike(fast(x), expected)
        assert any(part.fused for part in fast.report())
        assert_alike(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)
        # A frozen copy holds weights of its own.
        for p in model.parameters():
            names = p.__tensor_flatten__()[0] if hasattr(p, "__tensor_flatten__") else ()
            for t in [getattr(p, name) for name in names] or [p]:
                t.zero_()
        assert_alike(fast(x), expected)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("kind", MODELS)
def test_lora_of_peft(kind):
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules=["fc1", "fc2"], modules_to_save=["head"], init_lora_weights=False)
    model, x = peft.get_peft_model(make(kind), config), images()

    def gradients():
        model.zero_grad()
        model(x).square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    ours = gradients()
    with backends.force("reference"):
        theirs = gradients()
    assert ours.keys() == theirs.keys()
    assert sum("lora_" in name for name in ours) == 24  # two matrices of two layers of six blocks
    for name, gradient in ours.items():
        assert_alike(gradient, theirs[name], 1e-4)

    model.eval()
    with torch.no_grad():
        with backends.force("reference"):
            expected = model(x)
        assert_alike(model(x), expected)
        fast = mk.optimize_for_inference(model)
        assert_blocks_are_modules(fast, "fc1 is a peft.tuners.lora.layer.Linear, not a plain nn.Linear")
        assert_alike(fast(x), expected)
        merged = model.merge_and_unload()
        fast = mk.optimize_for_inference(merged)
        assert all(part.fused for part in fast.report() if part.kind.startswith("block")), str(fast.report())
        assert_alike(fast(x), expected)
