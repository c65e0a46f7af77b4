"""The forest against brute force over prompts as plain lists of tokens."""

import random
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.forest import Forest, Node, TokenIds, decode_tiles, prefill_tiles
from engine.kv_cache import ALIGN
from kernels.forest_attention.plan import MAX_SPLIT, MAX_TILE, WorkTile
from tests.forests import make_cache

Prompt = tuple[TokenIds, ...]


def make_forest(cells: int = 1 << 20) -> Forest:
    return Forest(make_cache(1, 16, cells))


def make_row(
    rng: random.Random, row: int, k: int, heads: int = 2, longest: int = 40
) -> list[Prompt]:
    """k samples of a row: a common head, a conversation, and rotations of 3 responses. Equal
    responses and equal rows occur."""
    head = (7,) * (1 + rng.randrange(heads))
    conversation = tuple(rng.randrange(2) for _ in range(rng.randrange(1, longest)))
    responses = [(rng.randrange(2),) * rng.randrange(1, longest) for _ in range(3)]
    orders = [responses[i:] + responses[:i] for i in range(3)]
    return [(head, conversation, *orders[rng.randrange(3)], (9,) * (row % 3 + 1)) for _ in range(k)]


def paths(prompts: Sequence[Prompt]) -> dict[Prompt, int]:
    """Every leading run of whole segments, and the tokens of its last segment."""
    return {prompt[:i]: len(prompt[i - 1]) for prompt in prompts for i in range(1, len(prompt) + 1)}


def segments(node: Node) -> Prompt:
    return tuple(each.token_ids for each in node.path())


@given(st.integers(0, 2**32), st.integers(1, 8), st.integers(1, 4))
def test_tree_tokens_are_the_distinct_tokens(seed: int, k: int, rows: int) -> None:
    """Of the row's own tree, head included, whatever rows came before; nodes are those of the
    paths, each once, and stand where their paths end."""
    rng = random.Random(seed)
    forest = make_forest()
    for row in range(rows):
        prompts = make_row(rng, row, k)
        ends, tree_tokens = forest.grow(prompts)
        assert tree_tokens == sum(paths(prompts).values())
        assert [segments(end) for end in ends] == prompts
        nodes = {node for end in ends for node in end.path()}
        assert {segments(node) for node in nodes} == set(paths(prompts))
        assert len(nodes) == len(paths(prompts))
        for node in nodes:
            assert node.start == sum(map(len, segments(node)[:-1]))
            assert node.stop == sum(map(len, segments(node)))


def test_segments_count_only_after_the_same_parent() -> None:
    """Equal segments after unequal ones are other nodes: their keys differ."""
    forest = make_forest()
    ends, tokens = forest.grow(
        [((1,), (2, 2)), ((1,), (3,), (2, 2)), ((4,), (2, 2)), ((1,), (2, 2))]
    )
    assert tokens == 1 + 2 + 1 + 2 + 1 + 2
    assert len({end.token_ids for end in ends}) == 1
    assert ends[0] is ends[3] and len(set(ends)) == 3


def test_heads_are_shared_across_rows_and_nothing_else_is() -> None:
    forest = make_forest()
    prompt: Prompt = ((1, 2, 3), (4,), (5, 6))
    (a,), _ = forest.grow([prompt])
    (b,), tokens = forest.grow([prompt])
    assert tokens == 6  # the row's own tree, as if it were alone
    assert a.path()[0] is b.path()[0]
    assert not set(a.path()[1:]) & set(b.path()[1:])
    fresh = [forest.allocate(end) for end in (a, b, b)]
    assert [len(nodes) for nodes in fresh if nodes is not None] == [3, 2, 0]
    forest.check([a, b, b])


def test_an_empty_segment_is_refused() -> None:
    for prompt in (((),), ((1,), ())):
        with pytest.raises(AssertionError, match="empty"):
            make_forest().grow([prompt])


