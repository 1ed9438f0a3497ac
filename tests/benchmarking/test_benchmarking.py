"""The timing harness: what it times, in what order, and what it makes of the figures."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch

from mambaout_kernels import backends
from mambaout_kernels.benchmarking import (
    accuracy,
    inputs,
    machine,
    measure,
    memory,
    photographs,
    plot,
    report,
    report_parts,
    shapes,
    stages,
    workloads,
)
from mambaout_kernels.benchmarking.run import Outcome, WorkerError, run
from mambaout_kernels.benchmarking.timing import Contender, Timing, by_cuda_events, interleave
from mambaout_kernels.benchmarking.worker import Job
from mambaout_kernels.benchmarking.workloads import Cell
from mambaout_kernels.models import VARIANTS, create_model

[SMALL] = shapes.stages("test_mambaout", [4])
CELL = Cell("op", "fwd", "fp32", 1, SMALL, ("fused", "eager"))


class Clock:
    """Time passes only when somebody works."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def work(self, seconds):
        self.now += seconds


def test_contenders_take_turns():
    order, clock = [], Clock()
    contenders = [Contender(name, lambda _, name=name: order.append(name)) for name in "AB"]
    interleave(contenders, 0.0, min_rounds=3, warmup_rounds=1, clock=clock)
    assert "".join(order) == "AB" * 4


def test_only_the_run_is_timed():
    clock = Clock()
    contender = Contender("A", lambda _: clock.work(1.0), prepare=lambda: clock.work(100.0))
    timing = interleave([contender], 0.0, min_rounds=3, clock=clock)["A"]
    assert timing.seconds == [1.0, 1.0, 1.0]


def test_rounds_fill_the_budget():
    clock = Clock()
    contenders = [Contender(name, lambda _: clock.work(0.5)) for name in "AB"]
    assert len(interleave(contenders, 20.0, clock=clock)["A"].seconds) == 20
    assert len(interleave(contenders, 0.0, clock=clock, min_rounds=5)["A"].seconds) == 5
    assert len(interleave(contenders, 1e9, clock=clock, max_rounds=7)["A"].seconds) == 7


def test_few_rounds_where_one_takes_long():
    calls, clock = [], Clock()
    contenders = [Contender(name, lambda _, name=name: (calls.append(name), clock.work(9.0))) for name in "AB"]
    assert interleave(contenders, 1.0, clock=clock)["B"].seconds == [9.0, 9.0, 9.0]
    assert "".join(calls) == "AB" * 4


def test_settling_is_not_timed():
    clock = Clock()
    contenders = [Contender(name, lambda _: clock.work(1.0)) for name in "AB"]
    timing = interleave(contenders, 0.0, min_rounds=3, clock=clock, settle=lambda: clock.work(50.0))["B"]
    assert timing.seconds == [1.0, 1.0, 1.0]


def test_a_stopwatch_of_its_own_times_instead_of_the_clock():
    clock = Clock()
    contender = Contender("A", lambda _: clock.work(1.0))

    def stopwatch(run):
        run()
        return 0.25

    assert interleave([contender], 4.0, clock=clock, stopwatch=stopwatch)["A"].seconds == [0.25] * 5


def test_by_cuda_events(monkeypatch):
    """What stands between the events is the run alone; the cache is filled with something else before."""
    order = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            order.append("record")

        def synchronize(self):
            order.append("wait")

        def elapsed_time(self, other):
            assert isinstance(other, Event)
            return 250.0  # milliseconds

    class Buffer:
        def zero_(self):
            order.append("buffer")

    sizes = []
    properties = SimpleNamespace(L2_cache_size=100 << 20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: properties)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch, "empty", lambda size, **_: sizes.append(size) or Buffer())
    stopwatch = by_cuda_events()
    assert sizes == [400 << 20]
    assert stopwatch(lambda: order.append("run")) == 0.25
    assert order == ["buffer", "record", "run", "record", "wait"]


def test_garbage_collection_is_switched_on_again():
    import gc

    def fails(_):
        raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        interleave([Contender("A", fails)], 0.0, warmup_rounds=0)
    assert gc.isenabled()


def test_minimum_and_median():
    timing = Timing([3.0, 1.0, 2.0, 10.0])
    assert (timing.minimum, timing.median) == (1.0, 2.5)


