"""Token mixers and the sweep over their lengths: what each computes, what is counted, where lines cross."""

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_alike
from torch import nn

from mambaout_kernels import backends, cli
from mambaout_kernels.cli import mixers as command
from mambaout_kernels.comparators import mamba_ssm, mixers, ssm, sweep
from mambaout_kernels.comparators.ledger import Ledger
from mambaout_kernels.comparators.mixers import create_layer
from mambaout_kernels.comparators.selective_scan import selective_scan
from mambaout_kernels.comparators.sweep import Row, Setting, crossing

DIM = 32
MIXERS = {name: mixer for name, mixer in mixers.MIXERS.items() if mixer.unavailable("cpu") is None}


def image(*size, dtype=torch.float32):
    return torch.randn(2, *size, DIM, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("block", [False, True])
@pytest.mark.parametrize("name", MIXERS)
def test_every_layer_maps_a_map_and_trains(name, block):
    torch.manual_seed(0)
    layer, x = create_layer(name, DIM, block), image(5, 7).requires_grad_()
    y = layer(x)
    assert y.shape == x.shape
    gradients = torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])
    assert all(g.isfinite().all() and g.abs().max() > 0 for g in gradients)


@pytest.mark.parametrize("name", MIXERS)
def test_every_layer_is_its_own_in_float64(name):
    torch.manual_seed(0)
    layer, x = create_layer(name, DIM), image(4, 6)
    with backends.force("reference"):
        exact = copy.deepcopy(layer).double()(x.double())
    assert_alike(layer(x), exact.float())


# --- against formulas of their papers, written once more ---


def test_gated_convolution():
    torch.manual_seed(0)
    layer, x = mixers.GatedConv(DIM).double(), image(5, 6, dtype=torch.float64)
    g, i, c = F.linear(x, layer.fc1.weight, layer.fc1.bias).split((85, 85 - DIM, DIM), dim=-1)
    c = F.conv2d(c.permute(0, 3, 1, 2), layer.conv.weight, layer.conv.bias, padding=3, groups=DIM).permute(0, 2, 3, 1)
    expected = F.linear(F.gelu(g) * torch.cat((i, c), dim=-1), layer.fc2.weight, layer.fc2.bias)
    torch.testing.assert_close(layer(x), expected)
    assert mixers.GatedConv(DIM, full_channel=True).conv.weight.shape == (85, 1, 7, 7)


@pytest.mark.parametrize("causal", [False, True])
def test_attention(causal):
    torch.manual_seed(0)
    layer, x = mixers.Attention(DIM, causal, head_dim=8).double(), image(3, 4, dtype=torch.float64)
    q, k, v = F.linear(x.flatten(1, 2), layer.qkv.weight, layer.qkv.bias).split(DIM, dim=-1)
    heads = []
    for channels in torch.arange(DIM).split(8):
        scores = q[..., channels] @ k[..., channels].transpose(1, 2) / math.sqrt(8)
        if causal:
            scores = scores.masked_fill(torch.ones(12, 12).triu(1).bool(), -math.inf)
        heads.append(scores.softmax(-1) @ v[..., channels])
    expected = F.linear(torch.cat(heads, dim=-1), layer.proj.weight, layer.proj.bias)
    torch.testing.assert_close(layer(x), expected.unflatten(1, (3, 4)))


@pytest.mark.parametrize("name", ["attention-causal", "bidirectional-scan"])
def test_what_a_token_sees(name):
    torch.manual_seed(0)
    layer, x = create_layer(name, DIM), image(3, 4)
    other = x.clone()
    other[:, 1, 2] += 1.0  # token 6
    changed = (layer(x) != layer(other)).flatten(1, 2).any(0).any(1)
    first = 6 if name == "attention-causal" else 0
    assert changed.tolist() == [token >= first for token in range(12)]


