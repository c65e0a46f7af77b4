"""What the Triton kernel of forest attention runs: programs, the runs of keys that they walk along,
and the partial results of every query.

A plan (`kernels/forest_attention/plan.py`) says which keys a query sees. A schedule says who reads
them: a program takes one query tile along runs of keys and writes one partial for each of its
queries. Runs are joined where they touch and cut to fill the device, unless the plan asks for one
partial per split. Suffixes have no list: one program for each query and split, partial j T + i for
query i and split j of T queries.

A CUDA graph replays launches with the arguments that it has seen. `StaticPlan` is a plan for such
launches: tensors that stay where they are and take the schedules of one plan after another, with
room to spare; a program without queries ends at once, an absent partial is -1.
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kernels.device import to_device
from kernels.forest_attention.plan import (
    MAX_SPLIT,
    ForestPlan,
    SuffixTiles,
    WorkItem,
    cut_between_queries,
    partial_table,
)
from kernels.target import Target, power_of_two

_MAX_PARTIAL_BYTES = 256 << 20  # of one part of a prefill's outputs, with one partial per split

CELLS = "first cells"  # where a plan keeps those of its suffixes


@dataclass(frozen=True)
class Tiles:
    """Rows of a query tile in the two instances of the kernel, on a target; both hold the heads of
    a group at least, and wide is no less than narrow."""

    narrow: int
    wide: int
    target: Target


@dataclass(frozen=True)
class HeadShape:
    """What a schedule depends on besides its plan: query heads of a group, key/value heads,
    channels of a value, tiles."""

    groups: int
    kv_heads: int
    v_dim: int
    tiles: Tiles

    @staticmethod
    def of(
        num_heads: int, kv_heads: int, dim: int, v_dim: int, dtype: torch.dtype, target: Target
    ) -> "HeadShape":
        """Tiles of 128 rows where their accumulator fits the registers of 8 warps."""
        groups = num_heads // kv_heads
        fits = dtype != torch.float32 and max(dim, v_dim) <= 128
        tiles = Tiles(power_of_two(groups, 16), power_of_two(groups, 128 if fits else 64), target)
        return HeadShape(groups, kv_heads, v_dim, tiles)


def schedule_key(window: int | None, shape: HeadShape) -> tuple[str, int | None, HeadShape]:
    """Where a plan keeps its schedules."""
    return "triton", window, shape


class Sizes(NamedTuple):
    """How long the tensors of a schedule are, its suffixes aside."""

    wide: int
    wide_runs: int
    narrow: int
    narrow_runs: int
    partials: int
    width: int  # of the table

    def covers(self, other: "Sizes") -> bool:
        """Whether all of the other's fits."""
        return all(mine >= theirs for mine, theirs in zip(self, other, strict=True))

    def with_room_for(self, other: "Sizes") -> "Sizes":
        """These, where the other is longer the next power of two."""
        return Sizes(
            *(
                mine if mine >= theirs else power_of_two(theirs)
                for mine, theirs in zip(self, other, strict=True)
            )
        )


@dataclass
class Programs:
    """Programs of one instance of the kernel, longest first, and the runs they walk along."""

    programs: Tensor  # (programs, 5) int32: see the kernel
    runs: Tensor  # (runs, 3) int32

    def to(self, device: torch.device) -> "Programs":
        """These, on a device."""
        return Programs(to_device(self.programs, device), to_device(self.runs, device))


@dataclass
class Schedule:
    """Queries [start, stop) of a plan: what runs, and who merges what. Without `table` every query
    has at most one partial, which is its result, in the order of queries. The table ends in the
    partials of the suffixes, which are numbered first."""

    start: int
    stop: int
    wide: Programs
    narrow: Programs
    num_partials: int
    num_items: int
    table: Tensor | None  # (stop - start, J) int64

    def to(self, device: torch.device) -> "Schedule":
        """The same on a device."""
        table = None if self.table is None else to_device(self.table, device)
        wide, narrow = self.wide.to(device), self.narrow.to(device)
        return Schedule(
            self.start, self.stop, wide, narrow, self.num_partials, self.num_items, table
        )


