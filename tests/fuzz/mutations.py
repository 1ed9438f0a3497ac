"""What makes a call wrong, or unusual: of an argument of each type of a schema, another one."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .calls import Draw

LARGE = 2**22  # elements: PyTorch is no longer quick
HUGE = (2**40, 2**44 + 1, 2**53, 2**62)
DTYPES = sorted({d for d in vars(torch).values() if isinstance(d, torch.dtype)}, key=str)
HEADER = 16  # numbers of 8 bytes before packed weights (csrc/torch/packed.h)
NUMBERS = (
    -(2**63), -(2**31), -64, -7, -1, 0, 1, 2, 3, 5, 7, 8, 9, 16, 31, 32, 33, 64, 101, 128, 2**12, 2**24 - 1, 2**24,
    2**31 - 1, 2**31, 2**32 + 7, 2**40 + 4, 2**61 + 8, 2**62, 2**63 - 1,
)  # fmt: skip


def any_tensor(d: Draw) -> Tensor:
    shape = [d.choice((1, 2, 3, 4, 8, 0)) for _ in range(d.randint(0, 5))]
    return torch.randn(shape).to(d.choice((torch.float32, torch.bfloat16, torch.uint8)))


# --- the same sizes and values in other memory ---


def _dense(d: Draw, t: Tensor) -> Tensor:
    return t.detach().clone(memory_format=torch.contiguous_format)


def _permuted_memory(d: Draw, t: Tensor) -> Tensor:
    order = d.sample(range(t.ndim), t.ndim)
    return _dense(d, t.permute(order)).permute([order.index(i) for i in range(t.ndim)])


def _part_of_wider(d: Draw, t: Tensor) -> Tensor:
    begin, step = d.randint(0, 3), d.choice((1, 1, 2))
    wider = torch.full([step * size + begin + d.randint(0, 2) for size in t.shape], 3.0).to(t.dtype)
    view = wider[tuple(slice(begin, begin + step * size, step) for size in t.shape)]
    return view.copy_(t) if view.shape == t.shape else t


def _misaligned(d: Draw, t: Tensor) -> Tensor:
    begin = d.randint(1, 5)
    return torch.cat((t.new_zeros(begin), t.flatten()))[begin:].view(t.shape)


def _negative_bit(d: Draw, t: Tensor) -> Tensor:
    return torch.complex(torch.zeros_like(t), -t).conj().imag


def _inference(d: Draw, t: Tensor) -> Tensor:
    with torch.inference_mode():
        return t.clone()


def _strange_strides_of_one(d: Draw, t: Tensor) -> Tensor:
    strides = [d.choice(NUMBERS[5:]) if size == 1 else s for size, s in zip(t.shape, t.stride(), strict=True)]
    return _dense(d, t).as_strided(t.shape, strides) if t.is_contiguous() else t


SAME = [
    _dense, _permuted_memory, _part_of_wider, _misaligned, _negative_bit, _inference, _strange_strides_of_one,
    lambda d, t: t.detach().clone().requires_grad_(), lambda d, t: torch.nn.Parameter(t.detach().clone()),
]  # fmt: skip


# --- other sizes, dtypes, layouts, devices, values ---


def _other_size(d: Draw, t: Tensor) -> Tensor:
    dim = d.randrange(t.ndim)
    size = max(0, d.choice((0, 1, t.shape[dim] - 1, t.shape[dim] + 1, 2 * t.shape[dim], d.randint(0, 40))))
    return t.new_zeros([*t.shape[:dim], size, *t.shape[dim + 1 :]]) + t.new_ones(())


def _repeated_values(d: Draw, t: Tensor) -> Tensor:
    """Stride 0 in some dimensions, of the sizes that they have or huge ones."""
    first = t[tuple(slice(0, 1) if d.chance(0.5) else slice(None) for _ in t.shape)]
    sizes = [
        d.choice(HUGE) if a == 1 and d.chance(0.3) else max(a, b) for a, b in zip(first.shape, t.shape, strict=True)
    ]
    return first.expand(sizes)


def _huge_without_elements(d: Draw, t: Tensor) -> Tensor:
    sizes = [d.choice((0, size, d.choice((*HUGE, 2**31)))) for size in t.shape]
    sizes[d.randrange(t.ndim)] = 0
    return torch.empty(sizes, dtype=t.dtype)


def _overlapping(d: Draw, t: Tensor) -> Tensor:
    strides = [d.choice((0, 1, 1, 2, 3)) for _ in t.shape]
    span = 1 + sum(max(0, size - 1) * stride for size, stride in zip(t.shape, strides, strict=True))
    return t.new_ones(span).as_strided(t.shape, strides)


def _released(d: Draw, t: Tensor) -> Tensor:
    """The storage is smaller than the tensor says, down to nothing."""
    t = d.choice(SAME[:4])(d, t).clone()
    storage = t.untyped_storage()
    storage.resize_(d.choice((0, 0, max(0, storage.nbytes() - 1), storage.nbytes() // 2)))
    return t


def _special_values(d: Draw, t: Tensor) -> Tensor:
    t = t.detach().clone()
    for _ in range(d.randint(1, 3)):
        t.view(-1)[d.randrange(t.numel())] = d.choice((math.nan, math.inf, -math.inf, 1e38, 1e-45, 0.0))
    return t


def _other_dtype(d: Draw, t: Tensor) -> Tensor:
    dtype = d.choice(DTYPES)
    if dtype in (torch.qint8, torch.quint8, torch.qint32):
        return torch.quantize_per_tensor(t.float(), 0.1, 0, dtype)
    return t.to(dtype) if d.chance(0.8) else torch.empty(t.shape, dtype=dtype)


OTHER = [
    _other_size, _other_size, _other_size, _repeated_values, _repeated_values, _huge_without_elements, _overlapping,
    _special_values, _other_dtype, _other_dtype,
    lambda d, t: t.unsqueeze(d.randint(0, t.ndim)), lambda d, t: t.select(d.randrange(t.ndim), 0), lambda d, t: t.mT,
    lambda d, t: t.flatten(), lambda d, t: t.to("meta"), lambda d, t: t.to_sparse(), lambda d, t: t.to_sparse_csr(),
    lambda d, t: t.to_sparse_bsr((1, 1)), lambda d, t: t.to_mkldnn(), lambda d, t: torch._efficientzerotensor(t.shape),
    lambda d, t: torch.complex(t, t).conj(), lambda d, t: torch.nested.nested_tensor([t, t]),
    lambda d, t: any_tensor(d),
]  # fmt: skip


# --- packed weights ---


def _damaged(d: Draw, t: Tensor) -> Tensor:
    t = t.detach().clone()
    kind = d.choice(("header", "header", "header", "bits", "header bits", "cut", "garbage", "longer", "shape"))
    if kind == "garbage":
        return torch.randint(0, 256, (d.choice((0, 1, 127, 128, 4096)),), dtype=torch.uint8)
    if kind == "cut":
        return t[: d.choice((0, 1, 63, 64, 127, 128, 192, t.numel() // 2, t.numel() - 64, t.numel() - 1))].clone()
    if kind == "longer":
        return torch.cat((t, torch.zeros(d.choice((1, 64, 128, 4096)), dtype=torch.uint8)))
    if kind.endswith("bits"):
        for _ in range(d.randint(1, 8)):
            t[d.randrange(min(t.numel(), 8 * HEADER) if kind == "header bits" else t.numel())] ^= 1 << d.randrange(8)
        return t
    words = t.view(torch.int64)
    for at in [d.randrange(HEADER)] if kind == "header" else range(10, 14):  # the op's sizes
        words[at] = d.choice(NUMBERS) if d.chance(0.7) else int(words[at]) + d.choice((-1, 1, -64, 64))
    return t


# --- arguments by their type ---


def readable(t: Tensor) -> bool:
    """Whether PyTorch can touch it, which does not ask itself whether a storage was released; and is quick with it."""
    if t.layout != torch.strided or t.is_nested or t.numel() > LARGE or any(size > LARGE for size in t.shape):
        return False
    if t.device.type != "cpu" or 0 in t.shape:
        return True
    try:
        end = 1 + t.storage_offset() + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
        storage = t.untyped_storage()
        return storage.data_ptr() != 0 and end * t.element_size() <= storage.nbytes()
    except (RuntimeError, NotImplementedError):  # it has none
        return False


def tensor(d: Draw, t: Any) -> Any:
    if not isinstance(t, Tensor) or not readable(t):  # left out, or replaced before
        return any_tensor(d)
    if t.dtype == torch.uint8 and d.chance(0.6):
        return _damaged(d, t)
    return d.choice(SAME if d.chance(0.35) else OTHER)(d, t)


def optional_tensor(d: Draw, t: Any) -> Any:
    return None if t is not None and d.chance(0.15) else tensor(d, t)


def tensors(d: Draw, given: list) -> list:
    given = list(given)
    if not given or d.chance(0.2):
        given.insert(d.randint(0, len(given)), any_tensor(d))
    elif d.chance(0.2):
        del given[d.randrange(len(given)) :]
    else:
        at = d.randrange(len(given))
        given[at] = tensor(d, given[at])
    return given


def text(d: Draw, given: Any) -> Any:
    return d.choice(("", "relu", "GELU", " gelu", "gelu\0", "silu", "gelu_tanh", "identity", "ä" * 300, "%s%n{}", None))


def integer(d: Draw, given: Any) -> Any:
    return d.choice((*NUMBERS, *(given + step for step in (-1, 1) if isinstance(given, int)), None, 1.5))


def number(d: Draw, given: Any) -> Any:
    return d.choice((math.nan, math.inf, -math.inf, 0.0, -0.0, -1.0, -1e-6, 1e-320, 1e-46, 1e39, 1e308, 2**70, None))


# A new type of argument needs a line here.
BY_TYPE: dict[str, Callable[[Draw, Any], Any]] = {
    "Tensor": tensor,
    "Optional[Tensor]": optional_tensor,
    "List[Tensor]": tensors,
    "int": integer,
    "float": number,
    "bool": lambda d, given: d.choice((not given, 2, None)),
    "str": text,
    "ScalarType": lambda d, given: d.choice((*DTYPES, None)),
    "Optional[ScalarType]": lambda d, given: d.choice((*DTYPES, None, "float32")),
}


def generator(op: Any, argument: Any) -> Callable[[Draw, Any], Any]:
    kind = str(argument.real_type)
    if kind not in BY_TYPE:
        raise LookupError(f"{op}: no generator for {argument.name}, a {kind}: add it to BY_TYPE in {__file__}")
    return BY_TYPE[kind]


def some_arguments(d: Draw, op: Any) -> list:
    """Of an op of which nothing is known but its schema."""
    plain = {"List[Tensor]": [], "int": 1, "float": 1e-6, "bool": False, "str": "gelu", "ScalarType": torch.float32,
             "Optional[ScalarType]": None}  # fmt: skip
    of_type = lambda a: any_tensor(d) if "Tensor" in str(a.type) else plain[str(a.real_type)]  # noqa: E731
    return [[any_tensor(d)] if str(a.type) == "List[Tensor]" else of_type(a) for a in op._schema.arguments]


def mutate(d: Draw, op: Any, arguments: list) -> list:
    """A tensor loses its memory, or one to three arguments are replaced."""
    arguments = list(arguments)
    of_tensors = [i for i, a in enumerate(arguments) if isinstance(a, Tensor)]
    if of_tensors and d.chance(0.08):  # alone: if others are wrong, PyTorch prints all of them
        at = d.choice(of_tensors)
        arguments[at] = _released(d, arguments[at])
        return arguments
    generators = [generator(op, a) for a in op._schema.arguments]
    for _ in range(d.choice((1, 1, 2, 3))):
        while True:
            at = d.randrange(len(arguments))
            try:
                arguments[at] = generators[at](d, arguments[at])
                break
            except Exception:  # by PyTorch, of this mutation: another one
                continue
    if d.chance(0.02) and torch._C._dispatch_has_kernel_for_dispatch_key(op._schema.name, "CPU"):
        arguments[d.randrange(len(arguments))] = None  # for a Tensor, one that is undefined
    if d.chance(0.05):
        kinds = [str(a.real_type) for a in op._schema.arguments]
        at = d.randrange(len(kinds))
        arguments[at] = arguments[d.choice([i for i, kind in enumerate(kinds) if kind == kinds[at]])]  # one for another
    return arguments
