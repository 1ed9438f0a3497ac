import copy
import dataclasses
import pickle
from functools import partial

import pytest
import torch
from numerics import assert_model_accurate
from on_meta import timm_model
from torch import nn

from mambaout_kernels.models import VARIANTS, MambaOut, create_model
from mambaout_kernels.nn.block import DropPath, FusedGatedCNNBlock
from mambaout_kernels.weights.checkpoints import to_timm

PARAMETERS = {
    "mambaout_femto": 7_304_536,
    "mambaout_kobe": 9_141_208,
    "mambaout_tiny": 26_545_096,
    "mambaout_small": 48_488_072,
    "mambaout_base": 84_813_092,
    "mambaout_small_rw": 48_495_560,
    "mambaout_base_short_rw": 88_827_688,
    "mambaout_base_tall_rw": 86_481_448,
    "mambaout_base_wide_rw": 94_448_104,
    "mambaout_base_plus_rw": 101_656_552,
    "test_mambaout": 447_560,
}
# Deeper stages repeat the same block: the wide variants are compared at these depths, the others at their own.
NARROW = ("mambaout_femto", "test_mambaout")
SHALLOW = {name: {"depths": (1, 1, 2, 1)} for name in VARIANTS if name not in NARROW}


def fill(model, seed=0):
    """Materialise a meta model with values that leave no parameter at 0 or 1 and keep activations of order 1."""
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1:
                bound = (3 / p[0].numel()) ** 0.5
                p.uniform_(-bound, bound, generator=generator)
            else:
                p.uniform_(-0.3, 0.3, generator=generator)
                p.add_(1.0 if name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "gamma")) else 0.0)
    return model


def make(name="test_mambaout", **overrides):
    with torch.device("meta"):
        model = create_model(name, **overrides)
    return fill(model)


def make_timm(name, model, **overrides):
    """timm's model of that name with the values of `model`."""
    pytest.importorskip("timm")
    other = timm_model(name, **overrides)
    other.load_state_dict(to_timm(model.state_dict()), strict=True, assign=True)
    return copy.deepcopy(other)  # assign shares the tensors


