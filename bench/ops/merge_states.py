"""Joining the partials of a step: a shared prefix's splits and two of every sample's own."""

from collections.abc import Iterator

import torch
from torch import Tensor

from bench.case import Arguments, OpCase, each, like, same_inputs
from bench.forests import Heads
from bench.shapes import SHAPES, Shape
from bench.timing import DEVICE, ON_GPU, Fill
from kernels.merge_states import merge_states, merge_states_ref


def _reference(o: Tensor, lse: Tensor, index: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    out, out_lse = merge_states_ref(o, lse, index)
    return (out if o.dtype == torch.float64 else out.to(dtype)), out_lse


def _eager(o: Tensor, lse: Tensor, index: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """All partials of a row gathered, weighted and summed."""
    logs = lse[index]
    total = logs.logsumexp(1)
    weights = (logs - total[:, None]).exp()
    return (weights[..., None] * o[index]).sum(1).to(dtype), total


def forward(shape: Shape, rows: int, partials: int, dtype: torch.dtype = torch.float32) -> OpCase:
    """`partials` of every row, joined into `dtype`."""
    heads, dim, size = shape.num_heads, Heads.of(shape).value_dim, rows * partials

    def make(tensor: Fill) -> Arguments:
        index = torch.arange(size, device=DEVICE).view(partials, rows).T.contiguous()
        return tensor(size, heads, dim), tensor(size, heads), index, dtype

    return OpCase(
        "merge_states",
        f"{shape.name} {rows} rows of {partials}",
        each(make),
        merge_states,
        like("merge_states", _reference),
        4 * rows * heads * (dim + 1) * (partials + 1) + 8 * size,
        2 * size * heads * (dim + 2),
        same_inputs(eager=_eager),
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
