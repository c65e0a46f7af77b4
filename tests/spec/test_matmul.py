"""The matrix product in fixed tiles. There is no C++ of it: a CPU has `packed_linear`."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.shapes import SHAPES
from kernels.launch import intercept
from kernels.matmul import _launch, _sum_order, matmul, matmul_ref
from kernels.target import TARGETS, Target, target_of
from tests.implementations import HALVES, ON_GPU, Implementation

# T, K, N: one of each, tiles full and in part, several of each, K in pieces, nothing.
CASES = [
    (1, 1, 1), (16, 64, 32), (64, 128, 64), (65, 100, 33), (200, 20, 7), (3, 1030, 20),
    (130, 1100, 40), (0, 8, 5), (5, 8, 0),
]  # fmt: skip
IN_TORCH_AND_TRITON = pytest.mark.implementations("torch", "triton")


def test_reference_is_the_sum() -> None:
    """In half precision it is that of float32, rounded once."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((5, 9), (4, 9), (4,))
    )
    for added in (None, bias):
        out = matmul_ref(x, weight, added)
        for t in range(5):
            for n in range(4):
                products = [float(x[t, k] * weight[n, k]) for k in range(9)]
                exact = math.fsum([*products, 0.0 if added is None else float(added[n])])
                assert abs(out[t, n].item() - exact) < 1e-14
    half = [each.half() for each in (x, weight, bias)]
    assert matmul_ref(*half).equal(matmul_ref(*(each.float() for each in half)).half())


@IN_TORCH_AND_TRITON
@pytest.mark.parametrize(("case", "biased"), [(case, i % 2 == 1) for i, case in enumerate(CASES)])
def test_values(
    on: Implementation, dtype: torch.dtype, case: tuple[int, int, int], biased: bool
) -> None:
    """Operands with a bias are slices of wider ones: nothing beside them is read."""
    rows, summed, size = case
    draw = on.poisoned if biased else on.draw
    x, weight = draw(rows, summed, dtype=dtype), draw(size, summed, dtype=dtype, seed=1)
    bias = draw(size, dtype=dtype, seed=2) if biased else None
    out = on.check(matmul, matmul_ref, x, weight, bias)
    if on.name == "torch":
        assert out.equal(F.linear(x, weight, bias))
    else:
        splits = _launch(rows, size, summed, dtype, target_of(x))["SPLITS"]
        assert splits == 2 if summed > 1024 else splits == 1


@IN_TORCH_AND_TRITON
@pytest.mark.filterwarnings("ignore:invalid value")  # inf - inf, as it has to be
def test_nan_and_infinity_stay_in_their_row_and_column(on: Implementation) -> None:
    x, weight = on.draw(20, 70), on.draw(40, 70, seed=1)
    expected = matmul(x, weight)
    x[3, 69], x[5, 0], weight[7, 69] = math.nan, math.inf, math.nan
    out = matmul(x, weight)
    assert out[3].isnan().all() and out[:, 7].isnan().all()
    column = torch.arange(40, device=on.device) != 7
    assert out[5, column].isinf().all()
    row = torch.ones(20, dtype=torch.bool, device=on.device)
    row[[3, 5]] = False
    assert out[row][:, column].equal(expected[row][:, column])


def test_bad_arguments() -> None:
    x, weight, bias = torch.ones(4, 6), torch.ones(3, 6), torch.ones(3)
    for arguments, message in (
        ((x[0], weight), r"x \(6,\) and weight \(3, 6\)"),
        ((x, weight[:, :5]), r"x \(4, 6\) and weight \(3, 5\)"),
        ((x[:, :0], weight[:, :0]), "K not 0"),
        ((x, weight, bias[:2]), r"bias must be \(3,\), got \(2,\)"),
        ((x, weight.half()), "dtypes torch.float32, torch.float16 must be one"),
        ((x, weight, bias.double()), "dtypes torch.float32, torch.float32, torch.float64"),
        ((x.long(), weight.long()), "dtypes torch.int64, torch.int64"),
        ((x, weight.to("meta")), "devices cpu, meta must be one"),
        ((x, weight.requires_grad_()), "no gradient"),
    ):
        with pytest.raises(ValueError, match=message):
            matmul(*arguments)
    with torch.no_grad():
        assert matmul(x, weight).shape == (4, 3)


# -- Triton alone ----------------------------------------------------------------------------------


def check_rows(x: Tensor, weight: Tensor, bias: Tensor | None, parts: list[slice]) -> set:
    """Fail unless a row has the same bits in any number of rows, at any place among them. Returns
    the tiles of rows that were taken, whether in pieces, and the number of pieces."""
    taken: list[tuple[int, bool, int]] = []

    def run(kernel: Any, grid: tuple[int, ...], arguments: tuple, options: dict[str, Any]) -> None:
        if kernel.__name__ == "_matmul_kernel":
            taken.append(tuple(options[name] for name in ("BLOCK_M", "IN_PIECES", "SPLITS")))
        else:
            assert kernel.__name__ == "_add_pieces_kernel" and taken[-1][1]
        kernel[grid](*arguments, **options)

    with intercept(run):
        expected = matmul(x, weight, bias)
        for part in parts:
            assert matmul(x[part], weight, bias).equal(expected[part]), part
    assert len(taken) == 1 + len(parts)
    return set(taken)


