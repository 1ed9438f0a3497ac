"""The whole block, and what stands between the stages, as one op each on the CPU."""

import copy
import pickle
import threading

import numpy as np
import pytest
import torch
from numerics import assert_accurate
from torch import nn

import mambaout_kernels as mk
from mambaout_kernels import backends, downsample, packs, whole_block
from mambaout_kernels.benchmarking import error_bounds
from mambaout_kernels.benchmarking.inputs import enlivened
from mambaout_kernels.models import Downsample, Stem

pytestmark = pytest.mark.skipif(backends.status()["cpu"] is not None, reason="no compiled CPU kernels")

# dim, H, W, N, and arguments of the block: what reaches each branch of the kernels
BLOCKS = {
    "a stage": (96, 15, 17, 2, {}),
    "hidden 341": (128, 9, 8, 1, {}),
    "wider than a column": (16, 5, 330, 1, {}),
    "narrower than the filter": (24, 2, 3, 3, {}),
    "one pixel": (72, 1, 1, 1, {}),
    "no conv channels": (20, 6, 5, 1, {"conv_ratio": 0.0}),
    "all channels convolved": (20, 6, 5, 1, {"conv_ratio": 8 / 3}),
    "filter of 3": (32, 8, 9, 1, {"kernel_size": 3}),
    "filter of 9": (32, 8, 9, 1, {"kernel_size": 9}),
    "layer scale and SiLU": (40, 7, 7, 2, {"ls_init_value": 1e-4, "act_layer": nn.SiLU}),
    "tanh": (40, 7, 7, 1, {"act_layer": lambda: nn.GELU(approximate="tanh")}),
    "identity": (40, 7, 7, 1, {"act_layer": nn.Identity}),
    "norm without parameters": (40, 7, 7, 1, {"norm_layer": lambda dim: nn.LayerNorm(dim, elementwise_affine=False)}),
    "deep sums": (600, 7, 7, 1, {}),
}


def block_of(dim, **arguments):
    return enlivened(mk.FusedGatedCNNBlock(dim, **arguments)).eval()


def three_ways(module, x, dtype, autocast=False):
    """(fused, eager, exact), without gradients; the module and x rounded to dtype first."""
    module, x = copy.deepcopy(module).to(dtype), x.to(dtype)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        fused = module(x)
        with backends.force("reference"):
            eager = module(x)
    with torch.no_grad(), backends.force("reference"):
        exact = module.double()(x.double())
    return fused, eager, exact


