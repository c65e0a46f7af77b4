"""Gradients of forest attention, against autograd through dense attention."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.forest_attention import (
    AttentionOptions,
    ForestPlan,
    forest_attention,
    forest_attention_with_lse,
    torch_impl,
)
from kernels.forest_attention.backward_schedule import key_tiles, query_tiles
from kernels.forest_attention.plan import Suffixes, WorkTile
from kernels.launch import intercept
from tests.forests import Sample, Segment, Shape
from tests.implementations import DTYPES, HALVES, Implementation, Largest, check_once_differentiable
from tests.oracles.attention import Problem, problem
from tests.rows import num_threads

ON_CPU = Implementation("cpp")
PLAIN = AttentionOptions(0.25)
CAPPED = AttentionOptions(0.25, 3.0)
WINDOWED = AttentionOptions(0.2, 5.0, 30)
# Shapes: powers of two; none; more heads in a group than rows of a product.
SQUARE, ODD, MANY_HEADS = Shape(2, 2, 16, 16), Shape(1, 3, 24, 20), Shape(1, 20, 8, 33)
Paths = Sequence[tuple[Segment, ...]]
TWO_LEAVES: Paths = [((0, 70), (1, 20)), ((0, 70), (2, 9))]
THREE_LEVELS: Paths = [
    ((0, 33), (1, 9), (3, 18)),
    ((0, 33), (1, 9), (4, 17)),
    ((0, 33), (2, 5)),
]
SMALL: Paths = [((0, 6), (1, 4)), ((0, 6), (2, 3))]


def make(
    on: Implementation, paths: Paths, shape: Shape, options: AttentionOptions, **more: Any
) -> Problem:
    samples = [Sample(100 + i, path, 0) for i, path in enumerate(paths)]
    return problem(samples, shape, options, device=on.device, **more)


@contextmanager
def spans_of_kernels(on: Implementation, full: bool) -> Iterator[None]:
    """In Triton each kernel of the backward runs once and has masked spans and, if asked for, full
    ones; in C++ forward and backward run."""
    found: dict[str, tuple[int, int]] = {}

    def run(kernel: Any, grid: tuple[int, ...], arguments: tuple, options: dict[str, Any]) -> None:
        given = dict(zip(kernel.arg_names, arguments, strict=False))
        if "tiles_ptr" in given:
            assert kernel.__name__ not in found
            _, _, first, first_masked, end = given["tiles_ptr"].T
            counts = int((first_masked - first).sum()), int((end - first_masked).sum())
            found[kernel.__name__] = counts
        kernel[grid](*arguments, **options)

    with intercept(run) if on.name == "triton" else on.counted() as counts:
        yield
    if on.name == "triton":
        assert set(found) == {"_forest_attention_dq_kernel", "_forest_attention_dkv_kernel"}
        assert all(masked and (unmasked or not full) for unmasked, masked in found.values())
    else:
        ran = {"attend_tiles", "merge", "attend_backward"} if on.name == "cpp" else set()
        assert counts is not None and set(counts) == ran


@pytest.mark.parametrize(
    ("paths", "shape", "options", "d_lse"),
    [
        (TWO_LEAVES, SQUARE, PLAIN, True),
        (TWO_LEAVES, SQUARE, AttentionOptions(0.25, 3.0, 60), False),
        (THREE_LEVELS, ODD, CAPPED, False),
        (THREE_LEVELS, ODD, WINDOWED, True),
        (SMALL, MANY_HEADS, CAPPED, True),
        (THREE_LEVELS, Shape(2, 1, 16, 8), WINDOWED, False),
    ],
)
def test_gradients(
    on: Implementation, dtype: torch.dtype, paths: Paths, shape: Shape, options: Any, d_lse: bool
) -> None:
    """Full spans, in Triton, reach across branches. A cell that no query sees has gradient 0."""
    case = make(on, paths, replace(shape, dtype=dtype), options, d_lse=d_lse)
    with spans_of_kernels(on, full=paths is TWO_LEAVES and dtype == torch.float32):
        found = case.gradients()
    case.check(found)
    unseen = case.k.isnan().all(-1).all(-1)
    assert unseen.any() and all(grad[unseen].eq(0).all() for grad in found[1:])
    assert all(grad.is_contiguous() for grad in found)


def test_only_some_queries_have_a_gradient(on: Implementation) -> None:
    """A part of a prompt whose first tokens are keys only."""
    paths = [((0, 30), (1, 40)), ((0, 30), (2, 9))]
    for window in (None, 20):
        options = AttentionOptions(0.25, None, window)
        case = make(on, paths, ODD, options, pieces=[(0, 20, 30), (1, 3, 40), (2, 4, 5)])
        case.check(case.gradients())


def test_slices(on: Implementation) -> None:
    """Queries, keys and values as one projection leaves them, and gradients of other layouts."""
    case = make(on, SMALL, SQUARE, CAPPED)
    expected = case.gradients()
    k, v = case.k.nan_to_num(), case.v.nan_to_num()
    rows = max(len(case.q), len(k))
    wide = torch.full((rows, 3, 9, 16), float("nan"), device=on.device)
    wide[: len(case.q), 1, :4], wide[: len(k), 1, 4:6], wide[: len(k), 1, 6:8] = case.q, k, v
    wide = wide[:, 1].requires_grad_()
    q, k, v = wide[: len(case.q), :4], wide[: len(k), 4:6], wide[: len(k), 6:8]
    assert not any(x.is_contiguous() for x in (q, k, v))
    assert case.d_lse is not None
    # Heads before tokens, and a last dimension with gaps.
    for order in ((1, 0, 2), (1, 2, 0)):
        back = sorted(range(3), key=order.__getitem__)
        grads = case.d_o.permute(order).contiguous().permute(back), case.d_lse.T.contiguous().T
        found = torch.autograd.grad(case.attend(q, k, v), (q, k, v), grads)
        case.check(found)
        same = all(a.equal(b) for a, b in zip(found, expected, strict=True))
        assert same or on.name != "triton"


def test_a_gradient_of_the_log_sum_exp_alone(on: Implementation) -> None:
    case = make(on, SMALL, ODD, CAPPED)
    case.d_o.zero_()
    inputs = case.inputs()
    found = torch.autograd.grad(case.attend(*inputs)[1], inputs, case.d_lse)
    case.check(found)
    assert found[0].ne(0).any() and found[2].eq(0).all()


def test_queries_without_keys_and_keys_without_queries(on: Implementation) -> None:
    """Query 1 stands before its only keys, query 3 has no item; keys from 4 on are NaN."""
    plan = ForestPlan([WorkTile(0, 3, 0, 4, 3)], torch.tensor([4, 2, 6, 5], device=on.device))
    q, k, v, d_o = (on.draw(4, 2, 16, seed=seed) for seed in range(4))
    k, v = (torch.cat([x, torch.full_like(x, float("nan"))]) for x in (k, v))
    mask = torch.zeros(4, 8, dtype=torch.bool)
    mask[0, :2] = mask[2, :4] = True
    case = Problem(q, k, v, d_o, d_o[..., 0], plan, mask, PLAIN)
    found = case.gradients()
    case.check(found)
    assert found[0][[1, 3]].eq(0).all()
    assert all(grad[4:].eq(0).all() and grad[:4].ne(0).any() for grad in found[1:])


def test_nothing_at_all(on: Implementation) -> None:
    empty = ForestPlan([], torch.zeros(0, dtype=torch.int64, device=on.device))
    q = torch.zeros(0, 2, 16, device=on.device, requires_grad=True)
    cache = torch.full((1, 8, 16), float("nan"), device=on.device, requires_grad=True)
    out, lse = forest_attention_with_lse(q, cache, cache, empty, PLAIN)
    assert out.shape == (0, 2, 16) and lse.shape == (0, 2)
    d_q, d_cache = torch.autograd.grad(out.sum(), (q, cache))
    assert d_q.shape == q.shape and d_cache.eq(0).all()


def test_the_same_bits_in_every_run(on: Implementation) -> None:
    """In C++ with any number of threads."""
    case = make(on, [((0, 70), (1, 9)), ((0, 70), (2, 65))], Shape(3, 2, 16, 24), WINDOWED)
    runs = []
    for threads in (1, 2, 5) if on.name == "cpp" else (1, 1):
        with num_threads(threads):
            runs.append(case.gradients())
    assert all(a.equal(b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


def test_half_types_keep_magnitude_and_direction(on: Implementation) -> None:
    """Sums over 200 queries of one sign, along the exact gradients and across them."""
    tokens = 200
    tiles = [WorkTile(i, min(64, tokens - i), 0, 16, 0) for i in range(0, tokens, 64)]
    plan = ForestPlan(tiles, torch.full((tokens,), 15, device=on.device))
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.rand(n, 1, 16, generator=generator).add(0.5) for n in (tokens, 16, 16, tokens)]
    d_lse = torch.rand(tokens, 1, generator=generator).to(on.device)
    mask = torch.ones(tokens, 16, dtype=torch.bool)
    for dtype in set(DTYPES[on.name]) & set(HALVES):
        q, k, v, d_o = (x.to(dtype).to(on.device) for x in drawn)
        case = Problem(q, k, v, d_o, d_lse, plan, mask, PLAIN)
        found = case.gradients()
        case.check(found)
        exact = case.dense(torch.float64)
        for mine, plain, exactly in zip(found, case.dense(dtype), exact, strict=True):
            mine = mine.double().cpu()
            along = ((mine * exactly).sum() / exactly.square().sum()).item()
            # Roundings are half a unit at most, and those of single elements average out.
            assert abs(along - 1) <= torch.finfo(dtype).eps / 2
            assert (mine - along * exactly).norm() <= 4 * (plain.double() - exactly).norm()


def test_long_sums_are_float32(on: Implementation) -> None:
    """One large term and 511 small ones, each 1/256 of a unit in the last place of the large one:
    a sum kept in a half type would stand still. All weights are equal, so that sums are known."""
    for dtype in set(DTYPES[on.name]) & set(HALVES):
        terms = torch.full((512, 1, 16), 2048 * torch.finfo(dtype).eps / 256)
        terms[0] = 2048
        expected = terms.double().sum(0)[0, 0].to(dtype)
        assert expected == 2048 * (1 + 2 * torch.finfo(dtype).eps)
        terms = terms.to(dtype).to(on.device)
        nothing = torch.zeros_like(terms)
        first = nothing[:1].clone()
        first[..., 0] = 1
        # 512 queries of one key, where d_lse is what ds becomes; then one query of 512 keys.
        tiles = [WorkTile(i, 64, 0, 1, 0) for i in range(0, 512, 64)]
        plan = ForestPlan(tiles, torch.zeros(512, dtype=torch.int64, device=on.device))
        mask = torch.ones(512, 1, dtype=torch.bool)
        d_lse = terms[..., 0].float()
        unit = AttentionOptions(1.0)
        many = Problem(torch.ones_like(terms), nothing[:1], first, terms, d_lse, plan, mask, unit)
        _, d_k, d_v = many.gradients()
        assert d_k.eq(expected).all() and d_v.eq(expected).all()
        tiles = [WorkTile(0, 1, 0, 256, 0), WorkTile(0, 1, 256, 256, 256)]
        plan = ForestPlan(tiles, torch.tensor([511], device=on.device))
        d_lse = torch.full((1, 1), 512.0, device=on.device)
        one = Problem(nothing[:1], terms, nothing, nothing[:1], d_lse, plan, mask.T, unit)
        assert one.gradients()[0].eq(expected).all()


def test_a_gradient_of_another_plan_is_refused(on: Implementation) -> None:
    nowhere = torch.zeros(2, dtype=torch.int64, device=on.device)
    suffix = Suffixes(torch.tensor([[0], [16]]).to(on.device), nowhere + 1, nowhere, 1)
    q, cache = on.draw(2, 2, 4), torch.zeros(1, 32, 4, device=on.device)
    for kind, plan in (
        ("suffixes", ForestPlan([], nowhere, suffix)),
        ("advancing positions", ForestPlan([], nowhere, advancing=True)),
    ):
        for leaf in range(3):
            given = [q, cache, cache]
            given[leaf] = given[leaf].clone().requires_grad_()
            with pytest.raises(ValueError, match=f"no gradient for a plan with {kind}"):
                forest_attention(given[0], given[1], given[2], plan, PLAIN)
            with torch.no_grad():
                forest_attention(given[0], given[1], given[2], plan, PLAIN)


def test_a_second_gradient_is_refused(on: Implementation) -> None:
    case = make(on, [((0, 5),)], SQUARE, PLAIN)
    check_once_differentiable(lambda q: case.attend(q, case.k, case.v)[0], case.q)


# -- a CPU alone -----------------------------------------------------------------------------------


@st.composite
def trees(draw: st.DrawFn) -> list[tuple[Segment, ...]]:
    """Up to 5 segments in trees of 1 to 3 levels."""
    lengths = st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 130]))
    prompts: list[tuple[Segment, ...]] = []
    for name in range(draw(st.integers(1, 5))):
        parents = [(), *(prompt for prompt in prompts if len(prompt) < 3)]
        prompts.append((*draw(st.sampled_from(parents)), (name, draw(lengths))))
    return prompts


SHAPES = st.builds(
    Shape, st.integers(1, 2), st.sampled_from([1, 3]), st.sampled_from([2, 8]),
    st.sampled_from([1, 5]), st.sampled_from([torch.float64, torch.float32]),
)  # fmt: skip
OPTIONS = st.builds(
    AttentionOptions, st.sampled_from([0.1, 0.35]), st.sampled_from([None, 3.0]),
    st.sampled_from([None, 1, 2, 37]),
)  # fmt: skip


@given(trees(), SHAPES, OPTIONS, st.booleans())
@settings(max_examples=40)
def test_gradients_of_any_tree(
    paths: Paths, shape: Shape, options: AttentionOptions, d_lse: bool
) -> None:
    """In C++, and in torch in float64."""
    case = make(ON_CPU, paths, shape, options, d_lse=d_lse)
    case.check(case.gradients())


@pytest.mark.implementations("torch")
def test_scores_are_bounded(on: Implementation, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tiles of queries where many keys are seen; the gradients are the same."""
    paths = [((0, 90), (1 + i, 30)) for i in range(3)]
    case = make(on, paths, Shape(1, 3, 4, 4), CAPPED, d_lse=False)
    bound = 8 * 3 * len(case.k)
    monkeypatch.setattr(torch_impl, "_MAX_SCORES", bound)
    with Largest() as largest:
        found = case.gradients()
    assert case.q.numel() < largest.numel <= bound
    case.check(found)


