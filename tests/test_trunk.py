"""A trunk that was called before runs its ops without calling its modules; whatever has changed since takes effect."""

import copy
import gc
import pickle
import weakref
from functools import partial

import numerics
import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from watch import Watch

from mambaout_kernels import FusedGatedCNNBlock, MambaOut, backends, whole_block
from mambaout_kernels.backends import cpu

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def make_model(**overrides):
    torch.manual_seed(0)
    arguments = {"depths": (1, 2), "dims": (16, 24), "num_classes": 5, "drop_path_rate": 0.1, **overrides}
    model = MambaOut(**arguments).eval()
    for p in model.parameters():
        p.normal_(0.05, 0.2)
    return model


@pytest.fixture
def blocks_called(monkeypatch):
    """The blocks that were called as modules, by a list that grows."""
    called = []

    def counted(block, x, of=whole_block.again):
        called.append(block)
        return of(block, x)

    monkeypatch.setattr(whole_block, "again", counted)
    return called


def images(*shape):
    return torch.randn(shape or (2, 3, 33, 40))


def by_modules(model, x):
    with backends.force("reference"):
        return model.forward_features(x)


assert_alike = partial(numerics.assert_alike, share=1e-4)


def test_the_second_call_calls_no_block_and_has_the_same_bits(blocks_called):
    model, x = make_model(), images()
    first = model.forward_features(x)
    assert len(blocks_called) == 3
    assert torch.equal(model.forward_features(x), first)
    assert len(blocks_called) == 3
    for other in (images(), images(1, 3, 64, 17), x.contiguous(memory_format=torch.channels_last), x[:, :, ::2]):
        assert_alike(model.forward_features(other), by_modules(copy.deepcopy(model), other))
    assert torch.equal(model(x), model.forward_head(first))
    assert len(blocks_called) == 3 + 4 * 3  # of the copies


def write_in_place(model):
    model.stages[1][1].fc1.weight.mul_(-1)


def write_data(model):
    model.stages[0][0].conv.weight.data.mul_(-1)


def write_stem(model):
    model.downsample_layers[0].conv1.weight.mul_(-1)


def replace_block(model):
    model.stages[1][0] = make_model(depths=(1,), dims=(24,)).stages[0][0]


def append_block(model):
    model.stages[1].append(make_model(depths=(1,), dims=(24,)).stages[0][0])


def delete_block(model):
    del model.stages[1][0]


def replace_stage(model):
    model.stages[0] = nn.Sequential()


def replace_stages(model):
    model.stages = nn.ModuleList([nn.Sequential(), nn.Sequential()])


def append_relu(model):
    model.stages[0].append(nn.ReLU())


def hook_block(model):
    model.stages[0][0].register_forward_hook(lambda module, inputs, output: 2 * output)


def hook_stage(model):
    model.stages[0].register_forward_pre_hook(lambda module, inputs: (inputs[0].roll(1, -1),))


def hook_downsampling(model):
    model.downsample_layers[1].register_forward_hook(lambda module, inputs, output: output + 1)


def override_forward(model):
    model.stages[1][1].forward = lambda x: 3 * x


def override_run_stage(model):
    model.run_stage = lambda stage, x: 2 * type(model).run_stage(model, stage, x)


