"""timm's registry with fused models: what timm's own tests of models check, on the fused ones and against timm's."""

import json
import subprocess

import pytest
import torch
from on_meta import timm_model
from processes import python

from mambaout_kernels import patch
from mambaout_kernels.models import VARIANTS
from mambaout_kernels.nn.block import FusedGatedCNNBlock

timm = pytest.importorskip("timm")
fused_timm = pytest.importorskip("mambaout_kernels.integrations.timm")


def images(size=64, n=2):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


def pair(**options):
    """timm's model and the fused one, with the same weights."""
    models = [timm.create_model(name, **options).eval() for name in ("test_mambaout", "fused_test_mambaout")]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in models[0].parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    models[1].load_state_dict(models[0].state_dict(), strict=True)
    return models


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_own_names_beside_timms():
    code = """
import timm, warnings
warnings.simplefilter("error")
before = {name: timm.models.model_entrypoint(name) for name in timm.list_models()}
import mambaout_kernels.integrations.timm
after = {name: timm.models.model_entrypoint(name) for name in timm.list_models()}
assert all(after[name] is before[name] for name in before)
print(*sorted(set(after) - set(before)))
"""
    found = subprocess.run([python(), "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == sorted(f"fused_{name}" for name in VARIANTS)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant(name):
    """Every block fused, nothing else changed, and timm's weights where timm has them."""
    with torch.device("meta"):
        fused = timm.create_model(f"fused_{name}")
    theirs = timm_model(name)
    blocks = [module for module in fused.modules() if isinstance(module, timm.models.mambaout.GatedConvBlock)]
    assert len(blocks) == sum(VARIANTS[name].depths)
    assert all(isinstance(block, FusedGatedCNNBlock) and block.unfused_reason() is None for block in blocks)
    assert {k: v.shape for k, v in fused.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert fused.pretrained_cfg == theirs.pretrained_cfg
    configurations = [timm.models.get_pretrained_cfg(n).hf_hub_id for n in (name, f"fused_{name}")]
    assert configurations[0] == configurations[1]
    assert timm.models.is_model_pretrained(f"fused_{name}") == timm.models.is_model_pretrained(name)


def test_tags():
    names = timm.list_models("fused_mambaout_base_plus_rw*", include_tags=True)
    assert "fused_mambaout_base_plus_rw.sw_e150_r384_in12k_ft_in1k" in names
    with torch.device("meta"):
        model = timm.create_model("fused_mambaout_base_plus_rw.sw_e150_r384_in12k_ft_in1k")
    assert model.default_cfg["input_size"] == (3, 384, 384)


def test_pretrained(tmp_path):
    """timm's own loading, with other channels and classes."""
    safetensors = pytest.importorskip("safetensors.torch")
    theirs, _ = pair()
    safetensors.save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    overlay = {"file": str(tmp_path / "model.safetensors"), "num_classes": 1000}
    fused = timm.create_model("fused_test_mambaout", pretrained=True, pretrained_cfg_overlay=overlay).eval()
    assert_close(fused(images()), theirs(images()))
    other = timm.create_model(
        "fused_test_mambaout", pretrained=True, pretrained_cfg_overlay=overlay, in_chans=1, num_classes=5
    )
    summed = theirs.stem.conv1.weight.sum(1, keepdim=True)
    torch.testing.assert_close(other.stem.conv1.weight, summed)
    assert other(images()[:, :1]).shape == (2, 5)


def test_forward_backward_and_checkpointing():
    theirs, fused = pair()
    results = []
    for model, checkpointing in ((theirs, False), (fused, False), (fused, True)):
        model.train().set_grad_checkpointing(checkpointing)
        y = model(images())
        results.append([y, *torch.autograd.grad(y.square().mean(), list(model.parameters()))])
    for actual in results[1:]:
        for ours, expected in zip(actual, results[0], strict=True):
            assert (ours - expected).norm() <= 1e-4 * expected.norm() + 1e-9


def test_head_and_classifier():
    theirs, fused = pair()
    x = images(160)
    for model in (theirs, fused):
        features = model.forward_features(x)
        assert features.shape[1:3] == model.default_cfg["pool_size"]
        assert features.shape[3] == model.num_features
        pre_logits = model.forward_head(features, pre_logits=True)
        assert pre_logits.shape[1] == model.head_hidden_size
        assert torch.equal(model.get_classifier()(pre_logits), model(x))
        model.reset_classifier(0)
        assert torch.equal(model(x), pre_logits)
        model.reset_classifier(0, "")  # without pooling
        assert model(x).ndim == 4
    assert_close(fused(x), theirs(x))
    for key in ("first_conv", "classifier"):
        assert (
            f"{timm.models.get_pretrained_cfg('fused_test_mambaout').to_dict()[key]}.weight" in pair()[1].state_dict()
        )


@pytest.mark.parametrize("feature_cls", [None, "getter", "fx"])
@pytest.mark.parametrize("out_indices", [(0, 1, 2, 3), (1, 3)])
def test_features_only(feature_cls, out_indices):
    options = {"features_only": True, "out_indices": out_indices}
    if feature_cls:
        options["feature_cls"] = feature_cls
    theirs, fused = pair(**options)
    assert [4 * 2**i for i in out_indices] == fused.feature_info.reduction()
    actual, expected = fused(images(96)), theirs(images(96))
    assert len(actual) == len(expected) == len(out_indices)
    for ours, other, reduction in zip(actual, expected, fused.feature_info.reduction(), strict=True):
        assert 96 // reduction in ours.shape
        assert_close(ours, other)
    assert any(isinstance(module, FusedGatedCNNBlock) for module in fused.modules())


@pytest.mark.parametrize("output_fmt", ["NCHW", "NHWC"])
def test_forward_intermediates(output_fmt):
    theirs, fused = pair()
    for checkpointing in (False, True):
        fused.set_grad_checkpointing(checkpointing)
        for ours, other in zip(
            fused.forward_intermediates(images(70), output_fmt=output_fmt)[1],
            theirs.forward_intermediates(images(70), output_fmt=output_fmt)[1],
            strict=True,
        ):
            assert ours.is_contiguous()
            assert_close(ours, other)


def test_prune():
    theirs, fused = pair()
    for model in (theirs, fused):
        model.prune_intermediate_layers([0, 1])
    assert len(fused.stages) == 2
    assert_close(fused(images()), theirs(images()))


@pytest.mark.parametrize("train", [False, True])
def test_fx(train):
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    _, fused = pair()
    fused.train(train)
    options = {"leaf_modules": timm.models.get_notrace_modules(), "param_shapes_constant": True}
    nodes = extraction.get_graph_node_names(fused, tracer_kwargs=options)
    traced = extraction.create_feature_extractor(
        fused, train_return_nodes=[nodes[0][-1]], eval_return_nodes=[nodes[1][-1]], tracer_kwargs=options
    )
    [y] = traced.train(train)(images()).values()
    assert torch.equal(y, fused(images()))
    y.mean().backward()
    assert all(p.grad is not None for p in fused.parameters())


def test_groups():
    theirs, fused = pair()
    for coarse in (False, True):
        groups = [timm.models.group_parameters(m, m.group_matcher(coarse), reverse=True) for m in (theirs, fused)]
        assert groups[0] == groups[1]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:")
def test_scriptable_models_are_timms():
    """timm's `scriptable=True` asks for a model that torch.jit.script takes; its parameters are the same."""
    model = timm.create_model("fused_test_mambaout", scriptable=True).eval()
    assert not any(isinstance(module, FusedGatedCNNBlock) for module in model.modules())
    theirs, fused = pair()
    model.load_state_dict(fused.state_dict())
    assert_close(torch.jit.script(model)(images()), theirs(images()))


def run_script(*arguments, **options):
    command = [python(), "-m", "mambaout_kernels.integrations.timm", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **options)


def test_scripts_know_the_names(tmp_path):
    (tmp_path / "beside.py").write_text("answer = 42")
    (tmp_path / "train.py").write_text("""
import sys, timm, beside
assert __name__ == "__main__" and "mambaout_kernels" not in vars()
print(sys.argv, beside.answer, type(timm.create_model(sys.argv[2])).__name__)
raise SystemExit(3)
""")
    done = run_script(tmp_path / "train.py", "--model", "fused_test_mambaout")
    assert (done.returncode, done.stderr) == (3, "")
    assert done.stdout == f"{[str(tmp_path / 'train.py'), '--model', 'fused_test_mambaout']} 42 FusedMambaOut\n"
    assert "usage: " in run_script().stderr
    assert "SCRIPT none.py does not exist" in run_script("none.py").stderr


def test_a_folder_of_timms_is_of_any_timm_and_can_name_the_fused_model(tmp_path):
    pytest.importorskip("huggingface_hub")
    hub = pytest.importorskip("timm.models._hub")
    model = timm.create_model("fused_test_mambaout", num_classes=3)
    hub.save_for_hf(model, tmp_path, safe_serialization=True)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architecture"] == "test_mambaout"
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert type(loaded) is not type(model)
    (tmp_path / "config.json").write_text(json.dumps({**config, "architecture": "fused_test_mambaout"}))
    fused = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert type(fused) is type(model)
    for other in (patch(loaded), fused):
        assert all(map(torch.equal, other.state_dict().values(), model.state_dict().values()))
