"""Joining the partials of a step: a shared prefix's splits and two of every sample's own."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bench.figures import Figure, Peer, Work, assert_close, calls_on
from bench.shapes import SHAPES, Shape
from bench.timing import DEVICE, ON_GPU, num_sets, randn
from kernels.merge_states import merge_states, merge_states_ref

# Shape, rows, partials of a row.
CASES = (
    [("qwen3-8b", 64, 18), ("qwen3-8b", 128, 34), ("gemma2-9b", 32, 6)]
    if ON_GPU
    else [("pocket", 32, 4), ("qwen3-107m", 32, 5)]
)
CHECKED = 4  # rows


def eager(o: Tensor, lse: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """All partials of a row gathered, weighted and summed."""
    logs = lse[index]
    total = logs.logsumexp(1)
    weights = (logs - total[:, None]).exp()
    return (weights[..., None] * o[index]).sum(1), total


def make_work(shape: Shape, rows: int, partials: int) -> Work:
    """`partials` of every row."""
    heads, dim = shape.num_heads, shape.head_dim
    num_bytes = 4 * rows * heads * (dim + 1) * (partials + 1) + 8 * rows * partials
    index = torch.arange(rows * partials, device=DEVICE).view(partials, rows).T.contiguous()
    sets = [
        (
            randn(rows * partials, heads, dim),
            randn(rows * partials, heads),
            index,
        )
        for _ in range(num_sets(num_bytes))
    ]

    def check(outs: tuple[Tensor, Tensor], factor: float) -> None:
        o, lse, _ = sets[0]
        exact = merge_states_ref(o.double(), lse.double(), index[:CHECKED])
        plain = merge_states_ref(o, lse, index[:CHECKED])
        for i in range(2):
            assert_close("merge_states", outs[i][:CHECKED], exact[i], plain[i], factor)

    return Work(
        "merge_states",
        f"{shape.name} {rows} rows of {partials}",
        num_bytes,
        2 * rows * partials * heads * (dim + 2),
        calls_on(merge_states, sets),
        check,
        {"eager": Peer(lambda: calls_on(eager, sets))},
    )


@pytest.mark.parametrize(("name", "rows", "partials"), CASES)
def test_merge_states(
    name: str, rows: int, partials: int, measured: Callable[[Work], Figure]
) -> None:
    measured(make_work(SHAPES[name], rows, partials))
