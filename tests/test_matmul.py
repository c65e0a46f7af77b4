"""The matrix product in fixed tiles: its reference, what it refuses, and that T decides no sum."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.shapes import SHAPES
from kernels.launch import INTERPRETED
from kernels.matmul import _launch, _sum_order, matmul, matmul_ref
from kernels.target import TARGETS, Target

ROWS = (1, 16, 17, 64, 65, 128, 256, 1000, 4096)
HALVES = (torch.bfloat16, torch.float16)


SIZES = sorted(
    {size for shape in SHAPES.values() for size in shape.products.values()} | {(1, 1), (7, 700)}
)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_reference() -> None:
    x, weight, bias = draw(5, 9), draw(4, 9, seed=1), draw(4, seed=2)
    for added in (None, bias):
        out = matmul_ref(x, weight, added)
        for t in range(5):
            for n in range(4):
                products = [float(x[t, k] * weight[n, k]) for k in range(9)]
                exact = math.fsum([*products, 0.0 if added is None else float(added[n])])
                assert abs(out[t, n].item() - exact) < 1e-14
    half = matmul_ref(x.half(), weight.half(), bias.half())
    assert half.dtype == torch.float16
    assert half.equal(
        matmul_ref(x.half().float(), weight.half().float(), bias.half().float()).half()
    )


@pytest.mark.skipif(INTERPRETED, reason="torch runs without the interpreter only")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES])
def test_on_cpu_it_is_torchs_product(dtype: torch.dtype) -> None:
    x, weight, bias = (each.to(dtype) for each in (draw(33, 70), draw(20, 70), draw(20)))
    for added in (None, bias):
        assert matmul(x, weight, added).equal(F.linear(x, weight, added))


def test_what_it_does_not_take_is_refused() -> None:
    x, weight, bias = draw(4, 6).float(), draw(3, 6).float(), draw(3).float()
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


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_the_order_of_a_sum_does_not_depend_on_the_rows(target: Target, dtype: torch.dtype) -> None:
    for size, summed in SIZES:
        order = _sum_order(size, summed, dtype, target)
        launches = [_launch(rows, size, summed, dtype, target) for rows in ROWS]
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
    target = TARGETS["sm_90"]
    for size, summed in SHAPES["qwen3-8b"].products.values():
        decode, prefill = (
            _launch(rows, size, summed, torch.bfloat16, target) for rows in (64, 4096)
        )
        tiles = -(-size // decode["BLOCK_N"])
        assert decode["BLOCK_N"] == 128
        assert tiles * decode["SPLITS"] >= 128 and decode["IN_PIECES"] == (tiles < 132)
        assert not prefill["IN_PIECES"]
