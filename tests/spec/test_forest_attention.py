"""Forest attention, forward: values against attention over each query's own sequence, bits, what is
executed and what is refused. Random forests are in `test_random_forests.py`."""

import resource
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.forest import Node
from engine.forward import take_pieces
from kernels.forest_attention import (
    AttentionOptions,
    ForestPlan,
    cpp_impl,
    forest_attention,
    forest_attention_ref,
    forest_attention_with_lse,
    schedule,
    torch_impl,
)
from kernels.forest_attention.plan import Suffixes, WorkTile, cut_between_queries
from kernels.segment_attention import segment_attention
from kernels.target import Target, target_of
from tests import forks
from tests.forests import Grove, Sample, Shape, crowd
from tests.implementations import HALVES, Implementation, Largest, check_refused, gaps_in
from tests.oracles.attention import Attend, over_sequences, rounded_once
from tests.rows import num_threads

PLAIN = AttentionOptions(0.25)
WINDOWED = AttentionOptions(0.2, 30.0, 97)
SMALL = Shape(1, 2, 16, 16)

Pieces = Sequence[tuple[Node, int, int]]
Forward = tuple[Tensor, ForestPlan]


def attention(plan: ForestPlan, options: AttentionOptions) -> Attend:
    """The operation as a function of its tensors alone."""
    return lambda q, k, v: forest_attention_with_lse(q, k, v, plan, options)


def reference(plan: ForestPlan, options: AttentionOptions) -> Attend:
    return rounded_once(lambda q, k, v: forest_attention_ref(q, k, v, plan, options))


def check(on: Implementation, plan: ForestPlan, options: AttentionOptions, *rest: Any) -> Tensor:
    """Hold outputs and log-sum-exps to an oracle, and the plan's count of tiles to what it says;
    rest: the oracle, q, and the caches. Of half types the C++ and torch give what float32 gives,
    rounded once. Returns the outputs."""
    before = plan.executed
    out, lse = on.check(attention(plan, options), *rest)
    assert plan.executed - before == plan.num_tiles(options.window)
    if out.dtype in HALVES and on.name != "triton":
        wide, wide_lse = attention(plan, options)(*(x.float() for x in rest[1:]))
        assert out.equal(wide.to(out.dtype)) and lse.equal(wide_lse)
    return out


def check_decode(
    on: Implementation, grove: Grove, forward: Forward, options: AttentionOptions, less: int = 0
) -> Tensor:
    """As above, of every sample's last token or the one `less` tokens earlier."""
    sequences = [(1, grove.cells_of(i, less)) for i in range(len(grove.samples))]
    q, plan = forward
    return check(on, plan, options, over_sequences(sequences, options), q, *grove.caches)


def check_prefill(
    on: Implementation, grove: Grove, pieces: Pieces, options: AttentionOptions, per_split: bool
) -> Tensor:
    """As above, of pieces of nodes."""
    q, plan = grove.prefill(pieces, per_split)
    oracle = over_sequences(pieces_of(grove, pieces), options)
    return check(on, plan, options, oracle, q, *grove.caches)


def pieces_of(grove: Grove, pieces: Pieces) -> list[tuple[int, Tensor]]:
    """Their tokens, and the cells of the sequences that end with them."""
    return [(stop - first, grove.cells_to(node, stop)) for node, first, stop in pieces]


def cut(nodes: Sequence[Node], size: int) -> Iterator[Pieces]:
    """The nodes in forwards of at most `size` tokens, as prefill cuts them."""
    queue = deque((node, 0) for node in nodes)
    while queue:
        yield take_pieces(queue, size)


# -- values ----------------------------------------------------------------------------------------

