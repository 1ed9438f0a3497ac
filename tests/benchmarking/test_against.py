"""bench model --against: which models a name is, that they are checked and run on their kernel, and what is told."""

import ast
import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mambaout_kernels import backends
from mambaout_kernels.benchmarking import against, measure, plot_against, report, report_against, shapes, workloads
from mambaout_kernels.benchmarking.against import Against
from mambaout_kernels.benchmarking.run import Outcome
from mambaout_kernels.benchmarking.worker import Job
from mambaout_kernels.benchmarking.workloads import Cell
from mambaout_kernels.cli import against as cli
from mambaout_kernels.cli import bench, main, terminal
from mambaout_kernels.comparators import reference
from mambaout_kernels.comparators.models import MODELS
from mambaout_kernels.models import VARIANTS

SCAN = "efficientvmamba_small"  # the smallest
SMALL = replace(shapes.stages("test_mambaout")[0], height=16, width=16)  # images of 64 x 64
CELL = Cell("model", "fwd", "fp32", 2, SMALL, ("fused", "eager"))
OWN = [name for name, model in MODELS.items() if model.factory]
TIMMS = [name for name, model in MODELS.items() if not model.factory]
needs_kernel = pytest.mark.skipif(against.scan_backend(CELL) == "reference", reason="no kernel of the selective scan")


@pytest.fixture
def without_timm(monkeypatch):
    found = terminal.find_spec
    monkeypatch.setattr(terminal, "find_spec", lambda name: None if name == "timm" else found(name))


def compare(*others, cell=CELL):
    return measure.against_rows(Against((cell,), others), 1, 0.001, measure.Watch(), measure.Peaks())


# Names


def test_variants_join_the_variants():
    assert cli.names(["mambaout_small", SCAN, SCAN]) == (["mambaout_small"], [SCAN])


@pytest.mark.parametrize("word", cli.TABLE)
def test_the_paper_is_its_whole_table(word):
    pytest.importorskip("timm")
    variants, others = cli.names([word])
    assert [*variants, *others] == [*MODELS]


@pytest.mark.parametrize("word", cli.TABLE)
def test_without_timm_the_paper_is_what_is_made_here(without_timm, word):
    variants, others = cli.names([word])
    assert [*variants, *others] == OWN


def test_without_timm_its_models_are_refused(without_timm):
    for name in TIMMS:
        with pytest.raises(terminal.UsageError, match=f"--against {name} needs timm: pip install timm"):
            cli.names([SCAN, name])
    with pytest.raises(terminal.UsageError, match=r"'resnet50' is no model .*; for timm's: pip install timm"):
        cli.names(["resnet50"])


def test_any_model_of_timm():
    pytest.importorskip("timm")
    assert cli.names(["resnet18"]) == ([], ["resnet18"])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--against", "vmamba_tinny"], ["'vmamba_tinny' is no model", "close: vmamba_tiny", "timm"]),
        (["--against", ""], ["'' is no model", "Allowed: paper, mambaout_"]),
        (["--against", SCAN, "--mode", "bwd"], ["compared in modes fwd and train"]),
    ],
)
def test_refuses_by_name(capsys, given, said):
    assert main(["bench", "model", *given]) == 2
    error = capsys.readouterr().err
    assert all(words in error for words in said), error


# Comparisons


def test_benchmarks_import_comparators_where_these_are_needed():
    for path in Path(against.__file__).parent.glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom):
                assert "comparators" not in [node.module, *(alias.name for alias in node.names)], path.name


def test_one_comparison_for_each_mode_dtype_batch_and_size():
    cells = [
        replace(CELL, mode=mode, shape=shapes.stages(variant)[0], contenders=("fused", "naive"))
        for mode in ("fwd", "bwd")
        for variant in ("mambaout_tiny", "mambaout_small", "test_mambaout")
    ]
    found = cli.comparisons(cells, [SCAN])
    assert [(each.image_size, [cell.label for cell in each.cells]) for each in found] == [
        (224, ["mambaout_tiny", "mambaout_small"]),
        (160, ["test_mambaout"]),
    ]
    assert {(cell.mode, cell.contenders, each.others) for each in found for cell in each.cells} == {
        ("fwd", ("fused", "eager"), (SCAN,))
    }


