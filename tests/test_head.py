"""The head as one op: what it does not compute is left to its modules, and whatever changes takes effect."""

import copy
from functools import partial

import pytest
import torch
from numerics import assert_accurate, assert_alike
from torch import nn
from watch import Watch

import mambaout_kernels as mk
from mambaout_kernels import backends
from mambaout_kernels.backends import cpu
from mambaout_kernels.benchmarking import error_bounds
from mambaout_kernels.head import Head, _op

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))
NAME = "mambaout_kernels::head"


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def make(**options):
    model = mk.create_model("test_mambaout", **{"num_classes": 11, "head_fn": "default", **options}).eval()
    for p in (*model.norm.parameters(), *model.head.parameters()):
        p.normal_(0.1, 0.3)
    return model


def a_map(model, n=3):
    return torch.randn(n, 4, 5, model.num_features, generator=torch.Generator().manual_seed(1))


def by_modules(model, x):
    with backends.force("reference"):
        return copy.deepcopy(model).forward_head(x)


def called_twice(model, x):
    """What the second call gives, which is known again."""
    model.forward_head(x)
    return model.forward_head(x)


def runs_as_one(model, x):
    with Watch() as watch:
        model.forward_head(x)
    return NAME in watch.names


@pytest.mark.parametrize(
    "options", [{}, {"head_fn": "norm_mlp"}, {"num_classes": 0}, {"num_classes": 0, "head_fn": "norm_mlp"}], ids=str
)
def test_of_every_kind_of_model(options):
    model = make(**options)
    x = a_map(model)
    assert runs_as_one(model, x)
    first = model.forward_head(x)
    assert_alike(first, by_modules(model, x))
    assert torch.equal(model.forward_head(x), first)
    assert_alike(model.forward_head(2 * x[:1]), by_modules(model, 2 * x[:1]))
    assert_alike(model.forward_head(x, pre_logits=True), model.head(model.pool(x), pre_logits=True))
    assert model.forward_head(x[:0]).shape == (0, first.shape[1])


