"""Attention of many queries over the keys of a forest: a tile is read once for all who share it.

    s_ij = scale * q_i . k_j        [softcap * tanh(s / softcap)]
    o_i  = sum_j exp(s_ij - lse_i) v_j,      j over the keys that i's work items name, where
           position(j) <= position(i)   and, with a window,   position(j) > position(i) - window

T queries, Hq query heads in groups of G per key/value head (Hkv of them), D and Dv channels of keys
and values, N cache slots. Prefill, decode and training differ in the plan only. A plan holds

- *work items*: (a run of queries, a run of keys in the cache, the position of the first key). A run
  of keys lies within one split of one segment, so that how keys are partitioned is a function of
  a sample's own sequence and never of who shares it;
- *suffix tiles*, implicit: every leaf's own generated keys in its slot of the cache.

Every item gives a partial result with its natural log-sum-exp, in float32 (float64 for float64
input); `merge_states` joins a query's partials in the order of its sequence. No T x T mask exists:
items run in batches of bounded size, and partials in chunks of queries, cut where no item reaches
across (in decode only between trees).

On CPU items of like shape are batched: queries are padded to 16, 32 or 64 (in suffixes the heads
of a group to 8 or 16) and keys to a power of two (in suffixes to a multiple of 16). Padding keys
get weight 0 and padded query rows are dropped. With these shapes a row's float32 bits do not depend
on the padding, on what else is in the batch or on the number of threads, and a token's partials are
the same in prefill and in decode (tests hold it to that).

It does not write the cache, choose what is shared, or compute gradients.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from kernels.merge_states import merge_states

MAX_SPLIT = 256  # keys of a work item
MAX_TILE = 64  # queries of a work item
_TILES = (16, 32, 64)
_WIDTHS = (16, 32, 64, 128, 256)
_MIN_ROWS = (8, 16)  # of a product, for D <= 128 and above; below, a row's bits depend on them
_NOWHERE = 1 << 62  # the position of a padding key
_MAX_SCORES = 1 << 22  # elements of one batch's scores, keys or values: 16 MiB of float32
_MAX_PARTIAL = 1 << 23  # elements of a chunk's partial outputs: 32 MiB of float32


class WorkItem(NamedTuple):
    """Queries [query, query + num_queries) look at keys [key, key + num_keys) of the cache, whose
    first stands at logical `position`. At most MAX_TILE queries and MAX_SPLIT keys, none of 0."""

    query: int
    num_queries: int
    key: int
    num_keys: int
    position: int


@dataclass
class SuffixTiles:
    """Every leaf's own keys: slot s owns cache slots [base + s * capacity, + capacity).

    row: (S,) int64, the query of each slot, -1 for an idle slot. length: (T,) int64, keys of each
    query's suffix, its own token included; it may grow up to `max_length` while the plan lives.
    position: (T,) int64, the logical position of the first. capacity is a multiple of 16.
    """

    base: int
    capacity: int
    row: Tensor
    length: Tensor
    position: Tensor
    max_length: int

    def __post_init__(self) -> None:
        assert self.base >= 0 and self.capacity % 16 == 0, (self.base, self.capacity)
        assert 0 <= self.max_length <= self.capacity, (self.max_length, self.capacity)

    @property
    def num_partials(self) -> int:
        """One for each slot and split."""
        return len(self.row) * -(-self.max_length // MAX_SPLIT)


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
class _Chunk:
    """Queries [start, stop), the batches that serve them, and who merges what."""

    start: int
    stop: int
    batches: list[_Batch]
    num_items: int
    num_partials: int  # the suffixes' own come first
    index: Tensor  # (stop - start, J)


@dataclass
class ForestPlan:
    """What `forest_attention` executes: items in the order of each query's sequence.

    positions: (T,) int64, the logical position of each query, on the device; in decode the caller
    advances it in place, always upwards, and sets `moving`: then every key of every item must stand
    before its queries from the start. suffix: the leaves' own keys, if any.
    `executed` counts the items run so far; every call adds `num_items(window)`.
    """

    items: Sequence[WorkItem]
    positions: Tensor
    suffix: SuffixTiles | None = None
    moving: bool = False
    executed: int = 0
    _chunks: dict[tuple[int | None, int], list[_Chunk]] = field(default_factory=dict)
    _first_position: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._first_position = self.positions.tolist()
        queries = len(self._first_position)
        for item in self.items:
            assert 0 < item.num_queries <= MAX_TILE and 0 < item.num_keys <= MAX_SPLIT, item
            assert item.query >= 0 and item.query + item.num_queries <= queries, item
            if self.moving:
                assert item.position + item.num_keys <= 1 + self._earliest(item), item
        if self.suffix is not None:
            assert len(self.suffix.length) == len(self.suffix.position) == queries
            rows = [row for row in self.suffix.row.tolist() if row != -1]
            assert len(set(rows)) == len(rows) and set(rows) <= set(range(queries)), rows
            longest = max(self.suffix.length.tolist(), default=0)
            assert longest <= self.suffix.max_length, (longest, self.suffix.max_length)

    def num_items(self, window: int | None = None) -> int:
        """Explicit items that a layer with this window executes: those wholly outside every
        query's window are skipped."""
        return sum(1 for item in self.items if self._needed(item, window))

    def _needed(self, item: WorkItem, window: int | None) -> bool:
        first, last = item.position, item.position + item.num_keys - 1
        if first > max(self._first_position[item.query : item.query + item.num_queries]):
            return False
        return window is None or last > self._earliest(item) - window

    def _earliest(self, item: WorkItem) -> int:
        return min(self._first_position[item.query : item.query + item.num_queries])

    def chunks(self, window: int | None, max_partials: int) -> list[_Chunk]:
        """The items as batches, compiled once per window, in chunks of `max_partials` at most where
        the items can be cut; the suffixes' partials are not counted."""
        key = (window, max_partials)
        if key not in self._chunks:
            items = [item for item in self.items if self._needed(item, window)]
            self._chunks[key] = [
                self._compile(part, start, stop)
                for part, start, stop in _cut(items, len(self._first_position), max_partials)
            ]
        return self._chunks[key]

    def _compile(self, items: list[WorkItem], start: int, stop: int) -> _Chunk:
        device = self.positions.device
        shapes: dict[tuple[int, int, bool], list[int]] = {}
        for i, item in enumerate(items):
            tile, width = _tile(item.num_queries), _width(item.num_keys)
            last = item.position + item.num_keys - 1
            masked = width != item.num_keys or last > self._earliest(item)
            shapes.setdefault((tile, width, masked), []).append(i)
        batches: list[_Batch] = []
        first_partial = np.zeros(len(items), dtype=np.int64)
        partials = 0 if self.suffix is None else self.suffix.num_partials
        table = np.array(items, dtype=np.int64).reshape(-1, 5)
        for (tile, width, masked), members in shapes.items():
            rows = torch.from_numpy(table[members]).to(device)
            batches.append(_Batch(rows, tile, width, partials, masked))
            first_partial[members] = partials + tile * np.arange(len(members))
            partials += tile * len(members)
        count = np.zeros(stop - start, dtype=np.int64)
        for item in items:
            count[item.query - start : item.query - start + item.num_queries] += 1
        index = np.full((stop - start, int(count.max(initial=0))), -1, dtype=np.int64)
        count[:] = 0
        for item, partial in zip(items, first_partial, strict=True):
            served = np.arange(item.query - start, item.query - start + item.num_queries)
            index[served, count[served]] = partial + np.arange(item.num_queries)
            count[served] += 1
        merged = torch.from_numpy(index).to(device)
        if self.suffix is not None:
            merged = torch.cat([merged, self._suffix_index(start, stop)], 1)
        return _Chunk(start, stop, batches, len(items), partials, merged)

    def _suffix_index(self, start: int, stop: int) -> Tensor:
        """The partial of each query and split of its suffix, out of (splits, slots)."""
        assert self.suffix is not None
        slots = len(self.suffix.row)
        slot_of = torch.full((len(self.positions) + 1,), -1, device=self.positions.device)
        slot_of[self.suffix.row] = torch.arange(slots, device=slot_of.device)
        mine = slot_of[start:stop, None]
        offset = torch.arange(0, self.suffix.num_partials, max(slots, 1), device=mine.device)
        return torch.where(mine >= 0, offset + mine, -1)


