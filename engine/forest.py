"""The trees of all live rows: which samples share which segments, and what attention must read.

A node is one segment after one parent; samples whose prompts begin with equal segments share
nodes. Heads (first segments) are shared across rows and stay after their rows have gone; all other
nodes belong to one row. A node's keys are cut into splits of MAX_SPLIT tokens from its own start:
how a sample's keys are partitioned is a function of its own sequence, whoever shares it.

Leaves are kept in depth-first order: every node covers a contiguous range of them. This module
makes work tiles for prefill and decode; it runs nothing and holds no keys.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import TypeVar
from weakref import WeakValueDictionary

from torch import Tensor

from engine.kv_cache import KVCache, Slab
from kernels.forest_attention.plan import MAX_SPLIT, MAX_TILE, WorkTile

TokenIds = tuple[int, ...]
Taken = TypeVar("Taken")


@dataclass(eq=False)
class Node:
    """One segment of some samples' prompts, from logical position `start`. `slab` is its place in
    the cache while it has one; `logits` (V,) are those after its last token, if a leaf starts
    there. `number` grows with creation, so that a node's path of numbers sorts depth-first."""

    token_ids: TokenIds
    parent: "Node | None"
    number: int
    start: int
    slab: Slab | None = None
    logits: Tensor | None = None
    above: "tuple[Node, ...]" = field(init=False)  # from the root to the parent

    def __post_init__(self) -> None:
        self.above = () if self.parent is None else (*self.parent.above, self.parent)

    @property
    def stop(self) -> int:
        """Logical position after the last token."""
        return self.start + len(self.token_ids)

    def path(self) -> list["Node"]:
        """The nodes from the root to this one."""
        return [*self.above, self]

    def key_spans(self, tokens: int | None = None) -> Iterator[tuple[int, int, int]]:
        """The splits of the segment, or of its first `tokens`, as (cache index, keys, position)."""
        assert self.slab is not None
        end = len(self.token_ids) if tokens is None else tokens
        for offset in range(0, end, MAX_SPLIT):
            yield self.slab.start + offset, min(MAX_SPLIT, end - offset), self.start + offset


class Forest:
    """The nodes of all live rows over one cache. `heads` holds those that are in the cache or that
    some row still refers to; others are forgotten. Where room is needed, heads without a leaf go,
    the one first whose last leaf was done first."""

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache
        self.heads: WeakValueDictionary[TokenIds, Node] = WeakValueDictionary()
        self._kept: dict[Node, None] = {}  # heads that the forest holds, by their last use
        self._count = 0

    def grow(self, prompts: Sequence[Sequence[TokenIds]]) -> tuple[list[Node], int]:
        """Add a row: for each sample the node at which its prompt ends, and the number of distinct
        tokens in the row's tree. Nothing is allocated. Segments must not be empty."""
        own: dict[tuple[Node, TokenIds], Node] = {}
        ends = []
        for prompt in prompts:
            node = self.heads.get(prompt[0])
            if node is None:
                node = self.heads[prompt[0]] = self._node(prompt[0], None)
            for segment in prompt[1:]:
                parent = node
                if (parent, segment) not in own:
                    own[parent, segment] = self._node(segment, parent)
                node = own[parent, segment]
            ends.append(node)
        return ends, tree_tokens(ends)

    def below(self, end: Node, segment: TokenIds) -> Node:
        """A node of its own for one more segment of a sample whose text ended at `end`."""
        return self._node(segment, end)

    def allocate(self, end: Node, blocks: int = 0) -> list[Node] | None:
        """Hold the path to `end` for one more leaf. Returns the nodes that got their slab now and
        must be prefilled, or None (and nothing is held) when the cache has no room for them, or not
        for so many blocks beside them."""
        held: list[Node] = []
        fresh: list[Node] = []
        for node in end.path():
            if node.slab is None:
                node.slab = self._find(partial(self.cache.allocate, len(node.token_ids)))
                if node.slab is None:
                    self._undo(held, fresh)
                    return None
                fresh.append(node)
                if node.parent is None:
                    self.cache.retain(node.slab)  # the forest's own hold
                    self._kept[node] = None
            else:
                self.cache.retain(node.slab)
            held.append(node)
        if blocks and self._find(lambda: self.cache.free_blocks >= blocks or None) is None:
            self._undo(held, fresh)
            return None
        return fresh

    def take_block(self) -> int | None:
        """The first cell of a block, None when the cache has no room."""
        return self._find(self.cache.take_block)

    def release(self, end: Node) -> None:
        """A leaf at `end` is done; segments that nobody holds any more are freed."""
        path = end.path()
        if path[0] in self._kept:
            self._kept[path[0]] = self._kept.pop(path[0])
        for node in reversed(path):
            self._drop(node)

    def forget(self) -> None:
        """Let go of the heads that no leaf uses: what is in the cache of them does not count any
        more."""
        for head in [h for h in self._kept if h.slab is not None and h.slab.holders == 1]:
            self._drop(head)

    def check(self, leaf_ends: Sequence[Node]) -> None:
        """Assert that holders are exactly the live leaves (and the forest, for heads)."""
        self.cache.check()
        expected = dict.fromkeys(self._kept, 1)
        for end in leaf_ends:
            for node in end.path():
                expected[node] = expected.get(node, 0) + 1
        for node, holders in expected.items():
            assert node.slab is not None and node.slab.holders == holders, (
                f"node {node.number} has the wrong number of holders"
            )
        assert len(self.cache._slabs) == len(expected), "a slab that no node of a leaf holds"

    def _node(self, token_ids: TokenIds, parent: Node | None) -> Node:
        assert token_ids, "an empty segment"
        self._count += 1
        return Node(token_ids, parent, self._count, 0 if parent is None else parent.stop)

    def _find(self, take: Callable[[], Taken | None]) -> Taken | None:
        """What `take` gives, after letting go of heads that no leaf uses, if need be."""
        while (taken := take()) is None:
            unused = (h for h in self._kept if h.slab is not None and h.slab.holders == 1)
            head = next(unused, None)
            if head is None:
                return None
            self._drop(head)
        return taken

    def _undo(self, held: Sequence[Node], fresh: Sequence[Node]) -> None:
        for node in held:
            self._drop(node)
        if fresh and fresh[0].parent is None:
            self._drop(fresh[0])  # it was not prefilled, so it is not kept

    def _drop(self, node: Node) -> None:
        assert node.slab is not None
        if self.cache.release(node.slab):
            node.slab = node.logits = None
            self._kept.pop(node, None)


