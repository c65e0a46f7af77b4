"""The gated activation of a step's rows and of a prefill's, and its gradient."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.case import Arguments, OpCase, assert_like, gradients, same_inputs
from bench.shapes import SHAPES, Shape
from bench.timing import ON_GPU, Fill
from kernels.gated_act import gated_act, gated_act_backward, gated_act_ref

CHECKED = 16  # rows
FLOPS = {"silu": 5, "gelu_tanh": 9}  # of one element of the result


def forward(shape: Shape, rows: int) -> OpCase:
    """The activation of `rows` tokens."""
    size, activation = rows * shape.intermediate_size, shape.activation

    def make_inputs(tensor: Fill, count: int) -> list[Arguments]:
        return [
            (tensor(rows, 2 * shape.intermediate_size, dtype=shape.dtype), activation)
            for _ in range(count)
        ]

    def check(arguments: Arguments, out: Tensor, factor: float) -> None:
        x = arguments[0][:CHECKED]
        assert_like("gated_act", lambda x: gated_act_ref(x, activation), [x], out[:CHECKED], factor)

    def eager(gate_up: Tensor, activation: str) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up

    return OpCase(
        "gated_act",
        f"{shape.name} {activation} {rows} rows",
        make_inputs,
        gated_act,
        check,
        3 * size * shape.dtype.itemsize,
        FLOPS[activation] * size,
        same_inputs(eager=eager),
    )


def backward(shape: Shape, rows: int) -> OpCase:
    """The gradient of the activation of `rows` tokens."""
    size, activation = rows * shape.intermediate_size, shape.activation

    def make_inputs(tensor: Fill, count: int) -> list[Arguments]:
        width, dtype = shape.intermediate_size, shape.dtype
        return [
            (tensor(rows, width, dtype=dtype), tensor(rows, 2 * width, dtype=dtype), activation)
            for _ in range(count)
        ]

    def check(arguments: Arguments, out: Tensor, factor: float) -> None:
        def reference(grad: Tensor, gate_up: Tensor) -> tuple[Tensor, ...]:
            return gradients(lambda x: gated_act_ref(x, activation), [gate_up], [grad])

        inputs = [x[:CHECKED] for x in arguments[:2]]
        assert_like("gated_act backward", reference, inputs, out[:CHECKED], factor)

    def eager(grad: Tensor, gate_up: Tensor, activation: str) -> Tensor:
        """What autograd makes of the eager forward."""
        gate, up = gate_up.chunk(2, -1)
        if activation == "silu":
            active, d_gate = F.silu(gate), torch.ops.aten.silu_backward(grad * up, gate)
        else:
            active = F.gelu(gate, approximate="tanh")
            d_gate = torch.ops.aten.gelu_backward(grad * up, gate, approximate="tanh")
        return torch.cat((d_gate, grad * active), -1)

    return OpCase(
        "gated_act backward",
        f"{shape.name} {activation} {rows} rows",
        make_inputs,
        gated_act_backward,
        check,
        5 * size * shape.dtype.itemsize,
        2 * FLOPS[activation] * size,
        same_inputs(eager=eager),
    )


def variants(shape: Shape, rows: int) -> Iterator[OpCase]:
    """The model's activation, and its gradients."""
    yield forward(shape, rows)
    yield backward(shape, rows)


_SHAPES = [
    SHAPES[name] for name in (("qwen3-8b", "gemma2-27b") if ON_GPU else ("pocket", "qwen3-107m"))
]
_ROWS = (64, 2048) if ON_GPU else (32, 512)
CASES = [forward(shape, rows) for shape in _SHAPES for rows in _ROWS]
CASES += [backward(shape, _ROWS[-1]) for shape in _SHAPES]
