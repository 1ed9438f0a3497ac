"""The Python that tests start (tests/processes.py) does as Python does."""

import os
import signal
import subprocess
import sys

import pytest
from processes import python


def outcome(program, *arguments, **how):
    done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=60, **how)
    return done.returncode, done.stdout, done.stderr.splitlines()[-1:]


SCRIPT = "import sys; print(__name__, __file__, sys.argv, sys.path[0], file=sys.stderr)"


@pytest.mark.parametrize(
    "code",
    [
        "import sys; print(sys.argv, sys.stdin.read(), __name__, repr(sys.path[0]))",
        "import os; print(os.getcwd(), os.environ['A'], os.environ.get('HOME'))",
        "import sys; sys.exit(3)",
        "import sys; sys.exit('a sentence')",
        "1 / 0",
        "raise KeyboardInterrupt",
        "import os; os.kill(os.getpid(), 11)",
        "import os; print('lost'); os._exit(5)",
        "import atexit; atexit.register(print, 'at the end'); print('first')",
    ],
)
def test_code(code, tmp_path):
    how = {"cwd": tmp_path, "env": {"A": "1", "PATH": os.environ["PATH"]}, "input": "text"}
    assert outcome(python(), "-c", code, "a", "b c", **how) == outcome(sys.executable, "-c", code, "a", "b c", **how)


def test_scripts_and_modules(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    how = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": str(tmp_path)}}
    for arguments in (
        ["script.py", "a"],
        ["-u", "script.py"],
        [str(tmp_path / "script.py")],
        ["-W", "error", "script.py"],
    ):
        assert outcome(python(), *arguments, **how) == outcome(sys.executable, *arguments, **how)
    status, _, [said] = outcome(python(), "-m", "script", "a", **how)
    assert status == 0
    assert said.startswith(f"__main__ {tmp_path / 'script.py'} [{str(tmp_path / 'script.py')!r}, 'a']")


def test_torch_is_there_and_has_the_threads_that_were_asked_for():
    code = "import sys; there = 'torch' in sys.modules; import torch; print(there, torch.get_num_threads())"
    assert outcome(python(), "-c", code, env={**os.environ, "OMP_NUM_THREADS": "3"}) == (0, "True 3\n", [])


WAITS = """
import time
try:
    print("there", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    print("well")
"""


def test_an_interrupt_reaches_it():
    process = subprocess.Popen([python(), "-c", WAITS], stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == ("well\n", None)
    assert process.returncode == 0


def test_it_ends_with_who_started_it():
    process = subprocess.Popen([python(), "-c", WAITS], stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.kill()
    assert process.communicate(timeout=60) == ("", None)  # the end of the pipe: nobody has it any more
    assert process.returncode == -signal.SIGKILL