def tree_tokens(ends: Sequence[Node]) -> int:
    """The distinct tokens of the prompts that end at `ends`."""
    tree = {node for end in ends for node in end.path()}
    return sum(len(node.token_ids) for node in tree)


def prefill_tiles(pieces: Sequence[tuple[Node, int, int]]) -> list[WorkTile]:
    """Work tiles of a prefill whose queries are tokens [first, stop) of nodes, laid side by side.

    A query tile reads all splits of the nodes above its own and, of its own, those up to its last
    token; keys past a query's position are masked by position.
    """
    tiles = []
    row = 0
    for node, first, stop in pieces:
        above = [span for ancestor in node.path()[:-1] for span in ancestor.key_spans()]
        own = list(node.key_spans(stop))
        for tile in range(first, stop, MAX_TILE):
            queries = min(MAX_TILE, stop - tile)
            for key, length, position in above:
                tiles.append(WorkTile(row, queries, key, length, position))
            for key, length, position in own:
                if position < node.start + tile + queries:
                    tiles.append(WorkTile(row, queries, key, length, position))
            row += queries
    return tiles


def decode_tiles(ends: Sequence[Node], keys_per_partial: int = 0) -> list[WorkTile]:
    """Work tiles of one decode step: `ends[i]` is the node above leaf i, in depth-first order.

    Sharing is decided edge by edge. A node that is shared costs every leaf below it a partial
    result, as dear as reading `keys_per_partial` keys; inlined, its keys are read once for each of
    its children, in the same breath as theirs. The cheaper is taken: 0 shares everything. Which
    keys make up a split, and the order of a leaf's splits, are the same either way.
    """
    tiles: list[WorkTile] = []
    _descend([end.path() for end in ends], 0, len(ends), 0, [], keys_per_partial, tiles)
    return tiles


def _descend(
    paths: Sequence[Sequence[Node]],
    start: int,
    stop: int,
    depth: int,
    inlined: list[tuple[int, int, int]],
    keys_per_partial: int,
    tiles: list[WorkTile],
) -> None:
    """Tiles of all nodes from `depth` on of leaves [start, stop), each node before its children;
    `inlined` are the spans of keys that the nodes above have left to these."""
    leaves = [i for i in range(start, stop) if depth < len(paths[i])]
    for node, members in groupby(leaves, key=lambda i: paths[i][depth]):
        first, *rest = members
        end = rest[-1] + 1 if rest else first + 1
        spans = [*inlined, *node.key_spans()]
        if keys_per_partial and all(depth + 1 < len(paths[i]) for i in range(first, end)):
            below = [paths[i][depth + 1] for i in range(first, end)]
            again = (len(set(below)) - 1) * sum(keys for _, keys, _ in spans)
            if again <= (end - first) * keys_per_partial:
                _descend(paths, first, end, depth + 1, spans, keys_per_partial, tiles)
                continue
        for tile in range(first, end, MAX_TILE):
            queries = min(MAX_TILE, end - tile)
            for key, length, position in spans:
                tiles.append(WorkTile(tile, queries, key, length, position))
        _descend(paths, first, end, depth + 1, [], keys_per_partial, tiles)