def test_convolutions_against_their_formulas():
    torch.manual_seed(0)
    x = image(6, 5, dtype=torch.float64)
    first = x.permute(0, 3, 1, 2)
    pooled = F.avg_pool2d(first, 3, 1, 1, count_include_pad=False) - first
    torch.testing.assert_close(mixers.Pooling(DIM)(x), pooled.permute(0, 2, 3, 1))
    layer = mixers.InceptionDepthwise(DIM).double()
    y, expected = layer(x), x.clone()
    for conv, begin, padding in ((layer.hw, 20, (1, 1)), (layer.w, 24, (0, 5)), (layer.h, 28, (5, 0))):
        part = F.conv2d(first[:, begin : begin + 4], conv.weight, conv.bias, padding=padding, groups=4)
        expected[..., begin : begin + 4] = part.permute(0, 2, 3, 1)
    torch.testing.assert_close(y, expected)
    layer = mixers.SeparableConv(DIM).double()
    with torch.no_grad():
        layer.act.scale.fill_(0.7), layer.act.bias.fill_(-0.3)
    hidden = 0.7 * F.linear(x, layer.pwconv1.weight).clamp(min=0) ** 2 - 0.3
    hidden = F.conv2d(hidden.permute(0, 3, 1, 2), layer.dwconv.weight, padding=3, groups=64).permute(0, 2, 3, 1)
    torch.testing.assert_close(layer(x), F.linear(hidden, layer.pwconv2.weight))


def test_a_block_has_an_mlp_where_its_papers_have_one():
    for name, mixer in MIXERS.items():
        layer = create_layer(name, DIM, block=True)
        linears = [m for m in layer.modules() if isinstance(m, nn.Linear) and m.out_features == 4 * DIM]
        assert bool(linears) != mixer.alone or name.endswith("scan"), name  # a scan's in_proj is as wide
    assert create_layer("attention", DIM, block=True).mlp is not None
    assert create_layer("cross-scan", DIM, block=True).mlp is None


def test_bad_names_and_widths():
    with pytest.raises(ValueError, match=r"name must be one of gated-conv, .*; got 'gated'"):
        create_layer("gated", 32)
    with pytest.raises(ValueError, match="dim must be a multiple of head_dim, 32; got 40"):
        create_layer("attention", 40)


# --- what is counted ---


def test_macs_of_attention_and_of_the_rule():
    """24 D^2 L + 4 D L^2 FLOPs of a Transformer block: both parts are equal at L = 6D."""
    D, L = 96, 576
    macs, parameters = sweep.count("attention", D, L, block=True)
    assert macs == 12 * D * D * L + 2 * D * L * L
    assert 12 * D * D * L == 2 * D * L * L
    assert parameters == 12 * D * D + 9 * D + 4 * D
    assert sweep.count("attention-causal", D, L)[0] == sweep.count("attention", D, L)[0]


def test_macs_of_gated_convolution_and_scan():
    D, L, hidden = 96, 784, 256
    assert sweep.count("gated-conv", D, L)[0] == L * (3 * D * hidden + 49 * D)
    assert sweep.count("gated-conv-full", D, L)[0] == L * (3 * D * hidden + 49 * hidden)
    assert sweep.count("depthwise", D, L)[0] == 49 * D * L
    channels, scans, states, rank = 2 * D, 4, 16, 6
    products = D * 2 * channels + 9 * channels + scans * channels * (2 * rank + 2 * states) + channels * D
    assert sweep.count("cross-scan", D, L)[0] == L * (products + scans * channels * (9 * states + 1))


def test_ledger():
    x = torch.randn(1000)  # 4,000 bytes
    with Ledger() as ledger:
        y = x.view(10, 100) * 2  # reads 1, writes 1
        z = y.expand(3, 10, 100) + 1  # reads 1, writes 3
        del y
        w = z.sum()  # reads 3, writes one number
        z.mul_(2)  # in place: reads 3, writes 3
    assert ledger.moved == 4000 * (1 + 1 + 1 + 3 + 3 + 3 + 3) + 4
    assert ledger.peak == 4000 * (1 + 3)
    del w


def test_ledger_counts_a_fused_op_once():
    torch.manual_seed(0)
    layer, x = mixers.GatedConv(DIM), image(8, 8)
    with Ledger() as ledger, torch.inference_mode():
        layer(x)
    if backends.preferred("cpu") != "cpu":
        pytest.skip("needs the compiled CPU kernels")
    hidden, pixels = 85, 128
    weights = sum(p.numel() for p in layer.parameters())
    assert ledger.moved == 4 * (pixels * (DIM + 2 * hidden + 3 * hidden + hidden + DIM) + weights)


# --- the sweep ---


def rows_of(name, times, dim=96):
    return [Row(name, dim, tokens, 1, 1, 1, 1, s, s, 3) for tokens, s in times.items()]


