"""Forest attention and the merge in Triton: against plain attention, the torch implementation and
float64, with every branch of the kernel shown to be taken."""

import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.forest_attention import (
    AttentionOptions,
    ForestPlan,
    forest_attention,
    forest_attention_with_lse,
    torch_impl,
)
from kernels.forest_attention import schedule as module
from kernels.forest_attention.plan import Suffixes, WorkTile
from kernels.launch import Target, intercept, target_of
from kernels.merge_states import merge_states, merge_states_ref
from kernels.segment_attention import segment_attention, segment_attention_ref
from tests.forests import Grove, Sample, Segment, Shape
from tests.oracles.attention import Tolerance, dense_attention
from tests.triton_device import (
    DEVICE,
    DTYPES,
    assert_like_reference,
    counted,
    on_triton,
)

pytestmark = on_triton

PLAIN = AttentionOptions(0.25)
CAPPED = AttentionOptions(0.25, 20.0)
WINDOWED = AttentionOptions(0.2, 30.0, 97)


@contextmanager
def instances() -> Iterator[Counter[str]]:
    """Programs run, by instance of the kernel."""
    programs: Counter[str] = Counter()

    def run(kernel: Any, grid: tuple[int, ...], arguments: tuple, options: dict[str, Any]) -> None:
        if kernel.__name__ == "_forest_attention_kernel":
            kind = "suffix" if options["SUFFIX"] else "narrow" if options["M"] <= 16 else "wide"
            programs[kind] += grid[0] * grid[1]
        else:
            programs["merge"] += 1
        kernel[grid](*arguments, **options)

    with intercept(run):
        yield programs


def attend(grove: Grove, q: Tensor, plan: ForestPlan, options: AttentionOptions) -> Tensor:
    return forest_attention(q, *grove.caches, plan, options)


def schedules_in(plan: ForestPlan) -> Any:
    """What a plan was compiled to for the forward."""
    (schedules,) = (
        value for key, value in plan._compiled.items() if key[:2] == ("triton", "forward")
    )
    return schedules


def check_decode(grove: Grove, out: Tensor, options: AttentionOptions, less: int = 0) -> None:
    tolerance = Tolerance(grove.shape.dtype)
    for i in range(len(grove.samples)):
        tolerance.compare(out[i : i + 1], grove.sequence(i, less), options)
    tolerance.check()


def check_prefill(grove: Grove, out: Tensor, options: AttentionOptions) -> None:
    tolerance = Tolerance(grove.shape.dtype)
    for node, first, stop in grove.whole():
        tolerance.compare(out[: stop - first], grove.attend_to(node, stop), options)
        out = out[stop - first :]
    tolerance.check()


def random_forest(seed: int, longest: int = 300) -> list[Sample]:
    """Up to 6 segments in trees of 1 to 3 levels, and up to 7 samples that end at any of them."""
    rng = random.Random(seed)
    lengths = [1, 2, 15, 16, 17, 63, 64, 65, 129, 255, 256, 257, longest]
    lengths = [length for length in lengths if length <= longest]
    prompts: list[tuple[Segment, ...]] = []
    for name in range(rng.randint(1, 6)):
        parents = [(), *(prompt for prompt in prompts if len(prompt) < 3)]
        prompts.append((*rng.choice(parents), (name, rng.choice(lengths))))
    return [
        Sample(100 + i, rng.choice(prompts), rng.choice([0, 1, 5, 40, 256, 257]))
        for i in range(rng.randint(1, 7))
    ]


SHAPES = [
    Shape(1, 2, 16, 16),
    Shape(2, 3, 24, 20),  # nothing is a power of two
    Shape(1, 20, 8, 33),  # more heads in a group than rows of the narrow instance
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("seed", "options"),
    [
        (0, PLAIN),
        (1, CAPPED),
        (2, WINDOWED),
        (3, AttentionOptions(0.2, None, 1)),
        (4, WINDOWED),
        (5, PLAIN),
    ],
)
def test_random_forests(seed: int, options: AttentionOptions, dtype: torch.dtype) -> None:
    shape = SHAPES[seed % 3]
    samples = random_forest(seed, longest=65 if shape.groups == 20 else 300)
    shape = Shape(shape.kv_heads, shape.groups, shape.head_dim, shape.v_head_dim, dtype)
    slots = random.Random(seed).sample(range(len(samples) + 2), len(samples))
    grove = Grove(samples, shape, capacity=272, slots=slots, device=DEVICE)
    q, plan = grove.decode()
    check_decode(grove, attend(grove, q, plan, options), options)
    assert plan.executed == plan.num_tiles(options.window)
    grove = Grove(samples, shape, written=False, device=DEVICE)
    q, plan = grove.prefill(grove.whole())
    with instances() as programs:
        check_prefill(grove, attend(grove, q, plan, options), options)
    assert "suffix" not in programs and programs["narrow"] + programs["wide"] > 0


