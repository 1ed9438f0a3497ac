"""Zeros between the weights of blocks of odd widths: numbers and all else are those of the block as it is."""

import copy
import json
import os
import subprocess
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_alike
from processes import python
from test_block import ACTS, NORMS, check_against_composition, composed, make_block, make_x, run
from torch import nn

from mambaout_kernels import VARIANTS, backends, create_model, patch
from mambaout_kernels.nn import alignment
from mambaout_kernels.nn import block as block_module
from mambaout_kernels.nn.alignment import padding, prefers_alignment

LOW = [torch.bfloat16, torch.float16]
ODD = {  # hidden, conv channels
    "hidden": {"dim": 16},  # 42, 16
    "both": {"dim": 13, "expansion_ratio": 2.5},  # 32, 13
    "no conv channels": {"dim": 13, "conv_ratio": 0.0},  # 34, 0
    "no identity channels": {"dim": 13, "expansion_ratio": 2.6, "conv_ratio": 2.6},  # 33, 33
    "fewer than an access": {"dim": 3, "expansion_ratio": 1.0},
    "layer scale": {"dim": 13, "kernel_size": 5, "ls_init_value": 0.5},
    "causal": {"dim": 13, "causal": True},
}


@pytest.fixture
def everywhere(monkeypatch):
    """Zeros on the CPU as well; the function sets whether."""

    def pad(yes=True):
        monkeypatch.setattr(alignment, "prefers_alignment", lambda device_type: yes)

    pad()
    return pad