def test_heads_stay_until_room_is_needed_and_go_oldest_first() -> None:
    forest = make_forest(3 * ALIGN)
    prompts: list[Prompt] = [((1,), (0,)), ((2,), (0,)), ((3,), (0,))]
    (first, second, third), _ = forest.grow(prompts)
    heads = [end.path()[0] for end in (first, second, third)]
    for end, head in zip((first, second), heads, strict=False):
        assert forest.allocate(end) == [head, end]
        forest.release(end)
        forest.check([])
    assert [head.slab is not None for head in heads] == [True, True, False]
    assert forest.allocate(third) == [heads[2], third]  # there was room for one of the two
    assert [head.slab is not None for head in heads] == [False, True, True]
    assert forest.allocate(second) is None  # its own head and the one in use cannot go
    assert [head.slab is not None for head in heads] == [False, True, True]
    forest.check([third])
    forest.release(third)
    assert forest.allocate(second) == [second]  # its head is still there
    forest.check([second])


def test_the_head_unused_for_longest_goes_first() -> None:
    """Not the oldest one, nor the one that was last given out first."""
    forest = make_forest(6 * ALIGN)
    prompts: list[Prompt] = [((i,), (0,)) for i in range(3)]
    ends, _ = forest.grow(prompts)
    heads = [end.path()[0] for end in ends]
    for end in ends:
        assert forest.allocate(end)
    for i in (1, 0, 2):
        forest.release(ends[i])
    (large,), _ = forest.grow([((9,) * 3 * ALIGN,)])
    assert forest.allocate(large)  # room for it came from one of the three
    assert [head.slab is not None for head in heads] == [True, False, True]
    forest.check([large])


def test_heads_go_for_blocks_too() -> None:
    """For one that is taken, and for those that must stay free beside a path, which is not held
    where they are not there; the head of a living leaf stays."""
    forest = make_forest(5 * ALIGN)
    ends, _ = forest.grow([((i,), (0,)) for i in range(3)])
    heads = [end.path()[0] for end in ends]
    for end in ends[:2]:
        assert forest.allocate(end)
        forest.release(end)
    assert forest.allocate(ends[2], blocks=4) is None
    assert forest.allocate(ends[2], blocks=3) == [heads[2], ends[2]]
    assert [head.slab is not None for head in heads] == [False, False, True]
    forest.check([ends[2]])
    assert [forest.take_block() is not None for _ in range(4)] == [True] * 3 + [False]
    forest.release(ends[2])
    assert forest.allocate(ends[2]) == [ends[2]]
    forest.release(ends[2])
    blocks = [forest.take_block() for _ in range(3)]
    assert None not in blocks[:2] and blocks[2] is None and heads[2].slab is None
    forest.check([])


def test_logits_go_with_the_slab() -> None:
    forest = make_forest(2 * ALIGN)
    (end,), _ = forest.grow([((1,), (2,))])
    head = end.path()[0]
    assert forest.allocate(end)
    head.logits = end.logits = forest.cache.k[0][0, 0]
    forest.release(end)
    assert end.logits is None and head.logits is not None
    (other,), _ = forest.grow([((3,), (4,))])
    assert forest.allocate(other)
    assert head.slab is None and head.logits is None


def test_an_allocation_that_fails_holds_nothing() -> None:
    """A head placed for it and never prefilled must not look as if it were in the cache."""
    forest = make_forest(3 * ALIGN)
    (long, short), _ = forest.grow([((1,), (2,) * 33), ((1,), (2,))])
    head = short.path()[0]
    assert forest.allocate(long) is None
    assert head.slab is None and long.slab is None
    forest.check([])
    assert forest.allocate(short) == [head, short]
    assert forest.allocate(long) is None
    assert head.slab is not None and head.slab.holders == 2
    forest.check([short])
    forest.release(short)
    assert forest.allocate(short) == [short]
    forest.check([short])


def test_heads_that_are_neither_kept_nor_used_are_forgotten() -> None:
    """Where every row has its own head, memory must not grow with the number of rows."""
    forest = make_forest(4 * ALIGN)
    for row in range(50):
        (end,), _ = forest.grow([((row, row), (1,))])
        assert forest.allocate(end)
        forest.release(end)
        del end
        assert len(forest.heads) == len(forest._kept) <= 4
        forest.check([])
    (waiting,), _ = forest.grow([((0, 0), (1,))])
    (again,), _ = forest.grow([((0, 0), (1,))])
    assert waiting.path()[0] is again.path()[0]


