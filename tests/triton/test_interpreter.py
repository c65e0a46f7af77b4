"""What `tests/conftest.py` changes of Triton's interpreter."""

import pytest
import torch
import triton
import triton.language as tl

from kernels.launch import INTERPRETED

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(not INTERPRETED, reason="only the interpreter checks for overflow"),
]


@triton.jit
def _calculate_kernel(x_ptr, y_ptr, OPERATION: tl.constexpr):
    x, y = tl.load(x_ptr + tl.arange(0, 2)), tl.load(y_ptr + tl.arange(0, 2))
    if OPERATION == "add":
        x += y
    elif OPERATION == "sub":
        x -= y
    else:
        x *= y
    tl.store(x_ptr + tl.arange(0, 2), x)


@pytest.mark.parametrize(
    ("operation", "least"), [("add", (1 << 30, 1 << 30)), ("sub", (-(1 << 31), 1)),
                             ("mul", (1 << 16, 1 << 15))],
)  # fmt: skip
def test_overflow_is_an_error(operation: str, least: tuple[int, int]) -> None:
    """Of 32 bits, in any element; one less does not overflow, nor do 64 bits."""
    x, y = (torch.tensor([3, value]) for value in least)
    expected = getattr(torch, operation)(x, y)
    with pytest.raises(Exception, match="overflow"):
        _calculate_kernel[(1,)](x.int(), y.int(), operation)
    _calculate_kernel[(1,)](x, y, operation)
    assert x.equal(expected)
    x = torch.tensor([3, least[0] - 1 if operation != "sub" else least[0] + 1])
    expected, x = getattr(torch, operation)(x, y), x.int()
    _calculate_kernel[(1,)](x, y.int(), operation)
    assert x.long().equal(expected)