@pytest.fixture
def widths(monkeypatch):
    """hidden, conv channels and dtype of every call of the op."""
    calls, op = [], block_module.gated_dwconv

    def recorded(u, weight, bias, act):
        calls.append((u.shape[-1] // 2, weight.shape[0], u.dtype))
        return op(u, weight, bias, act)

    monkeypatch.setattr(block_module, "gated_dwconv", recorded)
    return calls


def aligned_width(block, dtype):
    hidden, _, conv_channels = block.split_indices
    after_i, after_c = padding(dtype, hidden, conv_channels)
    assert after_i or after_c
    return hidden + after_i + after_c, conv_channels + after_c, dtype


@pytest.mark.parametrize(
    ("dim", "dtype", "expected"),
    [(128, torch.bfloat16, (3, 0)), (256, torch.float16, (6, 0)), (512, torch.bfloat16, (3, 0)),
     (128, torch.float32, (3, 0)), (256, torch.float32, (2, 0)), (512, torch.float32, (3, 0)),
     (768, torch.bfloat16, (0, 0)), (128, torch.float64, (0, 0))],
)  # fmt: skip
def test_padding_of_base(dim, dtype, expected):
    assert padding(dtype, int(8 / 3 * dim), dim) == expected


@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
def test_padded_rows_are_whole_accesses(dtype):
    for hidden in range(1, 40):
        for conv_channels in range(hidden + 1):
            after_i, after_c = padding(dtype, hidden, conv_channels)
            for width in (conv_channels + after_c, hidden + after_i + after_c):
                assert width * dtype.itemsize % 16 == 0
            assert max(after_i, after_c) * dtype.itemsize < 16


def test_only_mambaout_base_is_odd():
    odd = {
        name
        for name, variant in VARIANTS.items()
        for dim in variant.dims
        if padding(torch.bfloat16, int(variant.expansion_ratio * dim), int(variant.conv_ratio * dim)) != (0, 0)
    }
    assert odd == {"mambaout_base"}


def test_where_it_pays(monkeypatch):
    assert not prefers_alignment("cpu")
    with backends.force("reference"):
        assert not prefers_alignment("cpu")
    assert not prefers_alignment("meta")
    monkeypatch.setattr(backends, "_default", "triton")
    assert prefers_alignment("cpu")
    monkeypatch.setattr(backends, "_default", None)
    monkeypatch.setitem(backends._no_kernels, "cuda", None)
    assert prefers_alignment("cuda")
    monkeypatch.setitem(backends._no_kernels, "cuda", "nothing there")
    monkeypatch.setattr(backends, "_warn_once", lambda message: None)
    assert not prefers_alignment("cuda")


def test_left_alone_where_it_does_not_pay(widths):
    make_block()(make_x())
    assert widths == [(42, 16, torch.float32)]
    assert make_block().to("meta")(make_x().to("meta")).shape == make_x().shape


@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("kind", ["hidden", "both"])
def test_accuracy(kind, act, dtype, everywhere, widths):
    layer, function = ACTS[act]
    block = make_block(act_layer=layer, **ODD[kind]).to(dtype)
    check_against_composition(block, make_x(block.dim).to(dtype), function)
    assert widths == [aligned_width(block, dtype)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [kind for kind in ODD if kind not in ("hidden", "both", "causal")])
def test_accuracy_of_other_widths(kind, dtype, everywhere, widths):
    block = make_block(**ODD[kind]).to(dtype)
    check_against_composition(block, make_x(block.dim).to(dtype), F.gelu)
    assert widths == [aligned_width(block, dtype)]


@pytest.mark.parametrize("norm", NORMS)
def test_accuracy_with_any_norm(norm, everywhere):
    check_against_composition(make_block(13, norm_layer=NORMS[norm]), make_x(13), F.gelu)


def test_without_biases(everywhere, widths):
    block = make_block(13)
    block.fc1.bias = block.fc2.bias = None
    padded = run(block, block, make_x(13))
    everywhere(False)
    unpadded = run(block, block, make_x(13))
    for name, gradient in unpadded.items():
        assert_alike(padded[name], gradient)
    assert [width for width, *_ in widths] == [36 + 4, 34]


def test_causal(everywhere):
    block, x = make_block(**ODD["causal"]), make_x(13)
    padded = run(block, block, x)
    everywhere(False)
    for name, gradient in run(block, block, x).items():
        assert_alike(padded[name], gradient)


@pytest.mark.parametrize("low", LOW, ids=str)
@pytest.mark.parametrize("of_x", [torch.float32, None], ids=["fp32 input", "low input"])
@pytest.mark.parametrize("kind", ["hidden", "both"])
def test_autocast(kind, of_x, low, everywhere, widths):
    block = make_block(**ODD[kind])
    x = make_x(block.dim).to(of_x or low)
    check_against_composition(block, x, F.gelu, partial(torch.autocast, "cpu", low), low)
    assert widths == [aligned_width(block, low)]


def test_autocast_over_other_low_precision_parameters(everywhere, widths):
    block = make_block(13).half()
    context = partial(torch.autocast, "cpu", torch.bfloat16)
    check_against_composition(block, make_x(13).half(), F.gelu, context, torch.bfloat16)
    assert widths == [aligned_width(block, torch.bfloat16)]


def test_float64_is_left_alone_under_autocast_too(everywhere, widths):
    block = make_block(13).double()
    with torch.autocast("cpu", torch.bfloat16):
        block(make_x(13).double())
    assert widths == [(34, 13, torch.float64)]


def test_drop_path_drops_the_same_samples(everywhere):
    block, x = make_block(13, drop_path=0.5, ls_init_value=1.0), make_x(13, n=16)
    results = []
    for pad in (True, False):
        everywhere(pad)
        torch.manual_seed(5)
        results.append(run(block, block, x))
    for name, result in results[0].items():
        assert_alike(result, results[1][name])
    kept = (results[0]["y"] != x).flatten(1).any(1)
    assert 0 < kept.sum() < 16


class Tagged(torch.Tensor):
    """A subclass, as quantized weights and DTensor are."""


def parametrize_weight(layer):
    nn.utils.parametrize.register_parametrization(layer, "weight", nn.Softsign())


def subclass_weight(layer):
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Tagged))


def replace_forward(layer):
    layer.forward = lambda x: 2 * F.linear(x, layer.weight, layer.bias)


CHANGES = {
    "hook": lambda layer: layer.register_forward_hook(lambda module, inputs, output: 2 * output),
    "pre-hook": lambda layer: layer.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],)),
    "backward hook": lambda layer: layer.register_full_backward_hook(lambda module, dx, dy: (2 * dx[0],)),
    "parametrized": parametrize_weight,
    "subclass of a tensor": subclass_weight,
    "forward replaced": replace_forward,
}


