"""What products in fixed tiles cost against those of the library, in decode and in prefill."""

from collections.abc import Callable

import pytest
import torch.nn.functional as F
from torch import Tensor

from bench.figures import Figure, Peer, Work, assert_close, calls_on
from bench.shapes import SHAPES, Shape
from bench.timing import ON_GPU, num_sets, randn
from kernels.matmul import matmul, matmul_ref

# Rows of a step's few samples and of many, and of a prefill.
ROWS = [16, 64, 256, 4096] if ON_GPU else [32, 512]
LAYERS = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj", "lm_head"]
# Of a prompt nobody wants the logits of every token.
CASES = [
    ("qwen3-8b" if ON_GPU else "qwen3-107m", layer, rows)
    for rows in ROWS
    for layer in LAYERS
    if layer != "lm_head" or rows <= 256
]
if ON_GPU:
    CASES += [
        ("gemma2-27b", layer, rows) for rows in (64, 4096) for layer in ("o_proj", "gate_up_proj")
    ]
CHECKED = 300  # columns, the first and the last, of the first row, one in the middle and the last


def make_work(shape: Shape, layer: str, rows: int) -> Work:
    """The product of one layer for `rows` tokens."""
    size, summed = shape.products[layer]
    dtype = shape.dtype
    num_bytes = (rows * summed + size * summed + rows * size) * dtype.itemsize
    sets = [
        (randn(rows, summed, dtype=dtype), randn(size, summed, dtype=dtype) * summed**-0.5)
        for _ in range(num_sets(num_bytes))
    ]

    def check(out: Tensor, factor: float) -> None:
        checked = [0, rows // 2, rows - 1]
        x = sets[0][0][checked]
        for columns in (slice(CHECKED), slice(-CHECKED, None)):
            weight = sets[0][1][columns]
            exact, plain = matmul_ref(x.double(), weight.double()), matmul_ref(x, weight)
            assert_close("matmul", out[checked, columns], exact, plain, factor)

    return Work(
        "matmul",
        f"{shape.name} {layer} {rows} rows",
        num_bytes,
        2 * rows * size * summed,
        calls_on(matmul, sets),
        check,
        {"torch": Peer(lambda: calls_on(F.linear, sets))},
    )


@pytest.mark.parametrize(("name", "layer", "rows"), CASES)
def test_matmul(name: str, layer: str, rows: int, measured: Callable[[Work], Figure]) -> None:
    measured(make_work(SHAPES[name], layer, rows))
