"""The commit-msg hook takes messages that say what and why, and names what is wrong with others."""

import subprocess
import sys
from pathlib import Path

import pytest

HOOK = Path(__file__).resolve().parent.parent / ".ci" / "commit_message.py"

GOOD = {
    "subject and body": "A model names its dtype\n\nA user could not tell which it was.\n",
    "longest subject": "x" * 72 + "\n\nwhy\n",
    "comments": "# hint\nWhat\n\nwhy\n# Please enter the commit message.\n",
    "diff of --verbose": "What\n\nwhy\n# ------------------------ >8 ------------------------\ndiff --git a b\n",
    "blank lines first": "\n\nWhat\n\nwhy\n",
    "merge": "Merge branch 'main'\n",
    "fixup": "fixup! What it mends\n",
}
BAD = {
    "": "empty",
    "# only a comment\n": "empty",
    "x" * 73 + "\n\nwhy\n": "73 characters",
    "What.\n\nwhy\n": "full stop",
    "What\nwhy\n": "second line",
    "What\nwhy\n\nmore\n": "second line",
    "What\n": "no body",
    "What\n\n\n# a comment is no body\n": "no body",
    "What\n\n# ------------------------ >8 ------------------------\ndiff --git a b\n": "no body",
}


def run_hook(message: str, folder: Path) -> subprocess.CompletedProcess:
    path = folder / "COMMIT_EDITMSG"
    path.write_text(message, encoding="utf-8")
    return subprocess.run([sys.executable, HOOK, path], capture_output=True, text=True)


@pytest.mark.parametrize("message", GOOD.values(), ids=GOOD)
def test_takes(message, tmp_path):
    done = run_hook(message, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(("message", "problem"), BAD.items(), ids=range(len(BAD)))
def test_refuses(message, problem, tmp_path):
    done = run_hook(message, tmp_path)
    assert done.returncode == 1
    assert problem in done.stderr