@pytest.mark.parametrize("layer", ["fc1", "fc2"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_layer_that_is_not_plain_is_called(change, layer, everywhere, widths):
    block, x = make_block(13), make_x(13)
    CHANGES[change](getattr(block, layer))
    found = run(block, block, x)
    assert [width for width, *_ in widths] == [34]
    for name, expected in run(lambda x: composed(block, x, F.gelu), block, x).items():
        assert_alike(found[name], expected)


def test_a_subclass_of_a_linear_layer_is_called(everywhere, widths):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    block = make_block(13)
    block.fc2 = Doubled(34, 13)
    assert_alike(block(make_x(13)), composed(block, make_x(13), F.gelu))
    assert [width for width, *_ in widths] == [34]


@pytest.mark.parametrize("part", ["act", "conv"])
def test_an_unfused_block_is_left_alone(part, everywhere, widths, products_of_pytorch):
    block = make_block(13)
    getattr(block, part).register_forward_hook(lambda module, inputs, output: 2 * output)
    block_module._warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match=f"{part} has hooks"):
        y = block(make_x(13))
    g, i, c = block.fc1(block.norm(make_x(13))).split(block.split_indices, dim=-1)
    c = block.conv(c.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    assert torch.equal(y, block.fc2(block.act(g) * torch.cat((i, c), dim=-1)) + make_x(13))
    assert not widths


def test_linear_layers_without_bias_under_autocast(everywhere, widths):
    block, x = make_block(13), make_x(13)
    block.fc1.bias = block.fc2.bias = None
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        y = block(x)
        everywhere(False)
        expected = block(x)
    assert [width for width, *_ in widths] == [40, 34]
    assert_alike(y, expected, 0.02)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("layers", [["fc1"], ["fc2"], ["fc1", "fc2"]], ids=" and ".join)
def test_linear_layers_of_other_dtypes_fail_as_without_padding(layers, autocast, everywhere):
    block, x = make_block(13), make_x(13)
    for name in layers:
        block.get_submodule(name).double()

    def error():
        with pytest.raises(RuntimeError) as raised, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            block(x)
        return str(raised.value)

    found = error()
    everywhere(False)
    assert error() == found


@pytest.mark.parametrize("layer", ["fc1", "fc2"])
def test_a_layer_in_low_precision_fails_as_without_padding(layer, everywhere):
    """Without bias: beside zeros in the other's dtype its weight would become float32, and be multiplied."""
    block, x = make_block(13), make_x(13)
    fc = block.get_submodule(layer)
    fc.bias = None
    fc.bfloat16()
    with pytest.raises(RuntimeError, match="same dtype"):
        block(x)
    everywhere(False)
    with pytest.raises(RuntimeError, match="same dtype"):
        block(x)


def test_a_wrong_shape_is_refused_as_without_padding(everywhere):
    block = make_block(13)
    block.fc2 = nn.Linear(30, 13)
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        block(make_x(13))


@pytest.mark.parametrize("kind", ["hidden", "both"])
def test_differentiable_twice(kind, everywhere, monkeypatch, widths):
    monkeypatch.setattr(alignment, "_DTYPES", (torch.float64,))  # of whose channels two are a whole access
    dims = {"hidden": {"dim": 4, "expansion_ratio": 2.25}, "both": {"dim": 3, "expansion_ratio": 2.0}}[kind]
    block = make_block(kernel_size=3, **dims).double()
    names, parameters = zip(*block.named_parameters(), strict=True)
    leaves = [make_x(block.dim, 1, 2, 2).double(), *parameters]

    def call(x, *parameters):
        return torch.func.functional_call(block, dict(zip(names, parameters, strict=True)), (x,))

    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)
    assert {(hidden % 2, channels % 2) for hidden, channels, _ in widths} == {(0, 0)}


def test_the_module_and_its_optimizer_stay_what_they_were(everywhere, widths):
    padded = make_block(13)
    unpadded = copy.deepcopy(padded)
    attributes = set(vars(padded))
    optimizers = []
    for pad, block in ((True, padded), (False, unpadded)):
        everywhere(pad)
        optimizer = torch.optim.AdamW(block.parameters(), lr=1e-2)
        for seed in range(3):
            optimizer.zero_grad()
            block(make_x(13, seed=seed)).square().mean().backward()
            optimizer.step()
        optimizers.append(optimizer.state_dict())
    assert [width for width, *_ in widths] == [40] * 3 + [34] * 3
    assert set(vars(padded)) == attributes
    assert list(padded.state_dict()) == list(unpadded.state_dict())
    for name, p in padded.state_dict().items():
        assert_alike(p, unpadded.state_dict()[name], 1e-3)  # AdamW divides by the size of a gradient
    of_padded, of_unpadded = ([s["exp_avg"].shape for s in o["state"].values()] for o in optimizers)
    assert of_padded == of_unpadded


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm", "none"])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), "largest"])
def test_what_is_not_finite_is_not_with_the_zeros(value, norm, everywhere):
    """As well with an overflow within fc1, of "largest"; of every gradient, too."""
    for dtype in (torch.float32, torch.float16):
        for act, (layer, _) in ACTS.items():
            block = make_block(5, norm_layer=NORMS[norm], act_layer=layer, kernel_size=3).to(dtype)
            x = make_x(5).to(dtype)
            x[0, 3, 3, 0] = torch.finfo(dtype).max if value == "largest" else value
            everywhere()
            padded = run(block, block, x)
            everywhere(False)
            for name, result in run(block, block, x).items():
                assert torch.equal(padded[name].isfinite(), result.isfinite()), (dtype, act, name)


@pytest.mark.parametrize("training", [True, False])
def test_compiles_to_one_graph_for_all_batch_sizes(training, everywhere):
    counter = pytest.importorskip("torch._dynamo.testing").CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    block = make_block(13, drop_path=0.0, ls_init_value=0.5)
    compiled = torch.compile(block, fullgraph=True, backend=counter)
    for n in (2, 5, 3):
        x = make_x(13, n=n)
        torch._dynamo.mark_dynamic(x, 0)
        if training:
            expected = run(block, block, x)
            leaf = x.clone().requires_grad_()
            torch._dynamo.mark_dynamic(leaf, 0)
            y = compiled(leaf)
            y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(7)))
            assert_alike(y.detach(), expected["y"])
            assert_alike(leaf.grad, expected["x"])
        else:
            with torch.no_grad():
                assert_alike(compiled(x), block(x))
    assert counter.frame_count == 1
    (graph,) = counter.graphs
    calls = [node for node in graph.graph.nodes if "gated_dwconv" in str(node.target)]
    assert [call.meta["example_value"].shape[-1] for call in calls] == [40]
    torch._dynamo.reset()


