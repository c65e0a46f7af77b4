"""The keys and values of all live segments and samples: who holds which cells, and until when.

One pair of tensors per layer, head-major (Hkv, N, D) and (Hkv, N, Dv), in three regions:

    [ scratch | suffixes: one slot of `suffix_capacity` cells a sample | shared slabs ]

A shared segment is one contiguous slab, counted by its holders and freed by the last of them.
Nothing moves. Slabs are placed first-fit. It does not know trees, tokens or positions.
"""

from bisect import insort
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.target import power_of_two
from models.config import ModelConfig

ALIGN = 16


@dataclass(eq=False)
class Slab:
    """`length` cells from cache index `start` on, shared by `holders`."""

    start: int
    length: int
    holders: int = 1


def cell_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of one token's keys and values over all layers."""
    width = config.num_kv_heads * (config.head_dim + config.v_head_dim)
    return config.num_layers * width * dtype.itemsize


def round_up(length: int) -> int:
    """Cells taken by a run of `length` tokens."""
    return -(-length // ALIGN) * ALIGN


def scratch_cells(num_slots: int) -> int:
    """Cells that the padding rows of a step write: as many as a multiple of 16, or a power of two,
    may lie above a number of samples."""
    return max(ALIGN, power_of_two(num_slots) // 2)


class KVCache:
    """Cells for `num_slots` samples of at most `suffix_capacity` generated tokens each, and
    `shared_cells` cells for shared segments."""

    def __init__(
        self,
        config: ModelConfig,
        num_slots: int,
        suffix_capacity: int,
        shared_cells: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_slots = num_slots
        self.suffix_base = scratch_cells(num_slots)
        self.suffix_capacity = round_up(suffix_capacity)
        self.shared_base = self.suffix_base + num_slots * self.suffix_capacity
        self.size = self.shared_base + round_up(shared_cells)
        heads = config.num_kv_heads

        def cells(width: int) -> list[Tensor]:
            # Pages of an untouched tensor cost nothing until they are written.
            shape = (heads, self.size, width)
            return [
                torch.empty(shape, dtype=dtype, device=device) for _ in range(config.num_layers)
            ]

        self.k = cells(config.head_dim)
        self.v = cells(config.v_head_dim)
        for cache in (*self.k, *self.v):
            cache[:, : self.suffix_base] = 0
        # Gaps [start, stop) in ascending order, none empty, no two adjacent.
        self._free = [(self.shared_base, self.size)] if self.size > self.shared_base else []
        self._slabs: set[Slab] = set()
        self._idle_slots = list(range(num_slots - 1, -1, -1))

    @property
    def idle_slots(self) -> int:
        """Sample slots that are free."""
        return len(self._idle_slots)

    def allocate(self, length: int) -> Slab | None:
        """A slab for `length` > 0 tokens with one holder, or None when no gap is long enough."""
        assert length > 0
        cells = round_up(length)
        for i, (start, stop) in enumerate(self._free):
            if stop - start >= cells:
                self._free[i : i + 1] = [(start + cells, stop)] if stop - start > cells else []
                slab = Slab(start, length)
                self._slabs.add(slab)
                return slab
        return None

    def retain(self, slab: Slab) -> None:
        """Add a holder."""
        assert slab in self._slabs and slab.holders > 0
        slab.holders += 1

    def release(self, slab: Slab) -> bool:
        """Drop a holder; the last one frees the cells. Returns whether they were freed."""
        assert slab in self._slabs and slab.holders > 0
        slab.holders -= 1
        if slab.holders:
            return False
        self._slabs.remove(slab)
        start, stop = slab.start, slab.start + round_up(slab.length)
        insort(self._free, (start, stop))
        merged: list[tuple[int, int]] = []
        for gap in self._free:
            if merged and merged[-1][1] == gap[0]:
                merged[-1] = (merged[-1][0], gap[1])
            else:
                merged.append(gap)
        self._free = merged
        return True

    def take_slot(self) -> int:
        """An idle sample slot. Its part of the cache holds whatever it held before."""
        assert self._idle_slots, "no idle slot"
        return self._idle_slots.pop()

    def free_slot(self, slot: int) -> None:
        """Give a sample slot back."""
        assert 0 <= slot < self.num_slots and slot not in self._idle_slots
        self._idle_slots.append(slot)

    def check(self) -> None:
        """Assert that slabs and gaps tile the shared region, that gaps are merged, that every slab
        has a holder, and that idle slots are distinct."""
        spans = [(s.start, s.start + round_up(s.length)) for s in self._slabs]
        at = self.shared_base
        for start, stop in sorted([*spans, *self._free]):
            assert start == at and stop > start, f"cells {at}..{start} are lost or held twice"
            at = stop
        assert at == self.size, f"cells {at}..{self.size} are lost"
        starts = {start for start, _ in self._free}
        assert not any(stop in starts for _, stop in self._free), "two gaps side by side"
        assert all(slab.holders > 0 for slab in self._slabs), "a slab without a holder"
        idle = set(self._idle_slots)
        assert len(idle) == len(self._idle_slots) and idle <= set(range(self.num_slots)), (
            f"idle slots {self._idle_slots}"
        )
