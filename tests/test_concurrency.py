"""Several threads, forked processes, changed parameters, an interrupt, and memory that runs out."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from processes import python
from torch.utils.data import DataLoader, Dataset

import mambaout_kernels as mk
from mambaout_kernels import backends

THREADS = 8


@pytest.fixture
def model():
    torch.manual_seed(0)
    return mk.create_model("test_mambaout", num_classes=7).eval()


def images(n=2, seed=1):
    return torch.randn(n, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("optimized", [False, True])
def test_eight_threads_call_one_model(model, dtype, optimized):
    model.to(dtype)
    if optimized:
        model = mk.optimize_for_inference(model)
    given = [images(1 + i % 3, seed=i).to(dtype) for i in range(THREADS)]
    at_once = threading.Barrier(THREADS)

    def work(i):
        at_once.wait()
        with torch.no_grad():
            return [model(given[i]) for _ in range(4)]

    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(work, range(THREADS)))
    with torch.no_grad():
        for x, outputs in zip(given, found, strict=True):
            alone = model(x)
            assert all(torch.equal(y, alone) for y in outputs)


def test_threads_in_different_precisions_do_not_mix(model):
    """float32, and bfloat16 by autocast, which is of its thread alone."""
    x = images(2)

    def call(low):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=low):
            return model(x)

    alone = [call(low) for low in (False, True)]
    assert alone[0].dtype != alone[1].dtype
    at_once = threading.Barrier(THREADS)

    def work(i):
        at_once.wait()
        return [call(i % 2 == 1) for _ in range(8)]

    with ThreadPoolExecutor(THREADS) as pool:
        for i, outputs in enumerate(pool.map(work, range(THREADS))):
            assert all(y.dtype == alone[i % 2].dtype and torch.equal(y, alone[i % 2]) for y in outputs)


def test_a_load_beside_calls_leaves_the_new_weights(model):
    """What is called while weights are written may be of both; what is called afterwards is of the new ones."""
    x = images(1)
    others = [{k: v + 0.1 * i * torch.randn_like(v) for k, v in model.state_dict().items()} for i in range(6)]
    stop = threading.Event()

    def call():
        with torch.no_grad():
            while not stop.is_set():
                model(x)

    threads = [threading.Thread(target=call) for _ in range(2)]
    for thread in threads:
        thread.start()
    for weights in others:
        model.load_state_dict(weights)
        time.sleep(0.02)
    stop.set()
    for thread in threads:
        thread.join()
    again = mk.create_model("test_mambaout", num_classes=7).eval()
    again.load_state_dict(others[-1])
    with torch.no_grad():
        assert torch.equal(model(x), again(x))


def test_eight_threads_train_copies(model):
    """Forward and backward on autograd's threads: the gradients of each are those of the same step alone."""
    x = images(2)

    def step(_):
        copy = mk.create_model("test_mambaout", num_classes=7)
        copy.load_state_dict(model.state_dict())
        copy(x).square().sum().backward()
        return [p.grad for p in copy.parameters()]

    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(step, range(THREADS)))
    alone = step(0)
    for gradients in found:
        for now, then in zip(gradients, alone, strict=True):
            torch.testing.assert_close(now, then, rtol=1e-5, atol=1e-6)


def in_place(model):
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.25)


def through_data(model):
    for p in model.parameters():
        p.data.mul_(1.25)


def through_numpy(model):
    for p in model.parameters():
        p.detach().numpy()[...] *= 1.25


def replaced(model):
    for p in model.parameters():
        p.data = p.data * 1.25


def loaded(model):
    model.load_state_dict({name: 1.25 * value for name, value in model.state_dict().items()})