def make_images(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def run(model, x):
    """Output, and the gradients of x and of every parameter under timm's key names, of a fixed random loss."""
    x = x.clone().requires_grad_()
    y = model(x)
    dy = make_images(*y.shape, seed=7).to(y.dtype)
    names, parameters = zip(*model.named_parameters(), strict=True)
    x_grad, *grads = torch.autograd.grad(y, [x, *parameters], dy)
    grads = dict(zip(names, grads, strict=True))
    return {"y": y.detach(), "x": x_grad, **(to_timm(grads) if isinstance(model, MambaOut) else grads)}


@pytest.mark.parametrize("name", VARIANTS)
def test_parameter_count(name):
    with torch.device("meta"):
        model = create_model(name)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    assert tuple(len(stage) for stage in model.stages) == VARIANTS[name].depths


def test_variants_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        VARIANTS["mambaout_tiny"].depths = (1, 1, 1, 1)


def layer(name, *kinds):
    return [f"{name}.{kind}" for kind in kinds or ("weight", "bias")]


@pytest.mark.parametrize("name", ["mambaout_femto", "test_mambaout"])
def test_keys_are_the_authors(name):
    default = name == "mambaout_femto"
    block = [k for part in ("norm", "fc1", "conv", "fc2") for k in layer(part)] + ([] if default else ["ls.gamma"])
    stem = ["conv1", "norm1", "conv2", "norm2"] if default else ["conv1", "conv2", "norm2"]
    expected = [k for part in stem for k in layer(f"downsample_layers.0.{part}")]
    expected += [k for n in (1, 2, 3) for part in ("conv", "norm") for k in layer(f"downsample_layers.{n}.{part}")]
    for stage, depth in enumerate(VARIANTS[name].depths):
        expected += [f"stages.{stage}.{n}.{k}" for n in range(depth) for k in block]
    expected += layer("norm")
    expected += [k for part in (("fc1", "norm", "fc2") if default else ("fc1", "fc2")) for k in layer(f"head.{part}")]
    with torch.device("meta"):
        assert list(create_model(name).state_dict()) == expected


@pytest.mark.parametrize("name", VARIANTS)
def test_equals_timm(name):
    """The output and all gradients, in training with stochastic depth and dropout off; and in evaluation the output."""
    model = make(name, **SHALLOW.get(name, {}))
    reference = make_timm(name, model, **SHALLOW.get(name, {}))
    x = make_images(2, 3, 64, 48)
    exact = run(copy.deepcopy(reference).double().train(), x.double())  # as in evaluation
    assert_model_accurate(*(run(m.train(), x) for m in (model, reference)), exact)
    with torch.inference_mode():
        assert_model_accurate(*({"y": m.eval()(x)} for m in (model, reference)), {"y": exact["y"]})


@pytest.mark.parametrize("name", ["mambaout_femto", "test_mambaout"])
def test_random_depth_and_dropout_are_timms(name):
    options = {"drop_path_rate": 0.5, "drop_rate": 0.2}
    model = make(name, **options)
    reference = make_timm(name, model, **options)
    x = make_images(4, 3, 64, 64)
    results = []
    for m in (model, reference):
        torch.manual_seed(11)
        results.append(run(m.train(), x))
    actual, eager = results
    for key in eager:
        # Another draw changes these by their own size; rounding by about 1e-5 of it.
        torch.testing.assert_close(actual[key], eager[key], rtol=0, atol=1e-3 * eager[key].abs().max().item())
    assert (model.eval()(x) - actual["y"]).abs().max() > 0.1


def test_drop_path_rates_rise_linearly_over_all_blocks():
    with torch.device("meta"):
        model = create_model("mambaout_femto", drop_path_rate=0.17)
    blocks = [block for stage in model.stages for block in stage]
    assert type(blocks[0].drop_path) is nn.Identity
    rates = [block.drop_path.drop_prob for block in blocks[1:]]
    assert rates == pytest.approx([0.01 * n for n in range(1, 18)])


def test_forward_in_parts():
    model, x = make("mambaout_femto", depths=(1, 1, 1, 1)).eval(), make_images(2, 3, 64, 96)
    features = model.forward_features(x)
    assert features.shape == (2, 2, 3, 288)
    assert model.feature_info[-1] == {"num_chs": 288, "reduction": 32, "module": "stages.3"}
    assert torch.equal(model.forward_head(features), model(x))
    pre_logits = model.forward_head(features, pre_logits=True)
    assert pre_logits.shape == (2, model.head_hidden_size) == (2, 1152)
    assert torch.equal(model.get_classifier()(pre_logits), model(x))
    assert model.pool(features).shape == (2, model.num_features)
    assert torch.equal(model.head(model.pool(features)), model(x))


def test_without_classifier():
    model = make(num_classes=0)
    assert model(make_images(2, 3, 32, 32)).shape == (2, 256)
    assert type(model.get_classifier()) is nn.Identity
    assert not any(key.startswith("head.fc2") for key in model.state_dict())


def test_reset_classifier():
    model, x = make().to(torch.bfloat16), make_images(2, 3, 32, 32).to(torch.bfloat16)
    pre_logits = model.forward_head(model.forward_features(x), pre_logits=True)
    model.eval().reset_classifier(7)
    assert model.num_classes == 7
    assert model(x).shape == (2, 7)
    assert model.get_classifier().weight.dtype == torch.bfloat16
    assert not model.get_classifier().training
    assert 0.01 < model.get_classifier().weight.std() < 0.03
    model.reset_classifier(0)
    assert torch.equal(model(x), pre_logits)
    with pytest.raises(ValueError, match="num_classes must be >= 0, got -1"):
        model.reset_classifier(-1)


def test_initial_weights():
    torch.manual_seed(0)
    model = create_model("test_mambaout")
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            assert not module.bias.any()
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.35 if module.weight.numel() < 1000 else 0.1)
    assert all((block.ls.gamma == 1e-4).all() for stage in model.stages for block in stage)
    assert model.no_weight_decay() == {"norm"}


