"""A model in evaluation obeys every way of writing weights and settings, on the next call.

PyTorch does not count writes through `.data`, NumPy or inference mode, so this holds only where nothing that is derived
from a weight is kept. As a script it prints how often the next call obeyed:

    python tests/nn/test_weights_as_they_lie.py [trials]
"""

import copy
import functools
import sys
import threading
import warnings

import pytest
import torch
from torch import nn

from mambaout_kernels import FusedGatedCNNBlock, backends, create_model, patch

SMALL = {"num_classes": 10, "act_layer": "gelu", "depths": (1, 1), "dims": (16, 24)}


def make_block():
    return FusedGatedCNNBlock(24, ls_init_value=0.5)


def make_ours():
    return create_model("test_mambaout", **SMALL)


def make_timms():
    return patch(pytest.importorskip("timm").create_model("test_mambaout", **SMALL))


MODELS = {"block": make_block, "ours": make_ours, "timm's": make_timms}


@functools.cache
def original(kind):
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape) / (p[0].numel() ** 0.5 if p.ndim > 1 else 5) + (1 if p.ndim == 1 else 0))
    return model


def fresh(kind):
    model = MODELS[kind]().eval()
    model.load_state_dict(original(kind).state_dict())
    return model


def images(kind):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*((2, 9, 8, 24) if kind == "block" else (2, 3, 48, 40)), generator=generator)


def block_of(model):
    return next(module for module in model.modules() if isinstance(module, FusedGatedCNNBlock))


def other(p):
    return torch.randn_like(p) / p[0].numel() ** 0.5


# Each way in: a function of the model and the number of the trial. What it gives back, if anything, undoes it.


def row(block, trial):
    return block.fc1.weight[trial * 7 % block.fc1.out_features]


def one_row_through_data(model, trial):
    row(block_of(model), trial).data.add_(1)


def one_row_through_numpy(model, trial):
    row(block_of(model), trial).detach().numpy()[:] += 1


def one_row_in_place(model, trial):
    with torch.no_grad():
        row(block_of(model), trial).add_(1)


def one_number_through_data(model, trial):
    weight = block_of(model).fc2.weight.data
    weight.view(-1)[trial * 13 % weight.numel()] += 20


def all_through_data(model, trial):
    for p in model.parameters():
        p.data.mul_(-1)


def other_data(model, trial):
    weight = block_of(model).fc1.weight
    weight.data = other(weight)


def turned_data(model, trial):
    """The same memory, other strides."""
    bias = block_of(model).fc1.bias
    bias.data = bias.data.as_strided(bias.shape, (0,), trial % 8)


def set_(model, trial):
    weight = block_of(model).fc2.weight
    with torch.no_grad():
        weight.set_(other(weight))


def swap_tensors(model, trial):
    weight = block_of(model).fc1.weight
    torch.utils.swap_tensors(weight, nn.Parameter(other(weight)))


def load(model, trial, **options):
    state = {name: t.clone() for name, t in model.state_dict().items()}
    name = next(name for name in state if name.endswith("fc1.weight"))
    state[name][trial * 7 % len(state[name])] += 1
    model.load_state_dict(state, **options)


def load_assigned(model, trial):
    load(model, trial, assign=True)


def step(model, optimizer):
    with torch.enable_grad():
        x = images("block" if isinstance(model, FusedGatedCNNBlock) else "ours")
        model(x).square().mean().backward()
    optimizer.step()


def adamw_fused(model, trial):
    step(model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=True))


def adamw_foreach(model, trial):
    step(model, torch.optim.AdamW(model.parameters(), lr=0.1, foreach=True))


def sgd_of_one_weight(model, trial):
    step(model, torch.optim.SGD([block_of(model).fc2.weight], lr=10.0))


def averaged(model, trial):
    average = torch.optim.swa_utils.AveragedModel(model, avg_fn=lambda a, p, n: p)
    for p in average.module.parameters():
        p.data.mul_(-1)
    torch.utils.swap_tensors(block_of(model).fc1.weight, block_of(average.module).fc1.weight)


def become_inference_tensors(model):
    with torch.inference_mode():
        block = block_of(model)
        block.fc1.weight = nn.Parameter(block.fc1.weight.detach().clone(), requires_grad=False)


