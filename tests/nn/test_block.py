import copy
import io
import pickle
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_accurate, assert_model_accurate
from torch import nn

from mambaout_kernels import backends
from mambaout_kernels.benchmarking import error_bounds
from mambaout_kernels.nn import block as block_module
from mambaout_kernels.nn.block import DropPath, FusedGatedCNNBlock, activation_name

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
ACTS = {
    "gelu": (nn.GELU, F.gelu),
    "gelu_tanh": (partial(nn.GELU, approximate="tanh"), partial(F.gelu, approximate="tanh")),
    "silu": (nn.SiLU, F.silu),
    "identity": (nn.Identity, lambda x: x),
}
NORMS = {
    "layer_norm": partial(nn.LayerNorm, eps=1e-6),
    "layer_norm_no_affine": partial(nn.LayerNorm, elementwise_affine=False),
    "rms_norm": nn.RMSNorm,
    "none": nn.Identity,
}


def make_block(dim=16, seed=0, **kwargs):
    """A block with no parameter at a special value: biases not 0, norms and layer scale not 1."""
    block = FusedGatedCNNBlock(dim, **kwargs)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in block.named_parameters():
            around = 1.0 if name in ("norm.weight", "ls.gamma") else 0.0
            p.copy_(around + 0.3 * torch.randn(p.shape, generator=generator))
    return block


def make_x(dim=16, n=2, h=9, w=6, seed=1):
    return torch.randn(n, h, w, dim, generator=torch.Generator().manual_seed(seed))


def composed(block, x, act):
    """The block as its authors compose it from PyTorch calls, without drop path."""
    g, i, c = torch.split(block.fc1(block.norm(x)), block.split_indices, dim=-1)
    if c.shape[-1]:
        conv = block.conv
        c = F.conv2d(c.permute(0, 3, 1, 2), conv.weight, conv.bias, padding=conv.padding, groups=c.shape[-1])
        c = c.permute(0, 2, 3, 1)
    return block.ls(block.fc2(act(g) * torch.cat((i, c), dim=-1))) + x


def run(forward, block, x, context=None, dy=None):
    """Output, and the gradients of x and of every parameter, of a fixed random loss."""
    x = x.clone().requires_grad_()
    if context is None:
        y = forward(x)
    else:
        with context():
            y = forward(x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)) if dy is None else dy
    names, parameters = zip(*block.named_parameters(), strict=True)
    gradients = torch.autograd.grad(y, [x, *parameters], dy.to(y.dtype))
    return {"y": y.detach(), **dict(zip(["x", *names], gradients, strict=True))}


def check_against_composition(block, x, act, context=None, low=None):
    """low: of the autocast that `context` is."""
    eager = run(lambda x: composed(block, x, act), block, x, context)
    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(7)).to(eager["y"].dtype)
    exact_block = copy.deepcopy(block).double()
    exact = run(lambda x: composed(exact_block, x, act), exact_block, x.double(), dy=dy)
    actual = run(block, block, x, context)
    bounds = error_bounds.of_block(block, x, dy, low)
    assert exact.keys() == bounds.keys()
    for name, truth in exact.items():
        try:
            assert_accurate(actual[name], eager[name], truth, bounds[name])
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None
    assert_model_accurate(actual, eager, exact)


@pytest.fixture
def op_calls(monkeypatch):
    """The act of every call the block makes to the fused op."""
    calls = []
    op = block_module.gated_dwconv
    monkeypatch.setattr(block_module, "gated_dwconv", lambda u, w, b, act: calls.append(act) or op(u, w, b, act))
    return calls


@pytest.fixture
def fresh_warnings():
    block_module._warn_once.cache_clear()
    yield
    block_module._warn_once.cache_clear()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ACTS)
def test_equals_composition(act, dtype, op_calls):
    layer, function = ACTS[act]
    block = make_block(act_layer=layer).to(dtype)
    check_against_composition(block, make_x().to(dtype), function)
    assert op_calls == [act]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_any_norm_layer(norm, dtype):
    check_against_composition(make_block(norm_layer=NORMS[norm]).to(dtype), make_x().to(dtype), F.gelu)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"conv_ratio": 8 / 3},
        {"conv_ratio": 0.0},
        {"expansion_ratio": 3.0, "conv_ratio": 1.25, "ls_init_value": 1e-6},
        {"kernel_size": 1},
        {"kernel_size": 13},
        {"dim": 13, "expansion_ratio": 2.5},
    ],
    ids=lambda kwargs: ",".join(f"{k}={v:.3g}" for k, v in kwargs.items()),
)
def test_shapes(kwargs):
    dim = kwargs.get("dim", 16)
    check_against_composition(make_block(**kwargs), make_x(dim), F.gelu)


