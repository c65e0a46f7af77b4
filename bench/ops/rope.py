"""Rotary embedding of the queries and keys of a step or a prefill, as slices of one projection; and
of their gradients."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench.case import Arguments, OpCase, each, gradients, like, same_inputs
from bench.shapes import SHAPES, Shape, projected
from bench.timing import DEVICE, ON_GPU, Fill
from kernels.rope import rope, rope_backward, rope_cos_sin, rope_ref

Both = tuple[Tensor, Tensor]  # of queries and of keys


def _both(rotate: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[..., Both]:
    return lambda q, k, cos, sin: (rotate(q, cos, sin), rotate(k, cos, sin))


def _eager(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Both:
    """As models spell it in torch."""
    cos, sin = (torch.cat((x, x), -1)[:, None].to(q.dtype) for x in (cos, sin))

    def rotate(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat((-b, a), -1) * sin

    return rotate(q), rotate(k)


def _eager_backward(d_q: Tensor, d_k: Tensor, cos: Tensor, sin: Tensor) -> Both:
    """What autograd makes of `_eager`, up to the order of its sums."""
    return _eager(d_q, d_k, cos, -sin)


def _reference_backward(grad: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The gradient, which is the same for every x."""
    return gradients(lambda x: rope_ref(x, cos.clone(), sin.clone()), [grad], [grad])[0]


def _case(shape: Shape, rows: int, contiguous: bool, is_backward: bool) -> OpCase:
    op = "rope backward" if is_backward else "rope"
    kv_heads, dim = shape.turned
    size = rows * (shape.num_heads + kv_heads) * dim

    def make(tensor: Fill) -> Arguments:
        inv_freq = 1e6 ** -(torch.arange(0, dim, 2, device=DEVICE) / dim)
        q, k, _ = projected(shape, rows, tensor)
        if contiguous:
            q, k = q.contiguous(), k.contiguous()
        return q, k, *rope_cos_sin(torch.arange(rows, device=DEVICE) + 4096, inv_freq)

    return OpCase(
        op,
        f"{shape.name} {rows} rows" + (", contiguous" if contiguous and not is_backward else ""),
        each(make),
        _both(rope_backward if is_backward else rope),
        like(op, _both(_reference_backward if is_backward else rope_ref)),
        2 * size * shape.dtype.itemsize + rows * dim * 4,
        3 * size,
        same_inputs(eager=_eager_backward if is_backward else _eager),
    )


def forward(shape: Shape, rows: int, contiguous: bool = False) -> OpCase:
    """Queries and keys of `rows` tokens: slices, or contiguous as norms leave them."""
    return _case(shape, rows, contiguous, is_backward=False)


def backward(shape: Shape, rows: int) -> OpCase:
    """The gradients of queries and keys of `rows` tokens."""
    return _case(shape, rows, contiguous=True, is_backward=True)


def variants(shape: Shape, rows: int) -> Iterator[OpCase]:
    """Queries and keys as slices, and as norms leave them; and gradients."""
    yield forward(shape, rows)
    yield forward(shape, rows, contiguous=True)
    yield backward(shape, rows)


CASES = [
    case(SHAPES[name], rows)
    for name in (("qwen3-8b", "gemma2-9b") if ON_GPU else ("pocket", "qwen3-107m"))
    for case, rows in (
        [(forward, 64), (forward, 2048), (backward, 2048)]
        if ON_GPU
        else [(forward, 32), (forward, 512), (backward, 512)]
    )
]
