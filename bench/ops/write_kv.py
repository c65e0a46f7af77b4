"""Writing a step's or a prefill's keys and values into the cache: scattered slots, or a run."""

from collections.abc import Iterator

import torch
from torch import Tensor

from bench.case import Arguments, OpCase, assert_equal, same_inputs
from bench.shapes import SHAPES, Shape, projected
from bench.timing import DEVICE, ON_GPU, Fill
from kernels.write_kv import write_kv, write_kv_ref

SLOTS = 1 << 16 if ON_GPU else 1 << 12


def forward(shape: Shape, rows: int) -> OpCase:
    """`rows` tokens, keys as rope leaves them and values as a slice: in decode one far from the
    other, in prefill side by side. All calls write to one cache, each to slots of its own."""
    heads, dim, dtype = shape.num_kv_heads, shape.head_dim, shape.dtype

    def make_inputs(tensor: Fill, count: int) -> list[Arguments]:
        caches = [torch.zeros(heads, SLOTS, dim, dtype=dtype, device=DEVICE) for _ in range(2)]
        apart = SLOTS // rows if rows <= 64 else 1
        places = SLOTS // rows  # of which there are enough
        inputs = []
        for i in range(count):
            _, k, v = projected(shape, rows, tensor)
            first = i % places if apart > 1 else i % places * rows
            slots = torch.arange(rows, device=DEVICE) * apart + first
            inputs.append((k.contiguous(), v, *caches, slots))
        return inputs

    def check(arguments: Arguments, out: None, factor: float) -> None:
        k, v, k_cache, v_cache, slots = arguments
        expected = [torch.zeros_like(cache[:, slots]) for cache in (k_cache, v_cache)]
        write_kv_ref(k, v, expected[0], expected[1], torch.arange(rows))
        for cache, written in zip((k_cache, v_cache), expected, strict=True):
            assert_equal("write_kv", cache[:, slots], written)

    def eager(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
        k_cache.index_copy_(1, slots, k.transpose(0, 1))
        v_cache.index_copy_(1, slots, v.transpose(0, 1))

    return OpCase(
        "write_kv",
        f"{shape.name} {rows} rows",
        make_inputs,
        write_kv,
        check,
        4 * rows * heads * dim * dtype.itemsize + 8 * rows,
        0,
        same_inputs(eager=eager),
    )


def variants(shape: Shape, rows: int) -> Iterator[OpCase]:
    """Any number of tokens."""
    yield forward(shape, rows)


CASES = [
    forward(SHAPES[name], rows)
    for name in (("qwen3-8b", "gemma2-9b") if ON_GPU else ("pocket", "qwen3-107m"))
    for rows in ((64, 2048) if ON_GPU else (32, 512))
]