def test_job_survives_json_and_counts_its_models():
    job = Job(1, 0.5, [CELL], against=[Against((CELL, CELL), (SCAN, "resnet18"))])
    assert Job.from_json(job.to_json()) == job
    assert job.steps == 2
    assert job.least_s == 0.5 * (1 + 4)


def test_the_nearest_variant_is_by_ratio():
    assert against.nearest(23, {"a": 8, "b": 60}) == "b"
    assert against.nearest(21, {"a": 8, "b": 60}) == "a"


@pytest.mark.parametrize("name", [SCAN, "deit_small_patch16_224"])
def test_facts_are_computed_and_top1_is_the_paper_s(name):
    if name in TIMMS:
        pytest.importorskip("timm")
    model = against.make(name, 224)
    found = against.facts(name, model, 224)
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert found["macs"] / 1e9 == pytest.approx(MODELS[name].macs, rel=0.05)
    assert (found["top1"], found["top1_source"]) == (MODELS[name].top1, MODELS[name].source)
    assert against.facts(SCAN, against.make(SCAN, 64), 64)["top1"] is None  # reported of 224 x 224


def test_timm_s_models_of_one_size_are_made_for_another():
    pytest.importorskip("timm")
    found = compare("deit_tiny_patch16_224")[-1]
    assert found["per_second"] > 0
    assert found["backend"] == "PyTorch"


@needs_kernel
class TestScans:
    @pytest.mark.parametrize("mode", cli.MODES)
    def test_run_on_their_kernel(self, mode, monkeypatch):
        """Nor is it eager's context, in which the reference is forced, that the time is taken in."""

        def loop(*_):
            raise AssertionError("the reference ran")

        monkeypatch.setattr(reference, "selective_scan", loop)
        monkeypatch.setattr(reference, "selective_scan_backward", loop)
        monkeypatch.setattr(against, "verify", lambda *_: against.accuracy.compare_model(*[{"y": torch.ones(9)}] * 3))
        [*_, entrant] = against.entrants(Against((replace(CELL, mode=mode),), (SCAN,)))
        assert entrant.failure is None
        with entrant.contender.context():
            entrant.contender.run(None)
        assert measure._scan_backend(CELL, entrant).startswith("PyTorch, scan: cpu")
        with backends.force("reference"), pytest.raises(AssertionError, match="the reference ran"):
            entrant.contender.run(None)

    def test_are_not_timed_on_the_reference(self):
        """Where no kernel scans this dtype."""
        found = compare(SCAN, cell=replace(CELL, dtype="fp64"))[-1]
        assert found["failure"] == "not available: no kernel of the selective scan for fp64 on this cpu device"
        assert "median_s" not in found

    @pytest.mark.parametrize(("mode", "dtype"), [("train", "fp32"), ("fwd", "bf16")])
    def test_are_checked(self, mode, dtype):
        found = against.verify(replace(CELL, mode=mode, dtype=dtype), SCAN)
        assert [each.name for each in found] == ["y", "gradients"][: 1 + (mode == "train")]
        assert all(each.passed for each in found), found

    def test_a_wrong_one_has_no_time(self, monkeypatch):
        """The kernel is, beside a reference whose skip connections are larger by a hundredth."""
        right = reference.selective_scan
        monkeypatch.setattr(reference, "selective_scan", lambda *a: right(*a[:5], 1.01 * a[5], *a[6:]))
        rows = compare(SCAN)
        found = rows[-1]
        assert found["check"] is False
        assert "median_s" not in found
        assert found["times_fused"] is None
        assert report.red(rows) == [found]
        headings, lines = report_against.table(rows)
        [line] = [dict(zip(headings, line, strict=True)) for line in lines if line[0] == SCAN]
        assert line["check"].startswith("WRONG: y")
        assert line["images/s"] == line["as fast as fused"] == ""


