"""Writing a step's or a prefill's keys and values into the cache: scattered slots, or a run."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bench.figures import Figure, Peer, Work, assert_equal, calls_on
from bench.shapes import SHAPES, Shape
from bench.timing import DEVICE, ON_GPU, num_sets, randn
from kernels.write_kv import write_kv, write_kv_ref

NAMES = ["qwen3-8b", "gemma2-9b"] if ON_GPU else ["pocket", "qwen3-107m"]
ROWS = [64, 2048] if ON_GPU else [32, 512]
SLOTS = 1 << 16 if ON_GPU else 1 << 12
CHECKED = 16  # rows


def eager(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """Both caches with torch's own function."""
    k_cache.index_copy_(1, slots, k.transpose(0, 1))
    v_cache.index_copy_(1, slots, v.transpose(0, 1))


def make_work(shape: Shape, rows: int) -> Work:
    """`rows` tokens: in decode one far from the other, in prefill side by side."""
    heads, dim, dtype = shape.num_kv_heads, shape.head_dim, shape.dtype
    moved = 4 * rows * heads * dim * dtype.itemsize
    caches = torch.zeros(2, heads, SLOTS, dim, dtype=dtype, device=DEVICE)
    apart = SLOTS // rows if rows <= 64 else 1
    sets = []
    for i in range(min(num_sets(moved), SLOTS // rows)):
        qkv = randn(rows, shape.num_heads + 2 * heads, dim, dtype=dtype)
        first = i if apart > 1 else i * rows
        slots = torch.arange(rows, device=DEVICE) * apart + first
        sets.append((qkv[:, -2 * heads : -heads], qkv[:, -heads:], *caches, slots))

    def check(out: None, factor: float) -> None:
        k, v, _, _, slots = sets[0]
        expected = torch.zeros(2, heads, CHECKED, dim, dtype=dtype, device=DEVICE)
        at = torch.arange(CHECKED)
        write_kv_ref(k[:CHECKED], v[:CHECKED], expected[0], expected[1], at)
        assert_equal("write_kv", caches[:, :, slots[:CHECKED]], expected)

    return Work(
        "write_kv",
        f"{shape.name} {rows} rows",
        moved + 8 * rows,
        0,
        calls_on(write_kv, sets),
        check,
        {"eager": Peer(lambda: calls_on(eager, sets))},
    )


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", NAMES)
def test_write_kv(name: str, rows: int, measured: Callable[[Work], Figure]) -> None:
    measured(make_work(SHAPES[name], rows))
