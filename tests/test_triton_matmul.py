"""The matrix product in fixed tiles, in Triton, against its reference and against itself."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bench.shapes import SHAPES
from kernels.launch import intercept
from kernels.matmul import matmul, matmul_ref
from kernels.target import target_of
from tests.triton_device import DEVICE, DTYPES, ON_GPU, assert_like_reference, on_triton

pytestmark = on_triton

# T, K, N: one of each, tiles full and in part, several of each, K in pieces, nothing.
CASES = [
    (1, 1, 1), (16, 64, 32), (64, 128, 64), (65, 100, 33), (200, 20, 7), (3, 1030, 20),
    (130, 1100, 40), (0, 8, 5), (5, 8, 0),
]  # fmt: skip


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)


@contextmanager
def launched() -> Iterator[list[tuple[str, dict[str, Any]]]]:
    """Kernels and their options; everything still runs."""
    found: list[tuple[str, dict[str, Any]]] = []

    def run(kernel: Any, grid: tuple[int, ...], arguments: tuple, options: dict[str, Any]) -> None:
        found.append((kernel.__name__, options))
        kernel[grid](*arguments, **options)

    with intercept(run):
        yield found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_matmul(case: tuple[int, int, int], biased: bool, dtype: torch.dtype) -> None:
    rows, summed, size = case
    x, weight = draw(rows, summed, dtype=dtype), draw(size, summed, dtype=dtype, seed=1)
    bias = draw(size, dtype=dtype, seed=2) if biased else None
    with launched() as found:
        out = matmul(x, weight, bias)
    names = [name for name, _ in found]
    pieces = bool(names) and found[0][1]["IN_PIECES"]
    assert names == ["_matmul_kernel", "_add_pieces_kernel"][: pieces + 1] * (rows * size > 0)
    assert summed < 1024 or found[0][1]["SPLITS"] == 2
    assert_like_reference(out, matmul_ref, x, weight, bias)


def check_rows(x: Tensor, weight: Tensor, bias: Tensor | None, lengths: tuple[int, ...]) -> set:
    """Fail unless a row has the same bits in any number of rows, at any place among them. Returns
    the tiles of rows that were taken, and whether in pieces."""
    with launched() as found:
        expected = matmul(x, weight, bias)
        for rows in lengths:
            assert matmul(x[:rows], weight, bias).equal(expected[:rows]), rows
            part = slice(len(x) // 2 | 1, (len(x) // 2 | 1) + rows)
            assert matmul(x[part], weight, bias).equal(expected[part]), rows
    taken = [options for name, options in found if name == "_matmul_kernel"]
    assert len(taken) == 1 + 2 * len(lengths)
    return {(o["BLOCK_M"], o["IN_PIECES"], o["SPLITS"]) for o in taken}


@pytest.mark.usefixtures("products_in_order")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_how_many_there_are(dtype: torch.dtype) -> None:
    """In pieces and in one go, in tiles of 64 rows and of 128."""
    x = draw(9000 if ON_GPU else 390, 2100, dtype=dtype)
    weight, bias = draw(40, 2100, dtype=dtype, seed=1), draw(40, dtype=dtype, seed=2)
    taken = check_rows(x, weight, bias, (1, 63, 65, 128))
    assert {pieces for _, pieces, _ in taken} == {False, True}
    assert {splits for _, _, splits in taken} == {4}  # two would be the same in any order
    tiles = {64} if dtype == torch.float32 else {64, 128}
    if target_of(x).arch != "sm_100":
        assert {rows for rows, _, _ in taken} == tiles


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_of_a_large_model_on_a_gpu(dtype: torch.dtype) -> None:
    shape = SHAPES["qwen3-8b"]
    for size, summed in (
        (shape.hidden_size, shape.intermediate_size),
        (2 * shape.intermediate_size, shape.hidden_size),
        (6144, shape.hidden_size),
    ):
        x, weight = draw(4096, summed, dtype=dtype), draw(size, summed, dtype=dtype, seed=1)
        check_rows(x, weight, None, (1, 8, 16, 17, 48, 64, 80, 128, 200, 256, 513, 2000))
        assert_like_reference(matmul(x[:40], weight[:300]), matmul_ref, x[:40], weight[:300])


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_beside_the_operands_is_read(dtype: torch.dtype) -> None:
    """Slices of tensors that are NaN everywhere else; K, N and T end within a tile."""
    rows, summed, size = 17, 1030, 35
    x, weight = draw(rows, summed, dtype=dtype), draw(size, summed, dtype=dtype, seed=1)
    bias = draw(size, dtype=dtype, seed=2)
    expected = matmul(x, weight, bias)
    assert expected.isfinite().all()
    within = []
    for each in (x, weight):
        whole = torch.full((len(each) + 2, summed + 70), math.nan, dtype=dtype, device=DEVICE)
        whole[1:-1, 3 : 3 + summed] = each
        within.append(whole[1:-1, 3 : 3 + summed])
    padded = torch.full((size + 90,), math.nan, dtype=dtype, device=DEVICE)
    padded[5 : 5 + size] = bias
    assert matmul(within[0], within[1], padded[5 : 5 + size]).equal(expected)


@pytest.mark.filterwarnings("ignore:invalid value")  # inf - inf, as it has to be
def test_nan_and_infinity_stay_in_their_row_and_column() -> None:
    x, weight = draw(20, 70, dtype=torch.float32), draw(40, 70, dtype=torch.float32, seed=1)
    expected = matmul(x, weight)
    x[3, 69], x[5, 0], weight[7, 69] = math.nan, math.inf, math.nan
    out = matmul(x, weight)
    assert out[3].isnan().all() and out[:, 7].isnan().all()
    column = torch.arange(40, device=DEVICE) != 7
    assert out[5, column].isinf().all()
    row = torch.ones(20, dtype=torch.bool, device=DEVICE)
    row[[3, 5]] = False
    assert out[row][:, column].equal(expected[row][:, column])


def test_rows_beyond_two_to_the_31_elements() -> None:
    """So far apart, they take address space here, and memory only where they are touched."""
    apart, summed = 2**30 + 8, 40
    if ON_GPU:
        whole = torch.zeros(2 * apart + summed, dtype=torch.float16, device=DEVICE)
    else:
        whole = torch.from_numpy(np.zeros(2 * apart + summed, np.float16))
    far = whole.as_strided((3, summed), (apart, 1))
    near = draw(3, summed, dtype=torch.float16)
    far.copy_(near)
    other = draw(5, summed, dtype=torch.float16, seed=1)
    assert matmul(far, other).equal(matmul(near, other))
    assert matmul(other, far).equal(matmul(other, near))


def test_what_the_kernel_does_not_take_is_refused() -> None:
    x, weight = draw(4, 6, dtype=torch.float32), draw(3, 6, dtype=torch.float32)
    for arguments in ((x.T.contiguous().T, weight), (x, weight.T.contiguous().T)):
        with pytest.raises(ValueError, match=r"matmul: the last dimension must be contiguous"):
            matmul(*arguments)
    with pytest.raises(ValueError, match="matmul: float64 runs on CPU only"):
        matmul(x.double(), weight.double())