def stepped(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    with torch.enable_grad():
        model(images()).square().sum().backward()
    optimizer.step()


CHANGES = [in_place, through_data, through_numpy, replaced, loaded, stepped]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changed_parameters_take_effect(model, change):
    """Nothing that was made of the parameters is kept."""
    x = images()
    with torch.no_grad():
        before = model(x)
    change(model)
    with torch.no_grad():
        after = model(x)
        with backends.force("reference"):
            expected = model(x)
    assert not torch.allclose(after, before, rtol=1e-2)
    torch.testing.assert_close(after, expected, rtol=1e-3, atol=1e-4)


class Features(Dataset):
    """Runs the model in the workers, on what the parent computed with before."""

    def __init__(self, model):
        self.model = model

    def __len__(self):
        return 6

    def __getitem__(self, i):
        with torch.no_grad():
            return self.model(images(1, seed=i))[0]


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork")
# By spawn, make test has it of an inference model (test_inference_model.py), which is packed again there.
@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.nightly)])
def test_data_loader_workers(model, method):
    features = Features(model)
    expected = torch.stack([features[i] for i in range(len(features))])  # the parent has used its threads
    loader = DataLoader(features, batch_size=2, num_workers=2, multiprocessing_context=method, timeout=60)
    torch.testing.assert_close(torch.cat(list(loader)), expected, rtol=1e-4, atol=1e-5)


FORKED = """
import os, signal, sys, torch, mambaout_kernels as mk
torch.set_num_threads(2)
block = mk.FusedGatedCNNBlock(96).eval()
made = {made}
def run():
    with torch.no_grad():
        return made(torch.ones(4, 56, 56, 96))
here = run() if {used} else None
child = os.fork()
if child == 0:
    signal.alarm(30)
    threads = torch.get_num_threads()
    there = run()
    os._exit(0 if threads == (1 if {used} else 2) and (here is None or torch.equal(there, here)) else 3)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert here is None or torch.equal(run(), here)
assert torch.get_num_threads() == 2
"""