@pytest.mark.parametrize("name", shapes.variants())
def test_shapes_are_the_models(name):
    found = shapes.stages(name)
    with torch.device("meta"), torch.inference_mode():
        model = create_model(name)
        assert len(found) == len(model.stages)
        image = torch.zeros(1, 3, found[0].image_size, found[0].image_size)
        for shape, downsample, stage in zip(found, model.downsample_layers, model.stages, strict=True):
            image = downsample(image)
            block = stage[0]
            hidden, _, conv_channels = block.split_indices
            assert image.shape == (1, shape.height, shape.width, shape.dim)
            assert (hidden, conv_channels) == (shape.hidden, shape.conv_channels)
            assert block.conv.kernel_size == (shape.kernel_size, shape.kernel_size)
            assert VARIANTS[name].act_layer == shape.act


def test_every_variant_can_be_measured():
    assert set(shapes.variants()) == set(VARIANTS)
    assert shapes.variants()[0] == "mambaout_tiny"


def test_unknown_shapes_are_refused():
    with pytest.raises(ValueError, match="variant must be one of mambaout_tiny"):
        shapes.stages("resnet50")
    with pytest.raises(ValueError, match="stage must be in 1 to 4; got 0, 9"):
        shapes.stages("mambaout_tiny", [0, 9])


def test_photographs():
    images = photographs.load(9, 64)
    assert images.shape == (9, 3, 64, 64)
    assert images.dtype == torch.float32
    assert torch.isfinite(images).all()
    assert images[:5].flatten(1).std(dim=1).min() > 0.1
    assert not torch.equal(images[0], images[1])


@pytest.mark.parametrize("mode", workloads.MODES)
@pytest.mark.parametrize("subject", workloads.SUBJECTS)
def test_every_contender_runs(subject, mode):
    cell = Cell(subject, mode, "fp32", 1, SMALL, ("fused", "eager", "naive"), source="photographs")
    workload = workloads.build(cell)
    assert [contender.name for contender in workload.contenders] == ["fused", "eager", "naive"]
    for contender in workload.contenders:
        with contender.context():
            assert contender.run(contender.prepare()) is not None


def test_timms_model_has_our_weights():
    pytest.importorskip("timm")
    names = ("fused", "timm", "timm-channels-last", "cudnn-benchmark", "cuda")
    workload = workloads.build(Cell("model", "fwd", "fp32", 2, SMALL, names))
    if not torch.cuda.is_available():
        assert workload.failures == {"cuda": "not available: torch sees no CUDA device"}
    outputs = []
    for contender in workload.contenders[:4]:
        with contender.context():
            outputs.append(contender.run(contender.prepare()))
    for other in outputs[1:]:
        torch.testing.assert_close(other, outputs[0], rtol=1e-4, atol=1e-4)
    assert (
        workloads.build(Cell("block", "fwd", "fp32", 2, SMALL, ("timm",))).failures["timm"].startswith("not available")
    )


def test_our_own_under_a_compiler_is_verified_too(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    cell = Cell("block", "train", "fp32", 1, SMALL, ("fused", "compile-fused", "eager"))
    right = backends.load("cpu").gated_dwconv
    monkeypatch.setattr(backends.load("cpu"), "gated_dwconv", lambda *args: right(*args) * 1.001)
    fused, compiled, _ = measure.time_cell(cell, 1, 0.001, measure.Watch())
    assert fused["check"] is compiled["check"] is False
    assert compiled["speedup"] is None


def test_the_baselines_run_the_reference(monkeypatch):
    ran = []
    reference = backends.load("reference")
    right = reference.gated_dwconv
    monkeypatch.setattr(reference, "gated_dwconv", lambda *args: ran.append(args[1].shape[0]) or right(*args))
    for name, channels in (("eager", SMALL.conv_channels), ("naive", SMALL.hidden)):
        cell = dataclasses.replace(CELL, contenders=(name,))
        [contender] = workloads.build(cell).contenders
        ran.clear()
        with contender.context():
            contender.run(contender.prepare())
        assert ran == [channels]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("subject", "mode"), [("op", "bwd"), ("block", "train"), ("model", "train")])
def test_fused_is_verified(subject, mode, dtype):
    found = workloads.verify(Cell(subject, mode, dtype, 4, SMALL, ("fused", "eager")))
    assert len(found) > 1
    assert all(comparison.passed for comparison in found), found


def test_without_kernels_ours_is_eager():
    with backends.force("reference"):
        found = workloads.verify(Cell("op", "bwd", "bf16", 4, SMALL, ("fused", "eager")))
    assert all(comparison.passed for comparison in found), found


