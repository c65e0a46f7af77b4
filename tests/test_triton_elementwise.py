"""The Triton kernels of norm, rope, activation and cache writes against their references."""

import pytest
import torch
from torch import Tensor

from kernels.rms_norm import rms_norm, rms_norm_ref
from tests.triton_device import DEVICE, DTYPES, assert_like_reference, counted, on_triton

pytestmark = on_triton

# Leading dimensions and size: one row, rows of one program and of several, heads, nothing.
SHAPES = [(1, 16), (63, 192), (64, 64), (129, 20), (5, 6, 77), (0, 64), (3, 0, 8)]


def draw(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("plus_one", [False, True])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype, plus_one: bool) -> None:
    x, weight = draw(shape, dtype), draw(shape[-1:], dtype, 1)
    with counted() as counts:
        y = rms_norm(x, weight, 1e-6, plus_one)
    assert counts["_rms_norm_kernel"] == (x.numel() > 0)
    assert_like_reference(y, rms_norm_ref, x, weight, 1e-6, plus_one)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_adds_the_residual(dtype: torch.dtype) -> None:
    """In the wider of the two dtypes."""
    x, weight = draw((65, 40), dtype), draw((40,), dtype, 1)
    for residual in (draw((65, 40), dtype, 2), draw((65, 40), torch.float32, 2)):
        y, total = rms_norm(x, weight, 1e-6, residual=residual)
        assert total.equal(x + residual)
        assert_like_reference(
            y, lambda *a: rms_norm_ref(a[0], a[1], 1e-6, residual=a[2])[0], x, weight, residual
        )
