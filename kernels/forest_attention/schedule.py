"""What the forward kernel in Triton executes: programs, the spans of keys that they read, and the
partial results of every query.

A plan (`plan.py`) says which keys a query sees. A schedule says which program reads them: a program
takes one query tile along spans of keys and writes one partial for each of its queries. Adjacent
spans are joined, and long ones cut to fill the device, unless the plan asks for one partial per
split. Suffixes have no list: there is one program for each query and split, and it writes partial
j * T + i for query i and split j of T queries.

A CUDA graph replays fixed pointers and grid sizes. `StaticPlan` therefore owns oversized tensors
and copies each new plan's schedules into them. Unused programs have zero queries and return at
once; unused partial indices are -1.
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import triton
from torch import Tensor

from kernels.device import to_device
from kernels.forest_attention.plan import (
    MAX_SPLIT,
    CompiledKey,
    ForestPlan,
    Ints,
    Suffixes,
    cut_between_queries,
    partial_table,
)
from kernels.target import Target, power_of_two

_MAX_PARTIAL_BYTES = 256 << 20  # of one part of a prefill's outputs, with one partial per split
_SHARED_OF_TWO = 227 << 10  # of a processor that holds two programs with tiles of 64 rows

Span = tuple[int, int, int]  # first cache index, keys, position of the first


@dataclass(frozen=True)
class TileRows:
    """Rows of a query tile in the two instances of the kernel, on a target; both hold the heads of
    a group at least, and wide is no less than narrow. per_processor: programs of the wide instance
    that run on a processor at once."""

    narrow: int
    wide: int
    per_processor: int
    target: Target


@dataclass(frozen=True)
class HeadShape:
    """What a schedule depends on besides its plan: query heads of a group, key/value heads,
    channels of a value, rows of a tile."""

    groups: int
    kv_heads: int
    v_dim: int
    rows: TileRows

    @staticmethod
    def of(
        num_heads: int,
        kv_heads: int,
        dim: int,
        v_dim: int,
        dtype: torch.dtype,
        target: Target,
        decode: bool,
    ) -> "HeadShape":
        """Prefill takes tiles of 128 rows where their accumulator fits the registers of 8 warps:
        keys are read half as often. Decode takes tiles of 64 rows and 4 warps, of which Hopper
        holds two: the softmax of one runs beside the products of the other."""
        groups = num_heads // kv_heads
        fits = dtype != torch.float32 and max(dim, v_dim) <= 128
        most = 128 if fits and not decode else 32 if dtype == torch.float32 else 64
        wide = power_of_two(groups, most)
        two = fits and wide == 64 and target.shared_bytes >= _SHARED_OF_TWO
        rows = TileRows(power_of_two(groups, 16), wide, 2 if two else 1, target)
        return HeadShape(groups, kv_heads, v_dim, rows)


def forward_key(window: int | None, shape: HeadShape) -> CompiledKey:
    """Where a plan keeps its schedules."""
    return CompiledKey("triton", "forward", window, shape)


def keys_per_partial(num_heads: int, v_dim: int, cell: int, dtype: torch.dtype) -> int:
    """How many keys and values of one layer are as many bytes as one query's partial result, which
    is written and read again: what the choice between sharing and inlining weighs. cell: how many
    numbers a token has in the cache of a layer."""
    partial_bytes = num_heads * (v_dim + 1) * 4 * 2
    return partial_bytes // (cell * dtype.itemsize)


class Sizes(NamedTuple):
    """How long the tensors of a schedule are, its suffixes aside."""

    wide: int
    wide_spans: int
    narrow: int
    narrow_spans: int
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
    """Programs of one instance of the kernel, longest first, and the spans of keys they read."""

    programs: Tensor  # (programs, 5) int32: see the kernel
    spans: Tensor  # (spans, 3) int32

    def to(self, device: torch.device) -> "Programs":
        """These, on a device."""
        return Programs(to_device(self.programs, device), to_device(self.spans, device))


@dataclass
class Schedule:
    """Programs for queries [start, stop) of a plan, and the partials of each query.

    table: (stop - start, J) int64; its last columns are the partials of the suffixes, which are
    numbered first. None where every query has at most one partial, which is its result: partials
    are then numbered like the queries.
    """

    start: int
    stop: int
    wide: Programs
    narrow: Programs
    num_partials: int
    num_tiles: int
    table: Tensor | None

    def to(self, device: torch.device) -> "Schedule":
        """The same on a device."""
        table = None if self.table is None else to_device(self.table, device)
        wide, narrow = self.wide.to(device), self.narrow.to(device)
        return Schedule(
            self.start, self.stop, wide, narrow, self.num_partials, self.num_tiles, table
        )


@dataclass
class _ProgramList:
    """Programs under construction."""

    programs: list[tuple[int, int, int, int, int]] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    num_keys: list[int] = field(default_factory=list)

    def add(self, query: int, num_queries: int, spans: list[Span], partial: int) -> None:
        first = len(self.spans)
        self.spans += spans
        self.programs.append((query, num_queries, first, len(self.spans), partial))
        self.num_keys.append(sum(keys for _, keys, _ in spans))

    def finish(self) -> Programs:
        longest_first = np.argsort(-np.array(self.num_keys), kind="stable")
        programs = np.array(self.programs, dtype=np.int32).reshape(-1, 5)[longest_first]
        spans = np.array(self.spans, dtype=np.int32).reshape(-1, 3)
        return Programs(torch.from_numpy(programs), torch.from_numpy(spans))


def compile_plan(plan: ForestPlan, window: int | None, shape: HeadShape) -> list[Schedule]:
    """A plan's schedules for a layer with this window, on CPU. Prefill with one partial per split
    is cut into parts of bounded partials; in decode they are few."""
    tiles = plan.needed(window)
    queries = len(plan.positions)
    if plan.advancing or not plan.per_split:
        return [_schedule(plan, tiles, 0, queries, shape)]
    largest = _MAX_PARTIAL_BYTES // (4 * shape.groups * shape.kv_heads * shape.v_dim)
    return [
        _schedule(plan, part, start, stop, shape)
        for part, start, stop in cut_between_queries(tiles, queries, largest)
    ]


def _schedule(plan: ForestPlan, tiles: Ints, start: int, stop: int, shape: HeadShape) -> Schedule:
    """Programs for work tiles that serve queries [start, stop) alone."""
    groups, kv_heads, rows = shape.groups, shape.kv_heads, shape.rows
    spans_of: dict[tuple[int, int], list[Span]] = {}
    for query, num_queries, key, num_keys, position in tiles.tolist():
        spans_of.setdefault((query, num_queries), []).append((key, num_keys, position))
    listed: list[tuple[int, int, list[Span]]] = []
    for (query, num_queries), spans in spans_of.items():
        step = rows.wide // groups
        for first in range(query, query + num_queries, step):
            listed.append((first, min(step, query + num_queries - first), spans))
    if plan.per_split:
        listed = [(first, count, [span]) for first, count, spans in listed for span in spans]
    else:
        listed = [(first, count, _joined(spans)) for first, count, spans in listed]
        if len(listed) * kv_heads < rows.target.num_processors:
            # As many programs as run at once: a second round would start when the first ends.
            keys = sum(num_keys for _, _, spans in listed for _, num_keys, _ in spans)
            wanted = triton.cdiv(rows.per_processor * rows.target.num_processors, kv_heads)
            piece = triton.cdiv(keys, wanted * MAX_SPLIT) * MAX_SPLIT
            listed = [(first, count, p) for first, count, s in listed for p in _cut(s, piece)]

    served: list[tuple[int, int, int]] = []
    queries = len(plan.positions)
    splits = 0 if plan.suffix is None else plan.suffix.num_splits
    partials = queries * splits
    for first, count, _ in listed:
        served.append((first, count, partials))
        partials += count
    table = partial_table(served, start, stop)
    direct = plan.suffix is None and table.shape[1] <= 1
    wide, narrow = _ProgramList(), _ProgramList()
    for (first, count, spans), (_, _, first_partial) in zip(listed, served, strict=True):
        is_narrow = groups * count <= rows.narrow and not plan.per_split
        chosen = narrow if is_narrow else wide
        chosen.add(first, count, spans, first - start if direct else first_partial)
    suffixes = torch.arange(queries * splits).view(splits, queries).T[start:stop]
    merged = None if direct else torch.cat([table, suffixes], 1)
    return Schedule(start, stop, wide.finish(), narrow.finish(), partials, len(tiles), merged)


def _joined(spans: list[Span]) -> list[Span]:
    """Spans, joined where they are adjacent in the cache and in position."""
    joined = spans[:1]
    for key, keys, position in spans[1:]:
        last_key, last_keys, last_position = joined[-1]
        if key == last_key + last_keys and position == last_position + last_keys:
            joined[-1] = (last_key, last_keys + keys, last_position)
        else:
            joined.append((key, keys, position))
    return joined


def _cut(spans: list[Span], piece: int) -> list[list[Span]]:
    """Spans in lists of about `piece` keys; a long span is cut every `piece` keys."""
    lists: list[list[Span]] = [[]]
    room = piece
    for key, keys, position in spans:
        for offset in range(0, keys, piece):
            part = min(piece, keys - offset)
            if part > room and lists[-1]:
                lists.append([])
                room = piece
            lists[-1].append((key + offset, part, position + offset))
            room -= part
    return lists


class StaticPlan:
    """The plan of a decode step that a CUDA graph replays.

    It takes the schedules of one plan after another. These have the number of queries, the splits
    and the tensors of suffixes, and the windows that it was made for. `plan` is what the step
    executes. Where a schedule needs more room than there is, sizes grow to the next power of two
    and `plan` is replaced; the step then has to be captured again.
    """

    def __init__(
        self,
        positions: Tensor,
        suffix: Suffixes,
        windows: Collection[int | None],
        shape: HeadShape,
        per_split: bool = False,
    ) -> None:
        self._suffix = suffix
        self._positions = positions
        self._shape = shape
        self._per_split = per_split
        self._sizes = dict.fromkeys(windows, Sizes(0, 0, 0, 0, 0, 0))
        self._schedules: dict[int | None, Schedule] = {}
        self.plan = self._make()

    def load(self, plan: ForestPlan) -> bool:
        """Copy a plan's schedules. Returns whether `self.plan` was replaced."""
        assert plan.suffix is not None and plan.advancing and plan.per_split == self._per_split
        assert plan.suffix.num_splits == self._suffix.num_splits
        assert len(plan.positions) == len(self._positions)
        splits = plan.suffix.num_splits
        schedules = {}
        grown = False
        for window, sizes in self._sizes.items():
            (schedule,) = compile_plan(plan, window, self._shape)
            schedules[window] = schedule
            needed = _sizes(schedule, len(plan.positions), splits)
            if not sizes.covers(needed):
                self._sizes[window] = sizes.with_room_for(needed)
                grown = True
        if grown:
            self.plan = self._make()
        for window, schedule in schedules.items():
            _fill(self._schedules[window], schedule, splits)
        return grown

    def _make(self) -> ForestPlan:
        queries = len(self._positions)
        plan = ForestPlan(
            [], self._positions, self._suffix, True, self._per_split, host_positions=[0] * queries
        )
        suffix_partials = queries * self._suffix.num_splits
        device = self._positions.device

        def int32(length: int, width: int) -> Tensor:
            return torch.zeros(length, width, dtype=torch.int32, device=device)

        for window, sizes in self._sizes.items():
            width = sizes.width + self._suffix.num_splits
            schedule = Schedule(
                0,
                queries,
                Programs(int32(sizes.wide, 5), int32(sizes.wide_spans, 3)),
                Programs(int32(sizes.narrow, 5), int32(sizes.narrow_spans, 3)),
                suffix_partials + sizes.partials,
                0,
                torch.full((queries, width), -1, device=device),
            )
            self._schedules[window] = schedule
            plan.compiled(forward_key(window, self._shape), partial(list, (schedule,)))
        return plan


def _sizes(schedule: Schedule, queries: int, splits: int) -> Sizes:
    assert schedule.table is not None
    return Sizes(
        len(schedule.wide.programs),
        len(schedule.wide.spans),
        len(schedule.narrow.programs),
        len(schedule.narrow.spans),
        schedule.num_partials - queries * splits,
        schedule.table.shape[1] - splits,
    )


def _fill(static: Schedule, schedule: Schedule, splits: int) -> None:
    """Copy a schedule into a longer one; programs past its end have no queries."""
    assert static.table is not None and schedule.table is not None
    for target, source in ((static.wide, schedule.wide), (static.narrow, schedule.narrow)):
        programs = torch.zeros(target.programs.shape, dtype=torch.int32)
        programs[: len(source.programs)] = source.programs
        target.programs.copy_(to_device(programs, target.programs.device))
        target.spans[: len(source.spans)] = to_device(source.spans, target.spans.device)
    table = torch.full(static.table.shape, -1)
    width = schedule.table.shape[1] - splits
    table[:, :width] = schedule.table[:, :width]
    table[:, table.shape[1] - splits :] = schedule.table[:, width:]
    static.table.copy_(to_device(table, static.table.device))