@pytest.mark.skipif(backends.status()["cpu"] is not None, reason="the compiled module is not there")
def test_a_wrong_kernel_gets_no_speedup(monkeypatch):
    from mambaout_kernels.benchmarking import measure

    right = backends.load("cpu").gated_dwconv
    monkeypatch.setattr(backends.load("cpu"), "gated_dwconv", lambda *args: right(*args) * 1.001)
    [fused, _] = measure.time_cell(CELL, 1, 0.001, measure.Watch())
    assert fused["check"] is False
    assert fused["speedup"] is None
    assert report.red([fused]) == [fused]
    assert "WRONG" in report.check_text(fused)


def row(contender, seconds, label="a", **more):
    common = {"subject": "op", "mode": "fwd", "dtype": "fp32", "autocast": False, "threads": 1, "batch": 1}
    return {**common, "label": label, "contender": contender, "median_s": seconds, "min_s": seconds / 2, **more}


def test_summary():
    rows = [row("fused", 1.0), row("eager", 2.0), row("fused", 1.0, "b"), row("eager", 8.0, "b")]
    [entry] = report.summary(rows)
    assert entry["speedup_geomean"] == pytest.approx(4.0)
    assert entry["speedup_worst"] == 2.0
    assert entry["worst_cell"] == "a, batch 1"


def test_cells_that_are_slower_are_listed():
    rows = [row("fused", 1.0), row("eager", 2.0), row("compile", 0.8), row("fused", 3.0, "b"), row("eager", 1.5, "b")]
    worst, other = report.slower_cells(rows)
    assert worst.startswith("0.50x of eager partial: ")
    assert ", b, " in worst
    assert other.startswith("0.80x of torch.compile: ")
    assert report.slower_cells([row("fused", 1.0, check=False), row("eager", 0.5)]) == []


def test_conclusions_are_of_most_threads_and_of_what_was_right():
    def two(seconds, **more):
        return [row("fused", 1.0, **more), row("eager", seconds, **more), row("naive", 2 * seconds, **more)]

    rows = two(2.0, threads=2) + two(8.0, threads=2, dtype="bf16") + two(5.0)
    [line] = report_parts.conclusions(rows)
    assert line == (
        "the op forward: 2.00 in fp32 and 8.00 in bf16 times as fast as PyTorch; "
        "4.00 in fp32 and 16.00 in bf16 times as fast as the naive full-channel block"
    )
    assert report_parts.conclusions([row("fused", 1.0, check=False), row("eager", 2.0)]) == []


