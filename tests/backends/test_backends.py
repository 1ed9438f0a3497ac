"""Which backend runs."""

import asyncio
import os
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from numerics import make_inputs
from processes import python

from mambaout_kernels import backends, gated_dwconv
from mambaout_kernels.audit import cuda
from mambaout_kernels.backends import preferences
from mambaout_kernels.nn import FusedGatedCNNBlock


def test_status_names_every_backend_and_the_reference_always_works():
    status = backends.status()
    assert tuple(status) == backends.NAMES
    assert status["reference"] is None


def test_every_reason_is_a_sentence_for_a_person():
    for name, reason in backends.status().items():
        assert reason is None or len(reason) > 20, name


def test_force_is_undone_after_an_error():
    with pytest.raises(ValueError, match="act must"), backends.force("reference"):
        gated_dwconv(torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 1), torch.zeros(1), "relu")
    assert backends.forced() is None


def test_what_is_forced_is_what_is_preferred():
    with backends.force("reference"):
        assert backends.preferred("cpu") == "reference"
        assert not backends.has_kernels("cpu")
    assert backends.has_kernels("cpu") == (backends.status()["cpu"] is None)
    assert not backends.has_kernels("meta")


@pytest.mark.skipif(backends.status()["cpu"] is not None, reason="needs the compiled CPU kernels")
def test_a_forced_backend_that_does_not_support_a_call():
    assert backends.preferred("cpu") == "cpu"
    u, weight = torch.zeros(1, 2, 2, 4, device="meta"), torch.zeros(1, 1, 3, 3, device="meta")
    with backends.force("cpu"):
        assert backends.preferred("meta") == "cpu"
        with pytest.raises(RuntimeError, match=r"backend 'cpu' does not support u of torch\.float32 on meta"):
            backends.select(u, weight)


def test_force_nests():
    with backends.force("reference"):
        with backends.force("reference"):
            pass
        assert backends.forced() == "reference"


def test_force_is_of_its_thread_alone():
    """Threads that overlap, each of which ends in the middle of the other."""
    inside, leave = threading.Event(), threading.Event()
    seen = []

    def other():
        with backends.force("reference"):
            seen.append(backends.forced())
            inside.set()
            leave.wait()
        seen.append(backends.forced())

    thread = threading.Thread(target=other)
    thread.start()
    inside.wait()
    assert backends.forced() is None
    with backends.force("reference"):
        leave.set()
        thread.join()
        assert backends.forced() == "reference"
    assert seen == ["reference", None]
    assert backends.forced() is None


def test_force_when_a_compiler_traces():
    """Every call on the graph of what is forced in its thread; the same choice takes the same graph."""
    block, x, graphs = FusedGatedCNNBlock(8).eval(), torch.randn(1, 3, 3, 8), []

    def backend(graph, _):
        names = " ".join(str(node.target) for node in graph.graph.nodes)
        graphs.append("gated_dwconv" in names)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    with torch.no_grad():
        compiled(x)
        with backends.force("reference"):
            compiled(x)
            thread = threading.Thread(target=compiled, args=(x,))
            thread.start()
            thread.join()
            compiled(x)
        compiled(x)
    assert graphs in ([True, False], [True, False, True])  # gradients are on in another thread
    torch._dynamo.reset()


def test_force_is_of_its_asyncio_task_alone():
    async def task(name):
        with backends.force(name):
            await asyncio.sleep(0)
            return backends.forced()

    async def both():
        return await asyncio.gather(task("reference"), task(None), task("reference"))

    assert asyncio.run(both()) == ["reference", None, "reference"]


def test_the_default_is_of_all_threads_and_below_force(monkeypatch):
    monkeypatch.setattr(backends, "_default", None)
    backends.set_default("reference")
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(backends.forced).result() == "reference"
    if backends.status()["cpu"] is None:
        with backends.force("cpu"):
            assert backends.forced() == "cpu"
    with backends.force(None):
        assert backends.forced() == "reference"
    for name, error in (("tpu", ValueError), ("cuda", RuntimeError)):
        if name == "tpu" or backends.status()[name] is not None:
            with pytest.raises(error):
                backends.set_default(name)
    assert backends.forced() == "reference"
    backends.set_default(None)
    assert backends.forced() is None


@pytest.mark.skipif(backends.status()["cpu"] is not None, reason="needs two backends")
def test_backward_runs_where_its_forward_did(monkeypatch):
    """On whichever thread: autograd has some of its own, and a user may have, too."""
    inputs = make_inputs(1, 4, 4, 8, 4, 3)
    u = inputs.u.requires_grad_()
    with backends.force("cpu"):
        y = gated_dwconv(u, inputs.weight, inputs.bias)
    seen = []
    select = backends.select
    monkeypatch.setattr(
        backends, "select", lambda *args, **kwargs: seen.append(backends.forced()) or select(*args, **kwargs)
    )
    with ThreadPoolExecutor(1) as pool:
        pool.submit(y.sum().backward).result()
    assert seen == ["cpu"]
    assert u.grad.abs().max() > 0


def test_unknown_backend():
    with (
        pytest.raises(ValueError, match="backend must be one of reference, cpu, triton, cuda, got 'tpu'"),
        backends.force("tpu"),
    ):
        pass


@pytest.mark.parametrize("name", [n for n, reason in backends.status().items() if reason is not None])
def test_forcing_what_is_not_there_says_why(name):
    with pytest.raises(RuntimeError, match=f"backend '{name}' cannot be used here: "), backends.force(name):
        pass


def test_select_on_the_cpu():
    inputs = make_inputs(1, 2, 2, 4, 2, 3)
    expected = "reference" if backends.load("cpu").unavailable() else "cpu"
    assert backends.select(inputs.u, inputs.weight) is backends.load(expected)
    with backends.force("reference"):
        assert backends.select(inputs.u, inputs.weight) is backends.load("reference")


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [python(), "-c", code], env=os.environ | environment, capture_output=True, text=True, timeout=120
    )


