import json

import pytest
import torch
from test_models import PARAMETERS
from torch import nn

from mambaout_kernels import analysis
from mambaout_kernels.cli import main
from mambaout_kernels.models import VARIANTS, create_model
from mambaout_kernels.nn import block

# Of convolutions and linear layers, counted on timm's models with hooks, in 1e9.
GIGA_MACS = {
    "mambaout_femto": 1.148,
    "mambaout_kobe": 1.506,
    "mambaout_tiny": 4.470,
    "mambaout_small": 8.936,
    "mambaout_base": 15.794,
    "mambaout_small_rw": 8.936,
    "mambaout_base_short_rw": 16.281,
    "mambaout_base_tall_rw": 16.117,
    "mambaout_base_wide_rw": 17.752,
    "mambaout_base_plus_rw": 19.161,
}


@pytest.mark.parametrize("name", GIGA_MACS)
def test_parameters_and_macs(name):
    parameters, macs = analysis.parameters(name), analysis.macs(name)
    assert parameters == PARAMETERS[name]
    assert round(macs / 1e9, 3) == GIGA_MACS[name]
    if name in analysis.PAPER:  # which rounds, not always to the nearest
        of_paper = analysis.PAPER[name]
        assert parameters / 1e6 == pytest.approx(of_paper[0], abs=0.55)
        assert macs / 1e9 == pytest.approx(of_paper[1], abs=0.07)


def test_macs_of_another_counter():
    """By hooks on every convolution and linear layer, at a size that no stride divides."""
    model, total = create_model("test_mambaout", num_classes=1000), 0

    def count(module, inputs, output):
        nonlocal total
        per_output = module.weight[0].numel()
        total += output.numel() * per_output

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    block._warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="conv has hooks"):
        model(torch.zeros(1, 3, 70, 97))
    assert analysis.macs("test_mambaout", 70, 97) == total


def test_when_a_sequence_is_long():
    assert {name: 6 * dim for name, dim in analysis.WIDTHS.items()} == {"ViT-S": 2304, "ViT-B": 4608}
    lengths = {task: analysis.tokens(*size) for task, size in analysis.TASKS.items()}
    assert list(lengths.values()) == [196, 4000, 4096]
    assert analysis.tokens(225, 224) == 15 * 14
    assert analysis.length_ratio(2304, 384) == 1.0
    # what the ratio means: 4 D L^2 over 24 D^2 L
    assert analysis.length_ratio(196, 384) == pytest.approx(4 * 384 * 196**2 / (24 * 384**2 * 196))


@pytest.mark.parametrize(("h", "w", "kernel"), [(7, 9, 3), (3, 2, 7), (1, 1, 5), (6, 6, 1)])
def test_visibility_is_what_convolutions_see(h, w, kernel):
    """Counted by the inputs that each output depends on."""
    from mambaout_kernels.nn.causal import CausalConv2d

    found = []
    for layer in (nn.Conv2d, CausalConv2d):
        conv = layer(1, 1, kernel, padding=kernel // 2, bias=False)
        nn.init.ones_(conv.weight)
        jacobian = torch.func.jacrev(lambda x, conv=conv: conv(x).flatten())(torch.zeros(1, 1, h, w))
        found.append(int((jacobian != 0).sum()))
    seen = analysis.visibility(h, w, kernel)
    assert (seen.pairs, seen.causal_pairs) == tuple(found)
    assert (seen.taps, seen.causal_taps) == (kernel**2, kernel**2 // 2 + 1)


def test_traffic():
    partial, full = analysis.traffic("mambaout_tiny", 0)
    assert (partial.pixels, partial.hidden, partial.conv_channels, full.conv_channels) == (56 * 56, 256, 96, 256)
    assert partial.fused == full.fused == 3 * 256 * 56 * 56
    assert partial.separate < full.separate == 9 * 256 * 56 * 56
    assert full.macs / partial.macs == pytest.approx(8 / 3)
    assert analysis.traffic("mambaout_tiny", 3, 225, 224)[0].pixels == 8 * 7


def test_command(capsys):
    assert (
        main(["analyze", "--variant", "mambaout_femto,test_mambaout", "--json", "--size", "96x64", "--dim", "64"]) == 0
    )
    content = json.loads(capsys.readouterr().out)
    assert [m["variant"] for m in content["models"]] == ["mambaout_femto", "test_mambaout"]
    assert content["models"][0]["macs"] == analysis.macs("mambaout_femto", 96, 64)
    assert content["traffic"][0]["fused_bytes"] == 4 * 3 * 128 * 24 * 16
    assert content["visibility"][0]["map"] == [24, 16]
    own = [task for task in content["tasks"] if task["task"] == "--size" and task["dim"] == 64]
    assert [task["tokens"] for task in own] == [24]


def test_command_prints_tables(capsys):
    assert main(["analyze", "--variant", "mambaout_tiny"]) == 0
    out = capsys.readouterr().out
    assert all(text in out for text in ("26,545,096", "27M", "4.470G", "4.5G", "L / 6D", "51.1%", "39.3M"))
    assert "mambaout_base" not in out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--size", "0x3"], "'0x3' is no size"),
        (["--variant", "x"], "'x' is not one of"),
        (["--size", "99999"], "65536"),
    ],
)
def test_command_refuses(argv, said, capsys):
    try:
        status = main(["analyze", *argv])
    except SystemExit as error:
        status = error.code
    assert status == 2
    assert said in capsys.readouterr().err


def test_every_variant_is_analysed():
    assert set(GIGA_MACS) | {"test_mambaout"} == set(VARIANTS)
