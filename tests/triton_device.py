"""Where tests of Triton kernels run, and what their results are held to.

On a GPU where there is one, else under the interpreter (TRITON_INTERPRET=1), which `make test` sets
in a run of its own. A test module of such tests says `pytestmark = on_triton`.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.launch import INTERPRETED, intercept

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
# bf16 products under the interpreter are silently wrong.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if ON_GPU else [])]

on_triton = [
    pytest.mark.triton,
    pytest.mark.skipif(not (ON_GPU or INTERPRETED), reason="needs a GPU or TRITON_INTERPRET=1"),
]


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Counts launches by the kernel's name; everything still runs."""
    counts: Counter[str] = Counter()

    def run(kernel: Any, grid: tuple[int, ...], arguments: tuple, options: dict[str, Any]) -> None:
        counts[kernel.__name__] += 1
        kernel[grid](*arguments, **options)

    with intercept(run):
        yield counts


def wide(value: Any) -> Any:
    """Floating tensors as float64 on CPU, other tensors on CPU."""
    if isinstance(value, Tensor):
        value = value.cpu()
        return value.double() if value.is_floating_point() else value
    return value


def assert_like_reference(
    out: Tensor, reference: Callable[..., Tensor], *arguments: Any, factor: float = 4
) -> None:
    """The error of `out` against the reference in float64 is at most `factor` times that of the
    reference itself in the arguments' dtype, and never held below 2 units in the last place of the
    largest value."""
    exact = reference(*map(wide, arguments))
    cpu = [a.cpu() if isinstance(a, Tensor) else a for a in arguments]
    plain = reference(*cpu)
    assert out.shape == exact.shape and out.dtype == plain.dtype
    if not out.numel():
        return
    eps = torch.finfo(plain.dtype).eps
    out = out.cpu()
    odd = ~exact.isfinite()
    torch.testing.assert_close(out.double()[odd], exact[odd], rtol=0, atol=0, equal_nan=True)
    exact, plain, out = (x.double().masked_fill(odd, 0) for x in (exact, plain, out))
    error, plain_error = ((x - exact).abs().max().item() for x in (out, plain))
    unit = eps * max(exact.abs().max().item(), 1e-30)
    assert error <= max(factor * plain_error, 2 * unit), (error, plain_error, unit)
