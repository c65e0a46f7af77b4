"""Attention of many queries over the keys of a forest, each key tile read once for all who share it.

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
items are cut into batches of bounded size, and partials into chunks of queries of bounded size.

On CPU items of like shape are batched: queries are padded to 16, 32 or 64 and keys to a power of
two. Padding keys get weight 0 and padded query rows are dropped. For the products used here a row's
bits do not depend on the padding (float32, multiples of 16; tests hold it to that).

It does not write the cache, choose what is shared, or compute gradients.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kernels.merge_states import merge_states

MAX_SPLIT = 256  # keys of a work item
MAX_TILE = 64  # queries of a work item
_TILES = (16, 32, 64)
_WIDTHS = (16, 32, 64, 128, 256)
_NOWHERE = 1 << 62  # the position of a padding key
_MAX_SCORES = 1 << 22  # elements of one batch of scores: 16 MiB of float32
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
    position: (T,) int64, the logical position of the first.
    """

    base: int
    capacity: int
    row: Tensor
    length: Tensor
    position: Tensor
    max_length: int


@dataclass
class _Batch:
    """Work items of one padded shape. query (n, M), key (n, W) int64 index rows and cache slots;
    `partial` is the first of n * M partials; `visible` is None where every query sees every key."""

    query: Tensor
    key: Tensor
    position: Tensor  # (n, W) logical; beyond any query for padding
    partial: int
    masked: bool
    visible: Tensor | None = None


