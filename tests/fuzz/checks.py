"""Makes calls, one after the other, and looks at what they do. fuzzer.py starts it, in a process of its own."""

import argparse
import faulthandler
import json
import os
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fuzz import calls, mutations
from mambaout_kernels.backends import cpu

SECONDS = 20.0  # the most for a call
MOST_FAILURES = 20
LARGE, NEVER = 2**22, 2**38  # elements: a call takes long; there is no memory
SHARES = {8: 1e-9, 4: 1e-3, 2: 4e-2, 1: 0.0}  # of the largest value, by the bytes of an element
TORCH_SAYS = (
    "integer multiplication overflow", "can't allocate memory", "Storage size calculation overflowed",
    "Stride calculation overflowed", "Not yet supported ScalarType", "no fallback function is registered",
    "Could not run", "Expected a value of type", "Unable to cast", "is not supported", "does not support",
    "Overflow when unpacking", "must be in the range", "tensors do not have", "Cannot access storage of",
    "Inference tensors cannot be saved",
)  # fmt: skip
OTHER_ISA_SAYS = "another instruction set", "multiplies no bfloat16"
UNCLEAR = re.compile(r"INTERNAL ASSERT|std::|bad_alloc|vector::|basic_string|_M_|unknown exception|Traceback")


class Checks:
    def __init__(self, seed: int, only: str) -> None:
        self.seed = seed
        self.ops = {name: op for name, op in calls.cpu_ops().items() if only in name}
        self.isas = cpu.module.supported_cpu_capabilities()
        self.counts: dict[str, Counter[str]] = {name: Counter() for name in self.ops}
        self.messages: Counter[str] = Counter()
        for op in self.ops.values():
            for argument in op._schema.arguments:
                mutations.generator(op, argument)

    def call(self, index: int, verbose: bool) -> str:
        """What was wrong with a call; empty where nothing was."""
        d = calls.Draw(f"{self.seed}/{index}")
        torch.manual_seed(d.getrandbits(40))
        torch.set_num_threads(d.choice((1, 2, 3)))
        cpu.module.set_cpu_capability(d.choice(self.isas))
        name = d.choice(sorted(self.ops))
        op, known, counts = self.ops[name], calls.KNOWN.get(name, calls.Known(None)), self.counts[name]
        arguments = known.valid(d) if known.valid else mutations.some_arguments(d, op)
        valid = d.chance(0.15) and name in calls.KNOWN
        if not valid:
            arguments = mutations.mutate(d, op, arguments)
        if d.chance(0.05):
            cpu.module.set_cpu_capability(d.choice(self.isas))  # not the one that it is packed for
        if takes_long(known, arguments):
            counts["left out"] += 1
            return ""
        call = f"{name}({', '.join(map(described, arguments))})"
        if verbose:
            print(call, flush=True)
        before, begin = state(arguments), time.monotonic()
        try:
            result = op(*arguments)
        except Exception as error:
            took, wrong = time.monotonic() - begin, self.wrong_with_error(name, arguments, error, valid)
            counts["refused"] += 1
        else:
            took, wrong = time.monotonic() - begin, self.wrong_with_result(d, name, known, arguments, result)
            counts["returned"] += 1
        if took > SECONDS:
            wrong += f"; it took {took:.0f} s"
        if not same(before, state(arguments)):
            wrong += "; it changed an input"
        return wrong and f"{call}: {wrong}"

    def wrong_with_error(self, name: str, arguments: list, error: Exception, valid: bool) -> str:
        """It has to name an argument, or be one of PyTorch's own."""
        text, names = str(error), [a.name for a in self.ops[name]._schema.arguments]
        sentence = re.sub(r"^\w+, \S+:\d+, ", "", text.partition("\n")[0])
        self.messages[f"{name}: {type(error).__name__}: {re.sub(r'-?[0-9]+', '#', sentence)[:150]}"] += 1
        if valid and name not in calls.REFUSED and not any(says in text for says in OTHER_ISA_SAYS):
            return f"a valid call is refused: {text}"
        if on_meta(arguments):
            return ""
        named = {"result", *names, *(n.rpartition("_")[2] for n in names)} & {*re.findall(r"\w+", sentence)}
        if UNCLEAR.search(text) or not (named or any(says in text for says in TORCH_SAYS)):
            return f"unclear: {type(error).__name__}: {text[:500]}"
        return ""

    def wrong_with_result(self, d: calls.Draw, name: str, known: calls.Known, arguments: list, result: Any) -> str:
        results = result if isinstance(result, tuple) else (result,)
        if on_meta(arguments) or known.valid is None or isinstance(result, bool):
            return ""
        inputs = {t.data_ptr() for t in tensors_of(arguments) if t.layout == torch.strided}
        if any(r.numel() and r.data_ptr() in inputs for r in results):
            return "a result is an input"
        if not all(r.is_contiguous() for r in results):
            return "a result is not contiguous"
        if tuple(r.dtype for r in results) != known.dtypes(arguments):
            return f"results are {[r.dtype for r in results]}"
        if known.computes is None:
            return ""
        shapes = shapes_of_results(known, arguments)
        if shapes is None:
            return "plain PyTorch refuses it"
        compared = d.chance(0.4) and plain(arguments)
        if name.startswith("pack_"):
            share = SHARES[2 if arguments[-1] else 4]  # of products in bfloat16, though the result is float32
            return self.compare([run_packed(name, arguments, result)], known, arguments, share) if compared else ""
        if [tuple(r.shape) for r in results] != shapes:
            return f"results {[tuple(r.shape) for r in results]} should be {shapes}"
        return self.compare(results, known, arguments) if compared else ""

    def compare(self, results: Any, known: calls.Known, arguments: list, share: float | None = None) -> str:
        if any(hasattr(a, "joined") for a in arguments) and results[0].dtype == torch.bfloat16:
            return ""  # a norm of what was rounded between two blocks may be anything
        exact = known.computes(*(a if hasattr(a, "layer") else calls.wide(a) for a in arguments))
        exact = exact(calls.image(arguments)) if callable(exact) else exact
        for ours, truth in zip(results, exact if isinstance(exact, tuple) else (exact,), strict=True):
            if truth.is_meta or truth.numel() == 0 or not bool(truth.isfinite().all()):
                continue
            self.counts[next(iter(self.counts))]["compared"] += 1
            error = float((ours.detach().double() - truth.detach().double()).abs().max())
            allowed = SHARES[ours.dtype.itemsize] if share is None else share
            if not error <= allowed * (1 + float(truth.abs().max())):
                return f"off by {error}"
        return ""


