"""Forest attention against plain attention over each sequence by itself, in value and in bits."""

import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import kernels.forest_attention.torch_impl as module
from engine.forest import Node
from kernels import cpp
from kernels.forest_attention import (
    AttentionOptions,
    ForestPlan,
    forest_attention,
    forest_attention_ref,
    forest_attention_with_lse,
)
from kernels.forest_attention.plan import Suffixes, WorkTile, cut_between_queries
from tests.forests import Grove, Sample, Segment, Shape
from tests.oracles.attention import Tolerance
from tests.rows import needs_cpp

PLAIN = AttentionOptions(0.25)
LENGTHS = st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 255, 256, 257, 300, 512, 600]))
GENERATED = st.one_of(st.integers(0, 40), st.sampled_from([255, 256, 257, 300]))


@st.composite
def forests(draw: st.DrawFn) -> list[Sample]:
    """Up to 9 segments in trees of 1 to 4 levels, and samples that end at any of them."""
    prompts: list[tuple[Segment, ...]] = []
    for name in range(draw(st.integers(1, 9))):
        parents = [(), *(prompt for prompt in prompts if len(prompt) < 4)]
        prompts.append((*draw(st.sampled_from(parents)), (name, draw(LENGTHS))))
    ends = draw(st.lists(st.sampled_from(prompts), min_size=1, max_size=10))
    return [Sample(100 + i, end, draw(GENERATED)) for i, end in enumerate(ends)]


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    return Shape(
        kv_heads=draw(st.integers(1, 2)),
        groups=draw(st.integers(1, 4)),
        head_dim=draw(st.sampled_from([2, 8, 24])),
        v_head_dim=draw(st.sampled_from([1, 8, 20])),
        dtype=draw(st.sampled_from([torch.float32, torch.float64])),
    )