def test_environment_variable():
    code = "import mambaout_kernels.backends as b; print(b.forced())"
    assert run(code, MAMBAOUT_KERNELS_BACKEND="reference").stdout.strip() == "reference"
    assert run(code, MAMBAOUT_KERNELS_BACKEND="").stdout.strip() == "None"
    wrong = run(code, MAMBAOUT_KERNELS_BACKEND="tpu")
    assert wrong.returncode != 0
    assert "MAMBAOUT_KERNELS_BACKEND must be one of reference, cpu, triton, cuda, got 'tpu'" in wrong.stderr


def test_another_device_runs_on_the_reference():
    y = gated_dwconv(
        torch.empty(1, 4, 4, 8, device="meta"), torch.empty(2, 1, 3, 3, device="meta"), torch.empty(2, device="meta")
    )
    assert y.shape == (1, 4, 4, 4)
    assert y.device.type == "meta"


class FakeBackend:
    def __init__(self, dtypes):
        self.dtypes = dtypes

    def supports(self, u, weight):
        return u.dtype in self.dtypes


def cuda_tensor(N, H, W, width, dtype=torch.bfloat16):
    """What `select` looks at in a u on a GPU."""
    device = SimpleNamespace(type="cuda", index=0)
    size = torch.empty((), dtype=dtype).element_size()
    return SimpleNamespace(device=device, dtype=dtype, shape=(N, H, W, width), element_size=lambda: size)


@pytest.fixture
def h100_with_both(monkeypatch):
    low = (torch.float32, torch.bfloat16, torch.float16)
    both = {"triton": FakeBackend(low), "cuda": FakeBackend(low)}
    monkeypatch.setattr(backends, "_available", lambda device_type: both)
    monkeypatch.setattr(backends, "_usable_for", {})
    monkeypatch.setattr(preferences, "_architecture", lambda index: "sm_90")
    return both


def test_the_table_chooses_between_the_gpu_backends(h100_with_both):
    for row in preferences.shipped():
        if row.arch != "sm_90":
            continue
        D, C = (256, 96) if row.aligned else (341, 128)
        u = cuda_tensor(
            1 if row.max_elements else 128, 56, 56, 2 * D, torch.float32 if row.bits == 32 else torch.float16
        )
        chosen = backends.select(u, torch.empty(C, 1, 7, 7, device="meta"), backward=row.backward)
        assert chosen is h100_with_both[row.backend], row


def test_what_the_table_does_not_know_is_for_triton(h100_with_both, monkeypatch):
    u = cuda_tensor(1, 56, 56, 512, torch.float32)
    assert backends.select(u, torch.empty(96, 1, 5, 5, device="meta")) is h100_with_both["triton"]
    monkeypatch.setattr(preferences, "_architecture", lambda index: "sm_130")
    assert backends.select(u, torch.empty(96, 1, 7, 7, device="meta")) is h100_with_both["triton"]


@pytest.mark.parametrize("only", ["triton", "cuda"])
def test_the_only_gpu_backend_is_taken(h100_with_both, monkeypatch, only):
    monkeypatch.setattr(backends, "_available", lambda device_type: {only: h100_with_both[only]})
    u, weight = cuda_tensor(128, 56, 56, 512), torch.empty(96, 1, 7, 7, device="meta")
    assert backends.select(u, weight) is backends.select(u, weight, backward=True) is h100_with_both[only]


def test_no_gpu_backend_supports_float64(h100_with_both):
    u = cuda_tensor(1, 4, 4, 16, torch.float64)
    assert backends.select(u, torch.empty(8, 1, 7, 7, device="meta")) is backends.load("reference")


def test_gpus_of_a_generation_share_rows():
    def found(arch):
        return preferences.row(arch, 32, True, False, 10**9)

    assert found("sm_89").arch == "sm_89"
    assert found("sm_86").arch[:4] == "sm_8"
    assert found("sm_103").arch == "sm_100"
    assert found("hip") is found("sm_75") is None


def test_every_preference_follows_from_its_figures():
    from mambaout_kernels.audit.preferences import MARGIN, SMALL

    keys = [(r.arch, r.bits, r.aligned, r.backward, r.max_elements) for r in preferences.shipped()]
    assert len(set(keys)) == len(keys) == 5 * 2 * 2 * 2 * 2
    assert {r.max_elements for r in preferences.shipped()} == {SMALL, None}
    for row in preferences.shipped():
        assert row.backend == ("cuda" if row.cuda_us < MARGIN * row.triton_us else "triton"), row
        assert "% of the DRAM roofline" in row.reason


@pytest.mark.skipif(
    cuda.module_path() is None or cuda.disassembler() is None or os.environ.get("TRITON_INTERPRET") == "1",
    reason="needs the compiled CUDA module and Triton's compiler",
)
@pytest.mark.nightly
def test_the_table_is_what_the_machine_code_predicts():
    """Within 15 %, for compilers differ."""
    from mambaout_kernels.audit.preferences import rows_of

    if "sm_90" not in cuda.targets(cuda.module_path()):
        pytest.skip("the compiled module is for other cards")
    shipped = {(r.bits, r.aligned, r.backward, r.max_elements): r for r in preferences.shipped() if r.arch == "sm_90"}
    for now in rows_of(cuda.module_path(), "sm_90", "float32", True, 128, None):
        then = shipped[now["bits"], now["aligned"], now["backward"], now["max_elements"]]
        assert now["triton_us"] == pytest.approx(then.triton_us, rel=0.15)
        assert now["cuda_us"] == pytest.approx(then.cuda_us, rel=0.15)
