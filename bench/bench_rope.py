"""Rotary embedding of the queries and keys of a step or a prefill, as slices of one projection; and
of their gradients."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bench.figures import Figure, Peer, Work, assert_close, calls_on, gradients
from bench.shapes import SHAPES, Shape
from bench.timing import DEVICE, ON_GPU, num_sets, randn
from kernels.rope import rope, rope_backward, rope_cos_sin, rope_ref

NAMES = ["qwen3-8b", "gemma2-9b"] if ON_GPU else ["pocket", "qwen3-107m"]
ROWS = [64, 2048] if ON_GPU else [32, 512]
CHECKED = 16  # rows


def eager(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys rotated as models spell it in torch."""
    cos, sin = (torch.cat((x, x), -1)[:, None].to(q.dtype) for x in (cos, sin))

    def rotate(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat((-b, a), -1) * sin

    return rotate(q), rotate(k)


def ours(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The operation on both."""
    return rope(q, cos, sin), rope(k, cos, sin)


def make_tables(rows: int, dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of `rows` positions behind a prefix."""
    inv_freq = 1e6 ** -(torch.arange(0, dim, 2, device=DEVICE) / dim)
    return rope_cos_sin(torch.arange(rows, device=DEVICE) + 4096, inv_freq)


def make_work(shape: Shape, rows: int) -> Work:
    """Queries and keys of `rows` tokens."""
    heads, kv_heads, dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
    size = rows * (heads + kv_heads) * dim
    num_bytes = 2 * size * shape.dtype.itemsize + rows * dim * 4
    cos, sin = make_tables(rows, dim)
    sets = []
    for _ in range(num_sets(num_bytes)):
        qkv = randn(rows, heads + 2 * kv_heads, dim, dtype=shape.dtype)
        sets.append((qkv[:, :heads], qkv[:, heads : heads + kv_heads], cos, sin))

    def check(outs: tuple[Tensor, Tensor], factor: float) -> None:
        tables = cos[:CHECKED], sin[:CHECKED]
        for out, x in zip(outs, sets[0][:2], strict=True):
            x = x[:CHECKED]
            exact, plain = rope_ref(x.double(), *tables), rope_ref(x, *tables)
            assert_close("rope", out[:CHECKED], exact, plain, factor)

    return Work(
        "rope",
        f"{shape.name} {rows} rows",
        num_bytes,
        3 * size,
        calls_on(ours, sets),
        check,
        {"eager": Peer(lambda: calls_on(eager, sets))},
    )


def eager_backward(d_q: Tensor, d_k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """What autograd makes of `eager`, but for the order of its sums."""
    return eager(d_q, d_k, cos, -sin)


def ours_backward(d_q: Tensor, d_k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The operation on both."""
    return rope_backward(d_q, cos, sin), rope_backward(d_k, cos, sin)


def make_backward_work(shape: Shape, rows: int) -> Work:
    """The gradients of queries and keys of `rows` tokens."""
    heads, kv_heads, dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
    size = rows * (heads + kv_heads) * dim
    num_bytes = 2 * size * shape.dtype.itemsize + rows * dim * 4
    cos, sin = make_tables(rows, dim)
    sets = [
        (*(randn(rows, each, dim, dtype=shape.dtype) for each in (heads, kv_heads)), cos, sin)
        for _ in range(num_sets(num_bytes))
    ]

    def reference(x: Tensor) -> Tensor:
        return rope_ref(x, cos[:CHECKED].clone(), sin[:CHECKED].clone())

    def check(outs: tuple[Tensor, Tensor], factor: float) -> None:
        for out, grad in zip(outs, sets[0][:2], strict=True):
            grad = grad[:CHECKED]
            (exact,) = gradients(reference, [grad.double()], [grad.double()])  # of any x
            (plain,) = gradients(reference, [grad], [grad])
            assert_close("rope backward", out[:CHECKED], exact, plain, factor)

    return Work(
        "rope backward",
        f"{shape.name} {rows} rows",
        num_bytes,
        3 * size,
        calls_on(ours_backward, sets),
        check,
        {"eager": Peer(lambda: calls_on(eager_backward, sets))},
    )


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", NAMES)
def test_rope(name: str, rows: int, measured: Callable[[Work], Figure]) -> None:
    measured(make_work(SHAPES[name], rows))


@pytest.mark.parametrize("name", NAMES)
def test_rope_backward(name: str, measured: Callable[[Work], Figure]) -> None:
    measured(make_backward_work(SHAPES[name], ROWS[-1]))