OPTIONS = st.builds(
    AttentionOptions,
    st.sampled_from([0.1, 0.35]),
    st.sampled_from([None, 30.0]),
    st.sampled_from([None, 1, 2, 37, 255, 300, 5000]),
)


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """torch.empty is NaN; one thread, where a test asks for no other number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(before)


def attend(grove: Grove, q: Tensor, plan: ForestPlan, options: AttentionOptions) -> Tensor:
    return forest_attention(q, *grove.caches, plan, options)


def cut(pieces: Sequence[tuple[Node, int, int]], size: int) -> list[list[tuple[Node, int, int]]]:
    """The pieces in forwards of at most `size` tokens, as prefill cuts them."""
    forwards: list[list[tuple[Node, int, int]]] = [[]]
    room = size
    for node, first, stop in pieces:
        while first < stop:
            if not room:
                forwards.append([])
                room = size
            end = min(stop, first + room)
            forwards[-1].append((node, first, end))
            room -= end - first
            first = end
    return forwards


@given(forests(), shapes(), OPTIONS, st.data())
@settings(max_examples=60)
def test_decode_equals_attention_over_each_own_sequence(
    samples: list[Sample], shape: Shape, options: AttentionOptions, data: st.DataObject
) -> None:
    """Also as lengths and positions move on within one plan, and whatever the slots."""
    slots = data.draw(st.permutations(range(len(samples) + 2)))[: len(samples)]
    grove = Grove(samples, shape, capacity=300, slots=slots)
    less = data.draw(st.integers(0, 9))
    longest = max(sample.generated for sample in samples)
    q, plan = grove.decode(less, max_length=longest)
    grove.decode()  # writes what the last step will see
    tolerance = Tolerance(shape.dtype)
    for step in sorted({less, less // 2, 0}, reverse=True):
        assert plan.suffix is not None
        lengths = [max(sample.generated - step, 0) for sample in grove.samples]
        plan.positions += torch.tensor(lengths) - plan.suffix.length
        plan.suffix.length[:] = torch.tensor(lengths)
        sequences = [grove.sequence(i, step) for i in range(len(samples))]
        q = torch.from_numpy(np.concatenate([q for q, _, _ in sequences])).to(shape.dtype)
        out = attend(grove, q, plan, options)
        for i, sequence in enumerate(sequences):
            tolerance.compare(out[i : i + 1], sequence, options)
    tolerance.check()


@given(forests(), shapes(), OPTIONS, st.sampled_from([50, 300, 4096]))
@settings(max_examples=40)
def test_prefill_equals_attention_over_each_own_sequence(
    samples: list[Sample], shape: Shape, options: AttentionOptions, tokens: int
) -> None:
    """In forwards that cut nodes anywhere; what is not yet prefilled is NaN."""
    grove = Grove(samples, shape, written=False)
    tolerance = Tolerance(shape.dtype)
    seen = 0
    for pieces in cut(grove.whole(), tokens):
        q, plan = grove.prefill(pieces)
        out = attend(grove, q, plan, options)
        assert plan.executed == plan.num_tiles(options.window)
        seen += len(q)
        for node, first, stop in pieces:
            tolerance.compare(out[: stop - first], grove.attend_to(node, stop), options)
            out = out[stop - first :]
    assert seen == grove.tree_tokens
    tolerance.check()


@given(forests(), shapes(), OPTIONS)
@settings(max_examples=12)
def test_equals_the_reference(
    samples: list[Sample], shape: Shape, options: AttentionOptions
) -> None:
    shape = Shape(shape.kv_heads, shape.groups, shape.head_dim, shape.v_head_dim, torch.float64)
    prefill = Grove(samples, shape, written=False)
    decode = Grove(samples, shape, capacity=300)
    for grove, (q, plan) in (
        (prefill, prefill.prefill(cut(prefill.whole(), 150)[0])),
        (decode, decode.decode(advancing=False)),
    ):
        expected = forest_attention_ref(q, *grove.caches, plan, options)
        results = forest_attention_with_lse(q, *grove.caches, plan, options)
        for result, reference in zip(results, expected, strict=True):
            assert result.isneginf().equal(reference.isneginf())
            error = (result - reference).nan_to_num(nan=0.0).abs().max()
            # 64 units in the last place of values up to 5: scores reach 30, sums have 2000 terms.
            assert error <= 64 * torch.finfo(torch.float64).eps * 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_accumulated_in_float32(dtype: torch.dtype) -> None:
    """The result is the float32 result of the rounded inputs, rounded once."""
    samples = [Sample(100 + i, ((0, 300), (1 + i % 2, 90)), 40 + i) for i in range(5)]
    half, full = (Grove(samples, Shape(2, 3, dtype=d), capacity=64) for d in (dtype, torch.float32))
    q, plan = half.decode()
    out = attend(half, q, plan, PLAIN)
    _, plan = full.decode()
    full.cache.k, full.cache.v = ([cells.float()] for cells in half.caches)
    with nullcontext() if cpp.runs_cpp(q) else cpp.torch_only():
        expected = attend(full, q.float(), plan, PLAIN)
    assert out.dtype == dtype and out.equal(expected.to(dtype))


# -- bits ------------------------------------------------------------------------------------------


BIT_SHAPES = [
    Shape(2, 1, 8, 8), Shape(2, 1, 32, 32), Shape(1, 2, 12, 20), Shape(2, 3, 32, 32),
    Shape(1, 4, 64, 64), Shape(1, 2, 128, 128), Shape(1, 2, 256, 256),
]  # fmt: skip
BIT_CASES = [*((1, shape) for shape in BIT_SHAPES), (2, BIT_SHAPES[1]), (3, BIT_SHAPES[3])]
VARIANTS = [PLAIN, AttentionOptions(0.2, 30.0, 97)]


@pytest.fixture(params=BIT_CASES, ids=lambda case: f"{case[0]}-threads-{case[1]}")
def bit_shape(request: pytest.FixtureRequest, poisoned: None) -> Shape:
    threads, shape = request.param
    torch.set_num_threads(threads)
    return shape


def crowd() -> list[Sample]:
    """64 samples of three trees, in all lengths."""
    rng = np.random.default_rng(0)
    samples = []
    for i in range(64):
        if i < 40:
            prompt: tuple[Segment, ...] = ((0, 70), (1, 300), (2 + i % 3, 33 + 90 * (i % 3)))
        elif i < 60:
            prompt = ((0, 70), (5, 130))
        else:
            prompt = ((6, 17), (7 + i % 2, 20))
        samples.append(Sample(100 + i, prompt, int(rng.integers(1, 288))))
    samples[3] = Sample(103, samples[3].prompt, 288)
    return samples


def decoded(
    samples: Sequence[Sample], shape: Shape, options: AttentionOptions, **how: Any
) -> dict[int, Tensor]:
    """Each sample's output by name."""
    max_length = how.pop("max_length", None)
    grove = Grove(samples, shape, **{"capacity": 288, **how})
    q, plan = grove.decode(max_length=max_length)
    out = attend(grove, q, plan, options)
    return {sample.name: row for sample, row in zip(grove.samples, out, strict=True)}


