"""Forest attention in torch: the slow path of a CPU without a C++ compiler, and its gradients.

Work tiles with the same queries form a group. A group is one dense attention over all its keys, and
gives one partial result per query; suffixes give another one per leaf. `merge_states` joins them.
Blocks of scores are bounded, so that memory does not grow with queries x keys. Keys and values past
a leaf's last are masked, and may be anything.

The backward visits query tiles one by one, each over all keys that it sees. The formulas are in
`kernels/forest_attention/triton_backward.py`.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.forest_attention.backward_schedule import query_tiles
from kernels.forest_attention.options import AttentionOptions
from kernels.forest_attention.plan import (
    MAX_SPLIT,
    MAX_TILE,
    CompiledKey,
    ForestPlan,
    Suffixes,
    partial_table,
)
from kernels.forest_attention.reference import dense_attention, visible_keys
from kernels.merge_states import merge_states

_MAX_SCORES = 1 << 22  # elements of a block of scores: 16 MiB of float32


class _Group(NamedTuple):
    """Queries [query, query + num_queries), the first of their partials, and the spans of keys that
    they read: first cache index, number of keys, position of the first."""

    query: int
    num_queries: int
    partial: int
    spans: list[tuple[int, int, int]]


@dataclass
class Groups:
    """A plan as torch executes it. index: (T, J) int64, the partials of each query in order; the
    suffixes' partials, one per query, come after those of the groups."""

    groups: list[_Group]
    index: Tensor
    num_partials: int
    num_tiles: int


def compile_plan(plan: ForestPlan, window: int | None) -> Groups:
    """Group the work tiles that a layer with this window executes."""
    spans: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
    tiles = plan.needed(window).tolist()
    for query, num_queries, *span in tiles:
        spans.setdefault((query, num_queries), []).append(tuple(span))
    groups = []
    partials = 0
    for (query, num_queries), keys in spans.items():
        groups.append(_Group(query, num_queries, partials, keys))
        partials += num_queries
    index = partial_table([group[:3] for group in groups], 0, len(plan.positions))
    index = index.to(plan.positions.device)
    if plan.suffix is not None:
        own = partials + torch.arange(len(index), device=index.device)[:, None]
        index = torch.cat([index, own], 1)
        partials += len(index)
    return Groups(groups, index, partials, len(tiles))


def run(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, plan: ForestPlan, options: AttentionOptions
) -> tuple[Tensor, Tensor]:
    """The output (T, Hq, Dv) in q's dtype and the natural log-sum-exps (T, Hq) of checked input."""
    compiled = plan.compiled(
        CompiledKey("torch", "forward", options.window), lambda: compile_plan(plan, options.window)
    )
    wide = q.to(torch.promote_types(q.dtype, torch.float32))
    o = wide.new_empty(compiled.num_partials, q.shape[1], v_cache.shape[-1])
    lse = wide.new_empty(compiled.num_partials, q.shape[1])
    for group in compiled.groups:
        _attend_group(wide, k_cache, v_cache, plan, options, group, o, lse)
    if plan.suffix is not None:
        rows = slice(compiled.num_partials - len(q), None)
        o[rows], lse[rows] = _attend_suffixes(wide, k_cache, v_cache, plan, options, plan.suffix)
    plan.executed += compiled.num_tiles
    return merge_states(o, lse, compiled.index, q.dtype)