def test_what_is_not_finite_is_not_timed(monkeypatch):
    right = against.make

    def broken(name, size):
        model = right(name, size)
        if name == "resnet10t":
            torch.nn.init.constant_(model.fc.bias, float("nan"))
        return model

    pytest.importorskip("timm")
    monkeypatch.setattr(against, "make", broken)
    found = compare("resnet10t")[-1]
    assert found["failure"] == "ValueError: its output is not finite"
    assert "median_s" not in found


def test_of_a_wrong_fused_nothing_is_a_multiple(monkeypatch):
    if backends.status()["cpu"] is not None:
        pytest.skip("the compiled module is not there")
    right = workloads.verify
    monkeypatch.setattr(workloads, "verify", lambda cell: [replace(c, error=1.0, mean_error=1.0) for c in right(cell)])
    rows = compare()
    assert rows[0]["check"] is False
    assert [row["times_fused"] for row in rows] == [None, None]


# What is told


def row(label, how, seconds, parameters, **more):
    found = {"subject": "against", "mode": "fwd", "dtype": "fp32", "batch": 2, "image_size": 224, "threads": 1}
    found |= {"label": label, "contender": how, "backend": "PyTorch", "parameters": parameters, "macs": 4.5e9}
    found |= {"median_s": seconds, "min_s": seconds / 2, "per_second": 2 / seconds, "nearest": "mambaout_tiny"}
    known = MODELS.get(label)
    found |= {"top1": known and known.top1, "top1_source": known and known.source, "times_fused": 0.1 / seconds}
    return {**found, **more}


ROWS = [
    row("mambaout_tiny", "fused", 0.1, 27e6, peak_share=0.5, check=True, check_difference=1e-6),
    row("mambaout_tiny", "eager", 0.2, 27e6),
    row("mambaout_femto", "fused", 0.02, 7e6, nearest="mambaout_femto"),
    row("vmamba_tiny", "as made", 0.4, 22e6, backend="PyTorch, scan: cpu"),
    row("resnet18", "as made", 2.5, 11e6, nearest="mambaout_femto"),
]


def test_table():
    [(name, members)] = report_against.comparisons([*ROWS, {"subject": "model"}]).items()
    assert name == "fwd fp32, batch 2, 224 x 224 pixels, 1 thread"
    headings, lines = report_against.table(members)
    assert [line[0] for line in lines] == [
        "mambaout_femto",
        "resnet18",
        "mambaout_tiny",
        "mambaout_tiny",
        "vmamba_tiny",
    ]
    by_heading = dict(zip(headings, lines[2], strict=True))
    assert by_heading == {
        "model": "mambaout_tiny", "runs": "fused", "parameters, M": "27.0", "MACs, G": "4.50", "images/s": "20",
        "ms per batch": "50 / 100", "as fast as fused": "1.00x mambaout_tiny", "of peak": "50%",
        "top-1 (paper)": "82.7", "check": "ok, apart by 1.0e-06",
    }  # fmt: skip
    resnet, scan = (dict(zip(headings, lines[at], strict=True)) for at in (1, 4))
    assert (scan["as fast as fused"], scan["top-1 (paper)"]) == ("0.25x mambaout_tiny", "82.2")
    assert (resnet["ms per batch"], resnet["top-1 (paper)"]) == ("1250 / 2500", "")


def test_sources_are_told():
    told = report_against.sources(ROWS)
    assert told == [f"{MODELS['mambaout_tiny'].source}: mambaout_tiny, mambaout_femto",
                    f"{MODELS['vmamba_tiny'].source}: vmamba_tiny"]  # fmt: skip


