"""Forest attention on a CPU, in C++: a task is a work tile (or a split) and a key/value head; of
the backward, a head.

A plan is compiled once into the tables that C++ reads; nothing is gathered or padded in memory, and
a suffix costs what it holds. There is one partial for every tile and query, merged in order. The
C++ is in `kernels/cpp/attention.h` and `attention_backward.h`.
"""

import ctypes
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels import cpp
from kernels.checks import without_gaps
from kernels.forest_attention.options import AttentionOptions
from kernels.forest_attention.plan import (
    MAX_SPLIT,
    CompiledKey,
    ForestPlan,
    Ints,
    cut_between_queries,
    partial_table,
)

_MAX_PARTIAL = 1 << 23  # elements of a chunk's partial outputs: 32 MiB


@dataclass
class Chunks:
    """A plan's work tiles as C++ reads them: chunks that serve disjoint ranges of queries.

    table: (chunks, 6) int64: the address of its tiles (n, 6) int64 (a work tile and its first
    partial), n, the address of its index (queries, J) int64 of partials, J, and the first and the
    last query. The suffixes' partials come first. `kept` holds what the table points to.
    """

    table: Tensor
    num_tiles: int
    num_partials: int
    kept: list[Tensor]


def run(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, plan: ForestPlan, options: AttentionOptions
) -> tuple[Tensor, Tensor]:
    """The output (T, Hq, Dv) in q's dtype and the natural log-sum-exps (T, Hq) of checked input."""
    (queries, heads, dim), (kv_heads, _, v_dim) = q.shape, v_cache.shape
    chunks = compile_plan(plan, options.window, heads, v_dim)
    o, lse = partials_of(plan, chunks.num_partials, heads, v_dim)
    out = torch.empty(queries, heads, v_dim, dtype=q.dtype)
    out_lse = torch.empty(queries, heads)
    arguments = cpp.structure("AttentionArguments")(
        q.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(), *q.stride()[:2],
        *k_cache.stride()[:2], *v_cache.stride()[:2], heads, kv_heads, dim, v_dim,
        plan.positions.data_ptr(), float(options.scale), float(options.softcap or 0),
        options.window or 0, o.data_ptr(), lse.data_ptr(),
    )  # fmt: skip
    suffixes = suffixes_of(plan)
    if suffixes is not None:
        cpp.call("attend_suffixes", q.dtype, ctypes.byref(arguments), ctypes.byref(suffixes))
    for tiles, num_tiles, index, columns, start, stop in chunks.table.tolist():
        cpp.call("attend_tiles", q.dtype, ctypes.byref(arguments), tiles, num_tiles)
        cpp.call(
            "merge", q.dtype, o, lse, index, stop - start, columns, heads, v_dim, out[start:],
            out_lse[start:],
        )  # fmt: skip
    plan.executed += chunks.num_tiles
    return out, out_lse


