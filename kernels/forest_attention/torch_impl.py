"""Forest attention on CPU, in torch: items of like shape are batched.

Queries are padded to 16, 32 or 64 (in suffixes the heads of a group to 8 or 16) and keys to a power
of two (in suffixes to a multiple of 16). Padding keys get weight 0 and padded query rows are
dropped. With these shapes a row's float32 bits do not depend on the padding, on what else is in the
batch or on the number of threads, and a token's partials are the same in prefill and in decode
(tests hold it to that).

Items run in batches of bounded size, and partials in chunks of queries, cut where no item reaches
across (in decode only between trees). The operation itself, its reference and its Triton kernel are
in `kernels/forest_attention`.

The backward goes from query tile to query tile, each at once over all keys that it sees, and adds
to the gradients of those in the order of the queries.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from kernels.forest_attention.backward_schedule import query_tiles
from kernels.forest_attention.plan import (
    MAX_SPLIT,
    MAX_TILE,
    ForestPlan,
    SuffixTiles,
    WorkItem,
    cut_between_queries,
    partial_table,
)
from kernels.merge_states import merge_states

_TILES = (16, 32, 64)
_WIDTHS = (16, 32, 64, 128, 256)
_MIN_ROWS = (8, 16)  # of a product, for D <= 128 and above; below, a row's bits depend on them
_NOWHERE = 1 << 62  # the position of a padding key
_MAX_SCORES = 1 << 22  # elements of one batch's scores, keys or values: 16 MiB of float32
_MAX_PARTIAL = 1 << 23  # elements of a chunk's partial outputs: 32 MiB of float32


class _Cells(NamedTuple):
    """Where n items look: index rows, cache slots and logical positions, int64. Padding repeats the
    last query and the last key, at a position beyond any query."""

    query: Tensor  # (n, M)
    key: Tensor  # (n, W)
    position: Tensor  # (n, W)


@dataclass
class _Batch:
    """n work items of one padded shape, M = `tile` queries by W = `width` keys; `partial` is the
    first of n * M partials. Where all run in one piece, `cells` and `visible` are kept."""

    items: Tensor  # (n, 5) int64
    tile: int
    width: int
    partial: int
    masked: bool  # some query does not see some key, whatever the window
    cells: _Cells | None = None
    visible: Tensor | None = None

    def expand(self, span: slice) -> _Cells:
        """The cells of some of the items."""
        query, num_queries, key, num_keys, position = self.items[span].T[:, :, None].unbind()
        row = torch.arange(self.tile, device=self.items.device)
        column = torch.arange(self.width, device=self.items.device)
        return _Cells(
            query + torch.minimum(row, num_queries - 1),
            key + torch.minimum(column, num_keys - 1),
            torch.where(column < num_keys, position + column, _NOWHERE),
        )


@dataclass
class Chunk:
    """Queries [start, stop), the batches that serve them, and who merges what."""

    start: int
    stop: int
    batches: list[_Batch]
    num_items: int
    num_partials: int  # the suffixes' own come first
    index: Tensor  # (stop - start, J)


def attend(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    plan: ForestPlan,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """The output (T, Hq, Dv) in q's dtype and the natural log-sum-exps (T, Hq) of checked input."""
    wide = torch.promote_types(q.dtype, torch.float32)
    heads, kv_heads, v_dim = q.shape[1], k_cache.shape[0], v_cache.shape[-1]
    grouped = (q.to(wide) * scale).unflatten(1, (kv_heads, heads // kv_heads))  # (T, Hkv, G, D)
    out = torch.zeros(len(q), heads, v_dim, dtype=q.dtype, device=q.device)
    out_lse = torch.full(out.shape[:2], float("-inf"), dtype=wide, device=q.device)
    chunks = chunks_of(plan, window, _MAX_PARTIAL // (heads * v_dim))
    partials = max(chunk.num_partials for chunk in chunks)
    o = torch.empty(partials, kv_heads, heads // kv_heads, v_dim, dtype=wide, device=q.device)
    lse = torch.empty(partials, kv_heads, heads // kv_heads, dtype=wide, device=q.device)
    if plan.suffix is not None:
        _run_suffix(grouped, k_cache, v_cache, plan, plan.suffix, softcap, window, o, lse)
    for chunk in chunks:
        for batch in chunk.batches:
            _run_batch(grouped, k_cache, v_cache, plan, batch, softcap, window, o, lse)
        merged, merged_lse = merge_states(o.flatten(1, 2), lse.flatten(1), chunk.index, q.dtype)
        out[chunk.start : chunk.stop] = merged
        out_lse[chunk.start : chunk.stop] = merged_lse
        plan.executed += chunk.num_items
    return out, out_lse


def chunks_of(plan: ForestPlan, window: int | None, max_partials: int) -> list[Chunk]:
    """A plan's items as batches, compiled once per window, in chunks of `max_partials` at most
    where the items can be cut; the suffixes' partials are not counted."""

    def build() -> list[Chunk]:
        cut = cut_between_queries(
            plan.needed(window), len(plan.first_position), max_partials, _tile
        )
        return [_compile(plan, items, start, stop) for items, start, stop in cut]

    return plan.compiled(("cpu", window, max_partials), build)


def _compile(plan: ForestPlan, items: list[WorkItem], start: int, stop: int) -> Chunk:
    device = plan.positions.device
    shapes: dict[tuple[int, int, bool], list[int]] = {}
    for i, item in enumerate(items):
        tile, width = _tile(item.num_queries), _width(item.num_keys)
        last = item.position + item.num_keys - 1
        masked = width != item.num_keys or last > plan.earliest(item)
        shapes.setdefault((tile, width, masked), []).append(i)
    batches: list[_Batch] = []
    first_partial = np.zeros(len(items), dtype=np.int64)
    partials = 0 if plan.suffix is None else plan.suffix.num_partials
    table = np.array(items, dtype=np.int64).reshape(-1, 5)
    for (tile, width, masked), members in shapes.items():
        rows = torch.from_numpy(table[members]).to(device)
        batches.append(_Batch(rows, tile, width, partials, masked))
        first_partial[members] = partials + tile * np.arange(len(members))
        partials += tile * len(members)
    served = [
        (item.query, item.num_queries, int(first))
        for item, first in zip(items, first_partial, strict=True)
    ]
    merged = partial_table(served, start, stop).to(device)
    if plan.suffix is not None:
        own = plan.suffix.partials(len(plan.positions))
        merged = torch.cat([merged, own[start:stop]], 1)
    return Chunk(start, stop, batches, len(items), partials, merged)


def _tile(num_queries: int) -> int:
    return next(tile for tile in _TILES if tile >= num_queries)


def _width(num_keys: int) -> int:
    return next(width for width in _WIDTHS if width >= num_keys)


def _run_batch(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    plan: ForestPlan,
    batch: _Batch,
    softcap: float | None,
    window: int | None,
    o: Tensor,
    lse: Tensor,
) -> None:
    """Partials of one batch of items, in pieces of bounded size."""
    kv_heads, groups = q.shape[1:3]
    items, tile, width = len(batch.items), batch.tile, batch.width
    widest = max(tile * groups, k_cache.shape[-1], v_cache.shape[-1])
    piece = max(1, _MAX_SCORES // (kv_heads * width * widest))
    for first in range(0, items, piece):
        span = slice(first, min(first + piece, items))
        n = span.stop - span.start
        cells = batch.expand(span) if batch.cells is None else batch.cells
        if n == items:
            batch.cells = cells
        query = q[cells.query].permute(2, 0, 1, 3, 4)  # (Hkv, n, M, G, D)
        query = query.reshape(kv_heads * n, tile * groups, -1)
        keys, values = (
            cache.index_select(1, cells.key.flatten()).to(q.dtype).view(kv_heads * n, width, -1)
            for cache in (k_cache, v_cache)
        )
        visible = None
        if batch.masked or window is not None:
            if batch.visible is None:
                visible = _visible(cells, plan, window)
                if n == items and (window is None or not plan.advancing):
                    batch.visible = visible
            else:
                visible = batch.visible
            visible = visible[None, :, :, None]  # (1, n, M, 1, W)
        part, part_lse = _attend(
            query, keys, values, visible, (kv_heads, n, tile, groups, width), softcap
        )
        start = batch.partial + first * tile
        shape = (kv_heads, n * tile, groups)
        o[start : start + n * tile] = part.view(*shape, -1).transpose(0, 1)
        lse[start : start + n * tile] = part_lse.view(shape).transpose(0, 1)


def _run_suffix(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    plan: ForestPlan,
    suffix: SuffixTiles,
    softcap: float | None,
    window: int | None,
    o: Tensor,
    lse: Tensor,
) -> None:
    """Partials of every slot's own keys, split by split; views of the cache, nothing gathered."""
    slots, (kv_heads, groups) = len(suffix.row), q.shape[1:3]
    row = suffix.row.clamp_min(0)
    padded = max(groups, _MIN_ROWS[q.shape[-1] > 128])
    query = pad(q[row], (0, 0, 0, padded - groups))  # (S, Hkv, M, D)
    length = torch.where(suffix.row >= 0, suffix.length[row], 0)
    at = plan.positions[row]
    first_position = suffix.position[row]
    region = slice(suffix.base, suffix.base + slots * suffix.capacity)
    for split, start in enumerate(range(0, suffix.max_length, MAX_SPLIT)):
        used = min(suffix.max_length - start, MAX_SPLIT)
        width = min(-(-used // 16) * 16, suffix.capacity - start)
        column = torch.arange(start, start + width, device=q.device)
        visible = column < length[:, None]
        if window is not None:
            visible &= first_position[:, None] + column > at[:, None] - window
        rows = slice(split * slots, (split + 1) * slots)
        for head in range(kv_heads):
            keys, values = (
                cache[head, region].unflatten(0, (slots, -1))[:, start : start + width].to(q.dtype)
                for cache in (k_cache, v_cache)
            )
            part, part_lse = _attend(
                query[:, head],
                keys,
                values,
                visible[None, :, None, None],
                (1, slots, 1, padded, width),
                softcap,
            )
            o[rows, head] = part[:, :groups]
            lse[rows, head] = part_lse[:, :groups]


def _visible(cells: _Cells, plan: ForestPlan, window: int | None) -> Tensor:
    """Which keys of n items their queries see: (n, M or 1, W) bool."""
    position = cells.position[:, None]
    if plan.advancing and window is None:
        return position < _NOWHERE
    at = plan.positions[cells.query][..., None]
    visible = position <= at
    return visible if window is None else visible & (position > at - window)


def _attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    visible: Tensor | None,
    shape: tuple[int, int, int, int, int],
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of batched queries (b, M, D) over keys and values (b, W, D); `shape` is
    how scores (b, M, W) meet `visible`. Returns o (b, M, Dv) and its natural lse (b, M)."""
    scores = torch.bmm(query, keys.transpose(1, 2))
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    if visible is not None:
        scores.view(shape).masked_fill_(~visible, float("-inf"))
    top = scores.amax(-1, keepdim=True)
    top.masked_fill_(top == float("-inf"), 0)
    weights = scores.sub_(top).exp_()
    # The order of a sum depends on its width; powers of two agree on the terms they share.
    total = pad(weights, (0, _width(weights.shape[-1]) - weights.shape[-1])).sum(-1, keepdim=True)
    out = torch.bmm(weights, values)
    out.div_(torch.where(total > 0, total, 1))
    return out, (top + total.log()).squeeze(-1)


def attend_backward(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    o: Tensor,
    lse: Tensor,
    d_o: Tensor,
    d_lse: Tensor | None,
    plan: ForestPlan,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q (T, Hq, D), k_cache (Hkv, N, D) and v_cache (Hkv, N, Dv), the latter two laid
    out as (N, Hkv, ...), from those of o (T, Hq, Dv) and lse (T, Hq), `attend`'s. The formulas are
    in `kernels/forest_attention/triton_backward.py`."""
    wide = lse.dtype
    (_, heads, dim), (kv_heads, cells, v_dim) = q.shape, v_cache.shape
    delta = (d_o.to(wide) * o.to(wide)).sum(-1)
    if d_lse is not None:
        delta -= d_lse
    d_q = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    d_k, d_v = (
        torch.zeros(cells, kv_heads, size, dtype=wide, device=q.device).transpose(0, 1)
        for size in (dim, v_dim)
    )
    size = max(1, min(MAX_TILE, _MAX_SCORES // max(heads * cells, 1)))
    tiles, runs = plan.compiled(
        ("backward", window, size), lambda: query_tiles(plan, window, size, 1)
    )
    listed = runs.tolist()

    def rows_of(x: Tensor, first: int, count: int) -> Tensor:
        """(Hkv, queries x G, ...) of a tile's queries."""
        x = x[first : first + count].to(wide).unflatten(1, (kv_heads, -1))
        return x.transpose(0, 1).flatten(1, 2)

    for first, count, begin, partial, end in sorted(tiles.tolist()):
        if begin == end:  # these queries see nothing
            continue
        lengths = [num_keys for _, num_keys, _ in listed[begin:end]]
        spans = [slice(key, key + num_keys) for key, num_keys, _ in listed[begin:end]]
        k, v = (torch.cat([x[:, span] for span in spans], 1).to(wide) for x in (k_cache, v_cache))
        query, d_out = rows_of(q, first, count), rows_of(d_o, first, count)
        weights = torch.bmm(query, k.transpose(1, 2)).mul_(scale)  # (Hkv, queries x G, keys)
        slope = None
        if softcap is not None:
            weights.div_(softcap).tanh_()
            slope = 1 - weights.square()
            weights.mul_(softcap)
        weights.sub_(rows_of(lse, first, count)[..., None]).exp_()
        at = plan.positions[first : first + count, None]
        for run in range(partial, end):
            position, start = listed[run][2], sum(lengths[: run - begin])
            key_at = position + torch.arange(lengths[run - begin], device=at.device)
            visible = key_at <= at
            if window is not None:
                visible &= key_at > at - window
            columns = weights[..., start : start + len(key_at)].unflatten(1, (count, -1))
            columns.masked_fill_(~visible[:, None], 0)
        ds = torch.bmm(d_out, v.transpose(1, 2)).sub_(rows_of(delta, first, count)[..., None])
        ds.mul_(weights).mul_(scale)
        if slope is not None:
            ds.mul_(slope)
        d_query = torch.bmm(ds, k).unflatten(1, (count, -1)).transpose(0, 1)
        d_q[first : first + count] = d_query.flatten(1, 2)
        for x, d_x, d_scores in ((query, d_k, ds), (d_out, d_v, weights)):
            parts = torch.bmm(d_scores.transpose(1, 2), x).split(lengths, 1)
            for span, part in zip(spans, parts, strict=True):
                d_x[:, span] += part
    return d_q, d_k.to(q.dtype), d_v.to(q.dtype)