def inference_tensors(model, trial):
    with torch.inference_mode():
        block_of(model).fc1.weight[trial * 7 % block_of(model).fc1.out_features].add_(1)


def in_a_thread(work):
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def another_thread(model, trial):
    in_a_thread(lambda: one_row_through_data(model, trial)).join()


def another_thread_during_calls(model, trial):
    stop = threading.Event()

    def write():
        i = trial
        while True:
            one_row_through_data(model, i)
            i += 1
            if stop.is_set():
                return

    thread = in_a_thread(write)
    for _ in range(3):
        model(images("block" if isinstance(model, FusedGatedCNNBlock) else "ours"))
    stop.set()
    thread.join()


def modules_replaced(model, trial):
    block = block_of(model)
    block._modules["fc1"] = nn.Linear(block.fc1.in_features, block.fc1.out_features)


def parameters_replaced(model, trial):
    fc2 = block_of(model).fc2
    fc2._parameters["weight"] = nn.Parameter(other(fc2.weight))


def bias_removed(model, trial):
    block_of(model).fc1.bias = None


def become_torchs_gelu(model):
    for module in model.modules():
        if isinstance(module, FusedGatedCNNBlock):
            module.act = nn.GELU()


def act_approximate(model, trial):
    for module in model.modules():
        if isinstance(module, FusedGatedCNNBlock):
            module.act.approximate = "tanh"


def act_replaced(model, trial):
    block_of(model).act = nn.SiLU()


def act_of_others(model, trial):
    block_of(model).act.inner = nn.ReLU()


class GELU(nn.Module):
    """By name what the op computes; as long as `inner` does."""

    def __init__(self):
        super().__init__()
        self.inner = nn.GELU()

    def forward(self, x):
        return self.inner(x)


def become_of_others(model):
    block_of(model).act = GELU()


def padding_mode(model, trial):
    block_of(model).conv.padding_mode = "circular"


def dilation(model, trial):
    conv = block_of(model).conv
    conv.dilation, conv.padding = (2, 2), (6, 6)


def conv_weight(model, trial):
    conv = block_of(model).conv
    conv.weight = nn.Parameter(other(conv.weight))


def norm_eps(model, trial):
    block_of(model).norm.eps = 0.5


def layer_scale(model, trial):
    block_of(model).ls.gamma.data[trial % 16] += 1


def layer_scale_removed(model, trial):
    block_of(model).ls = nn.Identity()


def hook_added(model, trial):
    return block_of(model).fc1.register_forward_hook(lambda module, args, output: output + 1).remove


def pre_hook_added(model, trial):
    return block_of(model).norm.register_forward_pre_hook(lambda module, args: (args[0].roll(1, -1),)).remove


def hook_of_all_modules(model, trial):
    register = nn.modules.module.register_module_forward_hook
    return register(lambda module, args, output: output * 2 if isinstance(module, nn.LayerNorm) else None).remove


def become_hooked(model):
    model.handle = block_of(model).fc2.register_forward_hook(lambda module, args, output: 2 * output)


def hook_removed(model, trial):
    model.handle.remove()


def forward_replaced(model, trial):
    fc2 = block_of(model).fc2
    fc2.forward = lambda x: 2 * nn.functional.linear(x, fc2.weight, fc2.bias)


def parametrized(model, trial):
    nn.utils.parametrizations.weight_norm(block_of(model).fc1)
    block_of(model).fc1.parametrizations.weight.original0.data.mul_(2)


WAYS = [
    one_row_through_data, one_row_through_numpy, one_row_in_place, one_number_through_data, all_through_data,
    other_data, turned_data, set_, swap_tensors, load, load_assigned, adamw_fused, adamw_foreach, sgd_of_one_weight,
    averaged, inference_tensors, another_thread, another_thread_during_calls, modules_replaced, parameters_replaced,
    bias_removed, act_approximate, act_replaced, act_of_others, padding_mode, dilation, conv_weight, norm_eps,
    layer_scale, layer_scale_removed, hook_added, pre_hook_added, hook_of_all_modules, hook_removed, forward_replaced,
    parametrized,
]  # fmt: skip
BEFORE = {
    act_approximate: become_torchs_gelu,
    inference_tensors: become_inference_tensors,
    act_of_others: become_of_others,
    hook_removed: become_hooked,
}

# Of the largest value: two orders of float32 sums through some blocks differ by 1e-6; what is written changes more.
ALIKE = 1e-5


