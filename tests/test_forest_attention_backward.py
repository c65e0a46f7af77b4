"""Gradients of forest attention in torch: against autograd through dense attention in float64."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.cpp import torch_only
from kernels.forest_attention import AttentionOptions, ForestPlan, forest_attention, torch_impl
from kernels.forest_attention.backward_schedule import key_tiles, query_tiles
from kernels.forest_attention.plan import Suffixes, WorkTile
from tests.forests import Sample, Segment, Shape
from tests.oracles.attention import Problem, problem

PLAIN = AttentionOptions(0.25)
SHAPE = Shape(1, 3, 8, 5, torch.float64)


@st.composite
def trees(draw: st.DrawFn) -> list[Sample]:
    """Up to 5 segments in trees of 1 to 3 levels."""
    lengths = st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 130]))
    prompts: list[tuple[Segment, ...]] = []
    for name in range(draw(st.integers(1, 5))):
        parents = [(), *(prompt for prompt in prompts if len(prompt) < 3)]
        prompts.append((*draw(st.sampled_from(parents)), (name, draw(lengths))))
    return [Sample(100 + i, prompt, 0) for i, prompt in enumerate(prompts)]


SHAPES = st.builds(
    Shape,
    st.integers(1, 2),
    st.sampled_from([1, 3]),
    st.sampled_from([2, 8]),
    st.sampled_from([1, 5]),
    st.sampled_from([torch.float64, torch.float32]),
)
OPTIONS = st.builds(
    AttentionOptions,
    st.sampled_from([0.1, 0.35]),
    st.sampled_from([None, 3.0]),
    st.sampled_from([None, 1, 2, 37]),
)


@given(trees(), SHAPES, OPTIONS, st.booleans())
@settings(max_examples=60)
def test_gradients_equal_those_of_dense_attention(
    samples: list[Sample], shape: Shape, options: AttentionOptions, d_lse: bool
) -> None:
    case = problem(samples, shape, options, d_lse=d_lse)
    found = case.gradients()
    case.check(found)
    unseen = case.k.isnan().all(-1).all(-1)
    assert unseen.any() and all(grad[unseen].eq(0).all() for grad in found[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_forwards_on_cpu(dtype: torch.dtype) -> None:
    """C++ where it runs, and torch, with a gradient in the layout of the tokens."""
    samples = [Sample(9 + i, ((0, 70), (1 + i, 30)), 0) for i in range(3)]
    case = problem(samples, replace(SHAPE, dtype=dtype), AttentionOptions(0.25, 3.0, 60))
    found = case.gradients()
    case.check(found)
    assert all(grad.is_contiguous() for grad in found)
    with torch_only():
        case.check(case.gradients())


def test_only_some_queries_have_a_gradient() -> None:
    """A part of a prompt whose first tokens are keys only."""
    samples = [Sample(9, ((0, 80), (1, 70)), 0), Sample(10, ((0, 80), (2, 9)), 0)]
    for window in (None, 20):
        case = problem(
            samples,
            SHAPE,
            AttentionOptions(0.25, None, window),
            [(0, 60, 80), (1, 3, 70), (2, 4, 5)],
        )
        case.check(case.gradients())


def test_a_query_without_keys_has_no_gradient() -> None:
    """Query 1 stands before its only keys, query 3 has no item; q, k and v are NaN there."""
    at = torch.tensor([4, 2, 6, 5])
    plan = ForestPlan([WorkTile(0, 3, 0, 4, 3)], at)
    generator = torch.Generator().manual_seed(0)
    q, k, v, d_o = (torch.randn(4, 2, 3, generator=generator).double() for _ in range(4))
    k, v = (torch.cat([x, torch.full_like(x, float("nan"))]) for x in (k, v))
    mask = torch.zeros(4, 8, dtype=torch.bool)
    mask[0, :2] = mask[2, :4] = True
    case = Problem(q, k, v, d_o, d_o[..., 0], plan, mask, PLAIN)
    found = case.gradients()
    case.check(found)
    assert found[0][[1, 3]].eq(0).all() and found[1][4:].eq(0).all()


def test_nothing_at_all() -> None:
    empty = ForestPlan([], torch.zeros(0, dtype=torch.int64))
    q = torch.zeros(0, 2, 4, requires_grad=True)
    cache = torch.full((1, 8, 4), float("nan"), requires_grad=True)
    out = forest_attention(q, cache, cache, empty, PLAIN)
    d_q, d_cache = torch.autograd.grad(out.sum(), (q, cache))
    assert d_q.shape == (0, 2, 4) and d_cache.eq(0).all()


def test_either_result_alone() -> None:
    case = problem([Sample(9, ((0, 30),), 0)], SHAPE, AttentionOptions(0.25, 3.0, None))
    assert case.d_lse is not None

    def gradients(which: int) -> tuple[Tensor, ...]:
        inputs = case.inputs()
        result = case.attend(*inputs)[which]
        return torch.autograd.grad(result, inputs, (case.d_o, case.d_lse)[which])

    together = case.gradients()
    for both, of_o, of_lse in zip(together, gradients(0), gradients(1), strict=True):
        assert (both - of_o - of_lse).abs().max() <= 1e-10
    assert gradients(1)[2].eq(0).all() and gradients(1)[0].ne(0).any()


def test_a_shared_prompt_sums_over_its_samples() -> None:
    """Its gradients are the sum of those of the same sequences, each with a prompt of its own."""
    shape, options = Shape(2, 2, 8, 8, torch.float64), AttentionOptions(0.3, 5.0, None)
    paths = [((0, 50), (1 + i % 2, 20), (3 + i, 17)) for i in range(4)]
    together = problem([Sample(9, path, 0) for path in paths], shape, options, d_lse=False)
    for name in (0, 1, 2):  # a loss of the leaves: how often a shared token counts is not asked
        together.d_o[together.places[name][0]] = 0
    grads = together.gradients()
    total = [torch.zeros_like(grad) for grad in grads]
    for path in paths:
        alone = problem([Sample(9, path, 0)], shape, options, d_lse=False)
        for name, _ in path:
            alone.d_o[alone.places[name][0]] = together.d_o[together.places[name][0]]
        for i, grad in enumerate(alone.gradients()):
            for name, _ in path:
                total[i][together.places[name][i > 0]] += grad[alone.places[name][i > 0]]
    for grad, unshared in zip(grads, total, strict=True):
        assert grad.abs().max() > 0.1 and (grad - unshared).abs().max() <= 1e-10


def test_the_same_bits_in_every_run() -> None:
    samples = [Sample(9 + i, ((0, 90), (1 + i, 30)), 0) for i in range(3)]
    case = problem(samples, replace(SHAPE, dtype=torch.float32), AttentionOptions(0.25, 3.0, 60))
    runs = [case.gradients() for _ in range(3)]
    for again in runs[1:]:
        assert all(a.equal(b) for a, b in zip(runs[0], again, strict=True))


def test_a_gradient_of_another_plan_is_refused() -> None:
    nowhere = torch.zeros(2, dtype=torch.int64)
    suffix = Suffixes(0, 16, torch.tensor([0, 1]), nowhere + 1, nowhere, 1)
    plans = {
        "suffixes": ForestPlan([], nowhere, suffix),
        "advancing positions": ForestPlan([], nowhere, advancing=True),
    }
    q, cache = torch.zeros(2, 2, 4), torch.zeros(1, 32, 4)
    for kind, plan in plans.items():
        for leaf in range(3):
            inputs = [q, cache, cache]
            inputs[leaf] = inputs[leaf].clone().requires_grad_()
            with pytest.raises(ValueError, match=f"no gradient for a plan with {kind}"):
                forest_attention(inputs[0], inputs[1], inputs[2], plan, PLAIN)
            with torch.no_grad():
                forest_attention(inputs[0], inputs[1], inputs[2], plan, PLAIN)


def test_twice_is_refused() -> None:
    case = problem([Sample(9, ((0, 5),), 0)], SHAPE, PLAIN)
    inputs = case.inputs()
    out, _ = case.attend(*inputs)
    weight = torch.ones_like(out, requires_grad=True)
    (grad,) = torch.autograd.grad(out, inputs[0], weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_scores_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tiles of queries where many keys are seen; the gradients are the same."""
    samples = [Sample(9 + i, ((0, 90), (1 + i, 30)), 0) for i in range(3)]
    case = problem(samples, SHAPE, AttentionOptions(0.25, 3.0, None), d_lse=False)
    monkeypatch.setattr(torch_impl, "_MAX_SCORES", 5 * 3 * len(case.k))
    inputs = case.inputs()
    out, _ = case.attend(*inputs)
    widest = 0
    bmm = torch.bmm

    def watched(a: Tensor, b: Tensor) -> Tensor:
        nonlocal widest
        widest = max(widest, bmm(a, b).numel())
        return bmm(a, b)

    monkeypatch.setattr(torch, "bmm", watched)
    found = torch.autograd.grad(out, inputs, case.d_o)
    monkeypatch.undo()
    assert 0 < widest <= 5 * 3 * len(case.k)
    case.check(found)


# -- lists -----------------------------------------------------------------------------------------


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
