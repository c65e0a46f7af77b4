"""Times every operation on this machine's device beside its peers: `make bench`."""

from collections.abc import Callable

import pytest

from bench.case import OpCase
from bench.figures import Figure
from bench.goals import GOALS
from bench.ops import OPERATIONS

CASES = [case for operation in OPERATIONS.values() for case in operation.cases]
# Those with a goal come first: they should not be what a time budget cuts.
CASES.sort(key=lambda case: case.key not in {goal.key for goal in GOALS})


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.key)
def test_operation(case: OpCase, measured: Callable[[OpCase], Figure]) -> None:
    measured(case)
