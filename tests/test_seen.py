"""A block or a downsampling that was called before is known again; whatever has changed since takes effect."""

import copy

import pytest
import torch
from numerics import assert_alike
from torch import nn
from watch import Watch

from mambaout_kernels import FusedGatedCNNBlock, backends, create_model, downsample, whole_block
from mambaout_kernels.backends import cpu
from mambaout_kernels.models import Downsample, Stem

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def make_block():
    block = FusedGatedCNNBlock(12, ls_init_value=0.5, drop_path=0.1).eval()
    return randomized(block), torch.randn(2, 9, 8, 12)


def make_downsample():
    return randomized(Downsample(6, 10, False, nn.LayerNorm)), torch.randn(2, 9, 8, 6)


def make_stem():
    return randomized(Stem(3, 16, True, nn.LayerNorm, nn.GELU)), torch.randn(2, 3, 17, 20)


def randomized(module):
    for p in module.parameters():
        p.normal_(0.1, 0.3)
    return module


MAKERS = {"block": make_block, "downsample": make_downsample, "stem": make_stem}


@pytest.fixture
def known(monkeypatch):
    """How many calls were known again, by a list that grows."""
    found = []
    for module in (whole_block, downsample):

        def counted(*arguments, of=module.again):
            y = of(*arguments)
            if y is not None:
                found.append(y)
            return y

        monkeypatch.setattr(module, "again", counted)
    monkeypatch.setattr("mambaout_kernels.models.again", downsample.again)
    return found


def by_modules(module, x):
    """What PyTorch's own modules give, in a copy."""
    with backends.force("reference"):
        return copy.deepcopy(module)(x)


@pytest.mark.parametrize("kind", MAKERS)
def test_the_second_call_is_known_and_has_the_same_bits(kind, known):
    module, x = MAKERS[kind]()
    first = module(x)
    assert not known
    assert torch.equal(module(x), first)
    assert len(known) == (2 if kind == "stem" else 1)
    other = torch.randn_like(x)
    assert_alike(module(other), by_modules(module, other))
    assert torch.equal(module(x[:, :, 1:]), copy.deepcopy(module)(x[:, :, 1:]))
    assert torch.equal(module(x.transpose(0, 0)), first)


def replace_fc1(block):
    block.fc1 = randomized(nn.Linear(12, 64))


def replace_parameter(block):
    block.fc2.weight = nn.Parameter(torch.randn_like(block.fc2.weight))


def write_in_place(block):
    block.conv.bias.add_(1)


def write_data(block):
    block.fc1.weight.data.mul_(-1)


def write_numpy(block):
    block.norm.bias.numpy()[:] += 1


def swap_data(block):
    block.fc1.bias.data = torch.randn_like(block.fc1.bias)


def turn_data(block):
    """The same memory and number of versions, other rows."""
    weight = block.fc1.weight
    weight.data = weight.data.as_strided(weight.shape, (0, 1))


def add_hook(block):
    block.fc2.register_forward_hook(lambda module, inputs, output: 2 * output)


def add_pre_hook(block):
    block.norm.register_forward_pre_hook(lambda module, inputs: (inputs[0].roll(1, -1),))


def hook_act(block):
    block.act.register_forward_hook(lambda module, inputs, output: 2 * output)


def override_forward(block):
    block.fc1.forward = lambda x: torch.ones(*x.shape[:-1], 64)


def change_eps(block):
    block.norm.eps = 0.5


def change_padding_mode(block):
    block.conv.padding_mode = "circular"


def replace_act(block):
    block.act = nn.SiLU()


def replace_ls(block):
    block.ls = nn.Identity()


def parametrize(block):
    nn.utils.parametrizations.weight_norm(block.fc1)
    block.fc1.parametrizations.weight.original0.mul_(2)