@pytest.mark.parametrize("per_split", [False, True])
@pytest.mark.parametrize("options", [PLAIN, WINDOWED])
def test_the_same_plan_in_torch(options: AttentionOptions, per_split: bool) -> None:
    samples = [Sample(100 + i, ((0, 270), (1 + i % 2, 70)), 30 * i) for i in range(4)]
    grove = Grove(samples, Shape(1, 4, 32, 16), capacity=96, device=DEVICE)
    prefill = Grove(samples, Shape(1, 1, 32, 16), written=False, device=DEVICE)
    for each, (q, plan) in (
        (grove, grove.decode(per_split=per_split)),
        (prefill, prefill.prefill(prefill.whole()[:1], per_split)),
    ):
        ours, our_lse = forest_attention_with_lse(q, *each.caches, plan, options)
        _, again = each.decode() if each is grove else each.prefill(prefill.whole()[:1])
        theirs, their_lse = torch_impl.run(q, *each.caches, again, options)
        assert plan.executed == again.executed > 0
        # Each is held to float64 by itself; to each other, 16 units of values up to 5.
        eps = torch.finfo(torch.float32).eps
        assert (ours - theirs).abs().max() <= 16 * eps * 5
        assert (our_lse - their_lse).abs().max() <= 16 * eps * their_lse.abs().max()


