"""Models train, infer, are changed, copied, dropped, called by threads and child processes, in random order, for long.

    python tests/soak/soak.py [--minutes 10] [--seed 0] [--small]

Every output is that of a new model with the same weights, bit for bit; in a child process, which has another number of
threads, within a share of its largest value. Prints how often everything happened; exit status 1 if something was
wrong. --small: the test model alone, and no child that imports everything anew.
"""

import argparse
import copy
import gc
import io
import multiprocessing
import os
import random
import sys
import threading
import time
from collections import Counter
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import mambaout_kernels as mk

CLASSES = 7
SHARE = 1e-4  # of the largest value: what another number of threads may change
SECONDS_OF_A_CHILD = 120
OPTIMIZERS = [
    (kind, {"lr": lr, how: True} if how else {"lr": lr, "foreach": False})
    for kind, lr in ((torch.optim.AdamW, 1e-3), (torch.optim.SGD, 1e-2))
    for how in ("fused", "foreach", "")
]
# What happens, and how often beside the others.
WEIGHTS = {"train": 6, "evaluate": 6, "evaluate_average": 3, "optimize": 3, "infer_optimized": 3, "threads": 2,
           "train_beside": 1, "change": 4, "make_or_drop": 1, "fork": 1, "spawn": 0.1}  # fmt: skip
NAMES = ("test_mambaout", "mambaout_femto")


