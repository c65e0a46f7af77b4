"""What the backward of forest attention executes: two lists of tiles, each with the spans it sums
over.

Gradients of queries are sums over keys, gradients of keys and values sums over queries. So there is
a list of query tiles with spans of keys, and one of key tiles with spans of queries: the same work
tiles seen from either side. Every query and every key belongs to exactly one tile, even if the tile
has no spans, so exactly one program writes each gradient. The order of summation depends only on
the plan.

A span is *full* where every query of it sees every key; it is then a whole number of steps long and
needs no mask. Otherwise it is *masked*. What no query of a tile sees is in no span. Positions are
read when a list is made, so plans whose positions advance have none.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kernels.forest_attention.plan import ForestPlan, Ints

_FAR = 1 << 40  # past any position


class TileList(NamedTuple):
    """Tiles of one axis, those with most to sum first, and their spans along the other.

    tiles: (tiles, 5) int32: first, count, and into spans the first full one, the first masked one
    and the end. spans: (spans, 3) int32: first, count, and the position of the first key: of the
    span, where it is one of keys, or of the tile.
    """

    tiles: Tensor
    spans: Tensor


class _Entries(NamedTuple):
    """One row per (tile, span). The tile's mask allows only [seen, unseen) of the span, and within
    [full, ragged) it allows every pair, so no mask is needed there. Adjacent spans with equal
    `base` are merged. `base` is position minus index for keys, and the position of the tile's first
    key for queries."""

    tile: Ints
    seen: Ints
    full: Ints
    ragged: Ints
    unseen: Ints
    base: Ints


class _Spans(NamedTuple):
    tile: Ints
    order: Ints
    first: Ints
    length: Ints
    base: Ints


def query_tiles(plan: ForestPlan, window: int | None, size: int, step: int) -> TileList:
    """Tiles of at most `size` queries with spans of keys; full spans in steps of `step` keys."""
    query, num_queries, key, num_keys, position = plan.needed(window).T
    q_pos = plan.initial_positions
    cuts = [query, query + num_queries]
    if window is not None:  # with a gap between its queries, a tile might not see all in between
        jumps = np.diff(q_pos)
        cuts.append(np.flatnonzero((jumps < 0) | (jumps > 1)) + 1)
    first, count = _tiles(len(q_pos), cuts, size)
    tile, source = _covered(first, query, num_queries)
    key, num_keys, position = key[source], num_keys[source], position[source]
    earliest, latest = (
        (extreme.reduceat(q_pos, first) if len(q_pos) else q_pos)[tile]
        for extreme in (np.minimum, np.maximum)
    )
    reach = _FAR if window is None else window

    def find(sought: Ints) -> Ints:
        return key + np.clip(sought - position, 0, num_keys)

    seen = (earliest - reach + 1, latest + 1)
    entries = _entries(tile, find, seen, (latest - reach + 1, earliest + 1), position - key)
    spans = _spans(entries, step)
    return _list(first, count, spans, [span.base + span.first for span in spans])


def key_tiles(
    plan: ForestPlan, num_cells: int, window: int | None, size: int, step: int
) -> TileList:
    """Tiles of at most `size` keys of a cache of `num_cells` with spans of queries; full spans in
    steps of `step` queries."""
    query, num_queries, key, num_keys, position = plan.needed(window).T
    q_pos = plan.initial_positions
    # Along a stretch of queries positions do not descend, so binary search finds who sees a key.
    stretch = np.concatenate([[0], np.cumsum(np.diff(q_pos) < 0)])[: len(q_pos)]
    starts = np.searchsorted(stretch, np.arange(stretch[-1] + 2 if len(q_pos) else 1))
    lowest = q_pos.min(initial=0)
    extent = q_pos.max(initial=0) - lowest + 2
    along = stretch * extent + q_pos - lowest
    # Work tiles cut between stretches.
    first_stretch = stretch[query]
    pieces = stretch[query + num_queries - 1] + 1 - first_stretch
    source = np.repeat(np.arange(len(query)), pieces)
    piece_stretch = first_stretch[source] + _ranges(pieces)
    start = np.maximum(query[source], starts[piece_stretch])
    stop = np.minimum((query + num_queries)[source], starts[piece_stretch + 1])
    key, num_keys, position = key[source], num_keys[source], position[source]

    first, count = _tiles(num_cells, [key, key + num_keys], size)
    tile, piece = _covered(first, key, num_keys)
    start, stop, piece_stretch = start[piece], stop[piece], piece_stretch[piece]
    base = position[piece] + first[tile] - key[piece]
    last = base + count[tile] - 1
    reach = _FAR if window is None else window

    def find(sought: Ints) -> Ints:
        target = piece_stretch * extent + np.clip(sought - lowest, 0, extent - 1)
        return np.clip(np.searchsorted(along, target), start, stop)

    spans = _spans(_entries(tile, find, (base, last + reach), (last, base + reach), base), step)
    return _list(first, count, spans, [span.base for span in spans])


def _ranges(lengths: Ints) -> Ints:
    """0, 1, ... of each length, one after the other."""
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def _tiles(length: int, cuts: list[Ints], size: int) -> tuple[Ints, Ints]:
    """Cut an axis into tiles of at most `size`, none of them across a cut: first and count."""
    bounds = np.unique(np.concatenate([*cuts, np.array([0, length])]))
    start, stop = bounds[:-1], bounds[1:]
    pieces = -(-(stop - start) // size)
    first = np.repeat(start, pieces) + size * _ranges(pieces)
    return first, np.minimum(np.repeat(stop, pieces) - first, size)


def _covered(first: Ints, start: Ints, length: Ints) -> tuple[Ints, Ints]:
    """All pairs (tile, range) in which the range covers the tile, ordered by tile."""
    begin, end = np.searchsorted(first, start), np.searchsorted(first, start + length)
    covering = np.repeat(np.arange(len(start)), end - begin)
    tile = np.repeat(begin, end - begin) + _ranges(end - begin)
    order = np.argsort(tile, kind="stable")
    return tile[order], covering[order]


def _entries(
    tile: Ints,
    find: Callable[[Ints], Ints],
    seen: tuple[Ints, Ints],
    full: tuple[Ints, Ints],
    base: Ints,
) -> _Entries:
    """find: maps positions to indices along the spans. seen, full: the positions [first, stop) that
    some or all of a tile see, or are seen by."""
    begin, end = find(seen[0]), find(seen[1])
    end = np.maximum(begin, end)
    first_full = np.clip(find(full[0]), begin, end)
    return _Entries(tile, begin, first_full, np.clip(find(full[1]), first_full, end), end, base)


def _spans(entries: _Entries, step: int) -> tuple[_Spans, _Spans]:
    """Full spans and masked spans."""
    tile, seen, full, ragged, unseen, base = entries
    order = np.arange(len(tile))
    full = full + np.minimum((seen - full) % step, ragged - full)  # a masked step has the room
    whole = _joined(_Spans(tile, order, full, ragged - full, base))
    steps = whole.length // step * step
    rest = whole._replace(first=whole.first + steps, length=whole.length - steps)
    heads = _Spans(tile, order, seen, full - seen, base)
    tails = _Spans(tile, order, ragged, unseen - ragged, base)
    masked = _Spans(*(np.concatenate(parts) for parts in zip(heads, rest, tails, strict=True)))
    whole = whole._replace(length=steps)
    return _Spans(*(column[steps > 0] for column in whole)), _joined(masked)


def _joined(spans: _Spans) -> _Spans:
    """Spans without the empty ones, by tile and order, joined where they are adjacent."""
    kept = np.flatnonzero(spans.length)
    kept = kept[np.lexsort((spans.first[kept], spans.order[kept], spans.tile[kept]))]
    tile, order, first, length, base = (column[kept] for column in spans)
    apart = (tile[1:] != tile[:-1]) | (base[1:] != base[:-1])
    apart |= first[1:] != (first + length)[:-1]
    starts = np.concatenate([[0], np.flatnonzero(apart) + 1])[: len(tile)]
    ends = np.concatenate([starts[1:], [len(tile)]])[: len(starts)] - 1
    length = np.add.reduceat(length, starts) if len(tile) else length
    return _Spans(tile[starts], order[ends], first[starts], length, base[starts])


def _list(
    first: Ints, count: Ints, spans: tuple[_Spans, _Spans], positions: list[Ints]
) -> TileList:
    tile = np.concatenate([span.tile for span in spans])
    order = np.argsort(tile, kind="stable")  # of each tile the full spans before the masked ones
    columns = [
        np.concatenate([span.first for span in spans]),
        np.concatenate([span.length for span in spans]),
        np.concatenate(positions),
    ]
    end = np.cumsum(np.bincount(tile, minlength=len(first)))
    masked = end - np.bincount(spans[1].tile, minlength=len(first))
    begin = np.concatenate([[0], end])[: len(first)]
    work = np.bincount(tile, weights=columns[1], minlength=len(first))
    tiles = np.stack([first, count, begin, masked, end], 1)[np.argsort(-work, kind="stable")]
    return TileList(
        torch.from_numpy(tiles.astype(np.int32)),
        torch.from_numpy(np.stack(columns, 1)[order].astype(np.int32)),
    )