def _tile(num_queries: int) -> int:
    return next(tile for tile in _TILES if tile >= num_queries)


def _width(num_keys: int) -> int:
    return next(width for width in _WIDTHS if width >= num_keys)


def _cut(
    items: list[WorkItem], num_queries: int, max_partials: int
) -> list[tuple[list[WorkItem], int, int]]:
    """Cut items into runs that serve disjoint, consecutive ranges of queries."""
    floor = [num_queries] * (len(items) + 1)
    for i in range(len(items) - 1, -1, -1):
        floor[i] = min(floor[i + 1], items[i].query)
    parts = []
    first = start = reached = partials = 0
    for i, item in enumerate(items):
        if i > first and partials + MAX_TILE > max_partials and reached <= floor[i]:
            parts.append((items[first:i], start, floor[i]))
            first, start, partials = i, floor[i], 0
        reached = max(reached, item.query + item.num_queries)
        partials += _tile(item.num_queries)
    parts.append((items[first:], start, num_queries))
    return parts


def forest_attention_ref(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    plan: ForestPlan,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Specification of `forest_attention`: each query by itself over all the keys it may see."""
    out = torch.zeros(*q.shape[:2], v_cache.shape[-1], dtype=q.dtype, device=q.device)
    groups = q.shape[1] // k_cache.shape[0]
    positions = plan.positions.tolist()
    for i, at in enumerate(positions):
        keys: list[tuple[int, int]] = []  # cache slot, position
        for item in plan.items:
            if item.query <= i < item.query + item.num_queries:
                keys += [(item.key + j, item.position + j) for j in range(item.num_keys)]
        if plan.suffix is not None and i in plan.suffix.row.tolist():
            slot = plan.suffix.row.tolist().index(i)
            first = plan.suffix.base + slot * plan.suffix.capacity
            start = int(plan.suffix.position[i])
            keys += [(first + j, start + j) for j in range(int(plan.suffix.length[i]))]
        seen = [slot for slot, p in keys if p <= at and (window is None or p > at - window)]
        if not seen:
            continue
        k = k_cache[:, seen].repeat_interleave(groups, 0)  # (Hq, n, D)
        v = v_cache[:, seen].repeat_interleave(groups, 0)
        scores = torch.einsum("hd,hnd->hn", q[i], k) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        out[i] = torch.einsum("hn,hnd->hd", scores.softmax(-1), v)
    return out


def forest_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    plan: ForestPlan,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Attention of all queries of a plan.

    q: (T, Hq, D), k_cache: (Hkv, N, D), v_cache: (Hkv, N, Dv), one floating dtype and device;
    T = len(plan.positions), Hkv divides Hq. What no item names is not read, except in the slots of
    live leaves: there values behind the last key must be finite (keys may be anything). Returns
    (T, Hq, Dv) in q's dtype; a query without any key gives 0. Raises ValueError for other shapes,
    dtypes or devices, or a scale, soft-cap or window that is not positive.
    """
    _check(q, k_cache, v_cache, plan, scale, softcap, window)
    wide = torch.promote_types(q.dtype, torch.float32)
    heads, kv_heads, v_dim = q.shape[1], k_cache.shape[0], v_cache.shape[-1]
    grouped = (q.to(wide) * scale).unflatten(1, (kv_heads, heads // kv_heads))  # (T, Hkv, G, D)
    out = torch.zeros(len(q), heads, v_dim, dtype=q.dtype, device=q.device)
    chunks = plan.chunks(window, _MAX_PARTIAL // (heads * v_dim))
    partials = max(chunk.num_partials for chunk in chunks)
    o = torch.empty(partials, kv_heads, heads // kv_heads, v_dim, dtype=wide, device=q.device)
    lse = torch.empty(partials, kv_heads, heads // kv_heads, dtype=wide, device=q.device)
    if plan.suffix is not None:
        _run_suffix(grouped, k_cache, v_cache, plan, plan.suffix, softcap, window, o, lse)
    for chunk in chunks:
        for batch in chunk.batches:
            _run_batch(grouped, k_cache, v_cache, plan, batch, softcap, window, o, lse)
        merged, _ = merge_states(o.flatten(1, 2), lse.flatten(1), chunk.index)
        out[chunk.start : chunk.stop] = merged
        plan.executed += chunk.num_items
    return out


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
                if n == items and (window is None or not plan.moving):
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
    if plan.moving and window is None:
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


def _check(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    plan: ForestPlan,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> None:
    if q.ndim != 3 or k_cache.ndim != 3 or v_cache.ndim != 3:
        raise ValueError(
            f"forest_attention: q {tuple(q.shape)}, k_cache {tuple(k_cache.shape)}, v_cache "
            f"{tuple(v_cache.shape)} must be (T, Hq, D), (Hkv, N, D), (Hkv, N, Dv)"
        )
    if q.shape[2] != k_cache.shape[2] or k_cache.shape[:2] != v_cache.shape[:2]:
        raise ValueError(
            f"forest_attention: q {tuple(q.shape)}, k_cache {tuple(k_cache.shape)} and v_cache "
            f"{tuple(v_cache.shape)} do not agree"
        )
    if not k_cache.shape[0] or q.shape[1] % k_cache.shape[0]:
        raise ValueError(
            f"forest_attention: {k_cache.shape[0]} kv heads do not divide {q.shape[1]} heads"
        )
    if len(q) != len(plan.positions):
        raise ValueError(f"forest_attention: {len(q)} queries, plan for {len(plan.positions)}")
    if not q.dtype == k_cache.dtype == v_cache.dtype or not q.is_floating_point():
        raise ValueError(
            f"forest_attention: dtypes {q.dtype}, {k_cache.dtype}, {v_cache.dtype} must be one "
            "floating dtype"
        )
    if not q.device == k_cache.device == v_cache.device == plan.positions.device:
        raise ValueError(
            f"forest_attention: q is on {q.device}, k_cache on {k_cache.device}, v_cache on "
            f"{v_cache.device}, the plan on {plan.positions.device}"
        )
    for name, value in (("scale", scale), ("softcap", softcap), ("window", window)):
        if value is not None and not value > 0:
            raise ValueError(f"forest_attention: {name} must be positive, got {value}")