# -- what is executed -----------------------------------------------------------------------------


@st.composite
def plans(draw: st.DrawFn) -> tuple[ForestPlan, int]:
    """Any work tiles over up to 30 cells by queries whose positions go up, stand, fall and jump."""
    positions: list[int] = []
    for _ in range(draw(st.integers(0, 5))):
        at, length = draw(st.integers(0, 30)), draw(st.integers(1, 12))
        positions += range(at, at + length) if draw(st.booleans()) else [at] * length
    cells = draw(st.integers(1, 30))
    work = []
    for _ in range(draw(st.integers(0, 5)) if positions else 0):
        query, key = draw(st.integers(0, len(positions) - 1)), draw(st.integers(0, cells - 1))
        num_queries = draw(st.integers(1, len(positions) - query))
        num_keys = draw(st.integers(1, cells - key))
        work.append(WorkTile(query, num_queries, key, num_keys, draw(st.integers(0, 20))))
    return ForestPlan(work, torch.tensor(positions, dtype=torch.int64)), cells


@given(plans(), st.sampled_from([None, 1, 5]), st.integers(1, 20), st.integers(1, 9))
@settings(max_examples=150)
def test_both_lists_are_the_plan(
    drawn: tuple[ForestPlan, int], window: int | None, size: int, step: int
) -> None:
    """Every pair of a query and a key that it sees as often as the plan has it; tiles cover their
    axis; full spans hide nothing, and no span has what no query sees."""
    plan, cells = drawn
    q_pos = plan.initial_positions.tolist()

    def sees(query: int, position: int) -> bool:
        return position <= q_pos[query] and (window is None or position > q_pos[query] - window)

    expected = sorted(
        (query, tile.key + j)
        for tile in map(WorkTile._make, plan.tiles.tolist())
        for query in range(tile.query, tile.query + tile.num_queries)
        for j in range(tile.num_keys)
        if sees(query, tile.position + j)
    )
    for of_keys, (tiles, spans) in enumerate(
        [query_tiles(plan, window, size, step), key_tiles(plan, cells, window, size, step)]
    ):
        covered: list[int] = []
        pairs: list[tuple[int, int]] = []
        work = []
        for first, count, begin, masked, end in tiles.tolist():
            assert 0 < count <= size and begin <= masked <= end
            covered += range(first, first + count)
            work.append(int(spans[begin:end, 1].sum()))
            for span, (start, length, position) in enumerate(spans[begin:end].tolist(), begin):
                assert span >= masked or length % step == 0
                for other in range(length):
                    mine = []
                    for own in range(count):
                        query, key = (start + other, own) if of_keys else (first + own, other)
                        if sees(query, position + key):
                            mine.append((query, (first if of_keys else start) + key))
                    assert mine and (span >= masked or len(mine) == count)
                    pairs += mine
        assert sorted(covered) == list(range(cells if of_keys else len(q_pos)))
        assert sorted(pairs) == expected and work == sorted(work, reverse=True)


