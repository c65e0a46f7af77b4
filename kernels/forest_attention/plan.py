"""The plan of forest attention: which queries read which keys.

A plan holds

- *work tiles*: up to MAX_TILE consecutive queries and up to MAX_SPLIT consecutive keys, which lie
  within one split of one segment. How a sample's keys are cut is thus a function of its own
  sequence, never of who shares it;
- *suffixes*: every leaf's own generated keys, a block of the cache for each split.

Prefill, decode and training differ in the plan only. Each implementation compiles a plan into what
it executes, once per window and shape, and the plan keeps the result. This module holds the plan
and the index arithmetic that implementations share; it computes no attention.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MAX_SPLIT = 256  # keys of a work tile
MAX_TILE = 64  # queries of a work tile

Ints = NDArray[np.int64]
Compiled = TypeVar("Compiled")


class WorkTile(NamedTuple):
    """Queries [query, query + num_queries) read keys [key, key + num_keys) of the cache; the first
    of these keys has logical position `position`. Neither count is 0."""

    query: int
    num_queries: int
    key: int
    num_keys: int
    position: int


def splits_of(num_keys: int) -> int:
    """Splits of so many keys, and blocks of so many of a sample's own."""
    return -(-num_keys // MAX_SPLIT)


class CompiledKey(NamedTuple):
    """Names what a plan has been compiled to.

    | implementation | stage         | shape                    | value
    | torch          | forward       | None                     | `torch_impl.Groups`
    | torch, triton  | dq            | queries, keys of a tile  | `backward_schedule.TileList`
    | triton         | dkv           | cells, keys, queries     | `backward_schedule.TileList`
    | triton         | forward       | `schedule.HeadShape`     | list of `schedule.Schedule`
    | cpp            | forward       | partials of a chunk      | `cpp_impl.Chunks`
    | cpp            | backward      | None                     | (tiles, 5) int64, those needed
    | cpp            | partials      | partials, heads, v_dim   | buffers of partial results
    | cpp            | last position | None                     | int, for tables of angles
    """

    implementation: Literal["torch", "cpp", "triton"]
    stage: Literal["forward", "backward", "dq", "dkv", "partials", "last position"]
    window: int | None = None
    shape: Hashable = None


class Suffixes:
    """Every leaf's own keys: key c of query i has cache index
    blocks[i, c // MAX_SPLIT] + c % MAX_SPLIT, so that a split lies in one block.

    blocks: (T, J) int64, rows of any stride, the first cell of each query's blocks, and anything
    past its last; blocks may be added in place while the plan lives. length: (T,) int64, keys of
    each query's suffix, its own token included, 0 for a row without a leaf; it may grow up to
    `max_length` while the plan lives, and `grow_to` may raise that. position: (T,) int64, the
    logical position of the first of them.
    """

    def __init__(self, blocks: Tensor, length: Tensor, position: Tensor, max_length: int) -> None:
        assert blocks.ndim == 2 and len(blocks) == len(length) == len(position)
        assert blocks.stride(1) == 1, blocks.stride()
        self.blocks, self.length, self.position = blocks, length, position
        self.max_length = max_length
        assert 0 <= max_length <= self.capacity, (max_length, self.capacity)

    @property
    def capacity(self) -> int:
        """Keys that a suffix may have at most."""
        return self.blocks.shape[1] * MAX_SPLIT

    @property
    def num_splits(self) -> int:
        """Splits that the longest suffix may have."""
        return splits_of(self.max_length)

    def grow_to(self, max_length: int) -> bool:
        """Let lengths grow up to `max_length`. Returns False, and changes nothing, where that takes
        more splits."""
        if max_length > self.num_splits * MAX_SPLIT:
            return False
        self.max_length = max(self.max_length, max_length)
        return True

    @property
    def num_partials(self) -> int:
        """One for each query and split."""
        return len(self.blocks) * self.num_splits

    def partials(self) -> Tensor:
        """(T, splits) int64, on CPU: that of query i and split j is j * T + i."""
        return torch.arange(self.num_partials).view(self.num_splits, len(self.blocks)).T

    def check(self) -> None:
        """Assert that no suffix is longer than it may be, and that all have blocks of their own."""
        longest = max(self.length.tolist(), default=0)
        assert longest <= self.max_length, (longest, self.max_length)
        splits = torch.arange(self.num_splits, device=self.length.device)
        held = self.blocks[:, : self.num_splits][splits * MAX_SPLIT < self.length[:, None]].tolist()
        assert len(set(held)) == len(held) and min(held, default=0) >= 0, held


class ForestPlan:
    """What `forest_attention` executes.

    tiles: (n, 5) int64, the columns of a `WorkTile`, in the order of each query's sequence.
    positions: (T,) int64, the logical position of each query, on the device. suffix: the leaves'
    own keys, if any. advancing: the caller moves positions in place, always upwards; every key of
    every tile must then precede the tile's queries from the start. per_split: keep one partial
    result per work tile, so that a query's result depends neither on who shares its keys nor on how
    many do. Without it the Triton kernel joins and cuts spans of keys to fill the device; the C++
    always keeps one. executed: work tiles run so far; every call adds `num_tiles(window)`.
    """

    def __init__(
        self,
        tiles: Sequence[WorkTile] | Ints,
        positions: Tensor,
        suffix: Suffixes | None = None,
        advancing: bool = False,
        per_split: bool = False,
        host_positions: Sequence[int] | None = None,
    ) -> None:
        """host_positions: `positions`, from a caller that knows them and does not want to wait for
        the device; nothing is then read from a GPU, nor checked there."""
        known = positions.tolist() if host_positions is None else host_positions
        self.tiles: Ints = np.asarray(tiles, dtype=np.int64).reshape(-1, 5)
        self.positions = positions
        self.suffix = suffix
        self.advancing = advancing
        self.per_split = per_split
        self.executed = 0
        self.initial_positions: Ints = np.array(known, dtype=np.int64)
        self._compiled: dict[CompiledKey, Any] = {}

        queries = len(self.initial_positions)
        assert queries == len(positions), (queries, len(positions))
        query, num_queries, _, num_keys, position = self.tiles.T
        assert ((num_queries > 0) & (num_queries <= MAX_TILE)).all(), self.tiles
        assert ((num_keys > 0) & (num_keys <= MAX_SPLIT)).all(), self.tiles
        assert ((query >= 0) & (query + num_queries <= queries)).all(), self.tiles
        # The first and the last position of each tile's queries. Every other segment of reduceat
        # lies between tiles.
        bounds = np.stack([query, query + num_queries], 1).ravel()
        padded = np.append(self.initial_positions, 0)
        self._earliest, self._latest = (
            extreme.reduceat(padded, bounds)[::2] for extreme in (np.minimum, np.maximum)
        )
        if advancing:
            assert (position + num_keys <= 1 + self._earliest).all(), self.tiles
        if suffix is not None:
            assert len(suffix.length) == queries
            if host_positions is None or not positions.is_cuda:
                suffix.check()

    def needed(self, window: int | None) -> Ints:
        """(n, 5) int64: the tiles that a layer with this window executes. A tile is skipped where
        all its keys lie ahead of all its queries, or outside every query's window."""
        return self.tiles[self._is_needed(window)]

    def num_tiles(self, window: int | None = None) -> int:
        """How many tiles `needed` returns."""
        return int(self._is_needed(window).sum())

    def _is_needed(self, window: int | None) -> NDArray[np.bool_]:
        first = self.tiles[:, 4]
        last = first + self.tiles[:, 3] - 1
        needed = first <= self._latest
        return needed if window is None else needed & (last > self._earliest - window)

    def compiled(self, key: CompiledKey, build: Callable[[], Compiled]) -> Compiled:
        """What `build` returns, kept for the next call with this key."""
        if key not in self._compiled:
            self._compiled[key] = build()
        return self._compiled[key]


def cut_between_queries(
    tiles: Ints, num_queries: int, max_partials: int
) -> list[tuple[Ints, int, int]]:
    """Cut tiles into lists that serve disjoint, consecutive ranges [start, stop) of queries.

    A tile has one partial for each of its queries. A list has at most `max_partials` of them, as
    far as the tiles can be cut: no tile may reach across.
    """
    if not len(tiles):
        return [(tiles, 0, num_queries)]
    first, ends = tiles[:, 0], tiles[:, 0] + tiles[:, 1]
    partials = np.cumsum(tiles[:, 1])
    lowest_after = np.minimum.accumulate(first[::-1])[::-1][1:]
    highest_before = np.maximum.accumulate(ends)[:-1]
    parts = []
    begin = start = counted = 0
    for i in (np.flatnonzero(highest_before <= lowest_after) + 1).tolist():
        if partials[i - 1] - counted + MAX_TILE > max_partials:
            stop = int(lowest_after[i - 1])
            parts.append((tiles[begin:i], start, stop))
            begin, start, counted = i, stop, partials[i - 1]
    parts.append((tiles[begin:], start, num_queries))
    return parts


def partial_table(served: Sequence[tuple[int, int, int]] | Ints, start: int, stop: int) -> Tensor:
    """(stop - start, J) int64, on CPU: the partials of each query in order, -1 past its last.

    served: (first query, number of queries, first partial) of each writer of partials, in the order
    of the queries' sequences. A writer writes one partial for each of its queries.
    """
    first, length, partial = np.asarray(served, dtype=np.int64).reshape(-1, 3).T
    # One entry for each query of each writer: its place there, its row, its place in the row.
    place = np.arange(length.sum()) - np.repeat(np.cumsum(length) - length, length)
    row = np.repeat(first - start, length) + place
    count = np.bincount(row, minlength=stop - start)
    order = np.argsort(row, kind="stable")
    column = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
    table = np.full((stop - start, int(count.max(initial=0))), -1, dtype=np.int64)
    table[row[order], column] = (np.repeat(partial, length) + place)[order]
    return torch.from_numpy(table)