CHANGES = [
    write_in_place, write_data, write_stem, replace_block, append_block, delete_block, replace_stage, replace_stages,
    append_relu, hook_block, hook_stage, hook_downsampling, override_forward, override_run_stage,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_takes_effect_at_once_and_stays(change):
    model, x = make_model(), images()
    before = model.forward_features(x)
    assert torch.equal(model.forward_features(x), before)
    change(model)
    expected = by_modules(model, x)
    assert expected.shape != before.shape or not torch.allclose(expected, before, rtol=1e-3)
    for _ in range(3):
        assert_alike(model.forward_features(x), expected)


def test_a_hook_that_is_there_from_the_start_is_called_each_time():
    model, calls = make_model(), []
    model.stages[0].register_forward_hook(lambda module, inputs, output: calls.append(1))
    for _ in range(3):
        model.forward_features(images())
    assert len(calls) == 3


def test_a_hook_on_all_modules_is_called(blocks_called):
    model, x, calls = make_model(), images(), []
    first = model.forward_features(x)
    model.forward_features(x)
    handle = register_module_forward_hook(lambda module, inputs, output: calls.append(type(module)))
    try:
        model.forward_features(x)
    finally:
        handle.remove()
    assert calls.count(FusedGatedCNNBlock) == 3
    count = len(blocks_called)
    assert torch.equal(model.forward_features(x), first)
    assert len(blocks_called) == count


def test_another_forward_of_the_class_takes_effect(monkeypatch):
    model, x = make_model(), images()
    first = model.forward_features(x)
    model.forward_features(x)
    of = FusedGatedCNNBlock.forward
    monkeypatch.setattr(FusedGatedCNNBlock, "forward", lambda self, x: 2 * of(self, x))
    assert not torch.allclose(model.forward_features(x), first)


def test_a_norm_before_the_downsampling_is_not_left_out():
    model, x = make_model(downsample="conv_nf"), images()
    expected = by_modules(model, x)
    for _ in range(3):
        assert_alike(model.forward_features(x), expected)


def test_modules_of_others_are_called_each_time():
    class Doubled(FusedGatedCNNBlock):
        def forward(self, x):
            return super().forward(x) if self.plain else 2 * super().forward(x)

    model, x = make_model(), images()
    model.stages[1][1] = block = Doubled(24).eval()
    block.plain = True
    first = model.forward_features(x)
    assert torch.equal(model.forward_features(x), first)
    block.plain = False
    assert_alike(model.forward_features(x), 2 * first)


def test_modes_of_the_call_take_effect():
    model, x = make_model(), images()
    first = model.forward_features(x)
    model.forward_features(x)
    with torch.autocast("cpu", torch.bfloat16):
        low = model.forward_features(x)
        assert torch.equal(model.forward_features(x), low)
        assert not torch.equal(low.float(), first)  # maps are in bfloat16 whatever is multiplied
    assert torch.equal(model.forward_features(x), first)
    with torch.enable_grad():
        assert model.forward_features(x).requires_grad
    model.train()
    with torch.random.fork_rng():
        assert any(not torch.equal(model.forward_features(x), first) for _ in range(60))
    model.eval()
    assert torch.equal(model.forward_features(x), first)
    half = model.bfloat16().forward_features(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert torch.equal(model.forward_features(x.bfloat16()), half)


def test_one_who_watches_operators_sees_the_public_ones():
    model, x = make_model(), images()
    model.forward_features(x)
    model.forward_features(x)
    with Watch() as watch:
        model.forward_features(x)
    assert watch.names.count("mambaout_kernels::gated_cnn_block") == 3


def test_bad_images_are_still_refused():
    model = make_model()
    model.forward_features(images())
    with pytest.raises(ValueError, match=r"x must be \(N, 3, H, W\)"):
        model.forward_features(images(1, 4, 32, 32))


def test_copies_and_pickles_find_out_for_themselves(blocks_called):
    model, x = make_model(), images()
    first = model.forward_features(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        count = len(blocks_called)
        assert torch.equal(twin.forward_features(x), first)
        assert len(blocks_called) == count + 3
        twin.stages[0][0].fc2.weight.zero_()
        assert_alike(twin.forward_features(x), by_modules(twin, x))
    assert torch.equal(model.forward_features(x), first)


def test_an_error_in_between_leaves_nothing_behind():
    model, x = make_model(), images()

    def fail(module, inputs):
        raise RuntimeError("in between")

    handle = model.stages[1][1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in between"):
        model.forward_features(x)
    handle.remove()
    expected = by_modules(model, x)
    for _ in range(3):
        assert_alike(model.forward_features(x), expected)


def test_a_model_that_was_called_can_be_collected():
    model = make_model()
    for _ in range(3):
        model.forward_features(images())
    gone = weakref.ref(model), weakref.ref(model.stages[0][0])
    del model
    gc.collect()
    assert [ref() for ref in gone] == [None, None]
