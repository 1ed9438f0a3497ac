"""How commands end: output that cannot be written, too little memory, an interrupt. A sentence and an exit status."""

import errno
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from processes import python

import mambaout_kernels
from mambaout_kernels import backends, cli
from mambaout_kernels.benchmarking.run import Outcome, WorkerError
from mambaout_kernels.cli import bench, check, info, main, terminal

REFERENCE = ["--variant", "test_mambaout", "--dtype", "fp32", "--backend", "reference"]
COMMANDS = [["info"], ["info", "--json"], ["analyze", "--variant", "test_mambaout"], ["--help"]]
NEEDS_DEV_FULL = pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
OP = ["bench", "op", "--variant", "test_mambaout", "--dtype", "fp32", "--batch", "1", "--threads", "1"]


@pytest.fixture
def closed_pipe():
    """A stream whose reader is gone."""
    reader, writer = os.pipe()
    os.close(reader)
    stream = os.fdopen(writer, "w")
    yield stream
    stream.close()  # nothing may be left to write


@pytest.mark.parametrize("argv", COMMANDS, ids=" ".join)
def test_a_reader_that_is_gone(argv, capsys, closed_pipe, monkeypatch):
    monkeypatch.setattr(sys, "stdout", closed_pipe)
    assert main(argv) == 141
    assert "error" not in capsys.readouterr().err


