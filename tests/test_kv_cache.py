"""The cell allocator against a list of cells, each with its owner."""

import random
from itertools import groupby

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from engine.kv_cache import ALIGN, KVCache, Slab, cell_bytes, round_up, scratch_cells
from tests.forests import make_cache, make_config

CELLS = 20 * ALIGN
BLOCK = 3  # runs of ALIGN cells
SLOTS = 3


class CacheMachine(RuleBasedStateMachine):
    """`owner[i]` is the slab or the block of the i-th run of ALIGN cells, `holders` how many hold a
    slab."""

    slabs = Bundle("slabs")
    blocks = Bundle("blocks")
    slots = Bundle("slots")

    def __init__(self) -> None:
        super().__init__()
        self.cache = make_cache(SLOTS, 40, CELLS)
        self.owner: list[Slab | int | None] = [None] * (CELLS // ALIGN)
        self.holders: dict[Slab, int] = {}
        self.taken: set[int] = set()

    @rule(target=slabs, length=st.integers(1, 7 * ALIGN))
    def allocate(self, length: int) -> Slab | None:
        runs = -(-length // ALIGN)
        fits = self.fits(runs)
        slab = self.cache.allocate(length)
        if not fits:
            assert slab is None
            return None
        assert slab is not None and slab.length == length and slab.holders == 1
        assert slab.start == self.cache.base + fits[0] * ALIGN  # the first gap that fits
        self.owner[fits[0] : fits[0] + runs] = [slab] * runs
        self.holders[slab] = 1
        return slab

    @rule(slab=slabs)
    def retain(self, slab: Slab | None) -> None:
        if slab in self.holders:
            self.cache.retain(slab)
            self.holders[slab] += 1
        elif slab is not None:
            with pytest.raises(AssertionError):
                self.cache.retain(slab)

    @rule(slab=slabs)
    def release(self, slab: Slab | None) -> None:
        if slab not in self.holders:
            if slab is not None:
                with pytest.raises(AssertionError):
                    self.cache.release(slab)
            return
        self.holders[slab] -= 1
        last = self.holders[slab] == 0
        assert self.cache.release(slab) == last
        if last:
            del self.holders[slab]
            self.owner = [None if owner is slab else owner for owner in self.owner]

    def fits(self, runs: int) -> list[int]:
        """Where so many runs are free."""
        free = [owner is None for owner in self.owner]
        return [i for i in range(len(free) - runs + 1) if all(free[i : i + runs])]

    @rule(target=blocks)
    def take_block(self) -> int | None:
        fits = self.fits(BLOCK)
        block = self.cache.take_block()
        if not fits:
            assert block is None and self.cache.free_blocks == 0
            return None
        assert block == self.cache.base + fits[-1] * ALIGN  # the last place that fits
        self.owner[fits[-1] : fits[-1] + BLOCK] = [block] * BLOCK
        return block

    @rule(block=blocks)
    def free_block(self, block: int | None) -> None:
        if block in self.owner and block is not None:
            self.cache.free_block(block)
            self.owner = [None if owner == block else owner for owner in self.owner]
        elif block is not None:
            with pytest.raises(AssertionError, match="no block"):
                self.cache.free_block(block)

    @rule(target=slots)
    def take_slot(self) -> int | None:
        if len(self.taken) == SLOTS:
            with pytest.raises(AssertionError):
                self.cache.take_slot()
            return None
        slot = self.cache.take_slot()
        assert slot in set(range(SLOTS)) - self.taken
        self.taken.add(slot)
        return slot

    @rule(slot=consumes(slots))
    def free_slot(self, slot: int | None) -> None:
        if slot is not None:
            self.cache.free_slot(slot)
            self.taken.remove(slot)
            with pytest.raises(AssertionError):
                self.cache.free_slot(slot)

    @invariant()
    def nothing_is_lost(self) -> None:
        self.cache.check()
        assert self.cache.idle_slots == SLOTS - len(self.taken)
        gaps = groupby(self.owner, lambda owner: owner is None)
        room = sum(len(list(runs)) // BLOCK for free, runs in gaps if free)
        assert self.cache.free_blocks == room
        for slab, holders in self.holders.items():
            assert slab.holders == holders


TestCache = CacheMachine.TestCase
TestCache.settings = settings(max_examples=40, stateful_step_count=40)


def test_layout() -> None:
    """Scratch and the pool follow each other, aligned, in every layer."""
    cache = KVCache(make_config(2, 4, 6, layers=3), 5, 33, 100, torch.float16, torch.device("cpu"))
    assert (cache.base, cache.block_cells, cache.size) == (16, 48, 16 + 112)
    assert [cache.take_block() for _ in range(3)] == [80, 32, None]
    assert [tuple(k.shape) for k in cache.k] == [(2, cache.size, 4)] * 3
    assert [tuple(v.shape) for v in cache.v] == [(2, cache.size, 6)] * 3
    assert all(cells[:, :16].eq(0).all() for cells in (*cache.k, *cache.v))
    bytes_of_all = sum(cells.nbytes for cells in (*cache.k, *cache.v))
    assert bytes_of_all == cache.size * cell_bytes(make_config(2, 4, 6, layers=3), torch.float16)
    assert [round_up(n) for n in (1, 16, 17)] == [16, 16, 32]
    for slots in range(1, 300):
        rows = [max(round_up(n), 1 << (n - 1).bit_length(), 16) - n for n in range(1, slots + 1)]
        assert scratch_cells(slots) >= max(rows)


def test_cells_are_read_and_written_back() -> None:
    """Keys and values of every layer, in any order, into other cells; the rest stays."""
    cache = make_cache(1, 16, 64, make_config(2, 4, 6, layers=2))
    for i, cells in enumerate((*cache.k, *cache.v)):
        cells.copy_(i + torch.rand(cells.shape))
    before = [cells.clone() for cells in (*cache.k, *cache.v)]
    some, others = torch.tensor([30, 17, 18]), torch.tensor([40, 41, 60])
    contents = cache.read(some)
    for cells in (*cache.k, *cache.v):
        cells[:, some] = float("nan")
    cache.write(others, contents)
    for cells, old in zip((*cache.k, *cache.v), before, strict=True):
        assert cells[:, others].equal(old[:, some]) and cells[:, some].isnan().all()
        assert cells[:, 42:60].equal(old[:, 42:60])


def test_first_fit_uses_the_lowest_gap_and_gaps_grow_together() -> None:
    cache = make_cache(1, 16, 6 * ALIGN)
    slabs = [cache.allocate(length) for length in (ALIGN, 2 * ALIGN, ALIGN, 2 * ALIGN)]
    a, b, c, d = (slab for slab in slabs if slab is not None)
    assert cache.allocate(1) is None
    cache.release(b)
    cache.release(d)
    low = cache.allocate(5)
    assert low is not None and low.start == b.start
    assert cache.allocate(3 * ALIGN) is None  # two gaps of 1 and 2
    cache.release(c)
    high = cache.allocate(4 * ALIGN)  # one gap, before, within and after c
    assert high is not None and high.start == low.start + ALIGN
    for slab in (low, high, a):
        cache.release(slab)
    everything = cache.allocate(6 * ALIGN)
    assert everything is not None and everything.start == cache.base


def test_no_room_at_all() -> None:
    cache = make_cache(0, 16, 0)
    assert cache.allocate(1) is None and cache.idle_slots == 0
    cache.check()
    with pytest.raises(AssertionError):
        cache.allocate(0)


def occupied() -> tuple[KVCache, list[Slab]]:
    """A cache with gaps between slabs."""
    cache = make_cache(4, 16, 12 * ALIGN)
    slabs = [slab for _ in range(5) if (slab := cache.allocate(2 * ALIGN)) is not None]
    for i in (1, 3):
        cache.release(slabs[i])
    cache.take_slot()
    assert cache.take_block() is not None
    cache.check()
    return cache, [slabs[0], slabs[2], slabs[4]]


def test_check_catches_every_single_fault() -> None:
    """The invariants of the cache, broken one by one."""
    cache, slabs = occupied()
    cache._slabs.remove(slabs[1])
    with pytest.raises(AssertionError, match="lost or held twice"):
        cache.check()
    cache, slabs = occupied()
    cache._slabs.remove(slabs[2])
    cache._free.pop()
    with pytest.raises(AssertionError, match="lost"):
        cache.check()
    cache, slabs = occupied()
    cache._slabs.add(Slab(slabs[1].start, slabs[1].length))
    with pytest.raises(AssertionError, match="held twice"):
        cache.check()
    cache, slabs = occupied()
    cache._blocks.clear()
    with pytest.raises(AssertionError, match="lost"):
        cache.check()
    cache, slabs = occupied()
    cache._blocks.add(slabs[1].start)
    with pytest.raises(AssertionError, match="held twice"):
        cache.check()
    cache, slabs = occupied()
    slabs[0].length += ALIGN
    with pytest.raises(AssertionError, match="held twice"):
        cache.check()
    cache, slabs = occupied()
    slabs[0].holders = 0
    with pytest.raises(AssertionError, match="without a holder"):
        cache.check()
    cache, slabs = occupied()
    start, stop = cache._free[0]
    cache._free[:1] = [(start, start + ALIGN), (start + ALIGN, stop)]
    with pytest.raises(AssertionError, match="side by side"):
        cache.check()
    for slot in (1, 4, -1):
        cache, _ = occupied()
        cache._idle_slots.append(slot)
        with pytest.raises(AssertionError, match="idle slots"):
            cache.check()


def test_slabs_keep_their_data_while_others_come_and_go() -> None:
    """Two live slabs never share a cell, over a long random walk."""
    rng = random.Random(0)
    cache = make_cache(2, 16, 40 * ALIGN)
    live: list[tuple[Slab, float]] = []
    reused = False
    highest = 0
    for step in range(2000):
        if rng.random() < 0.55:
            slab = cache.allocate(rng.randrange(1, 80))
            if slab is not None:
                reused |= slab.start < highest
                highest = max(highest, slab.start)
                cache.k[0][:, slab.start : slab.start + slab.length] = step
                live.append((slab, step))
        elif live:
            slab, mark = live.pop(rng.randrange(len(live)))
            assert cache.k[0][:, slab.start : slab.start + slab.length].eq(mark).all()
            assert cache.release(slab)
    cache.check()
    assert reused and live