def tensors_of(arguments: list) -> list[Tensor]:
    flat = [v for a in arguments for v in (a if isinstance(a, list) else [a])]
    return [v for v in flat if isinstance(v, Tensor)]


def on_meta(arguments: list) -> bool:
    """Fake kernels take arguments as they are."""
    return any(t.device.type == "meta" for t in tensors_of(arguments))


def plain(arguments: list) -> bool:
    """Whether the values can be touched, and are worth a comparison."""
    if any(isinstance(a, float) and not 1e-9 <= a <= 1 for a in arguments):  # eps
        return False
    usual = (*calls.DTYPES, torch.uint8)
    return all(
        t.dtype in usual and mutations.readable(t) and bool((t.abs() < 1e3).all()) for t in tensors_of(arguments)
    )


def shapes_of_results(known: calls.Known, arguments: list) -> list[tuple[int, ...]] | None:
    """As plain PyTorch has them; None where it refuses, or for what it has not."""
    if known.computes is None:
        return None
    try:
        found = known.computes(*map(calls.as_meta, arguments))
        found = found(calls.image(arguments).to("meta")) if callable(found) else found
        return [tuple(t.shape) for t in (found if isinstance(found, tuple) else (found,))]
    except Exception:
        return None


def takes_long(known: calls.Known, arguments: list) -> bool:
    """Whether plain PyTorch would compute something large."""
    tensors = [t for t in tensors_of(arguments) if not t.is_nested]
    if all(size < LARGE for t in tensors for size in t.shape):
        return False
    shapes = shapes_of_results(known, arguments) or []
    elements = sum(torch.Size(s).numel() for s in shapes)
    return bool(shapes) and max(elements, *(t.numel() for t in tensors)) > LARGE and elements < NEVER


def run_packed(name: str, arguments: list, packed: Tensor) -> Tensor:
    x = calls.image(arguments).float()
    if name == "pack_conv3x3s2":
        return calls.OPS.conv3x3s2(x, packed, len(arguments[0]), torch.float32)
    return calls.OPS.gated_cnn_blocks(x, packed)


def state(arguments: list) -> list:
    """Every byte of every storage, and how the tensors lie there."""
    return [_state(t) for t in tensors_of(arguments)]


def _state(t: Tensor) -> list:
    if t.layout != torch.strided:
        return [_state(part) for part in ((t.crow_indices(), t.values()) if "csr" in str(t.layout) else ())]
    try:
        storage = t.untyped_storage()
        memory = torch.empty(0, dtype=torch.uint8)
        memory = memory.set_(storage).clone() if storage.data_ptr() else memory
        return [tuple(t.shape), t.stride(), t.storage_offset(), t.dtype, memory]
    except (RuntimeError, NotImplementedError):  # it has none
        return []


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    return all(map(same, a, b)) if isinstance(a, list) else bool(a == b)


def described(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(described, value))}]"
    if not isinstance(value, Tensor):
        return repr(value)
    try:
        text = f"{str(value.dtype).removeprefix('torch.')}{tuple(value.shape)}"
        if value.layout != torch.strided or value.device.type != "cpu":
            return f"{text} {value.layout} {value.device}"
        bytes_ = value.untyped_storage().nbytes()
        return f"{text} strides {value.stride()} at {value.storage_offset()} of {bytes_} bytes"
    except (RuntimeError, NotImplementedError):
        return "nested, or without memory"


def main() -> None:
    """Writes to LOG which call it makes, and in the end what it found to LOG.json."""
    faulthandler.enable()
    parser = argparse.ArgumentParser()
    for name, kind in (("log", str), ("seed", int), ("op", str), ("first", int), ("calls", int)):
        parser.add_argument(name, type=kind)
    args = parser.parse_args()
    checks = Checks(args.seed, args.op)
    failures: list[tuple[int, str]] = []
    with open(args.log, "wb", buffering=0) as log:
        for index in range(args.first, args.first + args.calls):
            os.pwrite(log.fileno(), f"{index:<20}".encode(), 0)
            if wrong := checks.call(index, args.calls == 1):
                failures.append((index, wrong))
            if len(failures) == MOST_FAILURES:
                break
    found = {"module": cpu.module.__file__, "counts": checks.counts, "messages": checks.messages}
    found |= {"failures": failures, "next": index + 1}
    Path(f"{args.log}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