@NEEDS_DEV_FULL
@pytest.mark.parametrize("argv", COMMANDS, ids=" ".join)
def test_output_on_a_full_device(argv, capsys, monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(argv) == 2
    assert capsys.readouterr().err.endswith("error: standard output: No space left on device\n")


@pytest.mark.parametrize("argv", COMMANDS, ids=" ".join)
def test_output_that_is_closed(argv, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert main(argv) == 2
    assert capsys.readouterr().err == "error: standard output is closed\n"


def test_progress_that_nobody_can_read(capsys, closed_pipe, monkeypatch):
    case = check.Case("small", N=1, H=2, W=2, D=4, C=2, K=3, act="gelu", dtype="fp32")
    monkeypatch.setattr(check, "find_cases", lambda *_: [case, case])
    monkeypatch.setattr(sys, "stderr", closed_pipe)
    assert main(["check", *REFERENCE]) == 141
    monkeypatch.setattr(sys, "stderr", None)
    assert main(["check", *REFERENCE, "--json"]) == 0
    assert capsys.readouterr().out.startswith("{")


@NEEDS_DEV_FULL
def test_an_error_on_a_full_device(monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stderr", full)
        assert main(["classify", "x.png"]) == 2


def test_a_process_and_its_pipe():
    """`mambaout-kernels info | head -1`, with what Python itself does when it ends."""
    command = f"{sys.executable} -m mambaout_kernels info | head -c 0; exit ${{PIPESTATUS[0]}}"
    root = str(Path(mambaout_kernels.__file__).parents[1])
    done = subprocess.run(
        ["bash", "-c", command], env={**os.environ, "PYTHONPATH": root}, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (141, "", "")


@pytest.fixture
def interrupts():
    """Heard by processes that are begun, as from a terminal; where tests run in the background they would not be."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupts")
def test_interrupt_of_a_process():
    root = str(Path(mambaout_kernels.__file__).parents[1])
    command = [sys.executable, "-m", "mambaout_kernels", "check", *REFERENCE[:-2]]
    with subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": root}, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr.readline().startswith("[1/")
        process.send_signal(signal.SIGINT)
        assert process.stderr.read().splitlines()[-1] == "interrupted"
    assert process.returncode == 130


@pytest.mark.usefixtures("interrupts")
@pytest.mark.skipif(os.name == "nt", reason="needs signals")
@pytest.mark.parametrize("seconds", [0.2, 0.8, 1.6])
def test_interrupt_while_torch_is_imported(seconds):
    command = [sys.executable, "-m", "mambaout_kernels", "info"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
    assert process.returncode in (-signal.SIGINT, 130), said
    assert said in ("", "interrupted\n") or seconds < 0.3  # before the package: Python's own


@pytest.mark.usefixtures("interrupts")
def test_another_process_that_imports_the_package_handles_interrupts_itself():
    code = "import signal, mambaout_kernels; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "True\n"


def test_interrupt_while_the_commands_are_imported(capsys, monkeypatch):
    class Interrupts:
        def find_spec(self, name, *_):
            if name == "mambaout_kernels.cli.bench":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "mambaout_kernels.cli.bench")
    monkeypatch.delattr(cli, "bench")
    monkeypatch.setattr(sys, "meta_path", [Interrupts(), *sys.meta_path])
    assert main(["info"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "error: out of memory\n"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes\nframe #0"),
            "error: out of memory: [enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes\n",
        ),
        (torch.OutOfMemoryError("CUDA out of memory."), "error: out of memory: CUDA out of memory.\n"),
        (FileNotFoundError(2, "No such file", "cuobjdump"), "error: cuobjdump: No such file\n"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_a_command_may_run_out_of(error, said, capsys, monkeypatch):
    def exhausted():
        raise error

    monkeypatch.setattr(info, "collect", exhausted)
    assert main(["info"]) == 2
    assert capsys.readouterr().err == said


def test_other_errors_keep_their_traceback(monkeypatch):
    monkeypatch.setattr(info, "collect", lambda: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="size"):
        main(["info"])


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([*OP, "--batch", "1000000000"], "--batch 1000000000: u of 40x40x16 alone takes"),
        (["bench", "model", "--variant", "test_mambaout", "--batch", "1000000000"], "--batch 1000000000: u of"),
        ([*OP, "--batch", "2147483648"], "'2147483648' is not a positive integer below 2^31"),
        (["audit", "--batch", "1" + 400 * "0"], "is not a positive integer below 2^31"),
        (["tune", "--batch", "1" + 5000 * "0"], "is not a positive integer below 2^31"),
        (["analyze", "--patch", "1" + 400 * "0"], "is not a positive integer below 2^31"),
        (["analyze", "--size", "70000"], "--size must be at most 65536 a side, got 70000x70000"),
    ],
)
def test_sizes_beyond_any_machine(argv, said, capsys, monkeypatch):
    monkeypatch.setattr(bench, "run_jobs", lambda *_: pytest.fail("it was run"))
    try:
        status = main(argv)
    except SystemExit as error:  # argparse's own
        status = error.code
    assert status == 2
    assert said in capsys.readouterr().err


def test_a_benchmark_without_memory_has_no_traceback(capsys, monkeypatch):
    def ended(*_):
        raise WorkerError(
            "RuntimeError: DefaultCPUAllocator: can't allocate memory\nTraceback (most recent call last):"
        )

    monkeypatch.setattr(bench, "run_jobs", ended)
    assert main(OP) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: the benchmark stopped: RuntimeError: Default")


@pytest.fixture
def tunable(monkeypatch):
    """A machine on which tune believes that it has a GPU."""
    pytest.importorskip("triton")
    from mambaout_kernels.backends.triton_kernels import tune

    monkeypatch.setattr(backends.load("triton"), "unavailable", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return tune


def test_tune_asks_first_whether_it_can_write(capsys, tmp_path, tunable, monkeypatch):
    monkeypatch.setattr(tunable, "tune", lambda *_: pytest.fail("it was run"))
    assert main(["tune", "--variant", "test_mambaout", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: --out {tmp_path} cannot be written: Is a directory\n"


@NEEDS_DEV_FULL
def test_tune_on_a_full_device(capsys, tunable, monkeypatch):
    monkeypatch.setattr(tunable, "tune", lambda *_: ([], []))
    assert main(["tune", "--variant", "test_mambaout", "--out", "/dev/full"]) == 2
    assert capsys.readouterr().err == "error: --out /dev/full cannot be written: No space left on device\n"


@pytest.mark.parametrize("name", ["op.json", "op.csv", "op.png"])
def test_bench_asks_first_whether_it_can_write(name, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "run_jobs", lambda *_: pytest.fail("it was run"))
    (tmp_path / name).mkdir()
    assert main([*OP, "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: --out {tmp_path / name} cannot be written: Is a directory\n"


def test_asking_whether_a_file_can_be_written_leaves_no_file(tmp_path):
    (tmp_path / "old").write_text("kept")
    terminal.check_writable("--out", tmp_path / "old")
    terminal.check_writable("--out", tmp_path / "folder" / "new")
    assert (tmp_path / "old").read_text() == "kept"
    assert not (tmp_path / "folder" / "new").exists()


def test_results_are_written_also_where_nobody_reads_them(capsys, tmp_path, closed_pipe, monkeypatch):
    monkeypatch.setattr(bench, "run_jobs", lambda *_: Outcome())
    monkeypatch.setattr(sys, "stdout", closed_pipe)
    assert main([*OP, "--out", str(tmp_path), "--no-plot"]) == 141
    assert (tmp_path / "op.json").stat().st_size > 0


def test_a_device_that_fills_up_while_results_are_written(capsys, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(bench, "run_jobs", lambda *_: Outcome())
    monkeypatch.setattr(bench.report, "write_csv", full)
    assert main([*OP, "--out", str(tmp_path)]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"error: --out {tmp_path} cannot be written: No space left on device"


def test_brackets_are_no_markup(capsys, monkeypatch):
    terminal.show_table("[/red] [bold]", ["[/a]", "[b]c"], [["[/d]", "[red]e"]])
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("[/red] [bold]", "[/a]", "[b]c", "[/d]", "[red]e"))

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    with terminal.progress(2) as step:
        step("[/red]")
        step("[bold]x")


@pytest.mark.parametrize(
    "command", [["-m", "mambaout_kernels"], ["-c", "import mambaout_kernels.cli as c; exit(c.main())"]]
)
@pytest.mark.parametrize(
    ("name", "said"),
    [("foo", "must be one of reference, cpu, triton, cuda, got 'foo'"), ("cuda", "cannot be used here")],
)
def test_a_wrong_backend_in_the_environment(command, name, said):
    if name == "cuda" and torch.cuda.is_available():
        pytest.skip("CUDA can be used here")
    environment = {**os.environ, "MAMBAOUT_KERNELS_BACKEND": name}
    argv = [python(), *command, "check", "--dtype", "fp32"]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True)
    if command[0] == "-c" and name == "foo":  # another program's: an exception, as anywhere in Python
        assert done.stderr.splitlines()[-1].startswith("ValueError: MAMBAOUT_KERNELS_BACKEND must be one of")
        return
    assert said in done.stderr
    assert done.stderr.startswith("error: MAMBAOUT_KERNELS_BACKEND")
    assert done.returncode == 2
    told = subprocess.run([*argv[: 1 + len(command)], "info"], env=environment, capture_output=True, text=True)
    assert (told.returncode == 0) == (name == "cuda")