@dataclass
class _ProgramList:
    """Programs under construction."""

    programs: list[tuple[int, int, int, int, int]] = field(default_factory=list)
    runs: list[tuple[int, int, int]] = field(default_factory=list)
    num_keys: list[int] = field(default_factory=list)

    def add(self, query: int, queries: int, runs: list[tuple[int, int, int]], partial: int) -> None:
        first = len(self.runs)
        self.runs += runs
        self.programs.append((query, queries, first, len(self.runs), partial))
        self.num_keys.append(sum(keys for _, keys, _ in runs))

    def finish(self) -> Programs:
        longest_first = np.argsort(-np.array(self.num_keys), kind="stable")
        programs = np.array(self.programs, dtype=np.int32).reshape(-1, 5)[longest_first]
        runs = np.array(self.runs, dtype=np.int32).reshape(-1, 3)
        return Programs(torch.from_numpy(programs), torch.from_numpy(runs))


def schedules_of(plan: ForestPlan, window: int | None, shape: HeadShape) -> list[Schedule]:
    """Compile a plan, on CPU. Prefill with one partial per split is cut into parts of bounded
    partials; in decode they are few."""
    items = plan.needed(window)
    queries = len(plan.first_position)
    if plan.advancing or not plan.per_split:
        return [_schedule(plan, items, 0, queries, shape)]
    largest = _MAX_PARTIAL_BYTES // (4 * shape.groups * shape.kv_heads * shape.v_dim)
    return [
        _schedule(plan, part, start, stop, shape)
        for part, start, stop in cut_between_queries(items, queries, largest, lambda n: n)
    ]


