"""What plant_faults.py would plant: each fault's place is still in its source, and the tests that are to see it are."""

from pathlib import Path

import pytest
from faults import FAULTS

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("file", sorted({fault.file for fault in FAULTS}))
def test_every_fault_has_its_place(file):
    source = (ROOT / file).read_text()
    assert [fault.right for fault in FAULTS if fault.file == file and fault.right not in source] == []


def test_every_fault_has_its_tests():
    paths = {word for fault in FAULTS for word in fault.test.split() if word.startswith("tests/")}
    assert [path for path in sorted(paths) if not (ROOT / path.partition("::")[0]).exists()] == []
    assert all(any(word.startswith("tests/") for word in fault.test.split()) for fault in FAULTS)
