"""Whether a row's result depends on what else is computed with it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from kernels import cpp

ROWS = 1040

needs_cpp = pytest.mark.skipif(
    not cpp.runs_cpp(torch.zeros(1)),
    reason="only the C++ gives a sample the same bits in any batch",
)
needs_dots = pytest.mark.skipif(
    not cpp.has_dot_products(), reason="this processor has no dot products of bfloat16"
)


@contextmanager
def num_threads(count: int) -> Iterator[None]:
    """Run operations on a CPU on so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_rows(op: Callable[[int], Tensor]) -> None:
    """Fail unless `op(T)`, over the first T of ROWS rows, has the same bits for every T.

    T takes several multiples of 16 at 1 to 4 threads, whose work is cut at different places.
    """
    for count in (1, 2, 3, 4):
        with num_threads(count):
            expected = op(ROWS)
            for rows in (160, 64, 48, 32, 16):
                differ = (op(rows) != expected[:rows]).flatten(1).any(-1)
                assert not differ.any(), f"{int(differ.sum())} of {rows} rows, {count} threads"