@needs_cpp
def test_a_sample_is_bit_for_bit_the_same_alone(bit_shape: Shape) -> None:
    """And with 63 others, in another order, in other slots, and with longer ones beside it."""
    samples = crowd()
    rng = np.random.default_rng(1)
    for options in VARIANTS:
        together = decoded(samples, bit_shape, options)
        shuffled = [samples[i] for i in rng.permutation(64)]
        slots = rng.permutation(80)[:64].tolist()
        elsewhere = decoded(shuffled, bit_shape, options, slots=slots, max_length=288)
        assert all(elsewhere[name].equal(row) for name, row in together.items())
        for i in (0, 3, 41, 63):
            for max_length in (None, 288):
                alone = decoded([samples[i]], bit_shape, options, max_length=max_length)
                assert alone[100 + i].equal(together[100 + i]), (i, max_length)
        for size in (2, 17, 35):
            few = decoded(shuffled[:size], bit_shape, options)
            assert all(few[name].equal(together[name]) for name in few), size


@needs_cpp
@pytest.mark.parametrize("capacity", [48, 80, 208, 272, 400])
def test_bits_do_not_depend_on_the_slots_capacity(capacity: int) -> None:
    """Also where the capacity is no power of two."""
    shape = Shape(2, 3, 32, 32)
    samples = [Sample(100 + i, ((0, 40),), length) for i, length in enumerate((1, 17, 33, 48))]
    expected = decoded(samples, shape, PLAIN, capacity=512)
    for max_length in range(48, capacity + 1, 16):
        out = decoded(samples, shape, PLAIN, capacity=capacity, max_length=max_length)
        assert all(out[name].equal(row) for name, row in expected.items()), max_length


def prefilled(
    samples: Sequence[Sample], shape: Shape, options: AttentionOptions, tokens: int
) -> dict[tuple[int, ...], Tensor]:
    """Outputs of each path of segments, in forwards of at most `tokens` tokens."""
    grove = Grove(samples, shape, written=False)
    rows: dict[tuple[int, ...], list[Tensor]] = {}
    for pieces in cut(grove.whole(), tokens):
        q, plan = grove.prefill(pieces)
        out = attend(grove, q, plan, options)
        for node, first, stop in pieces:
            path = tuple(grove.names[each][0] for each in node.path())
            rows.setdefault(path, []).append(out[: stop - first])
            out = out[stop - first :]
    return {path: torch.cat(parts) for path, parts in rows.items()}


def own_segment(sample: Sample) -> Sample:
    """The sample with its generated tokens as the last segment of its prompt."""
    return Sample(999, (*sample.prompt, (sample.name, sample.generated)), 0)


