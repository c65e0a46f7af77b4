"""Joining the partials of a step: a shared prefix's splits and two of every sample's own."""

from collections.abc import Iterator

import torch
from torch import Tensor

from bench.case import Arguments, OpCase, assert_like, same_inputs
from bench.shapes import SHAPES, Shape
from bench.timing import DEVICE, ON_GPU, Fill
from kernels.merge_states import merge_states, merge_states_ref

CHECKED = 4  # rows


def forward(shape: Shape, rows: int, partials: int, dtype: torch.dtype = torch.float32) -> OpCase:
    """`partials` of every row, joined into `dtype`."""
    heads, dim = shape.num_heads, shape.head_dim

    def make_inputs(tensor: Fill, count: int) -> list[Arguments]:
        index = torch.arange(rows * partials, device=DEVICE).view(partials, rows).T.contiguous()
        size = rows * partials
        return [(tensor(size, heads, dim), tensor(size, heads), index, dtype) for _ in range(count)]

    def check(arguments: Arguments, outs: tuple[Tensor, Tensor], factor: float) -> None:
        o, lse, index, _ = arguments
        inputs, found = [o, lse, index[:CHECKED]], [out[:CHECKED] for out in outs]
        assert_like("merge_states", merge_states_ref, inputs, found, factor)

    def eager(o: Tensor, lse: Tensor, index: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """All partials of a row gathered, weighted and summed."""
        logs = lse[index]
        total = logs.logsumexp(1)
        weights = (logs - total[:, None]).exp()
        return (weights[..., None] * o[index]).sum(1).to(dtype), total

    return OpCase(
        "merge_states",
        f"{shape.name} {rows} rows of {partials}",
        make_inputs,
        merge_states,
        check,
        4 * rows * heads * (dim + 1) * (partials + 1) + 8 * rows * partials,
        2 * rows * partials * heads * (dim + 2),
        same_inputs(eager=eager),
    )


def variants(shape: Shape, rows: int) -> Iterator[OpCase]:
    """Partials into float32, and into the model's dtype."""
    for dtype in dict.fromkeys((torch.float32, shape.dtype)):
        yield forward(shape, rows, 4, dtype)


CASES = [
    forward(SHAPES[name], rows, partials)
    for name, rows, partials in (
        [("qwen3-8b", 64, 18), ("qwen3-8b", 128, 34), ("gemma2-9b", 32, 6)]
        if ON_GPU
        else [("pocket", 32, 4), ("qwen3-107m", 32, 5)]
    )
]
