"""The gated activation of a step's rows and of a prefill's."""

from collections.abc import Callable
from functools import partial

import pytest
import torch.nn.functional as F
from torch import Tensor

from bench.figures import Figure, Peer, Work, assert_close, calls_on
from bench.shapes import SHAPES, Shape
from bench.timing import ON_GPU, num_sets, randn
from kernels.gated_act import gated_act, gated_act_ref

NAMES = ["qwen3-8b", "gemma2-27b"] if ON_GPU else ["pocket", "qwen3-107m"]
ROWS = [64, 2048] if ON_GPU else [32, 512]
CHECKED = 16  # rows
FLOPS = {"silu": 5, "gelu_tanh": 9}  # of one element of the result


def eager(activation: str, gate_up: Tensor) -> Tensor:
    """The activation with torch's own functions."""
    gate, up = gate_up.chunk(2, -1)
    return (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up


def ours(activation: str, gate_up: Tensor) -> Tensor:
    """The operation, with its arguments in the order of the other."""
    return gated_act(gate_up, activation)


def make_work(shape: Shape, rows: int) -> Work:
    """The activation of `rows` tokens."""
    size = rows * shape.intermediate_size
    num_bytes = 3 * size * shape.dtype.itemsize
    sets = [
        (randn(rows, 2 * shape.intermediate_size, dtype=shape.dtype),)
        for _ in range(num_sets(num_bytes))
    ]

    def check(out: Tensor, factor: float) -> None:
        x = sets[0][0]
        exact = gated_act_ref(x[:CHECKED].double(), shape.activation)
        plain = gated_act_ref(x[:CHECKED], shape.activation)
        assert_close("gated_act", out[:CHECKED], exact, plain, factor)

    return Work(
        "gated_act",
        f"{shape.name} {shape.activation} {rows} rows",
        num_bytes,
        FLOPS[shape.activation] * size,
        calls_on(partial(ours, shape.activation), sets),
        check,
        {"eager": Peer(lambda: calls_on(partial(eager, shape.activation), sets))},
    )


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", NAMES)
def test_gated_act(name: str, rows: int, measured: Callable[[Work], Figure]) -> None:
    measured(make_work(SHAPES[name], rows))