@needs_cpp
def test_prefill_is_bit_for_bit_the_same_alone_and_equal_to_decode(bit_shape: Shape) -> None:
    """Whatever else is prefilled, wherever forwards cut; and a token that was generated has the
    output that it has as the last of a prompt."""
    samples = crowd()[::9]
    whole = [own_segment(sample) for sample in samples]
    for options in VARIANTS:
        together = prefilled(whole, bit_shape, options, 1 << 20)
        for tokens in (1000, 111):
            pieces = prefilled(whole, bit_shape, options, tokens)
            assert all(pieces[path].equal(rows) for path, rows in together.items())
        for sample in (whole[1], whole[-1]):
            alone = prefilled([sample], bit_shape, options, 1 << 20)
            assert all(rows.equal(together[path]) for path, rows in alone.items())
        for less in (0, 5):
            shorter = [Sample(s.name, s.prompt, max(s.generated - less, 1)) for s in samples]
            for name, row in decoded(shorter, bit_shape, options).items():
                sample = next(s for s in shorter if s.name == name)
                path = (*(segment for segment, _ in sample.prompt), name)
                assert row.equal(together[path][sample.generated - 1]), (name, less)


# -- what is executed ------------------------------------------------------------------------------


def expected_decode_tiles(grove: Grove, window: int | None) -> int:
    """Splits of each node times tiles of 64 of its leaves, where some leaf of a tile sees a key."""
    leaves: dict[Node, list[int]] = {}
    for i, end in enumerate(grove.ends):
        for node in end.path():
            leaves.setdefault(node, []).append(i)
    count = 0
    for node, members in leaves.items():
        for tile in range(0, len(members), 64):
            q_pos = [
                grove.ends[i].stop + grove.samples[i].generated - 1 for i in members[tile:][:64]
            ]
            for first in range(node.start, node.stop, 256):
                last = min(first + 256, node.stop) - 1
                count += any(window is None or last > p - window for p in q_pos)
    return count


@pytest.mark.parametrize("window", [None, 1, 90, 400, 10_000])
def test_tiles_executed_are_the_plans(window: int | None) -> None:
    samples = crowd() + [Sample(300 + i, ((0, 70), (9, 700)), 1 + i) for i in range(70)]
    grove = Grove(samples, Shape(), capacity=288)
    q, plan = grove.decode()
    for calls in (1, 2):
        attend(grove, q, plan, AttentionOptions(1.0, None, window))
        expected = expected_decode_tiles(grove, window)
        assert plan.num_tiles(window) == expected
        assert plan.executed == calls * expected
    skipped = plan.num_tiles() - plan.num_tiles(window)
    assert (skipped > 0) == (window in (1, 90, 400))


def test_prefill_skips_what_lies_ahead_or_outside_the_window() -> None:
    grove = Grove([Sample(9, ((0, 1000), (1, 200)), 0)], Shape(), written=False)
    q, plan = grove.prefill(grove.whole())
    for window, expected in (
        (None, 4 * (1 + 2 + 3 + 4) + 4 * (4 + 1)),
        # A tile of 64 tokens looks back 63 tokens at most: into the split before at a start only.
        # The node at 1000 has its first tile look into the last split of the node above.
        (64, 4 * 4 + 3 + 4 + 1),
    ):
        before = plan.executed
        attend(grove, q, plan, AttentionOptions(1.0, None, window))
        assert plan.executed - before == plan.num_tiles(window) == expected


def test_torch_reads_a_shared_key_once_for_all_its_queries() -> None:
    """One group for each node, whoever is below it, and one for each query tile of a prefill."""
    samples = [Sample(100 + i, ((0, 300), (1 + i % 2, 40), (3 + i, 9)), 1) for i in range(8)]
    grove = Grove(samples, Shape(), capacity=16)
    _, plan = grove.decode()
    groups = module.compile_plan(plan, None)
    assert sorted(group.num_queries for group in groups.groups) == [1] * 8 + [4, 4, 8]
    assert groups.num_tiles == 2 + 2 + 8
    assert groups.index.shape == (8, 3 + 1)
    _, plan = grove.prefill(grove.whole())
    groups = module.compile_plan(plan, None)
    assert len(groups.groups) == 5 + 2 + 8 and groups.index.shape == (300 + 80 + 72, 1)