def distance(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def by_modules(model, x):
    with backends.force("reference"):
        return model(x)


def try_once(kind, way, trial):
    """How far the next call is from what PyTorch's modules compute, before and after the write; and what it changed."""
    model, x = fresh(kind), images(kind)
    BEFORE.get(way, lambda model: None)(model)
    with torch.no_grad():
        for _ in range(3):
            before = model(x)
        first = distance(before, by_modules(model, x))
        undo = way(model, trial)
        try:
            after, expected = model(x), by_modules(model, x)
        finally:
            if undo is not None:
                undo()
        undone = distance(model(x), by_modules(model, x))
    return max(first, undone), distance(after, expected), distance(before, expected)


@pytest.mark.filterwarnings("ignore:FusedGatedCNNBlock runs as separate:RuntimeWarning")
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("kind", MODELS)
def test_the_next_call_obeys(kind, way):
    for trial in range(12 if way is one_row_through_data else 2):
        around, after, change = try_once(kind, way, trial)
        assert change > 3 * ALIKE, "nothing was changed that could be seen"
        assert after <= ALIKE
        assert around <= ALIKE


@pytest.mark.parametrize("kind", MODELS)
def test_functional_call_obeys_and_leaves_the_model_alone(kind):
    model, x = fresh(kind), images(kind)
    with torch.no_grad():
        before = model(x)
        others = {name: -p for name, p in model.named_parameters()}
        called = torch.func.functional_call(model, others, (x,))
        with backends.force("reference"):
            expected = torch.func.functional_call(model, others, (x,))
        assert distance(called, before) > 3 * ALIKE
        assert distance(called, expected) <= ALIKE
        assert torch.equal(model(x), before)


def shallow(model):
    twin = copy.copy(model)
    twin._parameters, twin._modules = dict(model._parameters), {k: shallow(m) for k, m in model._modules.items()}
    return twin


def replica(model):
    """As torch.nn.parallel.replicate makes one: of attributes instead of parameters."""
    twin = model._replicate_for_data_parallel()
    for name, p in model._parameters.items():
        setattr(twin, name, p if p is None else p.detach().clone())
    for name, module in model._modules.items():
        setattr(twin, name, replica(module))
    return twin


@pytest.mark.parametrize("twin_of", [shallow, replica])
@pytest.mark.parametrize("kind", MODELS)
def test_a_copy_computes_with_its_own_weights(kind, twin_of):
    model, x = fresh(kind), images(kind)
    with torch.no_grad():
        before = model(x)
        twin = twin_of(model)
        fc1 = block_of(twin).fc1
        if twin_of is shallow:
            fc1._parameters["weight"] = nn.Parameter(other(fc1.weight))
        else:
            fc1.weight.copy_(other(fc1.weight))
        expected = by_modules(twin, x)
        assert distance(twin(x), expected) <= ALIKE
        assert distance(twin(x), before) > 3 * ALIKE
        assert torch.equal(model(x), before)


@pytest.mark.parametrize("kind", ["ours", "timm's"])
@pytest.mark.parametrize("part", ["stem", "downsampling", "head"])
def test_the_parts_around_the_blocks_obey_too(kind, part):
    names = {
        "stem": ("0.conv1", "stem.conv1"),
        "downsampling": ("s.1.conv", "1.downsample.conv"),
        "head": ("head.f",) * 2,
    }
    model, x = fresh(kind), images(kind)
    name, module = next((n, m) for n, m in model.named_modules() if names[part][kind != "ours"] in n)
    with torch.no_grad():
        for i in range(5):
            before = model(x)
            module.weight.data[i].mul_(-2).add_(1)
            assert distance(model(x), by_modules(model, x)) <= ALIKE, name
            assert distance(before, model(x)) > 3 * ALIKE


def main():
    trials = int(sys.argv[1]) if len(sys.argv) > 1 else 60
    warnings.simplefilter("ignore")
    print(f"of {trials} trials, how often the next call obeyed")
    for kind in ("block", "ours"):
        for way in WAYS:
            obeyed = sum(try_once(kind, way, trial)[1] <= ALIKE for trial in range(trials))
            print(f"{kind:6} {way.__name__:28} {obeyed:3}{'' if obeyed == trials else '  <--'}", flush=True)


if __name__ == "__main__":
    main()