PATHS = {
    "torch": {},
    "cpp": {"attend_suffixes": 1, "attend_tiles": 1, "merge": 1},
    "triton": {"_forest_attention_kernel": 3, "_merge_states_kernel": 1},
}
# A node for all, nodes for few, suffixes of several splits; in Triton its three instances.
DEEP = [Sample(100 + i, ((0, 300), (1 + i // 2, 40)), 30 + 60 * i) for i in range(6)]


def test_nodes_for_all_and_for_few_and_long_suffixes(
    on: Implementation, dtype: torch.dtype
) -> None:
    grove = Grove(DEEP, Shape(1, 3, 16, 16, dtype), capacity=336, device=on.device)
    q, plan = grove.decode()
    check_decode(on, grove, (q, plan), PLAIN)
    with on.counted() as counts:
        forest_attention(q, *grove.caches, plan, PLAIN)
    assert counts == PATHS[on.name]


@pytest.mark.implementations("torch", "cpp")
@pytest.mark.parametrize("heads", [(2, 1, 144, 80), (1, 5, 64, 144)])
def test_many_channels(
    on: Implementation, dtype: torch.dtype, heads: tuple[int, int, int, int]
) -> None:
    """More than C++ takes at once, in few rows and in many."""
    grove = Grove(DEEP, Shape(*heads, dtype), capacity=336)
    check_decode(on, grove, grove.decode(), AttentionOptions(0.05, 30.0, 333))


def test_values_that_are_the_first_channels_of_their_keys(
    on: Implementation, dtype: torch.dtype
) -> None:
    """As of latent attention: the keys' memory is all that is read."""
    shape = Shape(1, 5, 40, 24, dtype, aliased=True)
    grove = Grove(DEEP[::3], shape, capacity=336, device=on.device)
    k, v = grove.caches
    assert v.data_ptr() == k.data_ptr() and v.stride() == k.stride()
    check_decode(on, grove, grove.decode(), AttentionOptions(0.15))
    check_prefill(on, grove, grove.whole()[:2], AttentionOptions(0.15, 30.0, 97), per_split=False)


@pytest.mark.parametrize("options", [PLAIN, WINDOWED])
def test_a_plan_moves_on(on: Implementation, options: AttentionOptions) -> None:
    """Lengths and positions change in place, also into another split."""
    samples = [Sample(100 + i, ((0, 40),), length) for i, length in enumerate((30, 264, 258))]
    grove = Grove(samples, SMALL, capacity=272, device=on.device)
    _, plan = grove.decode(less=9, max_length=266)
    assert plan.suffix is not None
    grove.decode()  # writes what the last step will see
    for less in (9, 3, 0):
        lengths = torch.tensor([s.generated - less for s in samples], device=on.device)
        plan.positions += lengths - plan.suffix.length
        plan.suffix.length[:] = lengths
        check_decode(on, grove, (grove.queries(less), plan), options, less)


def test_slices_of_wider_tensors(on: Implementation) -> None:
    """Queries as the projections leave them, keys token by token; nothing beside them is read."""
    samples = [Sample(100 + i, ((0, 40),), 9 + i) for i in range(3)]
    grove = Grove(samples, Shape(2, 2, 16, 16), device=on.device)
    q, plan = grove.decode()
    expected = on.run(attention(plan, PLAIN), q, *grove.caches)
    sliced = on.poisoned(3, 64).copy_(q.flatten(1)).unflatten(1, (4, 16))
    k, v = (
        on.poisoned(x.shape[1], 2, 16).copy_(x.transpose(0, 1)).transpose(0, 1)
        for x in grove.caches
    )
    found = on.run(attention(plan, PLAIN), sliced, k, v)
    assert all(a.equal(b) for a, b in zip(found, expected, strict=True))


@pytest.mark.implementations("cpp", "triton")
def test_beyond_two_to_the_31_elements(on: Implementation) -> None:
    cells, dtype = (1 << 26) + 600, torch.bfloat16 if on.name == "cpp" else torch.float16
    whole = on.untouched(cells, 2, 16, dtype=dtype)
    whole[-300:] = on.draw(300, 2, 16, dtype=dtype)
    far = whole.transpose(0, 1)
    near, q = far[:, -300:].contiguous(), on.draw(2, 4, 16, dtype=dtype, seed=1)
    assert (cells - 300) * far.stride(1) > 2**31
    # A query of a tile, and one of a suffix.
    positions, length = (torch.tensor(x).to(on.device) for x in ([255, 30], [0, 31]))
    results = []
    for cache, first in ((far, cells - 300), (near, 0)):
        blocks = torch.tensor([[-1], [first + 220]], device=on.device)
        suffix = Suffixes(blocks, length, torch.zeros_like(length), 32)
        plan = ForestPlan([WorkTile(0, 1, first, 256, 0)], positions, suffix)
        results.append(on.run(attention(plan, PLAIN), q, cache, cache))
    assert all(a.equal(b) and a.isfinite().all() for a, b in zip(*results, strict=True))


# -- what is not read ------------------------------------------------------------------------------


def test_tiles_ahead_of_all_their_queries_are_not_run(on: Implementation) -> None:
    """A query that no tile has, the first and the last here, is 0."""
    tiles = [WorkTile(1, 2, 0, 4, 0), WorkTile(1, 2, 4, 4, 4), WorkTile(2, 1, 0, 2, 5)]
    plan = ForestPlan(tiles, torch.tensor([9, 3, 4, 9], device=on.device))
    assert plan.num_tiles() == 2
    q, k, v = on.draw(4, 2, 4), on.draw(1, 8, 4, seed=1), on.draw(1, 8, 4, seed=2)
    out = check(on, plan, PLAIN, reference(plan, PLAIN), q, k, v)
    assert out[[0, 3]].eq(0).all() and out[1:3].ne(0).all()


def test_an_idle_row_and_an_empty_suffix(on: Implementation) -> None:
    """A leaf without a token of its own, a row without a leaf or a block, and leaves with nothing
    but suffixes, of two lengths; the other cells are NaN."""
    blocks, length, position = (
        torch.tensor(x, device=on.device)
        for x in ([[0], [-1], [16], [32]], [0, 0, 3, 2], [0, 0, 0, 0])
    )
    suffix = Suffixes(blocks, length, position, 5)
    plan = ForestPlan([], torch.tensor([0, 0, 2, 1], device=on.device), suffix)
    cache = torch.full((1, 48, 4), float("nan"), device=on.device)
    cache[:, 16:19], cache[:, 32:34] = on.draw(1, 3, 4, seed=1), on.draw(1, 2, 4, seed=2)
    q = on.draw(4, 2, 4)
    out = check(on, plan, PLAIN, reference(plan, PLAIN), q, cache, cache)
    assert out[:2].eq(0).all() and out[2:].isfinite().all()


def test_nan_stays_with_its_owner(on: Implementation) -> None:
    """Samples whose keys and values are NaN do not reach the others."""
    grove = Grove(crowd()[::9], SMALL, capacity=288, device=on.device)
    q, plan = grove.decode()
    expected = forest_attention(q, *grove.caches, plan, PLAIN)
    ill = (0, len(q) - 1)
    for cache in grove.caches:
        for i in ill:
            cache[:, grove.own_cells(i).to(on.device)] = float("nan")
    out = forest_attention(q, *grove.caches, plan, PLAIN)
    for i in range(len(q)):
        assert out[i].isnan().all() if i in ill else out[i].equal(expected[i])


def test_keys_outside_every_window_are_not_read(on: Implementation) -> None:
    """They are NaN. In Triton so are those that the window cuts off within a split: the first query
    stands at 719 and sees from 680 on, in a tile of 16 keys from 672 on."""
    samples = [Sample(100 + i, ((0, 700),), 20 + i) for i in range(4)]
    grove = Grove(samples, SMALL, capacity=32, device=on.device)
    slab = grove.fresh[0].slab
    assert slab is not None
    unseen = 640 if on.name == "triton" else 512
    for cells in grove.caches:
        cells[:, slab.start : slab.start + unseen] = float("nan")
    q, plan = grove.decode()
    options = AttentionOptions(0.25, None, 40)
    assert plan.num_tiles(40) == 1 and plan.num_tiles() == 3
    out = forest_attention(q, *grove.caches, plan, options)
    for cells in grove.caches:  # the oracle weighs with 0 what it does not see
        cells.nan_to_num_()
    assert out.equal(check_decode(on, grove, (q, plan), options))


# -- bits ------------------------------------------------------------------------------------------

# Threads and shapes: vectors of C++ in part, full and several; a narrow and a wide tile in Triton.
BIT_CASES = {
    "cpp": [
        (1, Shape(2, 1, 8, 8)), (1, Shape(1, 4, 64, 64)), (1, Shape(1, 2, 256, 256)),
        (2, Shape(1, 2, 12, 20)), (2, Shape(2, 1, 32, 32)), (3, Shape(2, 3, 32, 32)),
    ],
    "triton": [(1, SMALL)],
}  # fmt: skip


def decoded(
    on: Implementation,
    samples: Sequence[Sample],
    shape: Shape,
    options: AttentionOptions,
    seed: int = 0,
    capacity: int = 288,
    max_length: int | None = None,
) -> dict[int, Tensor]:
    """Each sample's output by name."""
    grove = Grove(samples, shape, capacity=capacity, seed=seed, device=on.device)
    q, plan = grove.decode(max_length=max_length, per_split=True)
    out = forest_attention(q, *grove.caches, plan, options)
    return {sample.name: row for sample, row in zip(grove.samples, out, strict=True)}


def same_bits(some: dict[Any, Tensor], all_of_them: dict[Any, Tensor]) -> bool:
    return bool(some) and all(rows.equal(all_of_them[name]) for name, rows in some.items())


@pytest.mark.usefixtures("products_in_order")
@pytest.mark.implementations("cpp", "triton")
@pytest.mark.parametrize("options", [PLAIN, WINDOWED])
def test_a_sample_has_the_same_bits_in_any_company(
    on: Implementation, options: AttentionOptions
) -> None:
    """And in another order, in other blocks, with longer ones beside it. In
    Triton with one partial for each split."""
    samples = crowd() if on.name == "cpp" else crowd()[3::12]
    rng = np.random.default_rng(1)
    shuffled = [samples[i] for i in rng.permutation(len(samples))]
    for threads, shape in BIT_CASES[on.name]:
        with num_threads(threads):
            together = decoded(on, samples, shape, options)
            assert same_bits(decoded(on, shuffled, shape, options, 1, 304, 288), together)
            for some in (samples[:1], samples[-1:], shuffled[: len(samples) // 2]):
                assert same_bits(decoded(on, some, shape, options), together)
            for capacity, max_length in ((288, 288), (336, 299), (400, 400)):
                two = decoded(on, shuffled[:2], shape, options, 2, capacity, max_length)
                assert same_bits(two, together)


def prefilled(
    samples: Sequence[Sample], shape: Shape, options: AttentionOptions, tokens: int
) -> dict[tuple[int, ...], Tensor]:
    """Outputs of each path of segments, in forwards of at most `tokens` tokens."""
    grove = Grove(samples, shape, written=False)
    rows: dict[tuple[int, ...], list[Tensor]] = {}
    for pieces in cut(grove.fresh, tokens):
        q, plan = grove.prefill(pieces)
        out = forest_attention(q, *grove.caches, plan, options)
        parts = out.split([stop - first for _, first, stop in pieces])
        for (node, _, _), part in zip(pieces, parts, strict=True):
            path = tuple(grove.names[each][0] for each in node.path())
            rows.setdefault(path, []).append(part)
    return {path: torch.cat(parts) for path, parts in rows.items()}


@pytest.mark.implementations("cpp")
@pytest.mark.parametrize("options", [PLAIN, WINDOWED])
def test_prefill_has_the_same_bits_in_any_company_and_those_of_decode(
    on: Implementation, options: AttentionOptions
) -> None:
    """Whatever else is prefilled, wherever forwards cut; and a token that was generated has the
    output that it has as the last of a prompt."""
    samples = crowd()[::9]
    whole = [Sample(999, (*s.prompt, (s.name, s.generated)), 0) for s in samples]
    for threads, shape in BIT_CASES["cpp"]:
        with num_threads(threads):
            together = prefilled(whole, shape, options, 1 << 20)
            for some, tokens in ((whole, 1000), (whole, 111), (whole[1:2], 4096), (whole[-1:], 50)):
                assert same_bits(prefilled(some, shape, options, tokens), together)
            for less in (0, 5):
                earlier = [Sample(s.name, s.prompt, max(s.generated - less, 1)) for s in samples]
                rows = decoded(on, earlier, shape, options)
                for s in earlier:
                    path = (*(name for name, _ in s.prompt), s.name)
                    assert rows[s.name].equal(together[path][s.generated - 1])


# -- what is executed ------------------------------------------------------------------------------


def tiles_of_decode(grove: Grove, window: int | None) -> int:
    """Splits of each node times tiles of 64 of its leaves, where some leaf of a tile sees a key."""
    leaves: dict[Node, list[int]] = {}
    for sample, end in zip(grove.samples, grove.ends, strict=True):
        for node in end.path():
            leaves.setdefault(node, []).append(end.stop + sample.generated - 1)
    return sum(
        any(window is None or min(first + 256, node.stop) - 1 > q - window for q in q_pos[at:][:64])
        for node, q_pos in leaves.items()
        for at in range(0, len(q_pos), 64)
        for first in range(node.start, node.stop, 256)
    )


@pytest.mark.parametrize("window", [None, 1, 90, 400, 10_000])
def test_a_decode_executes_the_tiles_that_some_query_sees(window: int | None) -> None:
    samples = crowd() + [Sample(300 + i, ((0, 70), (9, 700)), 1 + i) for i in range(70)]
    grove = Grove(samples, Shape(), capacity=288)
    _, plan = grove.decode()
    assert plan.num_tiles(window) == tiles_of_decode(grove, window)
    assert (plan.num_tiles() > plan.num_tiles(window)) == (window in (1, 90, 400))


def test_a_prefill_skips_what_lies_ahead_or_outside_the_window() -> None:
    grove = Grove([Sample(9, ((0, 1000), (1, 200)), 0)], Shape(), written=False)
    _, plan = grove.prefill(grove.whole())
    assert plan.num_tiles() == 4 * (1 + 2 + 3 + 4) + 4 * (4 + 1)
    # A tile of 64 tokens looks back 63 tokens at most: into the split before at a start only.
    # The node at 1000 has its first tile look into the last split of the node above.
    assert plan.num_tiles(64) == 4 * 4 + 3 + 4 + 1


@pytest.mark.implementations("cpp", "triton")
def test_a_long_prefill_is_cut_to_bound_its_partials(
    on: Implementation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its tiles: no bit changes."""
    grove = Grove([Sample(9, ((0, 290),), 0)], SMALL, written=False, device=on.device)
    results = []
    for limit, parts in ((1 << 20, 1), (128, 3)):
        monkeypatch.setattr(cpp_impl, "_MAX_PARTIAL", 2 * 16 * limit)
        monkeypatch.setattr(schedule, "_MAX_PARTIAL_BYTES", 4 * 2 * 16 * limit)
        q, plan = grove.prefill(grove.whole(), per_split=True)
        with on.counted() as counts:
            results.append(forest_attention(q, *grove.caches, plan, PLAIN))
        assert counts["attend_tiles"] + counts["_forest_attention_kernel"] == parts
    assert results[0].equal(results[1])


def test_a_cut_lies_between_trees() -> None:
    tiles = np.array(
        [WorkTile(i, 1, 0, 8, 0) for i in range(900)] + [WorkTile(900, 64, 0, 8, 0)] * 20
    )
    parts = cut_between_queries(tiles, 1000, 640)
    assert [start for _, start, _ in parts[1:]] == [stop for _, _, stop in parts[:-1]]
    assert (parts[0][1], parts[-1][2]) == (0, 1000)
    assert np.concatenate([part for part, _, _ in parts]).tolist() == tiles.tolist()
    for part, start, stop in parts:
        assert (part[:, 0] >= start).all() and (part[:, 0] + part[:, 1] <= stop).all()
    # The last tiles serve the same queries, and cannot be cut.
    assert [int(part[:, 1].sum()) for part, _, _ in parts] == [577, 323 + 20 * 64]
    assert cut_between_queries(tiles[:0], 7, 640)[0][1:] == (0, 7)


def attend_to_a_tree(scale: int) -> None:
    samples = [Sample(i, ((0, 20 * scale), (1 + i, 3 * scale)), 0) for i in range(4)]
    grove = Grove(samples, Shape(1, 1, 4, 32), written=False)
    q, plan = grove.prefill(grove.whole())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    out = forest_attention(q, *grove.caches, plan, PLAIN)
    assert len(q) == 32 * scale and out.isfinite().all() and plan.executed == plan.num_tiles()
    taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert taken < 100 << 10, taken


def test_a_tree_of_16k_tokens_needs_little_memory() -> None:
    """One plan for all of it. A T x T mask would be 256 MiB, its scores 1 GiB."""
    process = forks.start(attend_to_a_tree, 512)
    process.join()
    assert process.exitcode == 0


# -- refusals --------------------------------------------------------------------------------------


def test_impossible_plans_are_refused() -> None:
    one, blocks = torch.tensor([1]), torch.tensor([[0, 256]])
    ForestPlan([WorkTile(0, 1, 0, 2, 0)], one, Suffixes(blocks, 257 * one, one, 300), True)
    for tile in (
        *((0, 65, 0, 1, 0), (0, 1, 0, 257, 0), (0, 1, 0, 0, 0), (0, 0, 0, 1, 0)),  # its size
        *((0, 2, 0, 1, 0), (-1, 1, 0, 1, 0)),  # no such query
        (0, 1, 0, 3, 0),  # a key past a query that may move
    ):
        with pytest.raises(AssertionError):
            ForestPlan([WorkTile(*tile)], one, advancing=True)
    for wrong, length, max_length in (
        *((blocks, one, 513), (blocks, 5 * one, 4)),  # longer than it may be
        *((blocks, one.repeat(2), 4), (blocks.repeat(2, 1), one, 4), (blocks[0], one, 4)),
        *((-blocks, 257 * one, 300), (0 * blocks, 257 * one, 300)),  # none, or one twice
        (torch.tensor([[0, 9], [256, 9]]).T[:1], one, 4),  # columns apart
    ):
        with pytest.raises(AssertionError):
            ForestPlan([], one, Suffixes(wrong, length, one, max_length), advancing=True)


TENSORS = {
    "q": torch.zeros(2, 4, 4),
    "k_cache": torch.zeros(2, 8, 4),
    "v_cache": torch.zeros(2, 8, 4),
}


def test_bad_arguments() -> None:
    check_refused(
        forest_attention,
        TENSORS | {"plan": ForestPlan([], torch.ones(2)), "options": PLAIN},
        ({"q": torch.zeros(2, 4)}, r"q \(2, 4\)"),
        ({"q": torch.zeros(2, 4, 5)}, r"q \(2, 4, 5\).*do not agree"),
        ({"v_cache": torch.zeros(2, 7, 4)}, r"v_cache \(2, 7, 4\) do not agree"),
        ({"q": torch.zeros(2, 3, 4)}, "2 kv heads do not divide 3 heads"),
        (dict.fromkeys(("k_cache", "v_cache"), torch.zeros(0, 8, 4)), "0 kv heads do not divide"),
        ({"q": torch.zeros(3, 4, 4)}, "3 queries, plan for 2"),
        ({"q": torch.zeros(2, 4, 4).double()}, "float64.*float32"),
        ({"v_cache": torch.zeros(2, 8, 4).half()}, "float16"),
        ({name: x.long() for name, x in TENSORS.items()}, "int64"),
        ({"q": torch.zeros(2, 4, 4, device="meta")}, "q is on meta"),
    )
    check_refused(
        AttentionOptions,
        {"scale": 1.0},
        ({"scale": 0.0}, "scale must be positive, got 0.0"),
        ({"scale": float("nan")}, "scale must be positive, got nan"),
        ({"softcap": -30.0}, "softcap must be positive, got -30.0"),
        ({"window": 0}, "window must be positive, got 0"),
    )


# -- torch alone -----------------------------------------------------------------------------------


def test_torch_reads_a_shared_key_once_for_all_its_queries() -> None:
    """One group for each node, whoever is below it, and one for each query tile of a prefill."""
    samples = [Sample(100 + i, ((0, 300), (1 + i % 2, 40), (3 + i, 9)), 1) for i in range(8)]
    grove = Grove(samples, Shape(), capacity=16)
    groups = torch_impl.compile_plan(grove.decode()[1], None)
    assert sorted(group.num_queries for group in groups.groups) == [1] * 8 + [4, 4, 8]
    assert groups.num_tiles == 2 + 2 + 8
    assert groups.index.shape == (8, 3 + 1)
    groups = torch_impl.compile_plan(grove.prefill(grove.whole())[1], None)
    assert len(groups.groups) == 5 + 2 + 8 and groups.index.shape == (300 + 80 + 72, 1)


@pytest.mark.implementations("torch")
def test_blocks_of_scores_are_bounded(on: Implementation) -> None:
    """64 queries of 8 heads over 10,240 keys are 5.2 million scores."""
    tiles = [WorkTile(0, 64, key, 256, key) for key in range(0, 10_240, 256)]
    plan = ForestPlan(tiles, torch.arange(10_240 - 64, 10_240))
    q, k, v = on.draw(64, 8, 4), on.draw(1, 10_240, 4, seed=1), on.draw(1, 10_240, 4, seed=2)
    oracle = over_sequences([(64, torch.arange(10_240))], WINDOWED)
    check(on, plan, WINDOWED, oracle, q, k, v)
    with Largest() as largest:
        attention(plan, PLAIN)(q, k, v)
    assert 1 << 21 < largest.numel <= 1 << 22


# -- Triton alone ----------------------------------------------------------------------------------


@pytest.mark.implementations("triton")
def test_what_no_kernel_takes_is_refused(on: Implementation) -> None:
    plan = ForestPlan([], torch.zeros(2, dtype=torch.int64, device=on.device))
    tensors = {name: x.to(on.device) for name, x in TENSORS.items()}
    double = {name: x.double() for name, x in tensors.items()}
    refusals = *gaps_in(tensors), (double, "float64 runs on CPU only")
    check_refused(forest_attention, tensors | {"plan": plan, "options": PLAIN}, *refusals)


def schedule_for(plan: ForestPlan, groups: int, processors: int) -> schedule.Schedule:
    rows = schedule.TileRows(16, 64, 1, Target("sm_90", 1 << 17, processors))
    (only,) = schedule.compile_plan(plan, None, schedule.HeadShape(groups, 1, 16, rows))
    return only


def test_few_queries_go_to_the_narrow_instance() -> None:
    """Two leaves to each of three nodes; one table joins them with two splits of suffixes."""
    _, plan = Grove(DEEP, SMALL, capacity=336).decode()
    found = schedule_for(plan, 3, 64)
    assert len(found.narrow.programs) == 3 and len(found.wide.programs) >= 1
    assert found.table is not None
    assert found.table.shape == (6, len(found.wide.programs) + 1 + 2)


def test_adjacent_spans_are_joined_or_kept_apart() -> None:
    """One partial for each split if the plan asks for it; else spans are cut where there are
    processors to spare, and one after the other where there are not."""
    grove = Grove([Sample(9, ((0, 600), (1, 60)), 0)], Shape(), written=False)
    grove.write(grove.fresh[0], 0, 600)
    last = [(grove.fresh[1], 0, 60)]
    _, plan = grove.prefill(last)
    for processors, cut_in in ((1, 1), (64, 3)):
        found = schedule_for(plan, 2, processors)
        assert len(found.wide.programs) == 2 * cut_in
        assert (found.table is None) == (cut_in == 1)
    found = schedule_for(grove.prefill(last, per_split=True)[1], 2, 1)
    assert found.table is not None and found.table.shape == (60, 4)
    assert len(found.wide.programs) == 4 * 2
    assert found.wide.spans[:, 1].tolist() == [256, 256, 88, 60] * 2


@pytest.mark.implementations("triton")
@pytest.mark.parametrize(("options", "per_split"), [(PLAIN, False), (WINDOWED, True)])
def test_one_static_plan_after_another(
    on: Implementation, options: AttentionOptions, per_split: bool
) -> None:
    """Buffers with room to spare give the bits of the plans whose tiles they take; what the plan
    before has left in them, and what no program names, is of no consequence."""
    positions, lengths, starts = (
        torch.zeros(9, dtype=torch.int64, device=on.device) for _ in range(3)
    )
    blocks = torch.full((9, 2), 1 << 40, device=on.device)
    suffixes = Suffixes(blocks, lengths, starts, 288)
    heads = schedule.HeadShape.of(2, 1, 16, 16, torch.float32, target_of(blocks), decode=True)
    key = schedule.forward_key(options.window, heads)
    static = schedule.StaticPlan(positions, suffixes, {options.window}, heads, per_split)
    grown = []
    # Wide and narrow programs; then fewer, then more of them; the last has nothing shared.
    for count, longest in ((9, 40), (4, 9), (9, 270), (9, 0)):
        prompts = [
            ((0, longest + 20), (1 + i % 4, 9 + i)) if longest else ((200 + i, 9),)
            for i in range(count)
        ]
        samples = [Sample(100 + i, prompt, 1 + 5 * i) for i, prompt in enumerate(prompts)]
        grove = Grove(samples, SMALL, capacity=288, seed=longest, device=on.device)
        q, plan = grove.decode(max_length=270, per_split=per_split)
        expected = forest_attention(q, *grove.caches, plan, options)
        own = plan.suffix
        assert own is not None
        for to, given in (
            (positions, plan.positions), (lengths, own.length), (starts, own.position),
        ):  # fmt: skip
            to.zero_()[:count] = given
        blocks.fill_(1 << 40)[:count] = own.blocks
        padded = ForestPlan(plan.tiles, positions, suffixes, advancing=True, per_split=per_split)
        before = static.plan
        room, *_ = before.compiled(key, list[schedule.Schedule])
        assert room.table is not None
        for programs in (room.wide, room.narrow):
            programs.programs.fill_(1 << 30)
            programs.spans.fill_(1 << 30)
        room.table.fill_(1 << 40)
        grown.append(static.load(padded))
        assert grown[-1] == (static.plan is not before)
        rows = torch.full((9, 2, 16), float("nan"), device=on.device)
        rows[:count] = q
        out = forest_attention(rows, *grove.caches, static.plan, options)
        assert out[:count].equal(expected) and out[count:].eq(0).all()
    assert grown == [True, False, per_split, False]


@pytest.mark.gpu
@pytest.mark.implementations("triton")
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_a_long_prefill_on_a_gpu(on: Implementation, dtype: torch.dtype, dim: int) -> None:
    """65,537 queries (8,193 in float32), with soft-cap; twice the same bits."""
    tokens = 65_537 if dtype != torch.float32 else 8193
    shapes = (tokens, 4, dim), (tokens, 2, dim), (tokens, 2, dim)
    q, k, v = (on.draw(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes))
    options, whole = AttentionOptions(dim**-0.5, 20.0), ([0, tokens], [0, tokens])
    results = [segment_attention(q, k, v, *whole, options, True)[0] for _ in range(2)]
    assert results[0].equal(results[1])
    rows = [0, 1, 63, 64, 255, 256, tokens // 2, tokens - 1]
    oracle = over_sequences([(1, torch.arange(row + 1)) for row in rows], options)
    exact, _ = oracle(*(x.cpu().double() for x in (q[rows], k.transpose(0, 1), v.transpose(0, 1))))
    error = (results[0][rows].cpu().double() - exact).abs().max().item()
    # A weight and an output are rounded once each to the dtype; values reach about 4.
    assert error <= 4 * torch.finfo(dtype).eps * v.abs().max().item()
