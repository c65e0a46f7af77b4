"""The keys and values of all live segments and samples: who holds which cells, and until when.

One pair of tensors per layer, head-major (Hkv, N, D) and (Hkv, N, Dv); with latent attention one
tensor, whose first Dv channels are the values:

    [ scratch | shared slabs ->        free        <- blocks of the samples' own keys ]

A shared segment is one contiguous slab, counted by its holders and freed by the last of them; slabs
are placed first-fit from the low end. A sample's own keys live in a chain of blocks of one size,
which are taken from the high end as it grows. Nothing moves. A slot is a number, of a sample's
records. It does not know trees, tokens or positions.
"""

from bisect import insort
from collections.abc import Sequence
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
    return config.num_layers * config.cell_width * dtype.itemsize


def round_up(length: int) -> int:
    """Cells taken by a run of `length` tokens."""
    return -(-length // ALIGN) * ALIGN


def scratch_cells(num_slots: int) -> int:
    """Cells that the padding rows of a step write: as many as a multiple of 16, or a power of two,
    may lie above a number of samples."""
    return max(ALIGN, power_of_two(num_slots) // 2)


class KVCache:
    """`num_cells` cells for slabs and for blocks of `block_cells`, and slots for `num_slots`
    samples. Both numbers of cells are rounded up to a multiple of 16."""

    def __init__(
        self,
        config: ModelConfig,
        num_slots: int,
        block_cells: int,
        num_cells: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_slots = num_slots
        self.block_cells = round_up(block_cells)
        self.base = scratch_cells(num_slots)
        self.size = self.base + round_up(num_cells)
        heads = config.cached_heads

        def cells(width: int) -> list[Tensor]:
            # Pages of an untouched tensor cost nothing until they are written.
            shape = (heads, self.size, width)
            return [
                torch.empty(shape, dtype=dtype, device=device) for _ in range(config.num_layers)
            ]

        self.k = cells(config.cached_key_dim)
        value_dim = config.cached_value_dim
        apart = config.latent is None
        self.v = cells(value_dim) if apart else [keys[..., :value_dim] for keys in self.k]
        self.stored = [*self.k, *self.v] if apart else self.k
        for cache in self.stored:
            cache[:, : self.base] = 0
        # Gaps [start, stop) in ascending order, none empty, no two adjacent.
        self._free = [(self.base, self.size)] if self.size > self.base else []
        self._slabs: set[Slab] = set()
        self._blocks: set[int] = set()  # their first cells
        self._idle_slots = list(range(num_slots - 1, -1, -1))

    @property
    def idle_slots(self) -> int:
        """Slots that are free."""
        return len(self._idle_slots)

    @property
    def free_blocks(self) -> int:
        """How many more blocks there is room for."""
        return sum((stop - start) // self.block_cells for start, stop in self._free)

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
        self._put_back(slab.start, round_up(slab.length))
        return True

    def take_block(self) -> int | None:
        """The first cell of a block, or None when no gap is long enough. The block holds whatever
        it held before."""
        for i in range(len(self._free) - 1, -1, -1):
            start, stop = self._free[i]
            first = stop - self.block_cells
            if first >= start:
                self._free[i : i + 1] = [(start, first)] if first > start else []
                self._blocks.add(first)
                return first
        return None

    def free_block(self, first: int) -> None:
        """Give a block back."""
        assert first in self._blocks, f"no block at {first}"
        self._blocks.remove(first)
        self._put_back(first, self.block_cells)

    def _put_back(self, start: int, cells: int) -> None:
        insort(self._free, (start, start + cells))
        merged: list[tuple[int, int]] = []
        for gap in self._free:
            if merged and merged[-1][1] == gap[0]:
                merged[-1] = (merged[-1][0], gap[1])
            else:
                merged.append(gap)
        self._free = merged

    def read(self, cells: Tensor) -> list[Tensor]:
        """A copy on the host of the keys and values of cells (n,) int64: for every layer (Hkv, n,
        D), then for every layer (Hkv, n, Dv) where values are stored apart."""
        return [cache[:, cells].cpu() for cache in self.stored]

    def write(self, cells: Tensor, contents: Sequence[Tensor]) -> None:
        """Put into cells what was read from as many others."""
        for cache, content in zip(self.stored, contents, strict=True):
            cache[:, cells] = content.to(cache.device)

    def take_slot(self) -> int:
        """An idle slot."""
        assert self._idle_slots, "no idle slot"
        return self._idle_slots.pop()

    def free_slot(self, slot: int) -> None:
        """Give a slot back."""
        assert 0 <= slot < self.num_slots and slot not in self._idle_slots
        self._idle_slots.append(slot)

    def check(self) -> None:
        """Assert that slabs, blocks and gaps tile the pool, that gaps are merged, that every slab
        has a holder, and that idle slots are distinct."""
        spans = [(s.start, s.start + round_up(s.length)) for s in self._slabs]
        spans += [(first, first + self.block_cells) for first in self._blocks]
        at = self.base
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