def test_lists_of_a_packed_tree() -> None:
    """A prompt of 256 and 4 branches of 128: full spans are joined across branches."""
    work = [WorkTile(t, 64, 0, 256, 0) for t in range(0, 256, 64)]
    for first in range(256, 768, 128):
        for tile in (first, first + 64):
            work += [WorkTile(tile, 64, 0, 256, 0), WorkTile(tile, 64, first, 128, 256)]
    positions = [*range(256), *([*range(256, 384)] * 4)]
    plan = ForestPlan(work, torch.tensor(positions))
    tiles, spans = key_tiles(plan, 768, None, 64, 16)
    first_key = {row[0]: spans[row[2] : row[4]].tolist() for row in tiles.tolist()}
    assert len(first_key) == 12
    assert first_key[0] == [[64, 704, 0], [0, 64, 0]]
    assert first_key[192] == [[256, 512, 192], [192, 64, 192]]
    assert first_key[256] == [[320, 64, 256], [256, 64, 256]]
    tiles, spans = query_tiles(plan, None, 32, 64)
    first_query = {row[0]: spans[row[2] : row[4]].tolist() for row in tiles.tolist()}
    assert first_query[288] == [[0, 256, 0], [256, 64, 256]]
    assert first_query[352] == [[0, 320, 0], [320, 64, 320]]
    assert first_query[736] == [[0, 256, 0], [640, 64, 256], [704, 64, 320]]


# -- Triton alone ----------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.implementations("triton")
@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_a_packed_tree_on_a_gpu(on: Implementation, dim: int, half: torch.dtype) -> None:
    """A prompt of 1,000 tokens and four branches of 300, with everything; twice the same bits."""
    paths = [((0, 1000), (1 + i, 300)) for i in range(4)]
    for options in (AttentionOptions(dim**-0.5), AttentionOptions(dim**-0.5, 20.0, 700)):
        case = make(on, paths, Shape(2, 4, dim, dim, half), options)
        first, again = case.gradients(), case.gradients()
        case.check(first)
        assert all(a.equal(b) for a, b in zip(first, again, strict=True))