def _schedule(
    plan: ForestPlan, items: list[WorkItem], start: int, stop: int, shape: HeadShape
) -> Schedule:
    """Programs for items that serve queries [start, stop) alone."""
    groups, kv_heads, tiles = shape.groups, shape.kv_heads, shape.tiles
    runs_of: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
    for item in items:
        runs_of.setdefault(item[:2], []).append(item[2:])
    listed: list[tuple[int, int, list[tuple[int, int, int]]]] = []
    for (query, num_queries), runs in runs_of.items():
        step = tiles.wide // groups
        for first in range(query, query + num_queries, step):
            listed.append((first, min(step, query + num_queries - first), runs))
    if plan.per_split:
        listed = [(first, count, [run]) for first, count, runs in listed for run in runs]
    else:
        listed = [(first, count, _joined(runs)) for first, count, runs in listed]
        if len(listed) * kv_heads < tiles.target.num_processors:
            keys = sum(run[1] for _, _, runs in listed for run in runs)
            wanted = -(-2 * tiles.target.num_processors // kv_heads)
            piece = -(-keys // (wanted * MAX_SPLIT)) * MAX_SPLIT
            listed = [(first, count, p) for first, count, r in listed for p in _cut(r, piece)]

    served: list[tuple[int, int, int]] = []
    queries = len(plan.first_position)
    splits = 0 if plan.suffix is None else plan.suffix.num_splits
    partials = queries * splits
    for first, count, _ in listed:
        served.append((first, count, partials))
        partials += count
    table = partial_table(served, start, stop)
    direct = plan.suffix is None and table.shape[1] <= 1
    wide, narrow = _ProgramList(), _ProgramList()
    for (first, count, runs), (_, _, to) in zip(listed, served, strict=True):
        is_narrow = groups * count <= tiles.narrow and not plan.per_split
        chosen = narrow if is_narrow else wide
        chosen.add(first, count, runs, first - start if direct else to)
    own = torch.arange(queries * splits).view(splits, queries).T[start:stop]
    merged = None if direct else torch.cat([table, own], 1)
    return Schedule(start, stop, wide.finish(), narrow.finish(), partials, len(items), merged)


def _joined(runs: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Runs with those put together that touch, in the cache and in position."""
    joined = runs[:1]
    for key, keys, position in runs[1:]:
        last_key, last_keys, last_position = joined[-1]
        if key == last_key + last_keys and position == last_position + last_keys:
            joined[-1] = (last_key, last_keys + keys, last_position)
        else:
            joined.append((key, keys, position))
    return joined


def _cut(runs: list[tuple[int, int, int]], piece: int) -> list[list[tuple[int, int, int]]]:
    """Runs in lists of about `piece` keys; a long run is cut every `piece` keys."""
    lists: list[list[tuple[int, int, int]]] = [[]]
    room = piece
    for key, keys, position in runs:
        for offset in range(0, keys, piece):
            part = min(piece, keys - offset)
            if part > room and lists[-1]:
                lists.append([])
                room = piece
            lists[-1].append((key + offset, part, position + offset))
            room -= part
    return lists


class StaticPlan:
    """The plan of a decode step that a CUDA graph replays. It takes the items of one plan after
    another; their queries, their suffixes' splits and their windows are those it was made for.

    `plan` is what the step executes. It is replaced where a plan needs more room than there is, by
    the next power of two; then the step has to be captured again.
    """

    def __init__(
        self,
        positions: Tensor,
        suffix: SuffixTiles,
        windows: Collection[int | None],
        shape: HeadShape,
        per_split: bool = False,
    ) -> None:
        self._suffix = suffix
        self._positions = positions
        self._shape = shape
        self._per_split = per_split
        self._cells = torch.full_like(positions, -1)
        self._sizes = dict.fromkeys(windows, Sizes(0, 0, 0, 0, 0, 0))
        self._schedules: dict[int | None, Schedule] = {}
        self.plan = self._make()

    def load(self, plan: ForestPlan) -> bool:
        """Take a plan's items; whether `self.plan` is another one by it."""
        assert plan.suffix is not None and plan.advancing and plan.per_split == self._per_split
        assert plan.suffix.num_splits == self._suffix.num_splits
        assert len(plan.positions) == len(self._positions)
        splits = plan.suffix.num_splits
        found = {}
        grown = False
        for window, sizes in self._sizes.items():
            (schedule,) = schedules_of(plan, window, self._shape)
            found[window] = schedule
            needed = _sizes(schedule, len(plan.positions), splits)
            if not sizes.covers(needed):
                self._sizes[window] = sizes.with_room_for(needed)
                grown = True
        if grown:
            self.plan = self._make()
        self._cells.copy_(plan.suffix.first_cells(len(self._cells)))
        for window, schedule in found.items():
            _fill(self._schedules[window], schedule, splits)
        return grown

    def _make(self) -> ForestPlan:
        queries = len(self._positions)
        plan = ForestPlan(
            [], self._positions, self._suffix, True, self._per_split, host_positions=[0] * queries
        )
        plan.compiled(CELLS, lambda: self._cells)
        own = queries * self._suffix.num_splits
        device = self._positions.device

        def int32(length: int, width: int) -> Tensor:
            return torch.zeros(length, width, dtype=torch.int32, device=device)

        for window, sizes in self._sizes.items():
            width = sizes.width + self._suffix.num_splits
            schedule = Schedule(
                0,
                queries,
                Programs(int32(sizes.wide, 5), int32(sizes.wide_runs, 3)),
                Programs(int32(sizes.narrow, 5), int32(sizes.narrow_runs, 3)),
                own + sizes.partials,
                0,
                torch.full((queries, width), -1, device=device),
            )
            self._schedules[window] = schedule
            plan.compiled(schedule_key(window, self._shape), partial(list, (schedule,)))
        return plan


def _sizes(schedule: Schedule, queries: int, splits: int) -> Sizes:
    assert schedule.table is not None
    return Sizes(
        len(schedule.wide.programs),
        len(schedule.wide.runs),
        len(schedule.narrow.programs),
        len(schedule.narrow.runs),
        schedule.num_partials - queries * splits,
        schedule.table.shape[1] - splits,
    )


def _fill(static: Schedule, schedule: Schedule, splits: int) -> None:
    """Copy a schedule into a longer one; programs behind it have no queries."""
    assert static.table is not None and schedule.table is not None
    for to, given in ((static.wide, schedule.wide), (static.narrow, schedule.narrow)):
        programs = torch.zeros(to.programs.shape, dtype=torch.int32)
        programs[: len(given.programs)] = given.programs
        to.programs.copy_(to_device(programs, to.programs.device))
        to.runs[: len(given.runs)] = to_device(given.runs, to.runs.device)
    table = torch.full(static.table.shape, -1)
    width = schedule.table.shape[1] - splits
    table[:, :width] = schedule.table[:, :width]
    table[:, table.shape[1] - splits :] = schedule.table[:, width:]
    static.table.copy_(to_device(table, static.table.device))
