"""Checks a commit message, given as a file: git's commit-msg hook, by way of .pre-commit-config.yaml."""

import sys
from pathlib import Path

LONGEST_SUBJECT = 72
_SCISSORS = "# ------------------------ >8 ------------------------"  # of git commit --verbose; the diff follows
_MADE_BY_GIT = ("Merge ", "fixup! ", "squash! ", "amend! ")


def problems(message: str) -> list[str]:
    """What is wrong with a message as git hands it over, comments and all; nothing where it is as it should be."""
    lines = [line.rstrip() for line in message.partition(_SCISSORS)[0].splitlines() if not line.startswith("#")]
    while lines and not lines[0]:
        lines.pop(0)
    if not lines:
        return ["the message is empty"]
    subject, body = lines[0], lines[1:]
    if subject.startswith(_MADE_BY_GIT):
        return []
    found = []
    if len(subject) > LONGEST_SUBJECT:
        found.append(f"the subject has {len(subject)} characters, of at most {LONGEST_SUBJECT}")
    if subject.endswith("."):
        found.append("the subject ends in a full stop")
    if body and body[0]:
        found.append("the second line is not blank")
    if not any(body[1:]):
        found.append("there is no body: after a blank line, say why")
    return found


if __name__ == "__main__":
    wrong = problems(Path(sys.argv[1]).read_text(encoding="utf-8"))
    for problem in wrong:
        print(f"commit message: {problem}", file=sys.stderr)
    sys.exit(bool(wrong))
