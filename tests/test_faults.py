"""tests/FAULTS.md is up to date: every fault can be planted, and its tests are there."""

import pytest

from tests.faults import ROOT, Fault, read_faults

FAULTS = list(read_faults((ROOT / "tests/FAULTS.md").read_text()))


def test_every_section_is_read() -> None:
    assert len(FAULTS) == (ROOT / "tests/FAULTS.md").read_text().count("\n### ") > 90


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.title)
def test_a_fault_can_be_planted(fault: Fault) -> None:
    assert (ROOT / fault.file).read_text().count(fault.old) == 1 and fault.old != fault.new
    assert fault.tests
    for test in fault.tests:
        path, name = test.split("::")
        assert f"def {name}(" in (ROOT / path).read_text(), test