def test_a_panel_of_the_plot_has_a_scale_of_its_own(tmp_path, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    kept = []
    monkeypatch.setattr(pyplot, "close", kept.append)
    rows = [row(name, 1.0, dtype=dtype, speedup=times) for dtype, times in (("fp32", 2.0), ("bf16", 150.0))
            for name in ("fused", "naive")]  # fmt: skip
    assert plot.draw(tmp_path / "a.png", rows, 20 * "a long title ")
    [figure] = kept
    tops = [ax.get_ylim()[1] for ax in figure.axes]
    assert tops == [pytest.approx(2.3), pytest.approx(172.5)]
    box = figure._suptitle.get_window_extent()
    assert 0 <= box.x0 < box.x1 <= figure.bbox.width


def test_summary_is_silent_where_fused_is_wrong():
    [entry] = report.summary([row("fused", 1.0, check=False), row("eager", 2.0)])
    assert entry["red"] == 1
    assert "speedup_geomean" not in entry


def test_summary_over_the_best_other():
    """Neither the naive baseline nor a contender that failed is one to be compared with."""
    rows = [row("fused", 1.0), row("eager", 4.0), row("openvino", 2.0), row("naive", 0.5)]
    rows.append({key: value for key, value in row("onnxruntime", 0.1).items() if key not in ("median_s", "min_s")})
    rows[-1]["failure"] = f"{workloads.NOT_AVAILABLE}: no kernels"
    over = {entry["over"]: entry.get("speedup_geomean") for entry in report.summary(rows)}
    assert over == {"eager": 4.0, "naive": 0.5, "openvino": 2.0, report.BEST: 2.0}
    headings, [line] = report.cells_table(rows)
    by_heading = dict(zip(headings, line, strict=True))
    assert by_heading["vs best"] == "2.00x"
    assert by_heading["ONNX Runtime, ms"] == workloads.NOT_AVAILABLE
    assert report.best_other({"fused": rows[0], "eager": rows[1]}) is None


def test_unsteady_timings_are_told():
    steady = [row("fused", 1.0, min_s=0.9)] * 10
    assert report.spread(steady) == []
    [warning] = report.spread([row("fused", 1.0, min_s=0.1)] * 2 + steady)
    assert warning.startswith("in 2 of 12 timings")


def test_json_has_no_nan(tmp_path):
    document = report.document("op", Outcome([row("fused", float("nan"))]), {}, [])
    report.write_json(tmp_path / "op.json", document)
    assert json.loads((tmp_path / "op.json").read_text())["results"][0]["median_s"] is None


def test_plot(tmp_path):
    assert set(plot.COLOURS) == set(plot.ORDER) == set(workloads.CONTENDERS)
    rows = [row(name, float(at)) for at, name in enumerate(workloads.CONTENDERS, start=1)]
    for each in rows:
        each |= {"per_second": 1 / each["median_s"], "speedup": 2.0 / each["median_s"]}
    assert plot.draw(tmp_path / "op.png", rows, "title")
    assert (tmp_path / "op.png").stat().st_size > 5000


class TestTolerance:
    exact = torch.tensor([1.0, -2.0], dtype=torch.float64)

    def compare(self, ours, eager, **bound):
        dtype = torch.float32
        return accuracy.compare(
            "y", torch.tensor(ours, dtype=dtype), torch.tensor(eager, dtype=dtype), self.exact, **bound
        )

    def test_within_twice_eagers_mean_error(self):
        assert self.compare([1.0, -2.0 - 1.99e-3], [1.0, -2.0 + 1e-3]).passed
        assert not self.compare([1.0, -2.0 - 2.01e-3], [1.0, -2.0 + 1e-3]).passed
        assert not self.compare([1.0 + 2e-3, -2.0 - 2e-3], [1.0, -2.0 + 1e-3]).passed

    def test_one_rounding_where_eager_is_exact(self):
        half_ulp = torch.finfo(torch.float32).eps
        assert self.compare([1.0 + half_ulp, -2.0], [1.0, -2.0]).passed
        assert not self.compare([1.0 + 2 * half_ulp, -2.0], [1.0, -2.0]).passed

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_not_finite_fails(self, bad):
        for bound in ({}, {"bound": torch.tensor([1.0, 1.0])}, {"bound": torch.tensor([bad, bad])}):
            found = self.compare([bad, -2.0], [1.0, -2.0], **bound)
            assert not found.passed
            assert found.excess == float("inf")
            assert not self.compare([bad, -2.0], [bad, -2.0], **bound).passed

    def test_another_dtype_or_shape_fails(self):
        y = self.exact.float()
        assert not accuracy.compare("y", y.half(), y, self.exact).passed
        assert not accuracy.compare("y", y[:1], y, self.exact).passed

    def test_each_element_within_its_own_bound(self):
        bound = torch.tensor([1e-3, 1e-1])
        assert self.compare([1.0, -2.0 - 5e-2], [1.0, -2.0 - 5e-2], bound=bound).passed
        found = self.compare([1.0 + 5e-3, -2.0], [1.0 + 5e-3, -2.0], bound=bound)
        assert not found.passed
        assert found.excess == pytest.approx(5.0, rel=1e-3)
        assert "5 times what correct arithmetic can be off by" in str(found)

    def test_an_exact_result_needs_no_bound(self):
        assert self.compare([1.0, -2.0], [1.0, -2.0], bound=torch.zeros(2)).passed

    @pytest.mark.parametrize(("elements", "differing", "compared"), [(30, 30, False), (5000, 10, False),
                                                                     (5000, 5000, True)])  # fmt: skip
    def test_of_few_independent_errors_the_bound_alone_decides(self, elements, differing, compared):
        """Within their bounds, and ten times eager's; a number that is there many times has one error."""
        exact = (1 + torch.rand(differing, dtype=torch.float64)).repeat(elements // differing)
        errors = 1e-4 * torch.randn(differing, dtype=torch.float64).repeat(elements // differing)
        ours, eager = ((exact + scale * errors).float() for scale in (10.0, 1.0))
        found = accuracy.compare("y", ours, eager, exact, bound=torch.full_like(exact, 0.1))
        assert found.passed != compared
        assert accuracy.compare("y", eager, eager, exact, bound=torch.full_like(exact, 0.1)).passed

    def test_eagers_luck_in_one_large_tensor(self):
        """Its errors are next to nothing but for one: no mean that says anything."""
        exact = 1 + torch.rand(5000, dtype=torch.float64)
        ours = (exact + 1e-4 * torch.randn(5000, dtype=torch.float64)).float()
        eager = exact.float()
        eager[7] += 1e-3
        assert accuracy.compare("y", ours, eager, exact, bound=torch.full_like(exact, 1e-2)).passed

    def test_a_models_gradients_are_one(self):
        exact = {"y": self.exact, "a": torch.rand(3, dtype=torch.float64), "b": torch.rand(900, dtype=torch.float64)}
        eager = {name: t.float() + 1e-4 * torch.randn(t.shape) for name, t in exact.items()}
        assert all(found.passed for found in accuracy.compare_model(eager, eager, exact))
        for name in ("a", "b"):
            worse = {**eager, name: eager[name] * 1.01}
            y, gradients = accuracy.compare_model(worse, eager, exact)
            assert (y.name, gradients.name) == ("y", "gradients")
            assert y.passed
            assert not gradients.passed


def test_kept_bytes_counts_each_storage_once():
    x = torch.randn(4, 5, requires_grad=True)

    def forward():
        a = x * 2  # saves nothing but a constant
        return (a * a).view(20) * a.view(20)

    kept = memory.kept_bytes(workloads.Problem(forward, {"x": x}))
    assert kept == 2 * 4 * 5 * 4  # a, and a * a


def test_enlivened_model_has_no_special_parameters():
    model = inputs.enlivened(create_model("mambaout_base_plus_rw", depths=(1, 1, 1, 1)))
    assert all(parameter.std() > 1e-3 for parameter in model.parameters() if parameter.numel() > 1)


def test_job_survives_json():
    job = Job(2, 0.5, [CELL], [CELL], [CELL, CELL], folder="somewhere")
    assert Job.from_json(job.to_json()) == job


@pytest.mark.usefixtures("forked_workers")
def test_a_broken_worker_is_reported():
    job = Job(1, 0.001, [dataclasses.replace(CELL, subject="nonsense")])
    with pytest.raises(WorkerError, match="KeyError: 'nonsense'"):
        run([job], lambda *_: None)


def test_machine_is_described():
    about = machine.description()
    assert about["torch"] == torch.__version__
    assert about["cores"] >= 1
    assert about["isa"] == (None if backends.status()["cpu"] else backends.load("cpu").module.cpu_capability())


def test_shares_of_time():
    before = {0: machine.CpuTimes(100, 50, 0)}
    after = {0: machine.CpuTimes(200, 75, 10)}
    assert machine.shares(before, after) == {0: (0.75, 0.10)}


MODEL = Cell("model", "fwd", "fp32", 2, shapes.stages("test_mambaout")[0], ("fused", "eager"))


def test_parts_are_the_model():
    found = stages.parts(MODEL)
    names = [part.name for part in found]
    assert names == ["stem", "stage 1", *(f"{kind} {i}" for i in (2, 3, 4) for kind in ("downsample", "stage")), "head"]
    posed = workloads.problem(MODEL)
    with workloads.running(MODEL, "eager"):
        assert torch.equal(found[-1].module(found[-1].x), posed.forward())
    assert sum(stages.flops(part.module, part.x) for part in found) == stages.problem_flops(posed)


def test_flops_of_a_block():
    """Two for each multiply-add of fc1, fc2 and the 7 x 7 convolution."""
    cell = dataclasses.replace(MODEL, subject="block", shape=SMALL)
    dim, hidden, channels = SMALL.dim, SMALL.hidden, SMALL.conv_channels
    expected = 2 * SMALL.height * SMALL.width * (3 * hidden * dim + 49 * channels)
    assert stages.problem_flops(workloads.problem(cell)) == expected


def test_part_rows():
    peak = {"fp32": 1e12}
    rows = measure.stage_rows(MODEL, 1, 0.001, peak, measure.Watch())
    fused = [row for row in rows if row["contender"] == "fused"]
    assert len(rows) == 2 * len(fused)
    *parts, total = fused
    assert total["part"] == "sum"
    assert total["flops"] == sum(row["flops"] for row in parts)
    assert total["min_s"] >= sum(row["min_s"] for row in parts)
    for each in fused:
        assert each["peak_share"] == pytest.approx(2 * each["flops"] / each["median_s"] / 1e12)
    headings, lines = report_parts.parts_table(rows)
    assert len(lines) == len(fused)
    assert all(len(line) == len(headings) for line in lines)
    assert report.cells_table(rows)[1] == report.summary(rows) == []


@pytest.mark.skipif(backends.status()["cpu"] is not None, reason="the compiled module is not there")
class TestFmaPeak:
    def test_of_every_instruction_set(self):
        module = backends.load("cpu").module
        before = module.cpu_capability()
        peaks = {}
        try:
            for isa in module.supported_cpu_capabilities():
                module.set_cpu_capability(isa)
                peaks[isa] = machine.fma_peak(repetitions=2, milliseconds=2.0)
        finally:
            module.set_cpu_capability(before)
        for isa, peak in peaks.items():
            assert set(peak) == ({"fp32", "bf16"} if isa in ("avx512_bf16", "amx_bf16") else {"fp32"})
            # At 10 MHz to 10 GHz, a cycle two multiply-adds of 4 to 16 lanes, of pairs in bf16, or a sixteenth of the
            # 16 x 16 x 32 of two tiles: a wrong count of operations or of seconds is outside.
            most = 1.1e13 if isa == "amx_bf16" else 1.3e12
            assert all(1e8 < flops / torch.get_num_threads() < most for flops in peak.values())

    def test_of_every_cell_and_what_it_fell_to(self, monkeypatch):
        found = iter([{"fp32": 2e11, "bf16": 4e11}, {"fp32": 1e11, "bf16": 3.9e11}, {"fp32": 1.9e11, "bf16": 4.1e11}])
        monkeypatch.setattr(machine, "fma_peak", lambda: next(found))
        peaks = measure.Peaks()
        assert peaks.best() == {}
        assert peaks.disturbances(1) == []
        assert [peaks.now()["fp32"] for _ in range(3)] == [2e11, 1e11, 1.9e11]
        assert peaks.best() == {"fp32": 2e11, "bf16": 4.1e11}
        (said,) = peaks.disturbances(1)
        assert "with 1 thread, the processor's own peak in fp32 fell to 50%" in said

    def test_of_every_thread(self):
        module = backends.load("cpu").module
        before = torch.get_num_threads()
        try:
            for threads in (1, 2):
                torch.set_num_threads(threads)
                assert len(module.fma_flops(False, 1.0)) == threads
        finally:
            torch.set_num_threads(before)

    def test_takes_the_time_it_is_given_and_lets_others_run(self):
        import threading
        import time

        module, counted = backends.load("cpu").module, 0
        thread = threading.Thread(target=module.fma_flops, args=(False, 100.0))
        start = time.perf_counter()
        thread.start()
        while thread.is_alive():
            counted += 1
            time.sleep(0.001)
        assert time.perf_counter() - start > 0.1
        assert counted > 3  # 1 if it kept the interpreter to itself

    def test_refuses(self):
        module = backends.load("cpu").module
        for wrong in (0.0, -1.0, float("nan"), 1e9):
            with pytest.raises(ValueError, match="milliseconds must be above 0, at most 10000; got"):
                module.fma_flops(False, wrong)
        before = module.cpu_capability()
        module.set_cpu_capability("portable")
        try:
            with pytest.raises(ValueError, match="multiplies no bfloat16"):
                module.fma_flops(True, 1.0)
        finally:
            module.set_cpu_capability(before)


def test_peak_in_words():
    text = report_parts.peak_text({2: {"fp32": 5e11}, 1: {"fp32": 2.5e11, "bf16": 5e11}})
    assert text.endswith("GFLOP/s: 1 thread: fp32 250, bf16 500; 2 threads: fp32 500")
    assert report_parts.peak_text({}) == ""


@pytest.mark.parametrize("subject", ["block", "model"])
def test_memory_of_an_inference(subject):
    shape = shapes.stages("test_mambaout")[0]
    cell = Cell(subject, "fwd", "fp32", 8, shape, ("fused", "eager", "compile"))
    job = Job(1, 0.001, memory=[cell])
    fused, eager = run([job], lambda *_: None).rows
    assert (fused["contender"], fused["of"], eager["kept_bytes"], eager["kept_ratio"]) == ("fused", "fwd", 0, None)
    if eager["peak_bytes"] is None:
        pytest.skip("the system does not tell")
    # eager holds fc1's output and the gated product at least, of one block of the first stage
    assert eager["peak_bytes"] > 8 * shape.height * shape.width * 3 * shape.hidden * 4
    if backends.status()["cpu"] is None:
        assert fused["peak_bytes"] < eager["peak_bytes"]
        assert fused["kept_bytes"] > 3 * shape.hidden * shape.dim * 4  # fc1 and fc2, packed
    assert fused["peak_ratio"] == fused["peak_bytes"] / eager["peak_bytes"]
    [_, second] = report.memory_table([fused, eager])[1]
    assert second[0] == f"{subject} fwd"