@given(st.integers(0, 2**32), st.sampled_from([30, 60, 4000]))
@settings(max_examples=40)
def test_joining_and_retiring_in_any_order(seed: int, runs: int) -> None:
    """After every step exactly the live leaves (and the forest, for heads) hold exactly their
    paths, and what is fresh is what has to be prefilled: never twice, never not at all."""
    rng = random.Random(seed)
    forest = make_forest(runs * ALIGN)
    waiting: list[Node] = []
    live: list[Node] = []
    prefilled: set[Node] = set()
    refused = 0
    for step in range(60):
        action = rng.random()
        if action < 0.2:
            waiting += forest.grow(make_row(rng, step, 1 + rng.randrange(4)))[0]
        elif action < 0.65 and waiting:
            end = waiting.pop(rng.randrange(len(waiting)))
            before = {node for node in prefilled if node.slab is not None}
            fresh = forest.allocate(end)
            prefilled = {node for node in before if node.slab is not None}
            if fresh is None:
                refused += 1
                assert len(live) > 0 or runs == 30
                waiting.append(end)
            else:
                assert fresh == [node for node in end.path() if node not in prefilled]
                prefilled.update(fresh)
                live.append(end)
        elif live:
            forest.release(live.pop(rng.randrange(len(live))))
        prefilled = {node for node in prefilled if node.slab is not None}
        placed = {node for end in (*live, *waiting) for node in end.path() if node.slab is not None}
        assert placed <= prefilled
        forest.check(live)
        if live:
            with pytest.raises(AssertionError):
                forest.check(live[1:])
    while live:
        forest.release(live.pop())
        forest.check(live)
    if runs == 4000:
        assert refused == 0


def grown(seed: int, longest: int) -> tuple[Forest, list[Node]]:
    """Leaves of several rows in depth-first order, all with slabs."""
    rng = random.Random(seed)
    forest = make_forest()
    leaves: list[tuple[tuple[int, ...], Node]] = []
    for row in range(rng.randrange(1, 5)):
        ends, _ = forest.grow(make_row(rng, row, rng.randrange(1, 120), longest=longest))
        for sample, end in enumerate(ends):
            forest.allocate(end)
            leaves.append(((*(node.number for node in end.path()), sample), end))
    return forest, [end for _, end in sorted(leaves, key=lambda leaf: leaf[0])]


def expected_keys(node: Node, tokens: int) -> list[tuple[int, int]]:
    """Cache slot and position of the first tokens of a node."""
    assert node.slab is not None
    return [(node.slab.start + j, node.start + j) for j in range(tokens)]


def keys_of(item: WorkTile) -> list[tuple[int, int]]:
    return [(item.key + j, item.position + j) for j in range(item.num_keys)]


def check_limits(items: Sequence[WorkTile], starts: set[int]) -> None:
    """Tiles and splits of at most the maximum, cut at multiples of it from a node's start."""
    for item in items:
        assert 0 < item.num_queries <= MAX_TILE and 0 < item.num_keys <= MAX_SPLIT
        nearest = max(start for start in starts if start <= item.key)
        assert (item.key - nearest) % MAX_SPLIT == 0