@pytest.mark.parametrize(
    "change",
    [
        replace_fc1, replace_parameter, write_in_place, write_data, write_numpy, swap_data, turn_data, add_hook,
        add_pre_hook, hook_act, override_forward, change_eps, change_padding_mode, replace_act, replace_ls, parametrize,
    ],
)  # fmt: skip
def test_a_change_of_the_block_takes_effect(change, known):
    block, x = make_block()
    before = block(x)
    assert torch.equal(block(x), before)
    assert len(known) == 1
    change(block)
    after = block(x)
    assert not torch.allclose(after, before, atol=1e-3)
    with backends.force("reference"):
        assert_alike(after, block(x))


def test_removing_a_hook_takes_effect(known):
    block, x = make_block()
    first = block(x)
    handle = block.fc2.register_forward_hook(lambda module, inputs, output: 2 * output)
    assert not torch.allclose(block(x), first)
    handle.remove()
    assert torch.equal(block(x), first)
    assert torch.equal(block(x), first)


def test_stochastic_depth_takes_effect(known):
    block, x = make_block()
    block(x)
    block.train()
    assert any(not torch.allclose(block(x), by_modules(block.eval(), x)) for _ in range(50) if block.train())
    block.eval()
    assert_alike(block(x), by_modules(block, x))


@pytest.mark.parametrize("kind", ["downsample", "stem"])
def test_a_change_of_a_downsampling_takes_effect(kind, known):
    def change_act(module):
        if kind == "stem":
            module.act.approximate = "tanh"

    for change in (
        lambda m: next(m.parameters()).mul_(-1),
        lambda m: list(m.parameters())[-1].data.add_(1),
        lambda m: setattr(m, "norm" if kind == "downsample" else "norm2", nn.Identity()),
        lambda m: m.get_submodule("conv" if kind == "downsample" else "conv2").register_forward_hook(
            lambda module, inputs, output: 2 * output
        ),
        change_act,
    ):
        module, x = MAKERS[kind]()
        module(x)
        module(x)
        change(module)
        with backends.force("reference"):
            expected = module(x)
        assert_alike(module(x), expected)


def test_modes_of_the_call_take_effect(known):
    block, x = make_block()
    first = block(x)
    block(x)
    with torch.autocast("cpu", torch.bfloat16):
        low = block(x)
        assert torch.equal(low, first) != cpu.multiplies_bf16()
        assert_alike(low, by_modules(block, x), 3e-2)
        assert torch.equal(block(x), low)
    assert torch.equal(block(x), first)
    with torch.enable_grad():
        assert block(x).requires_grad
    with backends.force("reference"):
        count = len(known)
        block(x)
        assert len(known) == count
    assert torch.equal(block(x), first)
    half = block.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert torch.equal(block(x.bfloat16()), half)


def test_another_instruction_set_takes_effect(isa, known):
    block, x = make_block()
    for name in (isa, "portable", isa):
        cpu.module.set_cpu_capability(name)
        assert_alike(block(x), by_modules(block, x))
        assert_alike(block(x), by_modules(block, x))


def test_one_who_watches_operators_sees_the_public_one():
    block, x = make_block()
    block(x)
    block(x)
    with Watch() as watch:
        block(x)
    assert "mambaout_kernels::gated_cnn_block" in watch.names


def test_functional_call_takes_effect(known):
    block, x = make_block()
    block(x)
    block(x)
    others = {name: torch.randn_like(p) for name, p in block.named_parameters()}
    called = torch.func.functional_call(block, others, (x,))
    replaced = copy.deepcopy(block)
    replaced.load_state_dict(others)
    assert_alike(called, by_modules(replaced, x))


def test_copies_and_pickles_know_nothing(known):
    model = create_model("test_mambaout").eval()
    x = torch.randn(1, 3, 40, 40)
    model(x)
    model(x)
    count = len(known)
    assert count
    twin = copy.deepcopy(model)
    assert_alike(twin(x), model(x))
    for p in twin.parameters():
        p.mul_(1.5)
    assert not torch.allclose(twin(x), model(x))


def test_wrong_input_is_refused_as_before(known):
    block, x = make_block()
    block(x)
    block(x)
    with pytest.raises(ValueError, match="x must be"):
        block(x[..., :5])
    with pytest.raises(ValueError, match="x must be"):
        block(x[0])