# of the parameters and the map, and of autocast
PRECISIONS = {
    "float32": (torch.float32, None),
    "bfloat16": (torch.bfloat16, None),
    "autocast": (torch.float32, torch.bfloat16),
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("case", BLOCKS)
def test_block_against_fp64(isa, case, precision):
    dim, H, W, N, arguments = BLOCKS[case]
    block = block_of(dim, **arguments)
    x = torch.randn(N, H, W, dim)
    with torch.no_grad():
        assert whole_block.applies(block, x)
    dtype, low = PRECISIONS[precision]
    bound = error_bounds.of_block(copy.deepcopy(block).to(dtype), x.to(dtype), low=low)["y"]
    assert_accurate(*three_ways(block, x, dtype, autocast=low is not None), bound)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("size", [(1, 1), (1, 6), (7, 5), (30, 33), (64, 226)], ids=str)
@pytest.mark.parametrize("kind", ["stem", "stem without norm", "down", "norm first"])
def test_downsampling_against_fp64(isa, kind, size, precision):
    norm, (dtype, low) = mk.block.LAYER_NORM, PRECISIONS[precision]
    if kind.startswith("stem"):
        module = enlivened(Stem(3, 40, kind == "stem", norm, nn.GELU)).eval()
        x = torch.randn(2, 3, *size)
        pixels, of = x.permute(0, 2, 3, 1), copy.deepcopy(module).to(dtype)
        layers = [of.conv1, of.norm1, "gelu", of.conv2, of.norm2]
    else:
        module = enlivened(Downsample(40, 72, kind == "norm first", norm)).eval()
        pixels = x = torch.randn(2, *size, 40)
        of = copy.deepcopy(module).to(dtype)
        layers = [of.norm, of.conv] if kind == "norm first" else [of.conv, of.norm]
    bound = error_bounds.of_downsampling(layers, pixels.to(dtype), low)
    assert_accurate(*three_ways(module, x, dtype, autocast=low is not None), bound)


def test_downsampling_of_any_strides():
    conv, norm = enlivened(nn.Conv2d(6, 10, 3, 2, 1)).eval(), enlivened(nn.LayerNorm(10))
    base = torch.randn(2, 9, 12, 14)
    for x in (base[..., 1:7], base[:, ::2, ::3, 8:], base[..., :12:2], base.transpose(1, 2)[..., :6]):
        with torch.no_grad():
            assert downsample.applies(conv, norm, None, "identity", x)
            fused = downsample.run(conv, norm, "identity", x, packs.Pack(), nn.ModuleList([conv]))
            eager = norm(conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        torch.testing.assert_close(fused, eager, rtol=1e-5, atol=1e-5)


def test_any_strides_and_no_write_to_the_input():
    block = block_of(12)
    base = torch.randn(3, 8, 9, 24)
    for x in (
        base[..., 5:17],
        base[:, ::2, :, ::2],
        base.transpose(1, 2)[..., :12],
        base[:1, :, :, :12].expand(4, -1, -1, -1),
    ):
        before = x.clone()
        fused, eager, exact = three_ways(block, x, torch.float32)
        assert_accurate(fused, eager, exact, error_bounds.of_block(block, x)["y"])
        assert torch.equal(x, before)


def test_empty_batch():
    with torch.no_grad():
        assert block_of(12)(torch.randn(0, 4, 4, 12)).shape == (0, 4, 4, 12)
        assert mk.create_model("test_mambaout").eval()(torch.randn(0, 3, 32, 32)).shape == (0, 1000)


def test_bitwise_the_same_at_every_thread_count_and_in_a_batch():
    model = enlivened(mk.create_model("test_mambaout")).eval()
    images = torch.randn(5, 3, 70, 90)
    for autocast in (False, True):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            torch.set_num_threads(1)
            first = model.forward_features(images)
            assert torch.equal(model.forward_features(images[3:4]), first[3:4])
            for threads in (2, 3, 8):
                torch.set_num_threads(threads)
                assert torch.equal(model.forward_features(images), first)


PARAMETERS = [f"{module}.{kind}" for module in ("norm", "fc1", "conv", "fc2") for kind in ("weight", "bias")]
PARAMETERS.append("ls.gamma")


def parameters_of(block):
    """In the op's order, without layer scale."""
    return [block.get_parameter(name).detach() for name in PARAMETERS[:-1]] + [None]


def _in_place(p):
    p.mul_(1.5)


def _through_data(p):
    p.data.mul_(1.5)


def _through_numpy(p):
    p.detach().numpy()[...] *= 1.5


@pytest.mark.parametrize("change", [_in_place, _through_data, _through_numpy])
@pytest.mark.parametrize("name", PARAMETERS)
def test_changed_parameters_are_packed_again(name, change):
    block = block_of(32, ls_init_value=0.5)
    x = torch.randn(1, 6, 6, 32)
    with torch.no_grad():
        before = block(x)
        change(block.get_parameter(name))
        after = block(x)
        fresh = copy.deepcopy(block)(x)
    assert torch.equal(after, fresh)
    assert not torch.equal(after, before)


def test_replaced_and_loaded_parameters_are_packed_again():
    block, other = block_of(16), block_of(16)
    for p in other.parameters():
        p.data.add_(0.1)
    x = torch.randn(1, 6, 6, 16)
    with torch.inference_mode():
        expected = other(x)
        block(x)
        block.load_state_dict(other.state_dict())
        assert torch.equal(block(x), expected)
        block.fc2 = nn.Linear(block.fc2.in_features, 16)
        assert torch.equal(block(x), copy.deepcopy(block)(x))


def test_an_optimizer_step_between_two_inferences():
    block = block_of(16)
    optimizer = torch.optim.AdamW(block.parameters(), lr=0.1)
    x = torch.randn(1, 6, 6, 16)
    with torch.no_grad():
        before = block(x)
    block(x).square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        after = block(x)
        assert torch.equal(after, copy.deepcopy(block)(x))
    assert not torch.equal(after, before)


def test_packed_parameters_live_and_die_with_their_block():
    block = block_of(8)
    x = torch.randn(1, 3, 3, 8)
    with torch.no_grad():
        block(x)
    number = block.pack.number
    assert number in packs._packs
    twin, again = copy.deepcopy(block), pickle.loads(pickle.dumps(block))
    assert len({number, twin.pack.number, again.pack.number}) == 3
    assert not any("pack" in key for key in block.state_dict())
    del block
    assert number not in packs._packs


def test_several_threads_at_once():
    model = enlivened(mk.create_model("test_mambaout")).eval()
    images = [torch.randn(1, 3, 40 + 8 * i, 48) for i in range(6)]
    with torch.no_grad():
        expected = [copy.deepcopy(model)(image) for image in images]
    found = [None] * len(images)

    def work(i):
        with torch.no_grad():
            for _ in range(5):
                found[i] = model(images[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(images))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def _hook(block):
    block.fc1.register_forward_hook(lambda *_: None)


def _train_with_drop_path(block):
    block.drop_path = mk.block.DropPath(0.5)
    block.train()


@pytest.mark.parametrize(
    "unsuited",
    [
        _hook,
        _train_with_drop_path,
        lambda b: b.half(),
        lambda b: setattr(b, "norm", nn.BatchNorm2d(16)),
        lambda b: b.fc1.bfloat16(),
    ],
)
def test_what_it_does_not_compute_is_left_to_the_modules(unsuited):
    block = block_of(16)
    unsuited(block)
    with torch.no_grad():
        assert not whole_block.applies(block, torch.randn(1, 4, 4, 16, dtype=block.fc2.weight.dtype))


def test_it_is_for_inference_only():
    block = block_of(16)
    x = torch.randn(1, 4, 4, 16)
    assert not whole_block.applies(block, x)
    with torch.no_grad():
        assert whole_block.applies(block, x)
        with backends.force("reference"):
            assert not whole_block.applies(block, x)


def test_compiles_without_a_graph_break_and_follows_parameters():
    model = enlivened(mk.create_model("test_mambaout")).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        for batch in (2, 3, 5):
            images = torch.randn(batch, 3, 64, 64)
            assert torch.equal(compiled(images), model(images))
        for p in model.parameters():
            p.mul_(1.1)
        assert torch.equal(compiled(images), model(images))


@pytest.mark.parametrize("module", ["block", "downsample"])
def test_opcheck(module):
    x = torch.randn(1, 5, 6, 8)
    if module == "block":
        block = block_of(8)
        arguments = (x, *parameters_of(block), 1e-6, "gelu", False, block.pack.number)
        op = torch.ops.mambaout_kernels.gated_cnn_block
    else:
        conv = nn.Conv2d(8, 12, 3, 2, 1)
        arguments = (
            x,
            conv.weight,
            conv.bias,
            None,
            None,
            False,
            0.0,
            "gelu",
            torch.float32,
            False,
            packs.Pack().number,
        )
        op = torch.ops.mambaout_kernels.downsample
    arguments = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in arguments)
    torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


def test_bad_input():
    good = [torch.randn(1, 5, 6, 8), *parameters_of(block_of(8)), 1e-6, "gelu", False, 1]
    op = torch.ops.mambaout_kernels.gated_cnn_block
    for at, bad, error, message in (
        (0, torch.randn(5, 6, 8), ValueError, "x must be"),
        (0, torch.randn(1, 5, 6, 9), ValueError, "x must be"),
        (0, torch.randn(1, 5, 6, 8).half(), TypeError, "x must be float32 or bfloat16; got torch.float16"),
        (7, torch.randn(8, 20), ValueError, "fc2_weight must be"),
        (11, "relu", ValueError, "act must be one of gelu"),
        (5, torch.randn(8, 1, 4, 4), RuntimeError, "conv_weight must be"),
        (6, torch.randn(7), RuntimeError, "conv_bias must have 8 elements, has 7"),
    ):
        arguments = [*good]
        arguments[at] = bad
        with torch.no_grad(), pytest.raises(error, match=message):
            op(*arguments)
    conv = nn.Conv2d(8, 12, 3, 2, 1)
    with torch.no_grad(), pytest.raises(ValueError, match="weight must be"):
        torch.ops.mambaout_kernels.downsample(
            torch.randn(1, 5, 6, 8),
            torch.randn(12, 8, 5, 5),
            conv.bias,
            None,
            None,
            False,
            0.0,
            "gelu",
            torch.float32,
            False,
            2,
        )


def test_packed_parameters_of_another_instruction_set_are_refused():
    from mambaout_kernels.backends import cpu

    supported = cpu.module.supported_cpu_capabilities()
    if len(supported) < 2:
        pytest.skip("one instruction set here")
    parameters = parameters_of(block_of(8))
    before = cpu.module.cpu_capability()
    try:
        cpu.module.set_cpu_capability(supported[0])
        packed = cpu.pack_block(parameters, False, lambda count: torch.empty(count, dtype=torch.uint8))
        cpu.module.set_cpu_capability(supported[1])
        with pytest.raises(RuntimeError, match="packed is for another instruction set"):
            cpu.gated_cnn_block(torch.randn(1, 2, 2, 8), packed, 1e-6, "gelu")
        with pytest.raises(RuntimeError, match="packed must come from gated_cnn_block_pack_cpu"):
            cpu.gated_cnn_block(torch.randn(1, 2, 2, 8), torch.zeros(4, dtype=torch.uint8), 1e-6, "gelu")
    finally:
        cpu.module.set_cpu_capability(before)


def test_not_a_number_stays_where_it_is():
    block = block_of(16, kernel_size=3)
    x = torch.randn(1, 9, 9, 16)
    x[0, 4, 4, 3] = np.nan
    with torch.no_grad():
        y = block(x)
        with backends.force("reference"):
            expected = block(x)
    assert torch.equal(y.isnan(), expected.isnan())
