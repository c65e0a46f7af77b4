"""The gated activation of a step's rows and of a prefill's, and its gradient."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.case import OpCase, each, gradients, like, same_inputs
from bench.shapes import SHAPES, Shape
from bench.timing import ON_GPU
from kernels.gated_act import gated_act, gated_act_backward, gated_act_ref

FLOPS = {"silu": 5, "gelu_tanh": 9}  # of one element of the result


def _eager(gate_up: Tensor, activation: str) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up


def forward(shape: Shape, rows: int) -> OpCase:
    """The activation of `rows` tokens."""
    width, activation, dtype = shape.intermediate_size, shape.activation, shape.dtype
    return OpCase(
        "gated_act",
        f"{shape.name} {activation} {rows} rows",
        each(lambda tensor: (tensor(rows, 2 * width, dtype=dtype), activation)),
        gated_act,
        like("gated_act", gated_act_ref),
        3 * rows * width * dtype.itemsize,
        FLOPS[activation] * rows * width,
        same_inputs(eager=_eager),
    )


def _reference_backward(grad: Tensor, gate_up: Tensor, activation: str) -> tuple[Tensor, ...]:
    return gradients(lambda x: gated_act_ref(x, activation), [gate_up], [grad])


def _eager_backward(grad: Tensor, gate_up: Tensor, activation: str) -> Tensor:
    """What autograd makes of `_eager`."""
    gate, up = gate_up.chunk(2, -1)
    if activation == "silu":
        active, d_gate = F.silu(gate), torch.ops.aten.silu_backward(grad * up, gate)
    else:
        active = F.gelu(gate, approximate="tanh")
        d_gate = torch.ops.aten.gelu_backward(grad * up, gate, approximate="tanh")
    return torch.cat((d_gate, grad * active), -1)


def backward(shape: Shape, rows: int) -> OpCase:
    """The gradient of the activation of `rows` tokens."""
    width, activation, dtype = shape.intermediate_size, shape.activation, shape.dtype
    return OpCase(
        "gated_act backward",
        f"{shape.name} {activation} {rows} rows",
        each(lambda tensor: (*(tensor(rows, n * width, dtype=dtype) for n in (1, 2)), activation)),
        gated_act_backward,
        like("gated_act backward", _reference_backward),
        5 * rows * width * dtype.itemsize,
        2 * FLOPS[activation] * rows * width,
        same_inputs(eager=_eager_backward),
    )


def variants(shape: Shape, rows: int) -> Iterator[OpCase]:
    """The model's activation, and its gradients."""
    yield forward(shape, rows)
    yield backward(shape, rows)


CASES = [
    case(SHAPES[name], rows)
    for name in (("qwen3-8b", "gemma2-27b") if ON_GPU else ("pocket", "qwen3-107m"))
    for case, rows in (
        [(forward, 64), (forward, 2048), (backward, 2048)]
        if ON_GPU
        else [(forward, 32), (forward, 512), (backward, 512)]
    )
]