def images(seed: int, n: int = 2) -> Tensor:
    return torch.randn(n, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


def new_model(name: str, weights: dict[str, Tensor] | None = None) -> nn.Module:
    model = mk.create_model(name, num_classes=CLASSES).eval()
    if weights is not None:
        model.load_state_dict(weights)
    return model


def autocast(low_precision: bool):
    return torch.autocast("cpu", torch.bfloat16) if low_precision else nullcontext()


def in_child(connection, name: str, weights: bytes, x: Tensor) -> None:
    """Of a process that is spawned: the model is made of what has come through the pipe."""
    model = new_model(name, torch.load(io.BytesIO(weights)))
    with torch.no_grad():
        connection.send((model(x).numpy(), mk.optimize_for_inference(model)(x).numpy()))


class Trained:
    """A model, the average of its weights, and what trains it."""

    def __init__(self, name: str, d: random.Random) -> None:
        self.name, self.model = name, new_model(name)
        self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        self.new_optimizer(d)

    def new_optimizer(self, d: random.Random) -> None:
        kind, options = d.choice(OPTIMIZERS)
        self.optimizer = kind(self.model.parameters(), **options)

    def step(self, seed: int, low_precision: bool) -> None:
        self.model.train()
        self.optimizer.zero_grad()
        with autocast(low_precision):
            loss = F.cross_entropy(self.model(images(seed)), torch.tensor([seed % CLASSES, 0]))
        loss.backward()
        self.optimizer.step()
        self.average.update_parameters(self.model)
        self.model.eval()
        assert loss.isfinite(), "the loss is not finite"


class Soak:
    """Each method without an underscore is something that happens."""

    def __init__(self, seed: int, small: bool) -> None:
        self.d, self.small = random.Random(seed), small
        torch.manual_seed(seed)
        self.counts: Counter[str] = Counter()
        self.trained = [Trained(NAMES[0], self.d)]
        self.optimized: list[tuple[nn.Module, Tensor, bool, Tensor]] = []  # and what they once gave

    def run(self, seconds: float) -> None:
        weights = {**WEIGHTS, "spawn": 0} if self.small else WEIGHTS
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            event = self.d.choices(list(weights), list(weights.values()))[0]
            try:
                getattr(self, event)()
            except Exception as error:
                raise AssertionError(f"event {self.counts.total()}, {event}: {error}") from error
            self.counts[event] += 1

    # --- what is compared ---

    def _compare(self, found: Tensor, expected: Tensor, share: float = 0.0) -> None:
        self.counts["outputs compared"] += 1
        difference = (found.double() - expected.double()).abs().max()
        assert found.dtype == expected.dtype, f"{found.dtype} instead of {expected.dtype}"
        assert difference <= share * expected.double().abs().max(), f"off by {difference}"

    def _call(self, model: nn.Module, x: Tensor, low_precision: bool) -> Tensor:
        with self.d.choice((torch.no_grad, torch.inference_mode))(), autocast(low_precision):
            return model(x)

    def _check(self, one: Trained, model: nn.Module) -> None:
        """A model against a new one with its weights."""
        low_precision, x = self.d.random() < 0.5, images(self.d.randrange(10**6), self.d.randint(1, 3))
        expected = self._call(new_model(one.name, model.state_dict()), x, low_precision)
        self._compare(self._call(model, x, low_precision), expected)

    # --- events ---

    def train(self) -> None:
        one = self.d.choice(self.trained)
        if self.d.random() < 0.2:
            one.new_optimizer(self.d)
        for _ in range(self.d.randint(1, 3)):
            one.step(self.d.randrange(10**6), self.d.random() < 0.5)
        kind = type(one.optimizer).__name__
        how = next((h for h in ("fused", "foreach") if one.optimizer.defaults[h]), "plain")
        self.counts[f"trained by {kind}, {how}"] += 1

    def evaluate(self) -> None:
        one = self.d.choice(self.trained)
        self._check(one, one.model)

    def evaluate_average(self) -> None:
        one = self.d.choice(self.trained)
        one.average.eval()
        self._check(one, one.average.module)

    def optimize(self) -> None:
        one, low_precision = self.d.choice(self.trained), self.d.random() < 0.5
        dtype, x = self.d.choice((None, torch.bfloat16)), images(self.d.randrange(10**6))
        model = mk.optimize_for_inference(one.model, dtype=dtype)
        again = mk.optimize_for_inference(new_model(one.name, one.model.state_dict()), dtype=dtype)
        found = self._call(model, x, low_precision)
        self._compare(found, self._call(again, x, low_precision))
        self.optimized = [*self.optimized[-4:], (model, x, low_precision, found)]

    def infer_optimized(self) -> None:
        """What was optimized before the last changes still has the weights of then."""
        if self.optimized:
            model, x, low_precision, before = self.d.choice(self.optimized)
            self._compare(self._call(model, x, low_precision), before)

    def threads(self) -> None:
        one, x = self.d.choice(self.trained), images(self.d.randrange(10**6))
        model = self.d.choice([one.model, *(m for m, *_ in self.optimized[-1:])])
        expected, found = self._call(model, x, False), []

        def infer() -> None:
            with torch.no_grad():
                found.extend(model(x) for _ in range(3))

        self._together([infer] * 4)
        assert len(found) == 12
        for output in found:
            self._compare(output, expected)

    def train_beside(self) -> None:
        """One model trains while another infers."""
        if len(self.trained) < 2:
            self.trained.append(Trained(NAMES[0], self.d))
        one, other = self.d.sample(self.trained, 2)
        seed = self.d.randrange(10**6)
        self._together([lambda: one.step(seed, False), lambda: self._check(other, other.model)])

    def _together(self, calls: list) -> None:
        failed: list[BaseException] = []

        def caught(call) -> None:
            try:
                call()
            except BaseException as error:
                failed.append(error)

        running = [threading.Thread(target=caught, args=(call,)) for call in calls]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
        if failed:
            raise failed[0]

    def change(self) -> None:
        """Weights are loaded, replaced or scaled, in one of the ways that there are."""
        one = self.d.choice(self.trained)
        factor = self.d.uniform(0.9, 1.1)
        weights = {name: t * factor for name, t in one.model.state_dict().items()}
        how = self.d.choice(("load", "assign", "in place", "data", "data in place", "parameters", "copy"))
        with torch.no_grad():
            if how in ("load", "assign"):
                one.model.load_state_dict(weights, assign=how == "assign")
            elif how == "copy":
                one.model = copy.deepcopy(one.model)
            for name, p in list(one.model.named_parameters()):
                if how == "in place":
                    p.mul_(factor)
                elif how == "data":
                    p.data = weights[name]
                elif how == "data in place":
                    p.data.mul_(factor)
                elif how == "parameters":
                    owner, _, last = name.rpartition(".")
                    setattr(one.model.get_submodule(owner), last, nn.Parameter(weights[name]))
        self.counts[f"changed by {how}"] += 1
        one.new_optimizer(self.d)
        self._check(one, one.model)

    def make_or_drop(self) -> None:
        if len(self.trained) > 2:
            del self.trained[self.d.randrange(len(self.trained))]
            self.optimized = self.optimized[-1:]
            gc.collect()
        else:
            self.trained.append(Trained(NAMES[0] if self.small else self.d.choice(NAMES), self.d))

    def fork(self) -> None:
        if not hasattr(os, "fork"):
            return
        one, x = self.d.choice(self.trained), images(self.d.randrange(10**6))
        model = self.d.choice((one.model, mk.optimize_for_inference(one.model)))
        expected = self._call(model, x, False)
        here, there = multiprocessing.Pipe()
        child = os.fork()
        if child == 0:
            try:
                torch.set_num_threads(1)  # those of the parent are not there
                with torch.no_grad():
                    there.send(model(x).numpy())
            finally:
                os._exit(0)
        answered = here.poll(SECONDS_OF_A_CHILD)
        if not answered:
            os.kill(child, 9)
        os.waitpid(child, 0)
        assert answered, "a forked child does not answer"
        self._compare(torch.from_numpy(here.recv()), expected, SHARE)

    def spawn(self) -> None:
        one, x = self.d.choice(self.trained), images(self.d.randrange(10**6))
        expected = [self._call(m, x, False) for m in (one.model, mk.optimize_for_inference(one.model))]
        weights = io.BytesIO()
        torch.save(one.model.state_dict(), weights)
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        child = context.Process(target=in_child, args=(there, one.name, weights.getvalue(), x))
        child.start()
        try:
            assert here.poll(SECONDS_OF_A_CHILD), "a spawned child does not answer"
            for found, wanted in zip(here.recv(), expected, strict=True):
                self._compare(torch.from_numpy(found), wanted, SHARE)
        finally:
            child.join(10)
            child.kill()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    print(f"seed {args.seed}", flush=True)
    soak, failed = Soak(args.seed, args.small), ""
    try:
        soak.run(60 * args.minutes)
    except AssertionError as error:
        failed = str(error)
    for event, count in sorted(soak.counts.items()):
        print(f"{count:7} {event}")
    print(failed or "nothing was wrong")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
