"""The C++'s own arithmetic: exp, log and tanh, and the sum over a row."""

import numpy as np
import pytest
import torch

from kernels import cpp
from tests.implementations import Implementation

pytestmark = pytest.mark.implementations("cpp")

# Their numbers in C++, and the largest errors that are allowed, in units in the last place.
FUNCTIONS = {"exp": (0, np.exp, 1.03), "log": (1, np.log, 1.0), "tanh": (2, np.tanh, 2.0)}


def test_a_sum_is_its_definition(on: Implementation) -> None:
    """16 lanes by index, joined 8, 4, 2 and 1 apart."""
    for size in (1, 15, 16, 17, 200, 1003, 2304):
        x, out = on.draw(1, size), torch.empty(1)
        cpp.call("row_dots", torch.float32, x, 1, size, torch.ones(1, size), out)
        lanes = np.zeros(16, dtype=np.float32)
        for i, value in enumerate(x[0].numpy()):
            lanes[i % 16] += value
        for apart in (8, 4, 2, 1):
            lanes[:apart] += lanes[apart : 2 * apart]
        assert float(out) == float(lanes[0])


def largest_error(name: str, bits: np.ndarray) -> float:
    """The largest error of a function on the float32 numbers of these bits, in units in the last
    place of the exact result; infinities, NaN and zeros have to be exact."""
    number, function, _ = FUNCTIONS[name]
    x = bits.view(np.float32)
    y = torch.empty(len(x))
    cpp.call("elementary", torch.float32, torch.from_numpy(x), y, len(x), number)
    with np.errstate(all="ignore"):
        exact = function(x.astype(np.float64))
        expected, found = exact.astype(np.float32), y.numpy()
        assert (np.isnan(found) == np.isnan(expected)).all()
        infinite = np.isinf(expected) | np.isinf(found)
        near = np.abs(exact[infinite]) > 3.4028e38
        assert (near | (found[infinite] == expected[infinite])).all()
        usual = np.isfinite(expected) & np.isfinite(found)
        unit = np.spacing(np.maximum(np.abs(expected[usual]), np.float32(2**-126)))
        errors = np.abs(found[usual].astype(np.float64) - exact[usual]) / unit
    return float(errors.max(initial=0.0))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_elementary_functions(on: Implementation, name: str) -> None:
    """Some two million numbers of all sizes, and the special ones."""
    bits = np.arange(0, 2**32, 2053, dtype=np.int64).astype(np.uint32)
    special = np.array([0, 1 << 31, 0x7F800000, 0xFF800000, 0x7FC00000, 1, 0x80000001])
    dense = np.linspace(-110, 100, 100_003).astype(np.float32).view(np.uint32)
    every = np.concatenate([bits, special.astype(np.uint32), dense])
    assert largest_error(name, every) <= FUNCTIONS[name][2]


@pytest.mark.soak
@pytest.mark.parametrize("name", FUNCTIONS)
def test_elementary_functions_of_every_number(on: Implementation, name: str) -> None:
    worst = 0.0
    for first in range(0, 2**32, 2**24):
        bits = np.arange(first, first + 2**24, dtype=np.int64).astype(np.uint32)
        worst = max(worst, largest_error(name, bits))
    print(f"{name}: {worst:.3f} units in the last place")
    assert worst <= FUNCTIONS[name][2]
