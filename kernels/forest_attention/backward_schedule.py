"""What the backward of forest attention runs: two lists of tiles, each with the runs it sums over.

Gradients of queries are sums over keys, gradients of keys and values sums over queries. So there is
a list of query tiles with runs of keys, and one of key tiles with runs of queries: the same items
seen from either side. The tiles of a list cover their axis, those that nobody looks at (or that see
nothing) with no runs: every gradient is written, and by one program, which adds in an order that
the plan alone gives.

A run is *full*, where every query of it sees every key (then it is a whole number of steps long,
and needs no mask), or *partial*. What no query of a tile sees is in no run. Where queries stand in
a plan is read when the list is made: it is not for plans whose positions move.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.forest_attention.plan import ForestPlan

_Ints = NDArray[np.int64]
_FAR = 1 << 40  # beyond any position


class TileList(NamedTuple):
    """Tiles of one axis, those with most to sum first, and their runs along the other.

    tiles: (tiles, 5) int32: first, count, and into runs the first full, the first partial and the
    end. runs: (runs, 3) int32: first, count, and the position of the first key: of the run, where
    it is one of keys, or of the tile.
    """

    tiles: Tensor
    runs: Tensor


class _Entries(NamedTuple):
    """Runs [first, stop) that tiles look at, of which they see [seen, unseen) and of that
    [full, ragged) in full. Runs that touch are joined where they have one base: a key's position
    less its place in the run's axis, or the position of the tile's first key."""

    tile: _Ints
    seen: _Ints
    full: _Ints
    ragged: _Ints
    unseen: _Ints
    base: _Ints


class _Runs(NamedTuple):
    tile: _Ints
    order: _Ints
    first: _Ints
    length: _Ints
    base: _Ints


def query_tiles(plan: ForestPlan, window: int | None, size: int, step: int) -> TileList:
    """Tiles of at most `size` queries, with runs of keys; full runs in steps of `step` keys."""
    query, num_queries, key, num_keys, position = _items(plan, window)
    at = np.array(plan.first_position, dtype=np.int64)
    cuts = [query, query + num_queries]
    if window is not None:  # with a gap between its queries, a tile might not see all in between
        cuts.append(np.flatnonzero((np.diff(at) < 0) | (np.diff(at) > 1)) + 1)
    first, count = _tiles(len(at), cuts, size)
    tile, item = _covered(first, query, num_queries)
    key, num_keys, position = key[item], num_keys[item], position[item]
    earliest, latest = (
        (extreme.reduceat(at, first) if len(at) else at)[tile]
        for extreme in (np.minimum, np.maximum)
    )
    reach = _FAR if window is None else window

    def find(sought: _Ints) -> _Ints:
        return key + np.clip(sought - position, 0, num_keys)

    seen = (earliest - reach + 1, latest + 1)
    entries = _entries(tile, find, seen, (latest - reach + 1, earliest + 1), position - key)
    runs = _runs(entries, step)
    return _list(first, count, runs, [run.base + run.first for run in runs])


def key_tiles(
    plan: ForestPlan, num_cells: int, window: int | None, size: int, step: int
) -> TileList:
    """Tiles of at most `size` keys of a cache of `num_cells`, with runs of queries; full runs in
    steps of `step` queries."""
    query, num_queries, key, num_keys, position = _items(plan, window)
    at = np.array(plan.first_position, dtype=np.int64)
    # Along a stretch of queries positions do not descend: what a key is seen by is found by search.
    stretch = np.concatenate([[0], np.cumsum(np.diff(at) < 0)])[: len(at)]
    starts = np.searchsorted(stretch, np.arange(stretch[-1] + 2 if len(at) else 1))
    lowest, span = at.min(initial=0), at.max(initial=0) - at.min(initial=0) + 2
    along = stretch * span + at - lowest
    # Items cut between stretches.
    first_of = stretch[query]
    pieces = stretch[query + num_queries - 1] + 1 - first_of
    item = np.repeat(np.arange(len(query)), pieces)
    of = first_of[item] + _ranges(pieces)
    start = np.maximum(query[item], starts[of])
    stop = np.minimum((query + num_queries)[item], starts[of + 1])
    key, num_keys, position = key[item], num_keys[item], position[item]

    first, count = _tiles(num_cells, [key, key + num_keys], size)
    tile, piece = _covered(first, key, num_keys)
    start, stop, of = start[piece], stop[piece], of[piece]
    base = position[piece] + first[tile] - key[piece]
    last = base + count[tile] - 1
    reach = _FAR if window is None else window

    def find(sought: _Ints) -> _Ints:
        found = np.searchsorted(along, of * span + np.clip(sought - lowest, 0, span - 1))
        return np.clip(found, start, stop)

    runs = _runs(_entries(tile, find, (base, last + reach), (last, base + reach), base), step)
    return _list(first, count, runs, [run.base for run in runs])


def _items(plan: ForestPlan, window: int | None) -> tuple[_Ints, _Ints, _Ints, _Ints, _Ints]:
    query, num_queries, key, num_keys, position = np.array(
        plan.needed(window), dtype=np.int64
    ).reshape(-1, 5).T  # fmt: skip
    return query, num_queries, key, num_keys, position


def _ranges(lengths: _Ints) -> _Ints:
    """0, 1, ... of each length, one after the other."""
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def _tiles(length: int, cuts: list[_Ints], size: int) -> tuple[_Ints, _Ints]:
    """An axis in tiles of at most `size`, none of them across a cut: the first of each, and how
    many it has."""
    bounds = np.unique(np.concatenate([*cuts, np.array([0, length])]))
    start, stop = bounds[:-1], bounds[1:]
    pieces = -(-(stop - start) // size)
    first = np.repeat(start, pieces) + size * _ranges(pieces)
    return first, np.minimum(np.repeat(stop, pieces) - first, size)


def _covered(first: _Ints, start: _Ints, length: _Ints) -> tuple[_Ints, _Ints]:
    """Which tiles, by their firsts, lie in which of some ranges: pairs (tile, range), tile by
    tile."""
    begin, end = np.searchsorted(first, start), np.searchsorted(first, start + length)
    of = np.repeat(np.arange(len(start)), end - begin)
    tile = np.repeat(begin, end - begin) + _ranges(end - begin)
    order = np.argsort(tile, kind="stable")
    return tile[order], of[order]


def _entries(
    tile: _Ints,
    find: Callable[[_Ints], _Ints],
    seen: tuple[_Ints, _Ints],
    full: tuple[_Ints, _Ints],
    base: _Ints,
) -> _Entries:
    """find: the places in the runs where positions begin; seen, full: the positions [first, stop)
    of what some or all of a tile see (or are seen by)."""
    begin, end = find(seen[0]), find(seen[1])
    end = np.maximum(begin, end)
    first_full = np.clip(find(full[0]), begin, end)
    return _Entries(tile, begin, first_full, np.clip(find(full[1]), first_full, end), end, base)


def _runs(entries: _Entries, step: int) -> tuple[_Runs, _Runs]:
    """Full runs and partial runs."""
    tile, seen, full, ragged, unseen, base = entries
    order = np.arange(len(tile))
    full = full + np.minimum((seen - full) % step, ragged - full)  # a partial step has the room
    whole = _joined(_Runs(tile, order, full, ragged - full, base))
    steps = whole.length // step * step
    rest = whole._replace(first=whole.first + steps, length=whole.length - steps)
    heads = _Runs(tile, order, seen, full - seen, base)
    tails = _Runs(tile, order, ragged, unseen - ragged, base)
    partial = _Runs(*(np.concatenate(parts) for parts in zip(heads, rest, tails, strict=True)))
    whole = whole._replace(length=steps)
    return _Runs(*(column[steps > 0] for column in whole)), _joined(partial)


def _joined(runs: _Runs) -> _Runs:
    """Those that are not empty, tile by tile in their order, with those put together that touch."""
    there = np.flatnonzero(runs.length)
    there = there[np.lexsort((runs.first[there], runs.order[there], runs.tile[there]))]
    tile, order, first, length, base = (column[there] for column in runs)
    apart = (tile[1:] != tile[:-1]) | (base[1:] != base[:-1])
    apart |= first[1:] != (first + length)[:-1]
    starts = np.concatenate([[0], np.flatnonzero(apart) + 1])[: len(tile)]
    ends = np.concatenate([starts[1:], [len(tile)]])[: len(starts)] - 1
    length = np.add.reduceat(length, starts) if len(tile) else length
    return _Runs(tile[starts], order[ends], first[starts], length, base[starts])


def _list(
    first: _Ints, count: _Ints, runs: tuple[_Runs, _Runs], positions: list[_Ints]
) -> TileList:
    tile = np.concatenate([run.tile for run in runs])
    order = np.argsort(tile, kind="stable")  # of each tile the full ones before the partial ones
    columns = [
        np.concatenate([run.first for run in runs]),
        np.concatenate([run.length for run in runs]),
        np.concatenate(positions),
    ]
    end = np.cumsum(np.bincount(tile, minlength=len(first)))
    partial = end - np.bincount(runs[1].tile, minlength=len(first))
    begin = np.concatenate([[0], end])[: len(first)]
    work = np.bincount(tile, weights=columns[1], minlength=len(first))
    tiles = np.stack([first, count, begin, partial, end], 1)[np.argsort(-work, kind="stable")]
    return TileList(
        torch.from_numpy(tiles.astype(np.int32)),
        torch.from_numpy(np.stack(columns, 1)[order].astype(np.int32)),
    )
