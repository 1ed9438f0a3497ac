"""recompute=True: the same bits as without, in training alone, for the memory of x."""

import copy
import io
from collections import Counter

import pytest
import torch
from numerics import assert_alike
from test_block import make_block, make_x, run
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mambaout_kernels import VARIANTS, MambaOut, backends, create_model, optimize_for_inference, patch, unpatch
from mambaout_kernels.nn import alignment
from mambaout_kernels.nn import block as block_module
from mambaout_kernels.nn.block import FusedGatedCNNBlock


class Calls(TorchDispatchMode):
    """Of operators, by their name without overload."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def both(block, x, context=None, seed=3):
    """Output and gradients without and with it, of the same random numbers."""
    results = []
    for recompute in (False, True):
        for module in block.modules():
            if isinstance(module, FusedGatedCNNBlock):
                module.recompute = recompute
        torch.manual_seed(seed)
        results.append(run(block, block, x, context))
        results[-1]["random"] = torch.rand(3)  # what is drawn next
    return results


def assert_same_bits(results):
    without, found = results
    assert without.keys() == found.keys()
    for name, result in without.items():
        assert torch.equal(found[name], result), name


@pytest.fixture
def op_calls(monkeypatch):
    calls, op = [], block_module.gated_dwconv
    monkeypatch.setattr(block_module, "gated_dwconv", lambda *args: calls.append(args) or op(*args))
    return calls


class Noisy(nn.Sequential):
    """A norm that draws random numbers."""

    def __init__(self, dim):
        super().__init__(nn.LayerNorm(dim), nn.Dropout(0.3))


BLOCKS = {
    "plain": {},
    "drop_path": {"drop_path": 0.5},
    "layer scale and drop_path": {"ls_init_value": 0.5, "drop_path": 0.3},
    "dropout within": {"norm_layer": Noisy, "drop_path": 0.5},
    "no conv channels": {"conv_ratio": 0.0},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", BLOCKS)
def test_same_bits(kind, dtype, op_calls):
    block = make_block(**BLOCKS[kind]).to(dtype)
    assert_same_bits(both(block, make_x(n=6).to(dtype)))
    assert len(op_calls) == 3


@pytest.mark.parametrize("kind", BLOCKS)
def test_same_bits_under_autocast(kind):
    block = make_block(**BLOCKS[kind])
    assert_same_bits(both(block, make_x(n=6), lambda: torch.autocast("cpu", torch.bfloat16)))


def test_same_bits_of_odd_widths(monkeypatch):
    monkeypatch.setattr(alignment, "prefers_alignment", lambda device_type: True)
    assert_same_bits(both(make_block(13), make_x(13)))


def test_same_bits_of_an_unfused_block():
    with pytest.warns(RuntimeWarning, match="act RReLU"):
        block_module._warn_once.cache_clear()
        block = make_block(act_layer=nn.RReLU)  # draws in training
    assert_same_bits(both(block, make_x()))


def test_same_bits_of_a_model_on_the_reference():
    model = create_model("test_mambaout", num_classes=3, drop_path_rate=0.5, drop_rate=0.3)
    with backends.force("reference"):
        without, found = both(model, torch.randn(4, 3, 40, 40))
    assert_same_bits((without, found))


@pytest.mark.parametrize("kind", ["plain", "drop_path"])
def test_fc2_is_not_multiplied_again(kind):
    """Where PyTorch multiplies: it keeps y before it does. The op of float32 on the CPU after it has."""
    block = make_block(**BLOCKS[kind]).bfloat16()
    x = make_x().bfloat16().requires_grad_()
    counts = []
    for recompute in (False, True):
        block.recompute = recompute
        with Calls() as calls:
            block(x).sum().backward()
        counts.append(calls.count)
    more = counts[1] - counts[0]
    products = {name: n for name, n in more.items() if name in ("addmm", "mm", "linear", "matmul", "bmm")}
    assert sum(products.values()) == 1, products  # fc1
    assert more["gated_dwconv"] == 1
    assert more["gated_dwconv_backward"] == 0
    assert more["bernoulli_"] == 0


def kept_bytes(block, x):
    """Of what is kept for backward, parameters apart."""
    sizes, held = {}, []
    own = {p.untyped_storage().data_ptr() for p in block.parameters()}

    def pack(t):
        held.append(t)
        sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        block(x)
    return sum(size for address, size in sizes.items() if address not in own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_keeps_x_alone(dtype):
    block = FusedGatedCNNBlock(24).to(dtype)
    x = torch.randn(2, 8, 8, 24, dtype=dtype, requires_grad=True)
    pixels, hidden = 2 * 8 * 8, block.split_indices[0]
    assert kept_bytes(block, x) == pixels * (24 + 3 * hidden + 2) * dtype.itemsize
    for more in ({}, {"ls_init_value": 0.5}):
        block = FusedGatedCNNBlock(24, recompute=True, **more).to(dtype)
        assert kept_bytes(block, x) == pixels * 24 * dtype.itemsize


def test_of_no_effect_in_evaluation_and_without_gradients(op_calls, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError

    block = make_block(recompute=True)
    x = make_x().requires_grad_()
    monkeypatch.setattr(block_module, "checkpoint", refuse)
    with torch.no_grad():
        block(x)
    block.eval()(x).sum().backward()
    assert len(op_calls) == 2
    with pytest.raises(AssertionError):
        block.train()(x)


def test_only_the_gradients_asked_for():
    block = make_block(recompute=True)
    block.requires_grad_(False)
    block.fc2.requires_grad_(True)
    block(make_x()).sum().backward()
    assert [name for name, p in block.named_parameters() if p.grad is not None] == ["fc2.weight", "fc2.bias"]
    frozen = make_block(recompute=True).requires_grad_(False)
    assert not frozen(make_x()).requires_grad


@pytest.mark.parametrize("training_call", ["twice", "retained", "double"])
def test_backward_more_than_once(training_call):
    results = []
    for recompute in (False, True):
        block = make_block(recompute=recompute).double()
        x = make_x().double().requires_grad_()
        y = block(x)
        if training_call == "twice":
            y = block(y)
        if training_call == "double":
            (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
            y = dx
        y.square().sum().backward(retain_graph=training_call == "retained")
        if training_call == "retained":
            y.sum().backward()
        results.append([x.grad, *(p.grad for p in block.parameters())])
    for without, found in zip(*results, strict=True):
        assert (without is None) == (found is None)
        assert without is None or torch.equal(without, found)


def test_a_model_with_checkpointing_too_recomputes_once(op_calls):
    x = torch.randn(2, 3, 32, 32)
    counts = []
    for recompute, checkpointing in ((False, False), (True, False), (False, True), (True, True)):
        torch.manual_seed(0)
        model = create_model("test_mambaout", num_classes=3, recompute=recompute, drop_path_rate=0.2)
        model.set_grad_checkpointing(checkpointing)
        op_calls.clear()
        torch.manual_seed(1)
        result = run(model, model, x)
        counts.append(len(op_calls))
        if not (recompute or checkpointing):
            expected = result
        assert_same_bits((expected, result))
    assert counts == [6, 12, 12, 12]


def test_checkpointing_in_evaluation_is_not_lost(op_calls):
    model = create_model("test_mambaout", num_classes=3, recompute=True).eval()
    model.set_grad_checkpointing()
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert len(op_calls) == 12


def test_wrapped_in_checkpoint_as_well():
    from torch.utils.checkpoint import checkpoint

    block, x = make_block(recompute=True, drop_path=0.5), make_x(n=6)
    torch.manual_seed(2)
    expected = run(block, block, x)
    torch.manual_seed(2)
    assert_same_bits((expected, run(lambda x: checkpoint(block, x, use_reentrant=False), block, x)))


def test_is_no_part_of_the_architecture():
    model = create_model("test_mambaout", num_classes=3, recompute=True)
    assert all(block.recompute for stage in model.stages for block in stage)
    assert "recompute" not in model.architecture()
    assert model.architecture() == create_model("test_mambaout", num_classes=3).architecture()
    other = MambaOut(**model.architecture())
    other.load_state_dict(model.state_dict(), strict=True)
    assert not other.stages[0][0].recompute
    assert "recompute" not in VARIANTS["test_mambaout"].__dict__
    fast = optimize_for_inference(model)
    with torch.no_grad():
        assert_alike(fast(torch.ones(1, 3, 32, 32)), model.eval()(torch.ones(1, 3, 32, 32)))


def test_copies_and_repr():
    block = make_block(recompute=True)
    file = io.BytesIO()
    torch.save(block, file)
    file.seek(0)
    for other in (copy.deepcopy(block), torch.load(file, weights_only=False)):
        assert other.recompute
    assert "fused=True, recompute=True" in repr(block)
    assert "recompute" not in repr(make_block())
    assert list(block.state_dict()) == list(make_block().state_dict())


def test_patched_blocks(op_calls):
    timm = pytest.importorskip("timm")
    model = patch(timm.create_model("test_mambaout", num_classes=3, drop_path_rate=0.3))
    assert not any(getattr(module, "recompute", False) for module in model.modules())
    op_calls.clear()
    assert_same_bits(both(model, torch.randn(4, 3, 32, 32)))
    assert len(op_calls) == 6 + 12
    unpatch(model)(torch.randn(4, 3, 32, 32)).sum().backward()


@pytest.mark.parametrize("kind", ["plain", "drop_path", "layer scale and drop_path"])
def test_compiles_without_graph_break(kind):
    results = []
    for recompute in (False, True):
        counter = pytest.importorskip("torch._dynamo.testing").CompileCounterWithBackend("aot_eager")
        torch._dynamo.reset()
        block = make_block(recompute=recompute, **BLOCKS[kind])
        compiled = torch.compile(block, fullgraph=True, backend=counter)
        for n in (4, 2):
            x = make_x(n=n)
            torch._dynamo.mark_dynamic(x, 0)
            torch.manual_seed(4)
            y = compiled(x)
            y.square().mean().backward()
        assert counter.frame_count == 1
        results.append([y, *(p.grad for p in block.parameters())])
    torch._dynamo.reset()
    for without, found in zip(*results, strict=True):
        assert torch.equal(without, found)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_wrapped_for_several_processes(kind, tmp_path):
    """With one process; tests/test_distributed.py has two, and checkpointing around blocks."""
    if not torch.distributed.is_gloo_available():
        pytest.skip("torch without gloo")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        results = []
        for recompute in (False, True):
            torch.manual_seed(0)
            model = create_model("test_mambaout", num_classes=3, recompute=recompute, drop_path_rate=0.2)
            if kind == "ddp":
                wrapped = nn.parallel.DistributedDataParallel(model)
            else:
                from torch.distributed.fsdp import fully_shard

                for stage in model.stages:
                    for block in stage:
                        fully_shard(block)
                wrapped = fully_shard(model)
            for seed in range(2):
                torch.manual_seed(seed)
                wrapped(torch.randn(4, 3, 32, 32)).square().mean().backward()
            gradients = [p.grad for p in wrapped.parameters()]
            results.append([g.full_tensor() if kind == "fsdp" else g for g in gradients])
            del wrapped, model, gradients
        for without, found in zip(*results, strict=True):
            assert torch.equal(without, found)
    finally:
        torch.distributed.destroy_process_group()
