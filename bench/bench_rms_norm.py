"""The norm, with and without the residual addition, on a step's rows and on a prefill's."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.figures import Figure, Peer, Work, assert_close, calls_on
from bench.shapes import SHAPES, Shape
from bench.timing import ON_GPU, num_sets, randn
from kernels.rms_norm import rms_norm, rms_norm_ref

EPS = 1e-6
NAMES = ["qwen3-8b", "gemma2-27b"] if ON_GPU else ["pocket", "qwen3-107m"]
ROWS = [64, 2048] if ON_GPU else [32, 512]
CHECKED = 16  # rows

Normed = Tensor | tuple[Tensor, Tensor]


def eager(weight: Tensor, plus_one: bool, x: Tensor, residual: Tensor | None = None) -> Normed:
    """The norm as models spell it in torch."""
    total = x if residual is None else x + residual
    wide = total.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    normed = (normed * (weight.float() + plus_one)).to(x.dtype)
    return normed if residual is None else (normed, total)


def fused(weight: Tensor, plus_one: bool, x: Tensor, residual: Tensor | None = None) -> Normed:
    """The norm with torch's own function."""
    total = x if residual is None else x + residual
    normed = F.rms_norm(total, weight.shape, weight + 1 if plus_one else weight, EPS)
    return normed if residual is None else (normed, total)


def ours(weight: Tensor, plus_one: bool, x: Tensor, residual: Tensor | None = None) -> Normed:
    """The operation, with its arguments in the order of the others."""
    return rms_norm(x, weight, EPS, plus_one, residual)


def make_work(shape: Shape, rows: int, residual: bool) -> Work:
    """The norm of `rows` hidden states."""
    plus_one, dtype = shape.norm_plus_one, shape.dtype
    size = rows * shape.hidden_size
    num_bytes = ((4 if residual else 2) * size + shape.hidden_size) * dtype.itemsize
    operands = 2 if residual else 1
    sets = [
        randn(operands, rows, shape.hidden_size, dtype=dtype).unbind()
        for _ in range(num_sets(num_bytes))
    ]
    weight = randn(shape.hidden_size, dtype=dtype)

    def check(out: Normed, factor: float) -> None:
        normed = out if isinstance(out, Tensor) else out[0]
        total = sets[0][0][:CHECKED]
        if residual:
            total = total + sets[0][1][:CHECKED]
        exact = rms_norm_ref(total.double(), weight.double(), EPS, plus_one)
        plain = rms_norm_ref(total, weight, EPS, plus_one)
        assert isinstance(exact, Tensor) and isinstance(plain, Tensor)
        assert_close("rms_norm", normed[:CHECKED], exact, plain, factor)

    return Work(
        "rms_norm",
        f"{shape.name} {rows} rows{' + residual' if residual else ''}",
        num_bytes,
        (3 + operands) * size,
        calls_on(partial(ours, weight, plus_one), sets),
        check,
        {
            "eager": Peer(lambda: calls_on(partial(eager, weight, plus_one), sets)),
            "torch": Peer(lambda: calls_on(partial(fused, weight, plus_one), sets)),
        },
    )


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", NAMES)
def test_rms_norm(name: str, rows: int, residual: bool, measured: Callable[[Work], Figure]) -> None:
    measured(make_work(SHAPES[name], rows, residual))