@pytest.mark.parametrize("strict", [True, False])
def test_exports(strict, everywhere):
    block = make_block(13).eval()
    n = torch.export.Dim("n", min=1, max=64)
    program = torch.export.export(block, (make_x(13),), dynamic_shapes=({0: n},), strict=strict)
    calls = [node for node in program.graph.nodes if "gated_dwconv" in str(node.target)]
    assert [call.meta["val"].shape[-1] for call in calls] == [40]
    assert_alike(program.module()(make_x(13, n=5)), block(make_x(13, n=5)))


def test_a_patched_block_of_timms(everywhere, widths):
    timm = pytest.importorskip("timm.models.mambaout")
    block, x = timm.GatedConvBlock(13, ls_init_value=0.5), make_x(13)
    expected = run(block, block, x)
    patch(block)
    found = run(block, block, x)
    assert widths[-1] == aligned_width(block, torch.float32)  # patch tries one of its own before
    for name, result in expected.items():
        assert_alike(found[name], result)


def test_a_whole_model(everywhere, widths):
    model = create_model("mambaout_base", depths=(1, 1, 1, 1), dims=(13, 16, 24, 32), num_classes=3)
    x = torch.randn(2, 3, 64, 64)
    y = model(x)
    assert [hidden % 4 or channels % 4 for hidden, channels, _ in widths] == [0, 0, 0, 0]
    everywhere(False)
    assert_alike(y, model(x))


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
def test_distributed(tmp_path):
    """DDP and, of a patched model, FSDP2, with zeros, beside one process without."""
    pytest.importorskip("timm")
    script, out = Path(__file__).with_name("aligned_training.py"), tmp_path / "losses.json"
    tests = script.parent.parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, (tests, tests.parent)))}
    launcher = [python(), "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, str(script), str(out)], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    losses = json.loads(out.read_text())
    assert losses["single"][-1] < 0.7 * losses["single"][0]
    for kind in ("ddp", "fsdp"):
        assert losses[kind] == pytest.approx(losses["single"], rel=1e-3)
