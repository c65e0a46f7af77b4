"""What `forest_attention` is to do: which run of queries looks at which run of keys.

A plan holds

- *work items*: (a run of queries, a run of keys in the cache, the position of the first key). A run
  of keys lies within one split of one segment, so that how keys are partitioned is a function of
  a sample's own sequence and never of who shares it;
- *suffix tiles*, implicit: every leaf's own generated keys in its slot of the cache.

Prefill, decode and training differ in the plan only. Each implementation compiles a plan into what
it runs, once per window, and keeps that in the plan. Nothing is computed here.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import InitVar, dataclass, field
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

MAX_SPLIT = 256  # keys of a work item
MAX_TILE = 64  # queries of a work item

Compiled = TypeVar("Compiled")


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
    query's suffix, its own token included; it may grow up to `max_length` while the plan lives, and
    `grow_to` may raise that.
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
    def num_splits(self) -> int:
        """Splits that the longest suffix may reach."""
        return -(-self.max_length // MAX_SPLIT)

    def grow_to(self, max_length: int) -> bool:
        """Let lengths grow up to `max_length`, unless that takes more splits: then nothing changes,
        and the answer is False."""
        if max_length > self.num_splits * MAX_SPLIT:
            return False
        self.max_length = max(self.max_length, max_length)
        return True

    @property
    def num_partials(self) -> int:
        """One for each slot and split: that of slot s and split j is j * S + s."""
        return len(self.row) * self.num_splits

    def first_cells(self, num_queries: int) -> Tensor:
        """(num_queries,) int64: where each query's own keys begin in the cache, -1 where it has no
        slot."""
        slots = torch.arange(len(self.row), device=self.row.device)
        cell_of = torch.full((num_queries + 1,), -1, device=self.row.device)
        cell_of[self.row] = self.base + slots * self.capacity  # idle slots write the last
        return cell_of[:num_queries]

    def partials(self, num_queries: int) -> Tensor:
        """(num_queries, splits) int64: the partials of each query's own keys, -1 where it has no
        slot."""
        slots = len(self.row)
        slot_of = torch.full((num_queries + 1,), -1, device=self.row.device)
        slot_of[self.row] = torch.arange(slots, device=slot_of.device)  # idle slots write the last
        mine = slot_of[:num_queries, None]
        offset = torch.arange(self.num_splits, device=mine.device) * slots
        return torch.where(mine >= 0, offset + mine, -1)


@dataclass
class ForestPlan:
    """What `forest_attention` executes: items in the order of each query's sequence.

    positions: (T,) int64, the logical position of each query, on the device; in decode the caller
    advances it in place, always upwards, and sets `advancing`: then every key of every item must
    stand before its queries from the start. suffix: the leaves' own keys, if any. per_split: one
    partial for every item on a GPU too, so that a query's result does not depend on who shares its
    keys or how many there are; without it the Triton kernel joins and cuts runs of keys to fill the
    device. (On CPU there is one partial for every item anyway.) host_positions: `positions`, from a
    caller that has them and does not want to wait for the device; on a GPU nothing there is read
    then, nor checked.
    `executed` counts the items run so far; every call adds `num_items(window)`.
    """

    items: Sequence[WorkItem]
    positions: Tensor
    suffix: SuffixTiles | None = None
    advancing: bool = False
    per_split: bool = False
    executed: int = 0
    host_positions: InitVar[Sequence[int] | None] = None
    first_position: list[int] = field(default_factory=list, init=False)
    _compiled: dict[Hashable, Any] = field(default_factory=dict, init=False)

    def __post_init__(self, host_positions: Sequence[int] | None) -> None:
        self.first_position = (
            self.positions.tolist() if host_positions is None else list(host_positions)
        )
        queries = len(self.first_position)
        assert queries == len(self.positions), (queries, len(self.positions))
        for item in self.items:
            assert 0 < item.num_queries <= MAX_TILE and 0 < item.num_keys <= MAX_SPLIT, item
            assert item.query >= 0 and item.query + item.num_queries <= queries, item
            if self.advancing:
                assert item.position + item.num_keys <= 1 + self.earliest(item), item
        if self.suffix is not None:
            assert len(self.suffix.length) == len(self.suffix.position) == queries
        if self.suffix is not None and (host_positions is None or not self.positions.is_cuda):
            rows = [row for row in self.suffix.row.tolist() if row != -1]
            assert len(set(rows)) == len(rows) and set(rows) <= set(range(queries)), rows
            longest = max(self.suffix.length.tolist(), default=0)
            assert longest <= self.suffix.max_length, (longest, self.suffix.max_length)

    def needed(self, window: int | None) -> list[WorkItem]:
        """The items that a layer with this window executes: those ahead of all their queries, or
        wholly outside every query's window, are skipped."""
        return [item for item in self.items if self._is_needed(item, window)]

    def num_items(self, window: int | None = None) -> int:
        """How many items `needed` gives."""
        return sum(1 for item in self.items if self._is_needed(item, window))

    def earliest(self, item: WorkItem) -> int:
        """The first position of an item's queries when the plan was made."""
        return min(self.first_position[item.query : item.query + item.num_queries])

    def _is_needed(self, item: WorkItem, window: int | None) -> bool:
        first, last = item.position, item.position + item.num_keys - 1
        if first > max(self.first_position[item.query : item.query + item.num_queries]):
            return False
        return window is None or last > self.earliest(item) - window

    def compiled(self, key: Hashable, build: Callable[[], Compiled]) -> Compiled:
        """What `build` gives, kept for the next call with this key."""
        if key not in self._compiled:
            self._compiled[key] = build()
        return self._compiled[key]


def cut_between_queries(
    items: list[WorkItem], num_queries: int, max_partials: int, tile: Callable[[int], int]
) -> list[tuple[list[WorkItem], int, int]]:
    """Cut items into runs that serve disjoint, consecutive ranges [start, stop) of queries, of at
    most `max_partials` partials where they can be cut; `tile(n)` partials for n queries."""
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
        partials += tile(item.num_queries)
    parts.append((items[first:], start, num_queries))
    return parts


def partial_table(served: Sequence[tuple[int, int, int]], start: int, stop: int) -> Tensor:
    """(stop - start, J) int64, on CPU: the partials of each query in order, -1 where there are no
    more.

    served: (first query, number of queries, first partial) of whatever writes one partial for each
    of its queries, in the order of the queries' sequences.
    """
    first, length, partial = np.array(served, dtype=np.int64).reshape(-1, 3).T
    # One entry for every query of each: which of its own it is, its row, and which of its row's.
    own = np.arange(length.sum()) - np.repeat(np.cumsum(length) - length, length)
    row = np.repeat(first - start, length) + own
    count = np.bincount(row, minlength=stop - start)
    order = np.argsort(row, kind="stable")
    place = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
    table = np.full((stop - start, int(count.max(initial=0))), -1, dtype=np.int64)
    table[row[order], place] = (np.repeat(partial, length) + own)[order]
    return torch.from_numpy(table)