@given(st.integers(0, 2**32), st.sampled_from([20, 700]))
@settings(max_examples=25)
def test_depth_first_leaves_of_a_node_are_contiguous(seed: int, longest: int) -> None:
    """And each leaf meets the keys of its path exactly once, root first, and no others."""
    _, ends = grown(seed, longest)
    leaves: dict[Node, list[int]] = {}
    for i, end in enumerate(ends):
        for node in end.path():
            leaves.setdefault(node, []).append(i)
    assert all(b - a == 1 for each in leaves.values() for a, b in pairwise(each))
    items = decode_tiles(ends)
    seen: list[list[tuple[int, int]]] = [[] for _ in ends]
    for item in items:
        for query in range(item.query, item.query + item.num_queries):
            seen[query] += keys_of(item)
    for end, keys in zip(ends, seen, strict=True):
        path = end.path()
        assert keys == [key for node in path for key in expected_keys(node, len(node.token_ids))]
        assert [position for _, position in keys] == list(range(end.stop))
    check_limits(items, {node.slab.start for node in leaves if node.slab is not None})
    # As few as can be: one for each split of a node and each 64 of its leaves.
    assert len(items) == sum(
        -(-len(each) // MAX_TILE) * -(-len(node.token_ids) // MAX_SPLIT)
        for node, each in leaves.items()
    )


@given(st.integers(0, 2**32), st.sampled_from([20, 700]), st.integers(0, 300))
@settings(max_examples=25)
def test_inlined_nodes_change_nobodys_keys(seed: int, longest: int, weight: int) -> None:
    """Whatever is inlined, each leaf meets the same splits in the same order, in fewer partials."""
    _, ends = grown(seed, longest)
    runs: list[list[list[tuple[int, ...]]]] = []
    partials = []
    for items in (decode_tiles(ends), decode_tiles(ends, weight)):
        runs.append([[] for _ in ends])
        for item in items:
            for query in range(item.query, item.query + item.num_queries):
                runs[-1][query].append(item[2:])
        partials.append(sum(queries for _, queries in {item[:2] for item in items}))
    assert runs[0] == runs[1]
    assert partials[1] <= partials[0]


def test_a_node_is_inlined_where_reading_it_again_is_cheaper() -> None:
    """A head of 60 tokens over 3 conversations of 2 leaves: twice 60 keys, or 6 partials."""
    cache = make_cache(1, 16, 4096)
    forest = Forest(cache)
    head = tuple(range(60))
    prompts = [[head, (100 + row,) * 300] for row in range(3) for _ in range(2)]
    ends, _ = forest.grow(prompts)
    for end in ends:
        forest.allocate(end)
    shared, inlined = decode_tiles(ends, 19), decode_tiles(ends, 20)
    assert shared == decode_tiles(ends) and len(shared) == 1 + 3 * 2
    assert [item[:2] for item in inlined] == [(row, 2) for row in (0, 2, 4) for _ in range(3)]
    assert [item.num_keys for item in inlined] == [60, 256, 44] * 3
    # A leaf that ends at the head needs it by itself.
    ends, _ = forest.grow([[head], *prompts])
    for end in ends:
        forest.allocate(end)
    assert decode_tiles(ends, 1000)[0] == WorkTile(0, 7, shared[0].key, 60, 0)


def test_no_leaves_make_no_items() -> None:
    assert decode_tiles([]) == [] and prefill_tiles([]) == []


@given(st.integers(0, 2**32), st.sampled_from([20, 700]), st.data())
@settings(max_examples=25)
def test_prefill_tiles_give_each_token_all_that_precedes_it(
    seed: int, longest: int, data: st.DataObject
) -> None:
    """Pieces may begin and end anywhere in their nodes; keys behind a piece are never read."""
    _, ends = grown(seed, longest)
    nodes = list({node: None for end in ends for node in end.path()})
    nodes = data.draw(st.permutations(nodes))[:5]
    pieces = []
    for node in nodes:
        stop = data.draw(st.integers(1, len(node.token_ids)))
        pieces.append((node, data.draw(st.integers(0, stop - 1)), stop))
    items = prefill_tiles(pieces)
    row = 0
    for node, first, stop in pieces:
        above = [
            key for each in node.path()[:-1] for key in expected_keys(each, len(each.token_ids))
        ]
        for token in range(first, stop):
            mine = [
                key for i in items if i.query <= row < i.query + i.num_queries for key in keys_of(i)
            ]
            expected = above + expected_keys(node, stop)
            assert mine == expected[: len(mine)] and len(mine) >= len(above) + token + 1
            row += 1
    assert max(item.query + item.num_queries for item in items) == row
    starts = {node.slab.start for end in ends for node in end.path() if node.slab is not None}
    check_limits(items, starts)