def test_every_instance_runs_and_merges() -> None:
    """A node for all, nodes for few, suffixes of several splits: wide, narrow and suffix."""
    samples = [Sample(100 + i, ((0, 600), (1 + i // 2, 90)), 200 + 30 * i) for i in range(10)]
    grove = Grove(samples, Shape(1, 2, 16, 16), capacity=480, device=DEVICE)
    q, plan = grove.decode()
    with instances() as programs:
        out = attend(grove, q, plan, PLAIN)
    check_decode(grove, out, PLAIN)
    assert programs["suffix"] == 10 * 2
    assert programs["narrow"] == 5 and programs["merge"] == 1
    (schedule,) = schedules_in(plan)
    assert programs["wide"] >= 1 and schedule.table.shape == (10, programs["wide"] + 1 + 2)


def test_spans_are_joined_or_kept_apart() -> None:
    """Adjacent splits of a prompt: one span, one partial, no merge; or one partial for each."""
    grove = Grove([Sample(9, ((0, 600), (1, 60)), 0)], Shape(), written=False, device=DEVICE)
    last = [(grove.fresh[1], 0, 60)]
    grove.write(grove.fresh[0], 0, 600)
    for per_split in (False, True):
        q, plan = grove.prefill(last, per_split)
        with instances() as programs:
            out = attend(grove, q, plan, PLAIN)
        tolerance = Tolerance(torch.float32)
        tolerance.compare(out, grove.attend_to(grove.fresh[1], 60), PLAIN)
        tolerance.check()
        schedules = schedules_in(plan)
        (schedule,) = schedules
        if per_split:
            assert programs["wide"] == 4 * 2 and schedule.table.shape == (60, 4)
            assert schedule.wide.spans[:, 1].tolist() == [256, 256, 88, 60] * 2
    # With processors to spare the spans are cut; with few they are one after the other.
    for processors, cut in ((1, 1), (64, 3)):
        rows = module.TileRows(16, 64, Target("sm_90", 1 << 17, processors))
        _, plan = grove.prefill(last)
        (schedule,) = module.compile_plan(plan, None, module.HeadShape(2, 1, 16, rows))
        assert len(schedule.wide.programs) == 2 * cut
        assert (schedule.table is None) == (cut == 1)


@pytest.mark.parametrize(
    ("options", "per_split"), [(PLAIN, False), (WINDOWED, False), (WINDOWED, True)]
)
def test_one_static_plan_after_another(options: AttentionOptions, per_split: bool) -> None:
    """Buffers with room to spare give the bits of the plans whose tiles they take; what the plan
    before has left in them, and what no program names, is of no consequence."""
    shape = Shape(1, 2, 16, 16)
    static: module.StaticPlan | None = None
    grown = []
    # Wide and narrow programs; then fewer, then more of them; the last has nothing shared.
    for count, longest in ((9, 40), (4, 9), (9, 270), (9, 0)):
        samples = [
            Sample(100 + i, ((0, longest + 20), (1 + i % 4, 9 + i)), 1 + 5 * i)
            if longest
            else Sample(100 + i, ((200 + i, 9),), 1 + 5 * i)
            for i in range(count)
        ]
        slots = random.Random(longest).sample(range(11), count)
        grove = Grove(samples, shape, capacity=288, slots=slots, device=DEVICE)
        q, plan = grove.decode(max_length=270, per_split=per_split)
        expected = attend(grove, q, plan, options)
        assert plan.suffix is not None
        suffix = plan.suffix
        if static is None:
            tensors = [torch.zeros(9, dtype=torch.int64, device=DEVICE) for _ in range(3)]
            nobody = torch.full((1,), -1, device=DEVICE)
            positions, lengths, starts = tensors
            empty = Suffixes(suffix.base, suffix.capacity, nobody, lengths, starts, 288)
            heads = module.HeadShape.of(2, 1, 16, 16, torch.float32, target_of(q))
            static = module.StaticPlan(positions, empty, {options.window}, heads, per_split)
        for to, given in ((positions, plan.positions), (lengths, suffix.length)):
            to.zero_()[:count] = given
        starts.zero_()[:count] = suffix.position
        padded = ForestPlan(
            plan.tiles,
            positions,
            Suffixes(suffix.base, suffix.capacity, suffix.row, lengths, starts, 270),
            advancing=True,
            per_split=per_split,
        )
        for schedule in static._schedules.values():
            for programs in (schedule.wide, schedule.narrow):
                programs.programs.fill_(1 << 30)
                programs.spans.fill_(1 << 30)
            assert schedule.table is not None
            schedule.table.fill_(1 << 40)
        (room,), before = static._sizes.values(), static.plan
        grown.append(static.load(padded))
        rows = torch.full((9, 2, 16), float("nan"), device=DEVICE)
        rows[:count] = q
        out = attend(grove, rows, static.plan, options)
        assert out[:count].equal(expected) and out[count:].eq(0).all()
        (plain,) = schedules_in(plan)
        needed = (
            len(plain.wide.programs), len(plain.wide.spans),
            len(plain.narrow.programs), len(plain.narrow.spans),
            plain.num_partials - 2 * count, plain.table.shape[1] - 2,
        )  # fmt: skip
        fits = all(has >= wants for has, wants in zip(room, needed, strict=True))
        assert grown[-1] == (not fits) == (static.plan is not before)
    assert grown[0] and not all(grown)


def test_keys_outside_every_window_are_not_read() -> None:
    """They are NaN; so are the keys of tiles that the window cuts off within a span."""
    samples = [Sample(100 + i, ((0, 700),), 20 + i) for i in range(4)]
    grove = Grove(samples, Shape(), capacity=32, device=DEVICE)
    slab = grove.fresh[0].slab
    assert slab is not None
    # The first query stands at 719 and sees from 719 - 39 on: tile 672 of 16 keys and later.
    for cells in grove.caches:
        cells[:, slab.start : slab.start + 640] = float("nan")
    q, plan = grove.decode()
    options = AttentionOptions(0.25, None, 40)
    assert plan.num_tiles(40) == 1 and plan.num_tiles() == 3
    check_decode(grove, attend(grove, q, plan, options), options)
    assert attend(grove, q, plan, PLAIN).isnan().all()


def test_a_plan_moves_on() -> None:
    """Lengths and positions change on the device; programs past the suffixes' ends stay idle."""
    samples = [Sample(100 + i, ((0, 40),), length) for i, length in enumerate((30, 264, 258))]
    grove = Grove(samples, Shape(), capacity=272, device=DEVICE)
    q, plan = grove.decode(less=9, max_length=266)
    grove.decode()  # writes what the last step will see
    for less in (9, 3, 0):
        assert plan.suffix is not None
        lengths = torch.tensor([s.generated - less for s in grove.samples], device=DEVICE)
        plan.positions += lengths - plan.suffix.length
        plan.suffix.length[:] = lengths
        rows = [grove.sequence(i, less)[0] for i in range(3)]
        q = torch.from_numpy(np.concatenate(rows)).to(DEVICE)
        with instances() as programs:
            out = attend(grove, q, plan, PLAIN)
        assert programs["suffix"] == 3 * 2
        check_decode(grove, out, PLAIN, less)


@pytest.mark.parametrize("options", [PLAIN, WINDOWED])
def test_per_split_bits_do_not_depend_on_the_company(options: AttentionOptions) -> None:
    samples = [
        Sample(100 + i, ((0, 300), (1 + i % 3, 33 + 90 * (i % 3))), 1 + 30 * i) for i in range(9)
    ]

    def decoded(some: list[Sample]) -> dict[int, Tensor]:
        grove = Grove(some, Shape(1, 2, 16, 16), capacity=288, device=DEVICE)
        q, plan = grove.decode(per_split=True)
        out = attend(grove, q, plan, options)
        return {sample.name: row for sample, row in zip(grove.samples, out, strict=True)}

    together = decoded(samples)
    for some in ([samples[3]], samples[4:7], samples[::-1]):
        assert all(row.equal(together[name]) for name, row in decoded(some).items())


def test_partials_are_bounded_with_one_for_each_split(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long prefill is cut between its tiles; no bit changes."""
    results = []
    for limit in (1 << 20, 4 * 2 * 16 * 64 * 2):
        monkeypatch.setattr(module, "_MAX_PARTIAL_BYTES", limit)
        grove = Grove([Sample(9, ((0, 290),), 0)], Shape(), written=False, device=DEVICE)
        q, plan = grove.prefill(grove.whole(), per_split=True)
        results.append(attend(grove, q, plan, PLAIN))
        schedules = schedules_in(plan)
        assert len(schedules) == (1 if limit == 1 << 20 else 3)
    assert results[0].equal(results[1])


def test_log_sum_exps_are_natural() -> None:
    samples = [Sample(100 + i, ((0, 70),), 20 + i) for i in range(3)]
    grove = Grove(samples, Shape(2, 2, 16, 16), capacity=32, device=DEVICE)
    q, plan = grove.decode()
    for options in (PLAIN, AttentionOptions(0.25, 5.0)):
        _, lse = forest_attention_with_lse(q, *grove.caches, plan, options)
        for i in range(3):
            query, k, v = (torch.from_numpy(x).double() for x in grove.sequence(i))
            everything = torch.ones(1, len(k), dtype=torch.bool)
            expected = dense_attention(query, k, v, everything, options.scale, options.softcap)[1]
            error = (lse[i].double().cpu() - expected[0]).abs().max()
            assert error <= 8 * torch.finfo(torch.float32).eps * expected.abs().max()


@pytest.mark.parametrize("queries", [1, 63, 64, 129])
def test_odd_numbers_of_queries(queries: int) -> None:
    grove = Grove([Sample(9, ((0, queries),), 0)], Shape(1, 1), written=False, device=DEVICE)
    q, plan = grove.prefill(grove.whole())
    check_prefill(grove, attend(grove, q, plan, PLAIN), PLAIN)


def test_no_keys_give_zero() -> None:
    plan = ForestPlan([WorkTile(1, 1, 0, 4, 0)], torch.tensor([0, 3, 0], device=DEVICE))
    q = torch.randn(3, 2, 4, device=DEVICE)
    cache = torch.randn(1, 8, 4, device=DEVICE)
    out, lse = forest_attention_with_lse(q, cache, cache, plan, AttentionOptions(1.0))
    assert out[[0, 2]].eq(0).all() and out[1].ne(0).all()
    assert lse[[0, 2]].isneginf().all() and lse[1].isfinite().all()
    empty = ForestPlan([], torch.zeros(0, dtype=torch.int64, device=DEVICE))
    with counted() as counts:
        assert forest_attention(q[:0], cache, cache, empty, PLAIN).shape == (0, 2, 4)
    assert not counts


def test_an_idle_slot_and_an_empty_suffix() -> None:
    """One leaf without a token of its own, one idle slot, one leaf with only a suffix."""
    row = torch.tensor([1, -1, 0], device=DEVICE)
    suffix = Suffixes(
        0, 16, row, torch.tensor([0, 3], device=DEVICE), torch.tensor([0, 0], device=DEVICE), 5
    )
    plan = ForestPlan([], torch.tensor([0, 2], device=DEVICE), suffix)
    cache = torch.full((1, 48, 4), float("nan"), device=DEVICE)
    cache[:, :3] = torch.randn(1, 3, 4, device=DEVICE)
    q = torch.randn(2, 2, 4, device=DEVICE)
    out = forest_attention(q, cache, cache, plan, AttentionOptions(1.0))
    assert out[0].eq(0).all()
    scores = q[1].double() @ cache[0, :3].double().T
    expected = scores.softmax(-1) @ cache[0, :3].double()
    assert (out[1] - expected).abs().max() <= 16 * torch.finfo(torch.float32).eps * 4


@pytest.mark.parametrize("name", ["q", "k_cache", "v_cache"])
def test_what_the_kernel_does_not_take_is_refused(name: str) -> None:
    plan = ForestPlan([], torch.zeros(2, dtype=torch.int64, device=DEVICE))
    shapes = {"q": (2, 4, 4), "k_cache": (2, 8, 4), "v_cache": (2, 8, 4)}
    tensors: dict[str, Any] = {
        key: torch.zeros(shape, device=DEVICE) for key, shape in shapes.items()
    }
    wrong = tensors | {name: tensors[name].transpose(1, 2).contiguous().transpose(1, 2)}
    with pytest.raises(ValueError, match="last dimension must be contiguous"):
        forest_attention(plan=plan, options=PLAIN, **wrong)
    double = {key: tensor.double() for key, tensor in tensors.items()}
    with pytest.raises(ValueError, match="float64 runs on CPU only"):
        forest_attention(plan=plan, options=PLAIN, **double)


def test_slices_of_wider_tensors_are_taken() -> None:
    """Queries as the projections leave them, keys token by token."""
    samples = [Sample(100 + i, ((0, 40),), 9 + i) for i in range(3)]
    grove = Grove(samples, Shape(2, 2, 16, 16), capacity=16, device=DEVICE)
    q, plan = grove.decode()
    expected = attend(grove, q, plan, PLAIN)
    wide = torch.full((3, 200), float("nan"), device=DEVICE)
    wide[:, 30:94] = q.flatten(1)
    sliced = wide[:, 30:94].unflatten(1, (4, 16))
    k, v = (cells.transpose(0, 1).contiguous().transpose(0, 1) for cells in grove.caches)
    assert not sliced.is_contiguous() and not k.is_contiguous()
    assert forest_attention(sliced, k, v, plan, PLAIN).equal(expected)


# -- on a GPU alone --------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_a_long_prefill_on_a_gpu(dim: int, dtype: torch.dtype) -> None:
    """65,537 queries (8,193 in float32), with soft-cap; twice the same bits."""
    tokens = 65_537 if dtype != torch.float32 else 8193
    generator = torch.Generator(DEVICE).manual_seed(dim)
    q, k, v = (
        torch.randn(shape, generator=generator, device=DEVICE).to(dtype)
        for shape in ((tokens, 4, dim), (2, tokens, dim), (2, tokens, dim))
    )
    tiles = [
        WorkTile(tile, min(64, tokens - tile), key, min(256, tokens - key), key)
        for tile in range(0, tokens, 64)
        for key in range(0, min(tile + 64, tokens), 256)
    ]
    positions = torch.arange(tokens, device=DEVICE)
    options = AttentionOptions(dim**-0.5, 20.0)
    results = [forest_attention(q, k, v, ForestPlan(tiles, positions), options) for _ in range(2)]
    assert results[0].equal(results[1])
    rows = [0, 1, 63, 64, 255, 256, tokens // 2, tokens - 1]
    mask = torch.arange(tokens, device=DEVICE) <= torch.tensor(rows, device=DEVICE)[:, None]
    keys, values = (x.transpose(0, 1).double() for x in (k, v))
    exact, _ = dense_attention(q[rows].double(), keys, values, mask, options.scale, 20.0)
    error = (results[0][rows].double() - exact).abs().max().item()
    # A weight and an output are rounded once each to the dtype; values reach about 4.
    assert error <= 4 * torch.finfo(dtype).eps * v.abs().max().item()


@pytest.mark.gpu
def test_offsets_beyond_two_to_the_31_on_a_gpu() -> None:
    """Keys at the far end of a cache of 2 x 8.6 M x 128 elements."""
    cells = (1 << 23) + 200_000
    cache = torch.zeros(2, cells, 128, dtype=torch.bfloat16, device=DEVICE)
    assert cache.numel() > 1 << 31
    cache[:, -512:] = torch.randn(2, 512, 128, device=DEVICE).bfloat16()
    q = torch.randn(8, 4, 128, device=DEVICE).bfloat16()
    tiles = [WorkTile(0, 8, cells - 512 + first, 256, first) for first in (0, 256)]
    q_pos = torch.full((8,), 511, device=DEVICE)
    options = AttentionOptions(0.1)
    far = forest_attention(q, cache, cache, ForestPlan(tiles, q_pos), options)
    near = cache[:, -512:].contiguous()
    tiles = [tile._replace(key=tile.position) for tile in tiles]
    assert far.equal(forest_attention(q, near, near, ForestPlan(tiles, q_pos), options))


# -- merge -----------------------------------------------------------------------------------------


def random_merge(seed: int, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Partials some of which are empty (and then NaN), and a table with gaps."""
    rng = np.random.default_rng(seed)
    count, heads, width = 9, 3, 20
    o = torch.from_numpy(rng.standard_normal((count, heads, width), dtype=np.float32))
    lse = torch.from_numpy(rng.standard_normal((count, heads), dtype=np.float32) * 20)
    lse[torch.from_numpy(rng.random((count, heads)) < 0.3)] = float("-inf")
    index = torch.from_numpy(rng.integers(-1, count, (rows, columns)))
    return o.to(DEVICE), lse.to(DEVICE), index.to(DEVICE)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 3), (43, 8), (129, 2), (4, 0), (0, 3)])
def test_merge_equals_float64(rows: int, columns: int) -> None:
    o, lse, index = random_merge(rows, rows, columns)
    with counted() as counts:
        out, out_lse = merge_states(o, lse, index)
    assert counts["_merge_states_kernel"] == (rows > 0)
    for result, part in ((out, 0), (out_lse, 1)):
        assert_like_reference(
            result, lambda *a, part=part: merge_states_ref(*a)[part], o, lse, index
        )


def test_merge_reads_no_empty_partial_and_keeps_nan_to_its_row() -> None:
    o, lse, _ = random_merge(0, 1, 1)
    lse[:] = 0.0
    lse[0], o[0] = float("-inf"), float("nan")
    lse[1], o[2] = float("nan"), float("nan")
    index = torch.tensor([[0, 3], [-1, 0], [1, 3], [2, 3], [3, 4]], device=DEVICE)
    out, out_lse = merge_states(o, lse, index)
    assert out[0].equal(o[3]) and out_lse[0].eq(0).all()
    assert out[1].eq(0).all() and out_lse[1].isneginf().all()
    assert out[2].isnan().all() and out_lse[2].isnan().all() and out[3].isnan().all()
    assert out[4].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_merge_rounds_once(dtype: torch.dtype) -> None:
    o, lse, index = random_merge(1, 7, 4)
    wide, _ = merge_states(o, lse, index)
    out, out_lse = merge_states(o, lse, index, dtype)
    assert out.equal(wide.to(dtype)) and out_lse.dtype == torch.float32


# -- segments --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("causal", "options"),
    [(False, AttentionOptions(0.3)), (True, AttentionOptions(0.3, 5.0, 20))],
)
def test_segment_attention(causal: bool, options: AttentionOptions, dtype: torch.dtype) -> None:
    """Four pairs, one of them without keys and one without queries."""
    offsets = [0, 3, 3, 70, 75], [0, 5, 9, 80, 80]
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(size, heads, 16, generator=generator).to(dtype).to(DEVICE)
        for size, heads in ((75, 4), (80, 2), (80, 2))
    )
    with counted() as counts:
        results = segment_attention(q, k, v, *offsets, options, causal, backend="triton")
    assert counts["_forest_attention_kernel"] >= 1
    assert results[0][70:].eq(0).all() and results[1][70:].isneginf().all()
    for part, result in enumerate(results):
        assert_like_reference(
            result if part == 0 else result.to(dtype),
            lambda q, k, v, part=part: segment_attention_ref(
                q, k, v, *offsets, options, causal
            )[part],
            q, k, v,
        )  # fmt: skip
    with pytest.raises(ValueError, match="'torch' does not run"):
        segment_attention(q, k, v, *offsets, options, causal, backend="torch")