def _attend_group(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    plan: ForestPlan,
    options: AttentionOptions,
    group: _Group,
    o: Tensor,
    lse: Tensor,
) -> None:
    """Attention of a group's queries over its keys, into its partials of o and lse."""
    k, v = (
        _keys_of(cache, group.spans).to(q.dtype).transpose(0, 1) for cache in (k_cache, v_cache)
    )
    k_pos = torch.cat([torch.arange(first, first + n) for _, n, first in group.spans]).to(q.device)
    block = max(1, _MAX_SCORES // (q.shape[1] * len(k)))
    for start in range(0, group.num_queries, block):
        stop = min(start + block, group.num_queries)
        rows = slice(group.query + start, group.query + stop)
        partials = slice(group.partial + start, group.partial + stop)
        visible = visible_keys(plan.positions[rows], k_pos, options.window)
        o[partials], lse[partials] = dense_attention(q[rows], k, v, options, visible)


def _attend_suffixes(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    plan: ForestPlan,
    options: AttentionOptions,
    suffix: Suffixes,
) -> tuple[Tensor, Tensor]:
    """o (T, Hq, Dv) and lse (T, Hq) of every query over its own keys."""
    width = max([0, *suffix.length.tolist()])
    column = torch.arange(width, device=q.device)
    k_pos = suffix.position[:, None] + column
    visible = column < suffix.length[:, None]  # (T, width)
    cells = suffix.blocks[:, column // MAX_SPLIT] + column % MAX_SPLIT
    cells = torch.where(visible, cells, 0)
    if options.window is not None:
        visible &= k_pos > plan.positions[:, None] - options.window
    k, v = (cache[:, cells].permute(1, 2, 0, 3).to(q.dtype) for cache in (k_cache, v_cache))
    v = v.masked_fill(~visible[..., None, None], 0)  # 0 * NaN is NaN
    o, lse = dense_attention(q[:, None], k, v, options, visible[:, None])
    return o[:, 0], lse[:, 0]


def _keys_of(cache: Tensor, spans: list[tuple[int, int, int]]) -> Tensor:
    """(Hkv, keys, channels): the cells of spans, one after the other."""
    return torch.cat([cache[:, first : first + count] for first, count, _ in spans], 1)


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
    (T, Hq, Dv) and lse (T, Hq), the results of `run`. In memory the caches' gradients are
    (N, Hkv, ...)."""
    scale, softcap, window = options.scale, options.softcap, options.window
    dtype = lse.dtype
    (_, heads, dim), (kv_heads, cells, v_dim) = q.shape, v_cache.shape
    delta = (d_o.to(dtype) * o.to(dtype)).sum(-1)
    if d_lse is not None:
        delta -= d_lse
    d_q = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    d_k, d_v = (
        torch.zeros(cells, kv_heads, size, dtype=dtype, device=q.device).transpose(0, 1)
        for size in (dim, v_dim)
    )
    size = max(1, min(MAX_TILE, _MAX_SCORES // max(heads * cells, 1)))
    tiles, all_spans = plan.compiled(
        CompiledKey("torch", "dq", window, (size, 1)), lambda: query_tiles(plan, window, size, 1)
    )
    listed = [tuple(span) for span in all_spans.tolist()]

    def rows_of(x: Tensor, first: int, count: int) -> Tensor:
        """(Hkv, queries x G, ...) of a tile's queries."""
        x = x[first : first + count].to(dtype).unflatten(1, (kv_heads, -1))
        return x.transpose(0, 1).flatten(1, 2)

    for first, count, begin, masked, end in sorted(tiles.tolist()):
        if begin == end:  # these queries see nothing
            continue
        spans = listed[begin:end]
        lengths = [num_keys for _, num_keys, _ in spans]
        k, v = (_keys_of(cache, spans).to(dtype) for cache in (k_cache, v_cache))
        query, d_out = rows_of(q, first, count), rows_of(d_o, first, count)
        weights = torch.bmm(query, k.transpose(1, 2)).mul_(scale)  # (Hkv, queries x G, keys)
        slope = None
        if softcap is not None:
            weights.div_(softcap).tanh_()
            slope = 1 - weights.square()
            weights.mul_(softcap)
        weights.sub_(rows_of(lse, first, count)[..., None]).exp_()
        q_pos = plan.positions[first : first + count]
        columns = weights.unflatten(1, (count, -1)).split(lengths, -1)
        for block, (_, num_keys, position) in list(zip(columns, spans, strict=True))[
            masked - begin :
        ]:
            k_pos = torch.arange(position, position + num_keys, device=q.device)
            block.masked_fill_(~visible_keys(q_pos, k_pos, window)[:, None], 0)
        ds = torch.bmm(d_out, v.transpose(1, 2)).sub_(rows_of(delta, first, count)[..., None])
        ds.mul_(weights).mul_(scale)
        if slope is not None:
            ds.mul_(slope)
        d_query = torch.bmm(ds, k).unflatten(1, (count, -1)).transpose(0, 1)
        d_q[first : first + count] = d_query.flatten(1, 2)
        for x, d_x, d_scores in ((query, d_k, ds), (d_out, d_v, weights)):
            parts = torch.bmm(d_scores.transpose(1, 2), x).split(lengths, 1)
            for (key, num_keys, _), part in zip(spans, parts, strict=True):
                d_x[:, key : key + num_keys] += part
    return d_q, d_k.to(q.dtype), d_v.to(q.dtype)