def test_crossings():
    quadratic = rows_of("attention", {L: 1e-9 * L * L for L in (100, 400, 1600, 6400)})
    linear = rows_of("depthwise", {L: 1e-6 * L for L in (100, 400, 1600, 6400)})
    assert crossing(quadratic, linear) == pytest.approx(1000)
    assert crossing(linear, quadratic) == 0.0 or crossing(linear, quadratic) == math.inf
    assert crossing(quadratic[:2], linear[:2]) == math.inf
    assert crossing(quadratic[2:], linear[2:]) == 0.0
    assert crossing(quadratic[:1], linear[1:]) is None
    noisy = rows_of("depthwise", {100: 1e-6, 400: 1e-3, 1600: 1e-6, 6400: 1e-6})  # slower once more in between
    assert 400 < crossing(quadratic, noisy) < 1600


def test_the_sweep_leaves_out_what_takes_too_long():
    announced = []
    found = list(sweep.sweep(["attention", "pooling"], [32], [64, 4096], Setting(), 0.01, 1e-9, announced.append))
    assert announced == ["dim 32, 64 tokens", "dim 32, 4096 tokens"]
    (first, _), (second, pooling) = found
    assert first.tokens == 64
    assert first.median_s > 0 < first.peak_bytes
    assert first.left_out is None
    assert second.median_s is None
    assert second.left_out.startswith("would take some")
    assert second.macs == 4 * 32 * 32 * 4096 + 2 * 32 * 4096**2
    assert pooling.left_out is not None


def test_a_layer_that_is_wrong_is_not_timed(monkeypatch):
    good = sweep.check("cross-scan", 32, Setting())
    assert good < 1e-5
    monkeypatch.setattr("mambaout_kernels.comparators.sweep.SHARES", {"fp32": good / 1e9})
    with pytest.raises(ValueError, match=r"cross-scan of dim 32 is off by .* of its largest value"):
        sweep.check("cross-scan", 32, Setting())


def test_mamba_ssms_kernel_is_what_its_mixer_scans_with(monkeypatch):
    seen = []
    monkeypatch.setattr(ssm.SS2DByMambaSSM, "scan_op", staticmethod(lambda *a: seen.append(1) or selective_scan(*a)))
    torch.manual_seed(0)
    layer, x = create_layer("cross-scan-mamba-ssm", DIM), image(4, 5)
    torch.manual_seed(0)
    assert torch.equal(layer(x), create_layer("cross-scan", DIM)(x))
    assert seen == [1]
    assert mixers.MIXERS["cross-scan-mamba-ssm"].unavailable("cuda") == mamba_ssm.unavailable()


def test_training_is_timed_with_gradients():
    timed = sweep.Timed("attention", 32, 16, Setting(mode="train"))
    assert len(timed.run()) == 1 + len(list(timed.layer.parameters()))


# --- the command ---


def test_lengths():
    assert command.lengths("196..16384") == [196, 784, 3136, 12544, 16384]
    assert command.lengths("64..64") == [64]
    assert command.lengths("784, 196") == [196, 784]
    for text in ("16..4", "0..4", "x", "4..", "2000000"):
        with pytest.raises(Exception, match=r"goes down|positive integer|more than"):
            command.lengths(text)


def test_the_command(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    status = cli.main(
        [
            "mixers",
            "--dim",
            "32,64",
            "--tokens",
            "64..1024",
            "--budget",
            "0.01",
            "--threads",
            "1",
            "--out",
            str(tmp_path),
        ]
    )
    assert status == 0
    out = capsys.readouterr().out
    assert "D = 32, 6D = 192" in out
    assert "attention takes longer than it" in out
    for mixer in MIXERS.values():
        assert mixer.label in out
    document = json.loads((tmp_path / "mixers.json").read_text())
    assert {(r["mixer"], r["dim"], r["tokens"]) for r in document["rows"]} == {
        (name, dim, tokens) for name in MIXERS for dim in (32, 64) for tokens in (64, 256, 1024)
    }
    assert all(r["median_s"] >= r["min_s"] > 0 for r in document["rows"])
    assert len((tmp_path / "mixers.csv").read_text().splitlines()) == len(document["rows"]) + 1
    assert (tmp_path / "mixers.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mixers", "atention"], "--mixers must be in gated-conv, .*; got atention"),
        (["--mixers", "cross-scan-mamba-ssm"], "cannot run: mamba_ssm's kernel runs on a GPU"),
        (["--dim", "40"], "--dim 40: attention cannot be made: dim must be a multiple"),
        (["--device", "cuda"], "--device cuda: torch sees no GPU here"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    import re

    assert cli.main(["mixers", *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)