def test_naive_block_convolves_every_channel():
    block = FusedGatedCNNBlock(96, conv_ratio=8 / 3)
    assert block.split_indices == (256, 0, 256)
    assert block.conv.weight.shape == (256, 1, 7, 7)
    assert FusedGatedCNNBlock(96).split_indices == (256, 160, 96)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("ls_init_value", [None, 1.0])
def test_autocast(dtype, ls_init_value, op_calls):
    block = make_block(ls_init_value=ls_init_value)
    seen = []
    for module in (block.norm, block.fc1, block.fc2, block.ls):
        module.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0].dtype, output.dtype)))
    context = partial(torch.autocast, "cpu", dtype)
    with torch.no_grad(), context():
        block(make_x())
        actual = seen.copy()
        seen.clear()
        composed(block, make_x(), F.gelu)
    assert actual == seen
    assert actual[2][0] == dtype  # what the op returns
    check_against_composition(block, make_x(), F.gelu, context, dtype)
    assert op_calls == ["gelu", "gelu"]


def test_autocast_over_other_low_precision_parameters():
    block = make_block().half()
    check_against_composition(
        block, make_x().half(), F.gelu, partial(torch.autocast, "cpu", torch.bfloat16), torch.bfloat16
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("scale_by_keep", [True, False])
def test_drop_path_is_timms(dtype, scale_by_keep):
    drop = pytest.importorskip("timm.layers.drop")
    x = torch.randn(64, 3, 2, 5, dtype=dtype)
    torch.manual_seed(3)
    expected = drop.DropPath(0.3, scale_by_keep)(x)
    torch.manual_seed(3)
    assert torch.equal(DropPath(0.3, scale_by_keep)(x), expected)


def test_drop_path_statistics():
    torch.manual_seed(0)
    drop_path, n, p = DropPath(0.2), 20_000, 0.2
    kept = drop_path(torch.ones(n, 2, 1, 1))[:, :, 0, 0]
    assert torch.equal(kept[:, 0], kept[:, 1])  # a sample is dropped whole
    assert set(kept.unique().tolist()) == {0.0, torch.tensor(1.0).div(0.8).item()}
    assert abs((kept[:, 0] == 0).double().mean().item() - p) < 5 * (p * (1 - p) / n) ** 0.5
    assert torch.equal(drop_path.eval()(kept), kept)


def test_drop_path_in_the_block():
    block = make_block(drop_path=0.5, ls_init_value=1.0)
    x = make_x(n=16)
    whole = block.eval()(x) - x
    torch.manual_seed(5)
    branch = block.train()(x) - x
    torch.manual_seed(5)
    keep = torch.empty(16).bernoulli_(0.5)
    assert 0 < keep.sum() < 16
    torch.testing.assert_close(branch, whole * (keep * 2).view(-1, 1, 1, 1), rtol=1e-5, atol=1e-5)


def test_loads_the_authors_state_dict_strictly():
    dim, hidden, channels = 24, 64, 24
    shapes = {
        "norm.weight": (dim,),
        "norm.bias": (dim,),
        "fc1.weight": (2 * hidden, dim),
        "fc1.bias": (2 * hidden,),
        "conv.weight": (channels, 1, 7, 7),
        "conv.bias": (channels,),
        "fc2.weight": (dim, hidden),
        "fc2.bias": (dim,),
    }
    state_dict = {name: torch.randn(shape) for name, shape in shapes.items()}
    block = FusedGatedCNNBlock(dim)
    block.load_state_dict(state_dict, strict=True)
    assert list(block.state_dict()) == list(shapes)
    assert all(torch.equal(block.state_dict()[name], state_dict[name]) for name in shapes)
    assert list(FusedGatedCNNBlock(dim, ls_init_value=1e-6).state_dict()) == [*shapes, "ls.gamma"]
    assert torch.equal(FusedGatedCNNBlock(dim, ls_init_value=1e-6).ls.gamma, torch.full((dim,), 1e-6))


@pytest.mark.parametrize(
    ("kwargs", "error", "words"),
    [
        ({"expansion": 2}, TypeError, ["'expansion'", "did you mean 'expansion_ratio'", "conv_ratio", "ls_init_value"]),
        ({"foo": 1, "bar": 2}, TypeError, ["'foo'", "'bar'", "allowed: dim, expansion_ratio, kernel_size"]),
        ({"dim": 0}, ValueError, ["dim", "positive", "0"]),
        ({"dim": 8.0}, TypeError, ["dim", "int", "8.0"]),
        ({"kernel_size": 4}, ValueError, ["kernel_size", "odd", "4"]),
        ({"kernel_size": 33}, ValueError, ["kernel_size", "31", "33"]),
        ({"kernel_size": 3.0}, TypeError, ["kernel_size", "int", "3.0"]),
        ({"conv_ratio": 3.0}, ValueError, ["conv_ratio", "[0, expansion_ratio]", "3.0"]),
        ({"conv_ratio": -0.01}, ValueError, ["conv_ratio", "[0, expansion_ratio]", "-0.01"]),
        ({"expansion_ratio": 0.01}, ValueError, ["expansion_ratio", "0.01"]),
        ({"drop_path": 1.0}, ValueError, ["drop_path", "[0, 1)", "1.0"]),
        ({"drop_path": -0.1}, ValueError, ["drop_path", "[0, 1)", "-0.1"]),
        ({"act_layer": lambda: F.gelu}, TypeError, ["act_layer", "Module", "gelu"]),
        ({"norm_layer": lambda dim: None}, TypeError, ["norm_layer", "Module", "None"]),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments(kwargs, error, words):
    with pytest.raises(error) as caught:
        FusedGatedCNNBlock(**{"dim": 16, **kwargs})
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (torch.zeros(2, 16, 8, 8), ["(N, H, W, 16)", "(2, 16, 8, 8)"]),
        (torch.zeros(64, 16), ["(N, H, W, 16)", "(64, 16)"]),
        (torch.zeros(2, 8, 8, 16, dtype=torch.int64), ["floating", "int64"]),
    ],
)
def test_bad_inputs(x, words):
    with pytest.raises(ValueError, match=r"^x must be") as caught:
        make_block()(x)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("shape", [(0, 8, 8, 16), (1, 1, 1, 16), (2, 3, 40, 16)])
def test_extreme_sizes(shape):
    assert make_block()(torch.randn(shape)).shape == shape


def test_activations_of_timm_are_known():
    layers = pytest.importorskip("timm.layers.activations")
    acts = [layers.GELU(), layers.GELUTanh(), layers.Swish(), layers.QuickGELU()]
    assert [activation_name(act) for act in acts] == ["gelu", "gelu_tanh", "silu", None]


@pytest.mark.parametrize("act_layer", [nn.ReLU, nn.PReLU, partial(nn.LeakyReLU, 0.2)])
def test_other_acts_are_composed_with_one_warning(act_layer, op_calls, fresh_warnings, products_of_pytorch):
    with pytest.warns(RuntimeWarning, match=r"act .*ReLU is none of gelu, gelu_tanh, silu, identity") as caught:
        block = make_block(act_layer=act_layer)
        make_block(act_layer=act_layer)(make_x())
        y = block(make_x())
    assert len(caught) == 1
    assert torch.equal(y, composed(block, make_x(), block.act))
    assert not op_calls
    assert "fused=False" in repr(block)


def test_replaced_act_takes_effect(op_calls, fresh_warnings, products_of_pytorch):
    block = make_block()
    block.act = nn.SiLU()
    block(make_x())
    assert op_calls == ["silu"]
    with pytest.warns(RuntimeWarning, match="act Tanh"):
        block.act = nn.Tanh()
        y = block(make_x())
    assert torch.equal(y, composed(block, make_x(), torch.tanh))


def dilate(block):
    block.conv.dilation, block.conv.padding = (2, 2), (6, 6)


def parametrize_conv(block):
    class Half(nn.Module):
        def forward(self, weight):
            return weight / 2

    nn.utils.parametrize.register_parametrization(block.conv, "weight", Half())


CHANGES = {
    "conv hook": lambda block: block.conv.register_forward_hook(lambda m, i, y: 2 * y),
    "conv pre-hook": lambda block: block.conv.register_forward_pre_hook(lambda m, i: (2 * i[0],)),
    "act hook": lambda block: block.act.register_forward_hook(lambda m, i, y: 2 * y),
    "conv replaced": lambda block: setattr(block, "conv", nn.Sequential(block.conv, nn.Tanh())),
    "conv dilated": dilate,
    "conv padded": lambda block: (
        setattr(block.conv, "padding_mode", "circular")
        or setattr(block.conv, "_reversed_padding_repeated_twice", [3, 3, 3, 3])
    ),
    "conv parametrized": parametrize_conv,
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_the_op_would_ignore_is_composed(change, op_calls, fresh_warnings, products_of_pytorch):
    block = make_block()
    before = block(make_x())
    CHANGES[change](block)
    assert block.unfused_reason() is not None
    with pytest.warns(RuntimeWarning, match=r"operations: (conv|act) "):
        after = block(make_x())
    g, i, c = block.fc1(block.norm(make_x())).split(block.split_indices, dim=-1)
    c = block.conv(c.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    assert torch.equal(after, block.fc2(block.act(g) * torch.cat((i, c), dim=-1)) + make_x())
    assert (after - before).abs().max() > 0.01
    assert op_calls == ["gelu"]  # before the change only


def test_dilation_without_its_padding_is_refused_as_in_eager(fresh_warnings):
    block = make_block()
    block.conv.dilation = (2, 2)
    with pytest.warns(RuntimeWarning, match=r"conv is Conv2d"), pytest.raises(RuntimeError, match="Sizes of tensors"):
        block(make_x(h=16, w=16))


def test_hooks_of_the_called_modules_keep_the_block_fused(op_calls):
    block = make_block(ls_init_value=1.0, drop_path=0.1)
    seen = []
    for name in ("norm", "fc1", "fc2", "ls", "drop_path"):
        getattr(block, name).register_forward_hook(lambda *args, name=name: seen.append(name))
    block(make_x())
    assert seen == ["norm", "fc1", "fc2", "ls", "drop_path"]
    assert op_calls == ["gelu"]


@pytest.mark.parametrize("act", ["gelu", "silu"])
def test_compiles_without_graph_break(act):
    block = make_block(act_layer=ACTS[act][0], ls_init_value=0.5)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for h in (9, 5):
        expected = run(block, block, make_x(h=h))
        actual = run(compiled, block, make_x(h=h))
        for name in expected:
            torch.testing.assert_close(actual[name], expected[name], rtol=1e-5, atol=1e-5)


def test_unfused_block_compiles_too(fresh_warnings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        block = make_block(act_layer=nn.ReLU)
    y = torch.compile(block, fullgraph=True, backend="aot_eager")(make_x())
    torch.testing.assert_close(y, block(make_x()))


def test_copies():
    block = make_block(act_layer=nn.SiLU, ls_init_value=0.5, drop_path=0.2).eval()
    file = io.BytesIO()
    torch.save(block, file)
    file.seek(0)
    for other in (
        copy.deepcopy(block),
        pickle.loads(pickle.dumps(block)),
        torch.load(file, weights_only=False),
    ):
        assert other.conv.weight.data_ptr() != block.conv.weight.data_ptr()
        assert other.op_act == "silu"
        assert torch.equal(other(make_x()), block(make_x()))


def test_repr():
    text = repr(FusedGatedCNNBlock(96, drop_path=0.1))
    assert "dim=96, hidden=256, conv_channels=96, fused=True" in text
    assert "drop_prob=0.100" in text
    with backends.force("reference"):
        assert "fused=False" in repr(FusedGatedCNNBlock(96))
    with torch.device("meta"):
        assert "fused=False" in repr(FusedGatedCNNBlock(96))


@pytest.mark.parametrize(
    "change",
    [
        lambda b: setattr(b, "norm", nn.LayerNorm((6, 16))),
        lambda b: setattr(b, "norm", nn.RMSNorm(16)),
        lambda b: setattr(b, "ls", nn.Sequential(nn.Flatten(2), nn.Unflatten(2, (6, 16)))),
        lambda b: setattr(b, "drop_path", DropPath(0.5)),
        lambda b: setattr(b, "fc2", nn.Sequential(b.fc2, nn.Softmax(2))),
    ],
    ids=["norm over more than channels", "another norm", "ls of a map", "DropPath", "fc2 of a map"],
)
def test_a_compiler_shows_modules_of_maps_a_map(change):
    block, x = make_block(), make_x()
    change(block)
    torch._dynamo.reset()
    results = []
    for run in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(3)
        y = run(x)
        results.append((y, *torch.autograd.grad(y, list(block.parameters()), torch.ones_like(y))))
    torch._dynamo.reset()
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)


def test_rows_are_for_compilers_in_training_around_the_op():
    """Elsewhere four dimensions are what a compiler does best with, or what a user looks at."""
    block, x, seen = make_block(), make_x(), []

    def rows(forced=None, grad=True):
        torch._dynamo.reset()
        with backends.force(forced), torch.set_grad_enabled(grad):
            torch.compile(block, fullgraph=True, backend=lambda graph, _: seen.append(graph) or graph)(x)
        return any("flatten" in str(node.target) for node in seen.pop().graph.nodes)

    assert rows() == (backends.status()["cpu"] is None)
    assert not rows("reference")
    assert not rows(grad=False)
    assert not any("view" in str(node.target) for node in torch.export.export(block, (x,)).graph.nodes)
    torch._dynamo.reset()