def test_plot(tmp_path, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    kept = []
    monkeypatch.setattr(pyplot, "close", kept.append)
    path = tmp_path / "against.png"
    assert not plot_against.draw(path, ROWS[:2], "title")  # one model
    assert not path.exists()
    assert plot_against.draw(path, ROWS, "title")
    assert path.read_bytes().startswith(b"\x89PNG")
    [ax] = kept[0].axes
    assert ax.get_xscale() == "log"
    assert {text.get_text() for text in ax.texts} == {"mambaout_tiny", "mambaout_femto", "vmamba_tiny"}
    _, fused = ax.get_lines()  # eager, fused: from the small to the large
    assert fused.get_xydata().tolist() == [[100.0, 78.9], [20.0, 82.7]]
    areas = [size for points in ax.collections for size in points.get_sizes()]
    assert sorted(areas)[-1] / sorted(areas)[0] == pytest.approx(27 / 7)


QUICK = ["--batch", "1", "--dtype", "fp32", "--threads", "1", "--budget", "0.001", "--input", "random", "--no-naive",
         "--no-compile", "--no-stages", "--no-memory", "--no-peers"]  # fmt: skip


@needs_kernel
@pytest.mark.usefixtures("forked_workers")
def test_a_run_of_models_against_each_other(capsys, tmp_path):
    command = ["bench", "model", "--variant", "test_mambaout", "--against", SCAN, *QUICK, "--out", str(tmp_path)]
    assert main(command) == 0
    out, err = capsys.readouterr()
    assert "2 models fwd fp32, batch 1, against each other" in err
    assert "top-1 (paper)" in out
    document = json.loads((tmp_path / "model.json").read_text())
    rows = [row for row in document["results"] if row["subject"] == "against"]
    assert [(row["label"], row["contender"]) for row in rows] == [
        ("test_mambaout", "fused"), ("test_mambaout", "eager"), (SCAN, "as made"),
    ]  # fmt: skip
    assert {entry["subject"] for entry in document["summary"]} == {"model"}
    fused, _, other = rows
    assert fused["check"]
    assert other["check"]
    assert other["times_fused"] == pytest.approx(fused["median_s"] / other["median_s"])
    assert other["peak_share"] > 0
    with (tmp_path / "model.csv").open() as file:
        assert {line["label"] for line in csv.DictReader(file)} == {"test_mambaout", SCAN}
    assert not (tmp_path / "against.png").exists()  # no top-1 of images of 160 x 160


def test_a_run_tells_where_top1_is_from_and_draws_it(capsys, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(bench, "run_jobs", lambda *_: Outcome(list(ROWS)))
    assert main(["bench", "model", "--against", "vmamba_tiny", *QUICK, "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert f"{MODELS['vmamba_tiny'].source}: vmamba_tiny" in out
    assert "Random weights; nothing here is trained" in out
    assert (tmp_path / "against.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "model.png").exists()  # no bars to draw


def test_the_estimate_counts_models(capsys, monkeypatch):
    monkeypatch.setattr(bench, "run_jobs", lambda *_: Outcome(list(ROWS)))
    assert main(["bench", "model", "--against", f"{SCAN},vmamba_tiny,vmamba_small", *QUICK, "--budget", "10"]) == 0
    assert "2 steps; the timing alone takes some 50 s" in capsys.readouterr().err


def test_without_timm_what_is_left_out_is_told(capsys, monkeypatch, without_timm):
    monkeypatch.setattr(bench, "run_jobs", lambda *_: Outcome(list(ROWS)))
    assert main(["bench", "model", "--against", "paper", *QUICK]) == 0
    assert f"left out, timm is not installed: {', '.join(TIMMS)}" in capsys.readouterr().out


def test_every_variant_may_be_named():
    assert cli.names(list(VARIANTS)) == (list(VARIANTS), [])
