"""Rotary embedding of the queries and keys of a step or a prefill, as slices of one projection; and
of their gradients."""

from collections.abc import Iterator

import torch
from torch import Tensor

from bench.case import Arguments, OpCase, assert_like, gradients, same_inputs
from bench.shapes import SHAPES, Shape, projected
from bench.timing import DEVICE, ON_GPU, Fill
from kernels.rope import rope, rope_backward, rope_cos_sin, rope_ref

CHECKED = 16  # rows


def _ours(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return rope(q, cos, sin), rope(k, cos, sin)


def _ours_backward(d_q: Tensor, d_k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return rope_backward(d_q, cos, sin), rope_backward(d_k, cos, sin)


def _eager(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys rotated as models spell it in torch."""
    cos, sin = (torch.cat((x, x), -1)[:, None].to(q.dtype) for x in (cos, sin))

    def rotate(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat((-b, a), -1) * sin

    return rotate(q), rotate(k)


def _eager_backward(d_q: Tensor, d_k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """What autograd makes of `_eager`, up to the order of its sums."""
    return _eager(d_q, d_k, cos, -sin)


def _gradients(grad: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """Those of rope's reference, which are the same for every x."""
    return gradients(lambda x: rope_ref(x, cos.clone(), sin.clone()), [grad], [grad])


def _case(shape: Shape, rows: int, backward: bool, contiguous: bool) -> OpCase:
    op = "rope backward" if backward else "rope"
    size = rows * (shape.num_heads + shape.num_kv_heads) * shape.head_dim

    def make_inputs(tensor: Fill, count: int) -> list[Arguments]:
        dim = shape.head_dim
        inv_freq = 1e6 ** -(torch.arange(0, dim, 2, device=DEVICE) / dim)
        tables = rope_cos_sin(torch.arange(rows, device=DEVICE) + 4096, inv_freq)
        inputs = [projected(shape, rows, tensor)[:2] for _ in range(count)]
        if contiguous:
            inputs = [[x.contiguous() for x in each] for each in inputs]
        return [(*each, *tables) for each in inputs]

    def check(arguments: Arguments, outs: tuple[Tensor, Tensor], factor: float) -> None:
        tables = [x[:CHECKED] for x in arguments[2:]]
        for out, x in zip(outs, arguments[:2], strict=True):
            reference = _gradients if backward else rope_ref
            assert_like(op, reference, [x[:CHECKED], *tables], out[:CHECKED], factor)

    return OpCase(
        op,
        f"{shape.name} {rows} rows{', contiguous' if contiguous and not backward else ''}",
        make_inputs,
        _ours_backward if backward else _ours,
        check,
        2 * size * shape.dtype.itemsize + rows * shape.head_dim * 4,
        3 * size,
        same_inputs(eager=_eager_backward if backward else _eager),
    )


def forward(shape: Shape, rows: int, contiguous: bool = False) -> OpCase:
    """Queries and keys of `rows` tokens: slices, or contiguous as norms leave them."""
    return _case(shape, rows, backward=False, contiguous=contiguous)


def backward(shape: Shape, rows: int) -> OpCase:
    """The gradients of queries and keys of `rows` tokens."""
    return _case(shape, rows, backward=True, contiguous=True)


def variants(shape: Shape, rows: int) -> Iterator[OpCase]:
    """Queries and keys as slices, and as norms leave them; and gradients."""
    yield forward(shape, rows)
    yield forward(shape, rows, contiguous=True)
    yield backward(shape, rows)


_SHAPES = [
    SHAPES[name] for name in (("qwen3-8b", "gemma2-9b") if ON_GPU else ("pocket", "qwen3-107m"))
]
_ROWS = (64, 2048) if ON_GPU else (32, 512)
CASES = [forward(shape, rows) for shape in _SHAPES for rows in _ROWS]
CASES += [backward(shape, _ROWS[-1]) for shape in _SHAPES]