@pytest.mark.implementations("triton")
@pytest.mark.usefixtures("products_in_order")
def test_a_row_does_not_depend_on_how_many_there_are(
    on: Implementation, dtype: torch.dtype
) -> None:
    """In pieces and in one go, in tiles of 64 rows and of 128."""
    x = on.draw(9000 if ON_GPU else 390, 2100, dtype=dtype)
    weight, bias = on.draw(40, 2100, dtype=dtype, seed=1), on.draw(40, dtype=dtype, seed=2)
    parts = [slice(1), slice(63), slice(195, 260), slice(195, 323)]
    taken = check_rows(x, weight, bias, parts)
    assert {pieces for _, pieces, _ in taken} == {False, True}
    assert {splits for _, _, splits in taken} == {4}  # two would be the same in any order
    tiles = {64} if dtype == torch.float32 else {64, 128}
    if target_of(x).arch != "sm_100":
        assert {rows for rows, _, _ in taken} == tiles


@pytest.mark.implementations("triton")
def test_beyond_two_to_the_31_elements(on: Implementation) -> None:
    """Rows so far apart take address space here, and memory only where they are touched."""
    apart, summed = 2**30 + 8, 40
    if ON_GPU:
        whole = torch.zeros(2 * apart + summed, dtype=torch.float16, device=on.device)
    else:
        whole = torch.from_numpy(np.zeros(2 * apart + summed, np.float16))
    far = whole.as_strided((3, summed), (apart, 1))
    near, other = (on.draw(n, summed, dtype=torch.float16, seed=n) for n in (3, 5))
    far.copy_(near)
    assert matmul(far, other).equal(matmul(near, other))
    assert matmul(other, far).equal(matmul(other, near))


@pytest.mark.implementations("triton")
def test_what_no_kernel_takes_is_refused(on: Implementation) -> None:
    x, weight = on.draw(4, 6), on.draw(3, 6)
    for arguments in ((x.T.contiguous().T, weight), (x, weight.T.contiguous().T)):
        with pytest.raises(ValueError, match=r"matmul: the last dimension must be contiguous"):
            matmul(*arguments)
    with pytest.raises(ValueError, match="matmul: float64 runs on CPU only"):
        matmul(x.double(), weight.double())


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_the_order_of_a_sum_does_not_depend_on_the_rows(target: Target, dtype: torch.dtype) -> None:
    sizes = {size for shape in SHAPES.values() for size in shape.products.values()}
    for size, summed in sizes | {(1, 1), (7, 700)}:
        order = _sum_order(size, summed, dtype, target)
        launches = [
            _launch(rows, size, summed, dtype, target)
            for rows in (1, 16, 17, 64, 65, 128, 256, 1000, 4096)
        ]
        for launch in launches:
            assert order.items() <= launch.items()
            assert launch["num_warps"] * 16 == launch["BLOCK_M"]
        # One size wherever tiles of 64 and of 128 rows would not be of the same instructions.
        single = dtype == torch.float32 or target.arch == "sm_100"
        assert len({launch["BLOCK_M"] for launch in launches}) == (1 if single else 2)
        # Every piece has something to add, and more than one step: a single product, added to the
        # pieces before it, might be compiled into one that starts from them.
        split, splits = order["SPLIT"], order["SPLITS"]
        assert split * (splits - 1) < summed <= split * splits
        assert splits == 1 or split >= 4 * order["BLOCK_K"]


def test_decode_fills_the_device_and_prefill_needs_no_second_pass() -> None:
    for size, summed in SHAPES["qwen3-8b"].products.values():
        decode, prefill = (
            _launch(rows, size, summed, torch.bfloat16, TARGETS["sm_90"]) for rows in (64, 4096)
        )
        tiles = -(-size // decode["BLOCK_N"])
        assert decode["BLOCK_N"] == 128
        assert tiles * decode["SPLITS"] >= 128 and decode["IN_PIECES"] == (tiles < 132)
        assert not prefill["IN_PIECES"]


@pytest.mark.gpu
@pytest.mark.implementations("triton")
@pytest.mark.parametrize("half", HALVES)
def test_rows_of_a_large_model_on_a_gpu(on: Implementation, half: torch.dtype) -> None:
    shape = SHAPES["qwen3-8b"]
    lengths = (1, 8, 16, 17, 48, 64, 80, 128, 200, 256, 513, 2000)
    parts = [slice(first, first + rows) for rows in lengths for first in (0, 2049)]
    for size, summed in (
        (shape.hidden_size, shape.intermediate_size),
        (2 * shape.intermediate_size, shape.hidden_size),
        (6144, shape.hidden_size),
    ):
        x, weight = on.draw(4096, summed, dtype=half), on.draw(size, summed, dtype=half, seed=1)
        check_rows(x, weight, None, parts)
        on.check(matmul, matmul_ref, x[:40], weight[:300])