@pytest.mark.usefixtures("in_torch")
@pytest.mark.parametrize("options", VARIANTS)
def test_scores_are_bounded(options: AttentionOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    """With small blocks of queries; the results are the same."""
    grove = Grove(crowd()[::9], Shape(2, 3, 32, 32), written=False)
    q, plan = grove.prefill(grove.whole())
    expected = attend(grove, q, plan, options)
    sizes: list[int] = []
    exp: Callable[[Tensor], Tensor] = Tensor.exp

    def counted(self: Tensor) -> Tensor:
        sizes.append(self.numel())
        return exp(self)

    limit = 3 * 6 * 512
    monkeypatch.setattr(module, "_MAX_SCORES", limit)
    monkeypatch.setattr(Tensor, "exp", counted)
    out = attend(grove, q, plan, options)
    monkeypatch.undo()
    assert 0 < max(sizes) <= limit
    torch.testing.assert_close(out, expected, rtol=0, atol=16 * torch.finfo(out.dtype).eps * 5)


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


SCRIPT = """
import resource, torch
from tests.forests import Grove, Sample, Shape
from kernels.forest_attention import AttentionOptions, forest_attention

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

torch.set_num_threads(1)
shape = Shape(1, 1, 4, 32)
def grove(scale):
    samples = [Sample(i, ((0, 20 * scale), (1 + i, 3 * scale)), 0) for i in range(4)]
    return Grove(samples, shape, written=False)
small, large = grove(16), grove(1024)
q, plan = small.prefill(small.whole())
forest_attention(q, *small.caches, plan, AttentionOptions(1.0))
q, plan = large.prefill(large.whole())
assert len(q) == 32 * 1024 == large.tree_tokens
before = peak()
out = forest_attention(q, *large.caches, plan, AttentionOptions(1.0))
assert out.isfinite().all() and plan.executed == plan.num_tiles()
print(peak() - before)
"""


def test_a_tree_of_32k_tokens_needs_little_memory() -> None:
    """One plan for all of it. A T x T mask would be 1 GiB, its scores 4 GiB."""
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 200 << 20


# -- edges and refusals ----------------------------------------------------------------------------


def test_tiles_ahead_of_all_their_queries_are_not_run() -> None:
    tiles = [WorkTile(0, 2, 0, 4, 0), WorkTile(0, 2, 4, 4, 4), WorkTile(1, 1, 0, 2, 5)]
    plan = ForestPlan(tiles, torch.tensor([3, 4]))
    q, k, v = (torch.randn(shape).double() for shape in ((2, 2, 4), (1, 8, 4), (1, 8, 4)))
    out = forest_attention(q, k, v, plan, PLAIN)
    assert plan.num_tiles() == plan.executed == 2
    expected = forest_attention_ref(q, k, v, plan, PLAIN)[0]
    assert (out - expected).abs().max() <= 64 * torch.finfo(torch.float64).eps * v.abs().max()


def test_no_keys_give_zero() -> None:
    plan = ForestPlan([WorkTile(1, 1, 0, 4, 0)], torch.tensor([0, 3, 0]))
    q, k, v = torch.randn(3, 2, 4), torch.randn(1, 8, 4), torch.randn(1, 8, 4)
    out = forest_attention(q, k, v, plan, PLAIN)
    assert out[[0, 2]].eq(0).all() and out[1].ne(0).all()
    empty = ForestPlan([], torch.zeros(0).long())
    assert forest_attention(q[:0], k, v, empty, PLAIN).shape == (0, 2, 4)


def test_nan_stays_with_its_owner() -> None:
    """A sample whose keys and values are NaN does not reach the others."""
    samples = crowd()
    expected = decoded(samples, Shape(), PLAIN)
    grove = Grove(samples, Shape(), capacity=288)
    q, plan = grove.decode()
    for i in (0, 63):
        for cache in grove.caches:
            cache[:, grove._region(grove.slots[i])] = float("nan")
    out = attend(grove, q, plan, PLAIN)
    for i, sample in enumerate(grove.samples):
        assert out[i].isnan().all() if i in (0, 63) else out[i].equal(expected[sample.name])


def test_nothing_past_a_suffix_is_read() -> None:
    """Keys and values there are NaN, also of idle slots."""
    samples = crowd()
    grove = Grove(samples, Shape(2, 3, 32, 32), capacity=304)
    for cache in grove.caches:
        cache[:, grove.cache.suffix_base : grove.cache.shared_base] = float("nan")
    q, plan = grove.decode()
    for options in VARIANTS:
        tolerance = Tolerance(torch.float32)
        out = attend(grove, q, plan, options)
        for i in range(len(samples)):
            tolerance.compare(out[i : i + 1], grove.sequence(i), options)
        tolerance.check()


def suffix(**changes: Any) -> Callable[[], Suffixes]:
    one = torch.tensor([1])
    values = {
        "base": 0, "capacity": 16, "row": torch.tensor([0]), "length": one, "position": one,
        "max_length": 4,
    }  # fmt: skip
    return lambda: Suffixes(**(values | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("tiles", "suffix"),
    [
        ([WorkTile(0, 65, 0, 1, 0)], None),
        ([WorkTile(0, 1, 0, 257, 0)], None),
        ([WorkTile(0, 1, 0, 0, 0)], None),
        ([WorkTile(0, 0, 0, 1, 0)], None),
        ([WorkTile(0, 2, 0, 1, 0)], None),
        ([WorkTile(-1, 1, 0, 1, 0)], None),
        ([WorkTile(0, 1, 0, 3, 0)], None),
        ([], suffix(capacity=20)),
        ([], suffix(max_length=17)),
        ([], suffix(row=torch.tensor([1]))),
        ([], suffix(row=torch.tensor([0, 0]))),
        ([], suffix(length=torch.tensor([5]))),
        ([], suffix(length=torch.tensor([1, 1]))),
    ],
)
def test_impossible_plans_are_refused(
    tiles: list[WorkTile], suffix: Callable[[], Suffixes] | None
) -> None:
    with pytest.raises(AssertionError):
        ForestPlan(tiles, torch.tensor([1]), suffix and suffix(), advancing=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(2, 4)}, r"q \(2, 4\)"),
        ({"q": torch.zeros(2, 4, 5)}, r"q \(2, 4, 5\).*do not agree"),
        ({"v_cache": torch.zeros(2, 7, 4)}, r"v_cache \(2, 7, 4\) do not agree"),
        ({"q": torch.zeros(2, 3, 4)}, "2 kv heads do not divide 3 heads"),
        (
            {"k_cache": torch.zeros(0, 8, 4), "v_cache": torch.zeros(0, 8, 4)},
            "0 kv heads do not divide 4 heads",
        ),
        ({"q": torch.zeros(3, 4, 4)}, "3 queries, plan for 2"),
        ({"q": torch.zeros(2, 4, 4).double()}, "float64.*float32"),
        ({"v_cache": torch.zeros(2, 8, 4).half()}, "float16"),
        (
            {name: torch.zeros(2, 8 if "cache" in name else 4, 4).long()
             for name in ("q", "k_cache", "v_cache")},
            "int64",
        ),
        ({"q": torch.zeros(2, 4, 4, device="meta")}, "q is on meta"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_refused(changes: dict[str, Any], message: str) -> None:
    arguments = {
        "q": torch.zeros(2, 4, 4),
        "k_cache": torch.zeros(2, 8, 4),
        "v_cache": torch.zeros(2, 8, 4),
        "plan": ForestPlan([], torch.tensor([0, 0])),
        "options": PLAIN,
    }
    with pytest.raises(ValueError, match=message):
        forest_attention(**(arguments | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": 0.0}, "scale must be positive, got 0.0"),
        ({"scale": float("nan")}, "scale must be positive, got nan"),
        ({"softcap": -30.0}, "softcap must be positive, got -30.0"),
        ({"window": 0}, "window must be positive, got 0"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AttentionOptions(**({"scale": 1.0} | options))