def test_precisions():
    model = make()
    x = a_map(model)
    exact = by_modules(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        for given in (x, x.bfloat16()):
            assert runs_as_one(model, given)
            assert_alike(model.forward_head(given), exact.bfloat16(), 2e-2)
    low = model.bfloat16()
    assert runs_as_one(low, x.bfloat16())
    assert_alike(low.forward_head(x.bfloat16()), exact.bfloat16(), 2e-2)
    assert not runs_as_one(copy.deepcopy(model).double(), x.double())
    assert not runs_as_one(copy.deepcopy(model).half(), x.half())


def double_output(module, args, output):
    return 2 * output


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def other_pool(model):
    model.pool = lambda x: model.norm(x.amax((1, 2)))


def other_head(model):
    model.head = nn.Sequential(nn.Linear(model.num_features, 7))
    model.head.forward = lambda x, pre_logits=False: x[:, :7]


def subclass(model):
    model.head.fc1 = Doubled(model.num_features, model.head_hidden_size)


# Changes after which the op no longer computes what the modules do.
LEFT_TO_THE_MODULES = {
    "another pooling": other_pool,
    "another head": other_head,
    "a subclass": subclass,
    "another activation": lambda model: setattr(model.head, "act", nn.Tanh()),
    "tanh": lambda model: setattr(model.head.act, "approximate", "tanh"),
    "another norm": lambda model: setattr(model, "norm", nn.Identity()),
    "a norm over more": lambda model: setattr(model.head, "norm", nn.GroupNorm(1, model.head_hidden_size)),
    "a wider classifier": lambda model: setattr(model.head, "fc2", nn.Sequential(model.head.fc2, nn.Tanh())),
    "dropout that is not": lambda model: setattr(model.head, "head_dropout", nn.Tanh()),
    "forward of one head": lambda model: setattr(
        model.head, "forward", lambda x, pre_logits=False: model.head.fc2(model.head.fc1(x))
    ),
} | {
    f"a hook of {name}": lambda model, name=name: model.get_submodule(name).register_forward_hook(double_output)
    for name in ("norm", "head", "head.fc1", "head.act", "head.norm", "head.head_dropout", "head.fc2")
}


@pytest.mark.parametrize("change", LEFT_TO_THE_MODULES.values(), ids=LEFT_TO_THE_MODULES)
def test_left_to_the_modules_at_once(change):
    model = make()
    x = a_map(model)
    before = called_twice(model, x)
    change(model)
    assert not runs_as_one(model, x)
    after = model.forward_head(x)
    assert_alike(after, by_modules(model, x) if change not in (other_pool, other_head) else model.head(model.pool(x)))
    assert after.shape != before.shape or not torch.equal(after, before)


def swap_data(model):
    model.head.fc1.weight.data = torch.randn_like(model.head.fc1.weight)


CHANGES = {
    "in place": lambda model: model.head.fc2.weight.mul_(2),
    "through NumPy": lambda model: model.head.norm.bias.numpy().__iadd__(1),
    "other data": swap_data,
    "another parameter": lambda model: setattr(model.norm, "weight", nn.Parameter(torch.randn(model.num_features))),
    "no bias": lambda model: setattr(model.head.fc1, "bias", None),
    "another layer": lambda model: model.reset_classifier(5),
    "no layer": lambda model: model.reset_classifier(0),
    "eps": lambda model: setattr(model.norm, "eps", 0.5),
    "turned weights": lambda model: setattr(
        model.head.fc2.weight, "data", model.head.fc2.weight.t().contiguous().t() * 2
    ),
    "no norm between": lambda model: setattr(model.head, "norm", None),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_takes_effect_at_once(change):
    model = make()
    x = a_map(model)
    before = called_twice(model, x)
    change(model)
    for _ in range(2):
        after = model.forward_head(x)
        assert_alike(after, by_modules(model, x))
        assert after.shape != before.shape or not torch.equal(after, before)
    assert runs_as_one(model, x)


def test_another_forward_of_the_class_takes_effect(monkeypatch):
    model = make()
    x = a_map(model)
    before = called_twice(model, x)
    forward = Head.forward
    monkeypatch.setattr(Head, "forward", lambda self, x, pre_logits=False: 2 * forward(self, x, pre_logits))
    assert_alike(model.forward_head(x), 2 * before)


def test_a_hook_on_all_modules_is_called():
    model = make()
    x = a_map(model)
    model.forward_head(x)
    called = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: called.append(type(module)))
    try:
        model.forward_head(x)
    finally:
        handle.remove()
    assert Head in called


def test_training():
    model = make(drop_rate=0.5)
    x = a_map(model)
    before = called_twice(model, x)
    model.train()
    with torch.random.fork_rng():
        assert not torch.equal(model.forward_head(x), before)
    model.eval()
    assert torch.equal(model.forward_head(x), before)
    with torch.enable_grad():
        y = model.forward_head(x)
    assert y.requires_grad
    assert_alike(y, before)


def test_a_large_map_is_averaged_as_exactly_as_eager_does():
    """Channels differ by 0.01 on average, of 100: the norm makes much of what the sums lose."""
    model = make(num_classes=1000)  # enough errors to compare
    x = 100 + torch.randn(1, 90, 110, model.num_features)
    exact = by_modules(copy.deepcopy(model).double(), x.double())
    bound = error_bounds.of_head(model.norm, model.head, x)
    assert_accurate(model.forward_head(x), by_modules(model, x), exact, bound)


def test_what_is_wrong_is_named():
    x, fc1, fc2 = torch.randn(2, 3, 3, 8), torch.randn(6, 8), torch.randn(4, 6)

    def call(x=x, fc1=fc1, fc2=fc2, norm=None):
        return _op(x, norm, None, fc1, None, None, None, fc2, None, 1e-6, 1e-6, True, torch.float32)

    assert call().shape == (2, 4)
    for wrong, error, named in (
        ({"x": x[0]}, ValueError, r"x must be \(N, H, W, 8\)"),
        ({"x": x[..., :7]}, ValueError, r"x must be \(N, H, W, 8\).*7\)"),
        ({"x": x[:, :0]}, ValueError, "H, W >= 1"),
        ({"x": x.double()}, TypeError, "x must be float32 or bfloat16; got torch.float64"),
        ({"fc1": fc1.half()}, TypeError, "fc1_weight must be float32 or bfloat16"),
        ({"fc1": fc1[0]}, ValueError, r"fc1_weight must be \(hidden, channels\)"),
        ({"fc2": fc2.t()}, ValueError, r"fc2_weight must be \(classes, 6\)"),
        ({"fc2": fc2.bfloat16()}, RuntimeError, "fc2_weight must have fc1_weight's dtype"),
        ({"norm": torch.ones(9)}, RuntimeError, r"norm_weight must have shape \(8,\)"),
    ):
        with pytest.raises(error, match=named):
            call(**wrong)


def test_the_op_is_registered_as_pytorch_wants_it():
    tensors = partial(torch.randn, generator=torch.Generator().manual_seed(1))
    arguments = (
        tensors(2, 3, 4, 8), tensors(8), None, tensors(6, 8), tensors(6), tensors(6), None, tensors(4, 6), None, 1e-6,
        1e-6, True, torch.bfloat16,
    )  # fmt: skip
    torch.library.opcheck(_op, arguments, test_utils=("test_schema", "test_faketensor"))
