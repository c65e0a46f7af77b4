"""The norm, with and without the residual addition, on a step's rows and on a prefill's, and its
gradients."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.figures import Figure, Peer, Work, assert_close, calls_on, gradients
from bench.shapes import SHAPES, Shape
from bench.timing import ON_GPU, num_sets, randn
from kernels.rms_norm import rms_norm, rms_norm_backward, rms_norm_ref

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


# Gradients of the input (and residual) and of the weight, from those of the norm (and the sum).
Gradients = tuple[Tensor, Tensor]


def eager_backward(
    weight: Tensor,
    plus_one: bool,
    total: Tensor,
    rstd: Tensor,
    grad: Tensor,
    grad_total: Tensor | None = None,
) -> Gradients:
    """The formula in torch."""
    wide = grad.float()
    normed = total.float() * rstd
    d_weight = (wide * normed).sum(0).to(weight.dtype)
    wide = wide * (weight.float() + plus_one)
    d_total = (wide - normed * (wide * normed).mean(-1, keepdim=True)) * rstd
    if grad_total is not None:
        d_total = d_total + grad_total
    return d_total.to(total.dtype), d_weight


def fused_backward(
    weight: Tensor,
    plus_one: bool,
    total: Tensor,
    rstd: Tensor,
    grad: Tensor,
    grad_total: Tensor | None = None,
) -> Gradients:
    """The backward of torch's own function."""
    scale = weight + 1 if plus_one else weight
    d_total, d_weight = torch.ops.aten._fused_rms_norm_backward(
        grad, total, weight.shape, rstd, scale, [True, True]
    )
    return d_total if grad_total is None else d_total + grad_total, d_weight


def ours_backward(
    weight: Tensor,
    plus_one: bool,
    total: Tensor,
    rstd: Tensor,
    grad: Tensor,
    grad_total: Tensor | None = None,
) -> Gradients:
    """The operation, with its arguments in the order of the others."""
    dtype = total.dtype
    d_x, _, d_weight = rms_norm_backward(
        grad,
        grad_total,
        total,
        weight,
        rstd,
        plus_one,
        dtype,
        None if grad_total is None else dtype,
    )
    assert d_weight is not None
    return d_x, d_weight


def make_backward_work(shape: Shape, rows: int, residual: bool) -> Work:
    """The gradients of the norm of `rows` hidden states."""
    plus_one, dtype = shape.norm_plus_one, shape.dtype
    size = rows * shape.hidden_size
    operands = 3 if residual else 2
    num_bytes = ((operands + 1) * size + 2 * shape.hidden_size) * dtype.itemsize + 4 * rows
    weight = randn(shape.hidden_size, dtype=dtype)
    sets = []
    for _ in range(num_sets(num_bytes)):
        total, *grads = randn(operands, rows, shape.hidden_size, dtype=dtype).unbind()
        rstd = torch.rsqrt(total.float().pow(2).mean(-1, keepdim=True) + EPS)
        sets.append((total, rstd, *grads))

    def reference(total: Tensor, weight: Tensor) -> Normed:
        return rms_norm_ref(
            total, weight, EPS, plus_one, torch.zeros_like(total) if residual else None
        )

    def check(outs: Gradients, factor: float) -> None:
        total, _, *grads = sets[0]
        wide = [x.double() for x in (total, weight, *grads)]
        exact = gradients(reference, wide[:2], wide[2:])
        plain = gradients(reference, [total, weight], grads)
        for out, exactly, plainly in zip(outs, exact, plain, strict=True):
            assert_close("rms_norm backward", out, exactly, plainly, factor)

    peers = {"eager": eager_backward} | ({"torch": fused_backward} if ON_GPU else {})
    return Work(
        "rms_norm backward",
        f"{shape.name} {rows} rows{' + residual' if residual else ''}",
        num_bytes,
        (9 + operands) * size,
        calls_on(partial(ours_backward, weight, plus_one), sets),
        check,
        {
            name: Peer(partial(calls_on, partial(peer, weight, plus_one), sets))
            for name, peer in peers.items()
        },
        {} if ON_GPU else {"torch": "has no fused backward on CPU"},
    )


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", NAMES)
def test_rms_norm(name: str, rows: int, residual: bool, measured: Callable[[Work], Figure]) -> None:
    measured(make_work(SHAPES[name], rows, residual))


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_rms_norm_backward(name: str, residual: bool, measured: Callable[[Work], Figure]) -> None:
    measured(make_backward_work(SHAPES[name], ROWS[-1], residual))
