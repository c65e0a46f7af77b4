"""The gated activation of a step's rows and of a prefill's, and its gradient."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.figures import Figure, Peer, Work, assert_close, calls_on, gradients
from bench.shapes import SHAPES, Shape
from bench.timing import ON_GPU, num_sets, randn
from kernels.gated_act import gated_act, gated_act_backward, gated_act_ref

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


def eager_backward(activation: str, grad: Tensor, gate_up: Tensor) -> Tensor:
    """What autograd makes of `eager`."""
    gate, up = gate_up.chunk(2, -1)
    if activation == "silu":
        active, d_gate = F.silu(gate), torch.ops.aten.silu_backward(grad * up, gate)
    else:
        active = F.gelu(gate, approximate="tanh")
        d_gate = torch.ops.aten.gelu_backward(grad * up, gate, approximate="tanh")
    return torch.cat((d_gate, grad * active), -1)


def ours_backward(activation: str, grad: Tensor, gate_up: Tensor) -> Tensor:
    """The operation, with its arguments in the order of the other."""
    return gated_act_backward(grad, gate_up, activation)


def make_backward_work(shape: Shape, rows: int) -> Work:
    """The gradient of the activation of `rows` tokens."""
    size, activation = rows * shape.intermediate_size, shape.activation
    num_bytes = 5 * size * shape.dtype.itemsize
    sets = []
    for _ in range(num_sets(num_bytes)):
        grad, *gate_up = randn(3, rows, shape.intermediate_size, dtype=shape.dtype).unbind()
        sets.append((grad, torch.cat(gate_up, -1)))

    def check(out: Tensor, factor: float) -> None:
        grad, gate_up = (x[:CHECKED] for x in sets[0])
        reference = partial(gated_act_ref, activation=activation)
        (exact,) = gradients(reference, [gate_up.double()], [grad.double()])
        (plain,) = gradients(reference, [gate_up], [grad])
        assert_close("gated_act backward", out[:CHECKED], exact, plain, factor)

    return Work(
        "gated_act backward",
        f"{shape.name} {activation} {rows} rows",
        num_bytes,
        2 * FLOPS[activation] * size,
        calls_on(partial(ours_backward, activation), sets),
        check,
        {"eager": Peer(lambda: calls_on(partial(eager_backward, activation), sets))},
    )


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", NAMES)
def test_gated_act(name: str, rows: int, measured: Callable[[Work], Figure]) -> None:
    measured(make_work(SHAPES[name], rows))


@pytest.mark.parametrize("name", NAMES)
def test_gated_act_backward(name: str, measured: Callable[[Work], Figure]) -> None:
    measured(make_backward_work(SHAPES[name], ROWS[-1]))
