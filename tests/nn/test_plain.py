"""What is not the plain module that its name says is called, not replaced by an op."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from mambaout_kernels import FusedGatedCNNBlock, create_model, optimize_for_inference
from mambaout_kernels.nn.linear import linear

pytestmark = pytest.mark.filterwarnings("ignore:FusedGatedCNNBlock runs as")


class DropPath(nn.Module):
    def forward(self, x):
        return x * 0.5  # in evaluation too


class LayerScale(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.linspace(-1, 1, dim))

    def forward(self, x):
        return x * self.gamma.exp()


class SiLU(nn.Module):
    def forward(self, x):
        return torch.where(x > 8, 3 * x, F.silu(x))


class GELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


def make_block(**parts):
    torch.manual_seed(0)
    block = FusedGatedCNNBlock(8, kernel_size=3, ls_init_value=0.5).eval()
    with torch.no_grad():
        block.fc1.weight.mul_(20)  # beyond 8
    for name, part in parts.items():
        setattr(block, name, part)
    return block, 3 * torch.randn(1, 4, 4, 8)


def called(block, x):
    """The block's formula, by calls of its modules."""
    g, i, c = block.fc1(block.norm(x)).split(block.split_indices, dim=-1)
    c = block.conv(c.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    return block.drop_path(block.ls(block.fc2(block.act(g) * torch.cat((i, c), dim=-1)))) + x


def check(block, x, parts=1):
    """That both ways of inference, and training, call what they have to; `parts`: how many stay modules."""
    expected = called(block, x)
    torch.testing.assert_close(block(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(block(x), expected)
        inference = optimize_for_inference(block)
        torch.testing.assert_close(inference(x), expected)
    assert [part.fused for part in inference.report()] == [False] * parts, str(inference.report())


@pytest.mark.parametrize(
    "part",
    [{"drop_path": DropPath()}, {"ls": LayerScale(8)}, {"act": SiLU()}, {"act": GELU()}],
    ids=lambda part: type(next(iter(part.values()))).__name__,
)
def test_a_class_is_not_known_by_its_name(part, products_of_pytorch):
    check(*make_block(**part))


def test_a_class_that_stands_where_timms_would_is_known():
    layers = pytest.importorskip("timm.layers")
    block, x = make_block(act=layers.GELUTanh(), ls=layers.LayerScale(8, 0.25), drop_path=layers.DropPath(0.5))
    block.norm = layers.LayerNorm(8)
    block.eval()
    inference = optimize_for_inference(block)
    assert all(part.fused for part in inference.report()), str(inference.report())
    with torch.no_grad():
        torch.testing.assert_close(inference(x), called(block, x), rtol=1e-4, atol=1e-4)


def doubled(forward):
    def twice(self, *args):
        return 2 * forward(self, *args)

    return twice


@pytest.mark.parametrize("wrapped", [False, True], ids=["another function", "a decorated one"])
@pytest.mark.parametrize("kind", [nn.Linear, nn.LayerNorm, nn.GELU, nn.Conv2d, nn.Identity])
def test_a_forward_that_was_replaced_on_the_class_is_called(monkeypatch, kind, wrapped, products_of_pytorch):
    block, x = make_block(drop_path=nn.Identity())
    before = block(x)
    forward = kind.forward
    replacement = functools.wraps(forward)(doubled(forward)) if wrapped else doubled(forward)
    monkeypatch.setattr(kind, "forward", replacement)
    if kind is nn.Identity:
        replacement_of_identity = block.drop_path(x)
        assert not torch.equal(replacement_of_identity, x)
    check(block, x)
    monkeypatch.undo()
    torch.testing.assert_close(block(x), before)
    assert all(part.fused for part in optimize_for_inference(block).report())


class Linear(nn.Module):
    def forward(self, x):
        return 2 * F.linear(x, self.weight, self.bias)


@pytest.mark.parametrize(("kind", "other"), [(nn.Linear, Linear), (nn.GELU, nn.Softsign)], ids=["by name", "by module"])
def test_a_forward_of_another_class_is_called(monkeypatch, kind, other, products_of_pytorch):
    block, x = make_block()
    before = block(x)
    monkeypatch.setattr(kind, "forward", other.forward)
    check(block, x)
    assert not torch.allclose(block(x), before)


def test_a_call_that_was_replaced_on_all_modules_is_made(monkeypatch):
    block, x = make_block()
    seen = []
    call = nn.Module.__call__

    def watching(self, *args, **kwargs):
        seen.append(type(self))
        return call(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "__call__", watching)
    block(x)
    assert {nn.LayerNorm, nn.Linear, nn.GELU, nn.Conv2d} <= set(seen)


HOOKS = ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"]


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("name", ["norm", "fc1", "act", "conv", "fc2", "ls"])
def test_every_hook_of_a_part_is_called(name, hook):
    block, x = make_block()
    seen = []
    handle = getattr(block.get_submodule(name), f"register_{hook}")(lambda *_: seen.append(1))
    block(x.requires_grad_()).sum().backward()
    assert seen == [1]
    handle.remove()
    block(x).sum().backward()
    assert seen == [1]


@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_of_all_modules_are_called_for_every_part(hook):
    block, x = make_block()
    seen = []
    register = getattr(nn.modules.module, f"register_module_{hook}")
    handle = register(lambda module, *_: seen.append(type(module).__name__))
    try:
        block(x.requires_grad_()).sum().backward()
    finally:
        handle.remove()
    assert {"LayerNorm", "Linear", "GELU", "Conv2d", "LayerScale", "FusedGatedCNNBlock"} <= set(seen)
    assert seen.count("Linear") == 2


def test_hooks_of_all_modules_are_compiled_too():
    block, x = make_block()
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, y: 2 * y if type(module) is nn.GELU else y
    )
    try:
        expected = block(x)
        compiled = torch.compile(block, backend="eager")
        torch.testing.assert_close(compiled(x), expected)
    finally:
        handle.remove()
    assert not torch.allclose(block(x), expected)
    torch.testing.assert_close(compiled(x), block(x))


def test_a_compiled_and_an_exported_block_are_fused():
    block, x = make_block()
    found = []

    def see(graph, _):
        found.append(str(graph.graph))
        return graph

    torch.compile(block, backend=see, fullgraph=True)(x)
    found.append(str(torch.export.export(block, (x,)).graph))
    assert all("gated_dwconv" in graph for graph in found)
    assert len(found) == 2


class Doubling(TorchFunctionMode):
    """What one function of PyTorch gives, twice."""

    def __init__(self, doubled):
        super().__init__()
        self.doubled = doubled

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        return 2 * result if function is self.doubled else result


@pytest.mark.parametrize("gradients", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("function", [F.linear, F.gelu, torch.conv2d, F.layer_norm], ids=lambda f: f.__name__)
def test_a_function_mode_sees_what_is_called(function, gradients):
    block, x = make_block()
    with torch.set_grad_enabled(gradients):
        before = block(x)
        with Doubling(function):
            torch.testing.assert_close(block(x), called(block, x))
            assert not torch.allclose(block(x), before)
        torch.testing.assert_close(block(x), before)


def test_the_mode_of_a_default_device_changes_nothing():
    block, _ = make_block()
    with torch.device("cpu"):
        assert block.unfused_reason() is None


class TwiceAsLarge(torch.Tensor):
    """A weight whose linear product is twice its own, as a quantized weight's is not that of its bytes."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is F.linear:
            return F.linear(*(2 * a.as_subclass(torch.Tensor) if isinstance(a, TwiceAsLarge) else a for a in args))
        if function is torch.conv2d:
            args = [2 * a.as_subclass(torch.Tensor) if isinstance(a, TwiceAsLarge) else a for a in args]
            return function(*args, **(kwargs or {}))
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.mark.parametrize("name", ["fc1.weight", "fc2.weight", "conv.weight", "fc1.bias", "conv.bias"])
def test_weights_that_are_no_plain_tensors_are_left_to_pytorch(name):
    block, x = make_block()
    module_name, parameter = name.split(".")
    module = block.get_submodule(module_name)
    old = getattr(module, parameter).detach()
    setattr(module, parameter, nn.Parameter(old.as_subclass(TwiceAsLarge), requires_grad=False))
    with torch.no_grad():
        check(block, x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_dynamically_quantized_block_runs():
    block, x = make_block()
    quantized = torch.ao.quantization.quantize_dynamic(block, {nn.Linear}, dtype=torch.qint8)
    assert type(quantized.fc1) is not nn.Linear
    with torch.no_grad():
        check(quantized, x)


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_sparse_weights_are_left_to_pytorch():
    block, x = make_block()
    block.fc1.weight = nn.Parameter(block.fc1.weight.detach().to_sparse_csr(), requires_grad=False)
    with torch.no_grad():
        check(block, x)


@pytest.mark.parametrize("shape", [(), (-1,), (-1, 1), (1, -1)], ids=str)
@pytest.mark.parametrize("name", ["fc1.weight", "fc2.weight", "conv.weight", "norm.weight", "ls.gamma", "fc1.bias"])
def test_weights_of_another_shape_are_an_error_of_pytorchs(name, shape):
    """Or computed as PyTorch does, which broadcasts some: never read as if they had the right shape."""
    block, x = make_block()
    module_name, parameter = name.split(".")
    module = block.get_submodule(module_name)
    old = getattr(module, parameter).detach()
    setattr(module, parameter, nn.Parameter(old.flatten()[0].clone() if shape == () else old.reshape(shape)))
    if getattr(module, parameter).shape == old.shape:
        return
    with torch.no_grad():
        reason = optimize_for_inference(block).report()[0].reason
        assert reason is not None
        try:
            expected = called(block, x)
        except (RuntimeError, IndexError):
            with pytest.raises((RuntimeError, ValueError)):
                block(x)
        else:
            torch.testing.assert_close(block(x), expected)


def test_a_vector_as_weight_is_multiplied_as_pytorch_does():
    fc, x = nn.Linear(8, 1, bias=False), torch.randn(3, 8)
    fc.weight = nn.Parameter(torch.randn(8))
    assert linear(fc, x).shape == (3,)
    torch.testing.assert_close(linear(fc, x), fc(x))


def test_without_biases_a_block_is_fused():
    block, x = make_block()
    block.fc1.bias = block.fc2.bias = block.norm.bias = None
    inference = optimize_for_inference(block)
    assert all(part.fused for part in inference.report()), str(inference.report())
    with torch.no_grad():
        torch.testing.assert_close(inference(x), called(block, x), rtol=1e-4, atol=1e-4)


def test_timms_fast_norm_is_called(monkeypatch, products_of_pytorch):
    norm = pytest.importorskip("timm.layers.norm")
    block, x = make_block()
    block.norm = norm.LayerNorm(8)
    block.norm._fast_norm = True
    monkeypatch.setattr(norm, "fast_layer_norm", lambda *args: 2 * F.layer_norm(*args))
    check(block, x)


def test_a_filter_of_another_size_than_the_convs_is_not_padded_as_its_own():
    block, x = make_block()
    block.conv.weight = nn.Parameter(torch.randn(8, 1, 5, 5))
    with pytest.raises(RuntimeError):
        called(block, x)
    with pytest.raises(RuntimeError):
        block(x)


@pytest.mark.parametrize(
    "change", [{"stride": (2, 2)}, {"dilation": (2, 2)}, {"padding": (2, 2)}, {"groups": 4}], ids=str
)
def test_a_conv_whose_map_has_another_size_is_an_error(change):
    block, x = make_block()
    vars(block.conv).update(change)
    for call in (lambda: called(block, x), lambda: block(x)):
        with pytest.raises(RuntimeError):
            call()


def test_a_conv_without_bias_is_composed(products_of_pytorch):
    block, x = make_block()
    block.conv = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
    check(block, x)


def test_without_conv_channels_a_block_is_fused():
    assert FusedGatedCNNBlock(8, conv_ratio=0).unfused_reason() is None


def test_a_filter_that_is_too_large_for_the_op_is_composed(products_of_pytorch):
    block, x = make_block()
    block.conv = nn.Conv2d(8, 8, 33, padding=16, groups=8)
    check(block, x)


class Wrapper(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_wrapped_stage_runs(checkpointing):
    torch.manual_seed(0)
    model = create_model("mambaout_femto", depths=(1, 2, 1, 1), dims=(8, 8, 16, 16))
    wrapped = copy.deepcopy(model)
    wrapped.stages[1] = Wrapper(wrapped.stages[1])
    wrapped.set_grad_checkpointing(checkpointing)
    x = torch.randn(1, 3, 33, 33)
    for network in (model, wrapped):
        network(x).square().sum().backward()
    for p, q in zip(model.parameters(), wrapped.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    inference = optimize_for_inference(wrapped.eval())
    torch.testing.assert_close(inference(x), model.eval()(x), rtol=1e-4, atol=1e-4)
    assert all(part.fused for part in inference.report())