def run_backward(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    o: Tensor,
    lse: Tensor,
    d_o: Tensor,
    d_lse: Tensor | None,
    plan: ForestPlan,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q (T, Hq, D), k_cache (Hkv, N, D) and v_cache (Hkv, N, Dv) from those of o
    (T, Hq, Dv) and lse (T, Hq), the results of `run`; sums are in float32. In memory the caches'
    gradients are (N, Hkv, ...)."""
    (_, heads, dim), (kv_heads, cells, v_dim) = q.shape, v_cache.shape
    delta = (d_o.float() * o.float()).sum(-1)
    if d_lse is not None:
        delta -= d_lse
    tiles = plan.compiled(
        CompiledKey("cpp", "backward", options.window),
        lambda: torch.from_numpy(np.ascontiguousarray(plan.needed(options.window))),
    )
    lanes = cpp.panel_columns() // 2
    d_q = torch.zeros(q.shape)
    d_k, d_v = (torch.zeros(kv_heads, cells, -(-size // lanes) * lanes) for size in (dim, v_dim))
    arguments = cpp.structure("AttentionArguments")(
        q.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(), *q.stride()[:2],
        *k_cache.stride()[:2], *v_cache.stride()[:2], heads, kv_heads, dim, v_dim,
        plan.positions.data_ptr(), float(options.scale), float(options.softcap or 0),
        options.window or 0, None, None,
    )  # fmt: skip
    d_out = without_gaps(d_o.to(q.dtype))
    lse = lse.contiguous()
    gradients = cpp.structure("Gradients")(
        d_out.data_ptr(), *d_out.stride()[:2], lse.data_ptr(), delta.data_ptr(), tiles.data_ptr(),
        len(tiles), cells, d_q.data_ptr(), d_k.data_ptr(), d_v.data_ptr(),
    )  # fmt: skip
    cpp.call("attend_backward", q.dtype, ctypes.byref(arguments), ctypes.byref(gradients))

    def by_cell(x: Tensor, channels: int) -> Tensor:
        return x[..., :channels].transpose(0, 1).to(q.dtype).contiguous().transpose(0, 1)

    return d_q.to(q.dtype), by_cell(d_k, dim), by_cell(d_v, v_dim)


def suffixes_of(plan: ForestPlan) -> ctypes.Structure | None:
    """A plan's suffixes as C++ reads them, None where it has none; valid while the plan lives."""
    s = plan.suffix
    if s is None:
        return None
    return cpp.structure("Suffixes")(
        s.blocks.data_ptr(), s.length.data_ptr(), s.position.data_ptr(), len(s.blocks),
        s.blocks.stride(0), MAX_SPLIT, s.num_splits,
    )  # fmt: skip


def partials_of(plan: ForestPlan, num: int, heads: int, v_dim: int) -> tuple[Tensor, Tensor]:
    """Room for a plan's partial outputs (num, Hq, Dv) and log-sum-exps (num, Hq), float32: the same
    for all its layers and steps."""
    return plan.compiled(
        CompiledKey("cpp", "partials", shape=(num, heads, v_dim)),
        lambda: (torch.empty(num, heads, v_dim), torch.empty(num, heads)),
    )


def compile_plan(plan: ForestPlan, window: int | None, heads: int, v_dim: int) -> Chunks:
    """A plan's tiles for a layer with this window, compiled once."""
    max_partials = _MAX_PARTIAL // (heads * v_dim)
    return plan.compiled(
        CompiledKey("cpp", "forward", window, max_partials),
        lambda: _compile(plan, window, max_partials),
    )


def _compile(plan: ForestPlan, window: int | None, max_partials: int) -> Chunks:
    parts = cut_between_queries(plan.needed(window), len(plan.positions), max_partials)
    own = None if plan.suffix is None else plan.suffix.partials()
    first = 0 if plan.suffix is None else plan.suffix.num_partials
    rows: list[tuple[int, ...]] = []
    chunks = Chunks(torch.empty(0), 0, first, [])
    for tiles, start, stop in parts:
        table, starts, num_partials = _placed(tiles, first)
        served = [(i[0], i[1], at) for i, at in zip(tiles.tolist(), starts, strict=True)]
        index = partial_table(served, start, stop)
        if own is not None:
            index = torch.cat([index, own[start:stop]], 1)
        index = index.contiguous()
        rows.append((table.data_ptr(), len(tiles), index.data_ptr(), index.shape[1], start, stop))
        chunks.kept += [table, index]
        chunks.num_tiles += len(tiles)
        chunks.num_partials = max(chunks.num_partials, num_partials)
    chunks.table = torch.tensor(rows, dtype=torch.int64)
    return chunks


def _placed(tiles: Ints, first: int) -> tuple[Tensor, list[int], int]:
    """The tiles (n, 6) with their first partials, those partials, and the number of partials."""
    ends = first + np.cumsum(tiles[:, 1])
    starts = ends - tiles[:, 1]
    placed = torch.from_numpy(np.column_stack([tiles, starts]))
    return placed, starts.tolist(), int(ends[-1]) if len(tiles) else first