@pytest.mark.skipif(not hasattr(os, "fork") or backends.status()["cpu"] is not None, reason="no fork, or no kernels")
@pytest.mark.parametrize("used", [True, False], ids=["after use", "before any use"])
@pytest.mark.parametrize("made", ["block", "mk.optimize_for_inference(block)"])
def test_a_forked_child_computes(made, used):
    """Without its parent's threads, if there were any; in plain PyTorch it would wait for them for ever."""
    code = FORKED.format(made=made, used=used)
    done = subprocess.run([python(), "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_gradients_in_a_forked_child():
    """PyTorch forbids autograd after a fork only where its own threads ran; the op itself has to work."""
    code = """
import os, torch, mambaout_kernels as mk
u, w, b = torch.randn(1, 9, 9, 32), torch.randn(8, 1, 7, 7), torch.randn(8)
here = mk.gated_dwconv(u, w, b)
child = os.fork()
if child == 0:
    dy = torch.ones_like(here)
    same = torch.equal(mk.gated_dwconv(u, w, b), here)
    du, dw, db = torch.ops.mambaout_kernels.gated_dwconv_backward(dy, u, w, b, "gelu")
    os._exit(0 if same and du.isfinite().all() else 3)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert torch.equal(mk.gated_dwconv(u, w, b), here)
"""
    done = subprocess.run([python(), "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


INTERRUPTED = """
import json, os, signal, sys, time, torch, mambaout_kernels as mk
from mambaout_kernels.backends import cpu
from mambaout_kernels.ops import conv3x3s2, gated_cnn_blocks

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background of a shell starts deaf to it
calls = []  # of compiled ops: when they began

def logged(op):
    def call(*arguments):
        calls.append(time.time())
        return op(*arguments)
    return call

for module, name in (
    (gated_cnn_blocks, "gated_cnn_blocks"), (conv3x3s2, "conv3x3s2"), (cpu, "gated_dwconv"),
    (cpu, "gated_dwconv_backward"),
):
    setattr(module, name, logged(getattr(module, name)))
model = mk.create_model("test_mambaout", num_classes=5)
fast = mk.optimize_for_inference(model)

def infer(x):
    return [fast(x)]

def train(x):
    model.zero_grad()
    model.train()(x).square().sum().backward()
    return [p.grad for p in model.parameters()]

work = {"infer": infer, "train": train}[sys.argv[1]]
x = torch.randn(24, 3, 224, 224)
first = [t.clone() for t in work(x[:2])]
assert calls
for _ in sys.stdin:
    calls.clear()
    try:
        print(os.getpid(), flush=True)
        while True:
            work(x)
    except KeyboardInterrupt:
        print(json.dumps(calls), flush=True)
    assert all(map(torch.equal, work(x[:2]), first))
print("well", flush=True)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGINT") or sys.platform == "win32", reason="no signals")
@pytest.mark.skipif(backends.status()["cpu"] is not None, reason="no compiled CPU kernels")
@pytest.mark.parametrize("work", ["infer", "train"])
def test_an_interrupt_returns_after_one_op_and_leaves_nothing_broken(work):
    """Python hears of a signal when the op at hand returns: no other begins, wherever in a step it came.

    That is the bound, in ops and not in seconds: it holds on a machine that is busy with other things, too. The next
    calls of the same process have the same bits as before.
    """
    command = [python(), "-c", INTERRUPTED, work]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    hung = threading.Timer(200, process.kill)
    hung.start()
    try:
        for i in range(8):
            process.stdin.write("again\n")
            process.stdin.flush()
            worker = int(process.stdout.readline())  # of python(): without a way for the signal through its server
            time.sleep(0.05 + 0.07 * i)  # somewhere in a forward or backward
            os.kill(worker, signal.SIGINT)
            sent = time.time()
            calls = json.loads(process.stdout.readline())
            assert not [began for began in calls if began > sent]
        said, _ = process.communicate(timeout=120)
    finally:
        hung.cancel()
        process.kill()
    assert said == "well\n"
    assert process.returncode == 0


WITHIN_AN_OP = """
import signal, torch, mambaout_kernels as mk
backward = torch.ops.mambaout_kernels.gated_dwconv_backward
u, dy, w, b = torch.randn(4, 112, 112, 256), torch.randn(4, 112, 112, 128), torch.randn(96, 1, 7, 7), torch.randn(96)
first = [mk.gated_dwconv(u, w, b), *backward(dy, u, w, b, "gelu")]
signal.signal(signal.SIGALRM, signal.default_int_handler)
for op in (lambda: mk.gated_dwconv(u, w, b), lambda: backward(dy, u, w, b, "gelu")):
    returned = False
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.001)  # a small part of what the op takes
        op()
        returned = True
    except KeyboardInterrupt:
        pass
    assert not returned
assert all(map(torch.equal, [mk.gated_dwconv(u, w, b), *backward(dy, u, w, b, "gelu")], first))
print("well")
"""


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers")
def test_an_interrupt_within_an_op_is_raised_when_it_returns():
    done = subprocess.run([python(), "-c", WITHIN_AN_OP], capture_output=True, text=True, timeout=120)
    assert done.stdout == "well\n", done.stderr


OUT_OF_MEMORY = """
import resource, torch, mambaout_kernels as mk
torch.set_num_threads(1)
block = mk.optimize_for_inference(mk.FusedGatedCNNBlock(32))
x = torch.randn(1, 8, 8, 32)
with torch.no_grad():
    first = block(x)
u, w, b = torch.zeros(1, 1, 1, 64).expand(512, 1024, 64, 64), torch.randn(16, 1, 7, 7), torch.randn(16)
free = 256 << 20
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + free, used + free))
def refused(call):
    try:
        call()
    except (RuntimeError, MemoryError) as error:
        assert "memory" in str(error).lower() or "allocate" in str(error).lower(), error
        return True
assert refused(lambda: mk.gated_dwconv(u, w, b))
assert refused(lambda: torch.ops.mambaout_kernels.gated_dwconv_backward(u[..., :32], u, w, b, "gelu"))
with torch.no_grad():
    assert refused(lambda: block(torch.zeros(1, 1, 1, 32).expand(512, 1024, 64, 32)))
    assert torch.equal(block(x), first)
print("well")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory as Linux does")
def test_out_of_memory_is_an_error_and_the_next_call_works():
    done = subprocess.run([python(), "-c", OUT_OF_MEMORY], capture_output=True, text=True, timeout=120)
    assert done.stdout == "well\n", done.stderr