@dataclass
class _Chunk:
    """Queries [start, stop), the batches that serve them, and who merges what."""

    start: int
    stop: int
    batches: list[_Batch]
    num_items: int
    num_partials: int
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

    def num_items(self, window: int | None = None) -> int:
        """Explicit items that a layer with this window executes: those wholly outside every
        query's window are skipped."""
        return sum(1 for item in self.items if self._needed(item, window))

    def _needed(self, item: WorkItem, window: int | None) -> bool:
        first, last = item.position, item.position + item.num_keys - 1
        positions = self._first_position[item.query : item.query + item.num_queries]
        if first > max(positions):
            return False
        return window is None or last > min(positions) - window

    def chunks(self, window: int | None, max_partials: int) -> list[_Chunk]:
        """The items as batches, compiled once per window; at most about `max_partials` each."""
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
            tile = next(t for t in _TILES if t >= item.num_queries)
            width = next(w for w in _WIDTHS if w >= item.num_keys)
            last = item.position + item.num_keys - 1
            earliest = min(self._first_position[item.query : item.query + item.num_queries])
            masked = width != item.num_keys or last > earliest
            shapes.setdefault((tile, width, masked), []).append(i)
        batches: list[_Batch] = []
        first_partial = np.zeros(len(items), dtype=np.int64)
        partials = 0
        table = np.array(items, dtype=np.int64).reshape(-1, 5)
        for (tile, width, masked), members in shapes.items():
            query, num_queries, key, num_keys, position = table[members].T[:, :, None]
            column = np.arange(width)
            batches.append(
                _Batch(
                    torch.from_numpy(query + np.minimum(np.arange(tile), num_queries - 1)).to(
                        device
                    ),
                    torch.from_numpy(key + np.minimum(column, num_keys - 1)).to(device),
                    torch.from_numpy(np.where(column < num_keys, position + column, _NOWHERE)).to(
                        device
                    ),
                    partials,
                    masked,
                )
            )
            first_partial[members] = partials + tile * np.arange(len(members))
            partials += tile * len(members)
        count = np.zeros(stop - start, dtype=np.int64)
        for item in items:
            count[item.query - start : item.query - start + item.num_queries] += 1
        index = np.full((stop - start, int(count.max(initial=0))), -1, dtype=np.int64)
        count[:] = 0
        for item, partial in zip(items, first_partial, strict=True):
            rows = np.arange(item.query - start, item.query - start + item.num_queries)
            index[rows, count[rows]] = partial + np.arange(item.num_queries)
            count[rows] += 1
        merged = torch.from_numpy(index).to(device)
        if self.suffix is not None:
            merged = torch.cat([merged, self._suffix_index(start, stop, partials)], 1)
        return _Chunk(start, stop, batches, len(items), partials, merged)

    def _suffix_index(self, start: int, stop: int, partials: int) -> Tensor:
        """The partial of each query and split of its suffix: (splits, slots) behind the items'."""
        assert self.suffix is not None
        slots = len(self.suffix.row)
        splits = -(-self.suffix.max_length // MAX_SPLIT)
        slot_of = torch.full((len(self.positions) + 1,), -1, device=self.positions.device)
        slot_of[self.suffix.row] = torch.arange(slots, device=slot_of.device)
        mine = slot_of[start:stop, None]
        offset = torch.arange(splits, device=mine.device) * slots
        return torch.where(mine >= 0, partials + offset + mine, -1)


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
        partials += item.num_queries
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
    T = len(plan.positions), Hkv divides Hq. Values of the cache that padding touches must be finite
    in `v_cache`'s suffix slots. Returns (T, Hq, Dv) in q's dtype; a query without any key gives 0.
    Raises ValueError for other shapes or dtypes, or a scale, soft-cap or window that is not
    positive.
    """
    _check(q, k_cache, v_cache, plan, scale, softcap, window)
    wide = torch.promote_types(q.dtype, torch.float32)
    heads, kv_heads, v_dim = q.shape[1], k_cache.shape[0], v_cache.shape[-1]
    grouped = (q.to(wide) * scale).unflatten(1, (kv_heads, heads // kv_heads))  # (T, Hkv, G, D)
    out = torch.zeros(len(q), heads, v_dim, dtype=q.dtype, device=q.device)
    for chunk in plan.chunks(window, _MAX_PARTIAL // (heads * v_dim)):
        suffix_partials = 0
        if plan.suffix is not None:
            splits = -(-plan.suffix.max_length // MAX_SPLIT)
            suffix_partials = splits * len(plan.suffix.row)
        total = chunk.num_partials + suffix_partials
        o = torch.empty(total, kv_heads, heads // kv_heads, v_dim, dtype=wide, device=q.device)
        lse = torch.empty(total, kv_heads, heads // kv_heads, dtype=wide, device=q.device)
        for batch in chunk.batches:
            _run_batch(grouped, k_cache, v_cache, plan, batch, softcap, window, o, lse)
        if plan.suffix is not None:
            _run_suffix(
                grouped,
                k_cache,
                v_cache,
                plan,
                softcap,
                window,
                o[chunk.num_partials :],
                lse[chunk.num_partials :],
            )
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
    (items, tile), width = batch.query.shape, batch.key.shape[1]
    piece = max(1, _MAX_SCORES // (kv_heads * groups * tile * width))
    for first in range(0, items, piece):
        span = slice(first, min(first + piece, items))
        n = span.stop - span.start
        query = q[batch.query[span]].permute(2, 0, 1, 3, 4)  # (Hkv, n, M, G, D)
        query = query.reshape(kv_heads * n, tile * groups, -1)
        keys, values = (
            cache.index_select(1, batch.key[span].flatten())
            .to(q.dtype)
            .view(kv_heads * n, width, -1)
            for cache in (k_cache, v_cache)
        )
        visible = None
        if batch.masked or window is not None:
            if batch.visible is None:
                visible = _visible_in(batch, plan, window, span)
                if piece >= items and (window is None or not plan.moving):
                    batch.visible = visible
            else:
                visible = batch.visible[span]
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
    softcap: float | None,
    window: int | None,
    o: Tensor,
    lse: Tensor,
) -> None:
    """Partials of every slot's own keys, split by split; views of the cache, nothing gathered."""
    suffix = plan.suffix
    assert suffix is not None
    slots, (kv_heads, groups) = len(suffix.row), q.shape[1:3]
    row = suffix.row.clamp_min(0)
    query = q[row]  # (S, Hkv, G, D)
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
                (1, slots, 1, groups, width),
                softcap,
            )
            o[rows, head] = part
            lse[rows, head] = part_lse


def _visible_in(batch: _Batch, plan: ForestPlan, window: int | None, span: slice) -> Tensor:
    """Which keys of a batch's items their queries see: (n, M or 1, W) bool."""
    position = batch.position[span][:, None]
    if plan.moving and window is None:
        return position < _NOWHERE
    at = plan.positions[batch.query[span]][..., None]
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
    total = weights.sum(-1, keepdim=True)
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
    if q.shape[1] % k_cache.shape[0]:
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
    for name, value in (("scale", scale), ("softcap", softcap), ("window", window)):
        if value is not None and not value > 0:
            raise ValueError(f"forest_attention: {name} must be positive, got {value}")