@pytest.mark.parametrize("size", [(1, 1), (33, 47), (160, 160), (1, 70)])
def test_any_size(size):
    model = make().eval()
    h, w = ((s + 31) // 32 for s in size)
    assert model.forward_features(make_images(1, 3, *size)).shape == (1, h, w, 64)
    assert model(make_images(1, 3, *size)).isfinite().all()
    assert model(make_images(0, 3, *size)).shape == (0, 1000)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes_equal_timm(dtype):
    model = make(in_chans=5, num_classes=10).to(dtype)
    reference = make_timm("test_mambaout", model, in_chans=5, num_classes=10)
    x = make_images(2, 5, 64, 64).to(dtype)
    exact = run(copy.deepcopy(reference).double(), x.double())
    assert_model_accurate(run(model, x), run(reference, x), exact)


def test_autocast_equals_timm():
    model = make()
    reference = make_timm("test_mambaout", model)
    x = make_images(2, 3, 64, 64)
    exact = copy.deepcopy(reference).double()(x.double())
    with torch.autocast("cpu", torch.bfloat16):
        assert_model_accurate({"y": model(x)}, {"y": reference(x)}, {"y": exact})


def test_options_reach_the_modules():
    norm_layer = partial(nn.RMSNorm, eps=1e-5)
    model = make(norm_layer=norm_layer, act_layer=nn.GELU, kernel_size=5, conv_ratio=2.0, ls_init_value=None)
    blocks = [m for m in model.modules() if isinstance(m, FusedGatedCNNBlock)]
    assert len(blocks) == 6
    for block in blocks:
        assert block.conv.weight.shape == (2 * block.dim, 1, 5, 5)
        assert (block.op_act, type(block.norm), type(block.ls)) == ("gelu", nn.RMSNorm, nn.Identity)
    assert type(model.downsample_layers[0].act) is nn.GELU
    assert not any(isinstance(m, nn.LayerNorm | nn.SiLU | DropPath) for m in model.modules())
    assert type(make(act_layer="silu").stages[0][0].act) is nn.SiLU
    assert type(make(act_layer="silu").head.act) is nn.GELU  # whatever the blocks use


def test_one_stage():
    model = MambaOut(depths=(2,), dims=(16,), num_classes=3)
    assert model(make_images(1, 3, 16, 16)).shape == (1, 3)


def test_copies():
    model, x = make(drop_path_rate=0.1).eval(), make_images(1, 3, 32, 32)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))


@pytest.mark.parametrize(
    ("kwargs", "error", "words"),
    [
        ({"name": "mambaout_tinny"}, ValueError, ["mambaout_tinny", "did you mean 'mambaout_tiny'", "test_mambaout"]),
        ({"name": "resnet50"}, ValueError, ["resnet50", "allowed: mambaout_femto, "]),
        ({"drop_path": 0.1}, TypeError, ["'drop_path'", "did you mean 'drop_path_rate'", "num_classes"]),
        ({"pretrained": True}, TypeError, ["'pretrained'", "allowed: in_chans, num_classes, depths"]),
        ({"depths": (1, 1)}, ValueError, ["depths", "dims", "(1, 1)"]),
        ({"depths": (), "dims": ()}, ValueError, ["depths", "dims"]),
        ({"downsample": "conv_fn"}, ValueError, ["downsample", "'conv_fn'", "did you mean 'conv_nf'"]),
        ({"head_fn": "mlp"}, ValueError, ["head_fn", "'mlp'", "allowed: default, norm_mlp"]),
        ({"act_layer": "relu"}, ValueError, ["act_layer", "'relu'", "gelu_tanh"]),
        ({"drop_path_rate": 1.0}, ValueError, ["drop_path_rate", "[0, 1)"]),
        ({"drop_rate": 1.5}, ValueError, ["drop", "1.5"]),
        ({"num_classes": -1}, ValueError, ["num_classes", "-1"]),
        ({"in_chans": 0}, ValueError, ["in_chans", "0"]),
        ({"kernel_size": 6}, ValueError, ["kernel_size", "6"]),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments(kwargs, error, words):
    with pytest.raises(error) as caught:
        create_model(**{"name": "test_mambaout", **kwargs})
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 4, 32, 32), (1, 32, 32, 3), (1, 3, 0, 32)])
def test_bad_inputs(shape):
    with pytest.raises(ValueError, match=r"^x must be \(N, 3, H, W\)") as caught:
        make()(torch.zeros(shape))
    assert str(shape) in str(caught.value)
