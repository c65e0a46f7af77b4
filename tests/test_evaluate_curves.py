"""The curves of bench.evaluate: subsets, ways to vote and values, against loops in plain Python."""

import math
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bench.evaluate import curves
from bench.evaluate.benchmark import Item, RowScores, Rule, Total
from bench.evaluate.curves import SUBSETS, Way
from bench.evaluate.rules import by_order, drawn
from bench.evaluate.votes import row_scores
from engine.labels import chance_right
from kernels.vote import points_of, vote
from tests.evaluated import failed, item, votes_of

K = st.integers(1, 40)


def of_means(chosen: Item, scores: Sequence[RowScores]) -> np.ndarray:
    assert chosen.rows[0].label is not None
    return drawn(scores[0].means, chosen.rows[0].label)


VOTE = Rule("vote", "", of_means)


@given(K)
def test_numbers_of_votes(k: int) -> None:
    votes = curves.votes_up_to(k)
    assert list(votes.sizes) == sorted({k, *(2**i for i in range(6) if 2**i < k)})
    counts = Counter(votes.of_subset.tolist())
    assert counts == {size: 1 if size == k else SUBSETS for size in votes.sizes}
    for size, place in zip(votes.sizes, votes.places, strict=True):
        assert set(votes.of_subset[place].tolist()) == {size}


@given(K, st.integers(1, 5), st.integers(0, 4), st.integers(0, 9))
def test_subsets_turn_through_the_orders(k: int, n: int, start: int, seed: int) -> None:
    """As a run of that many samples does; of all k there is one."""
    first = np.array([(start + i) % n for i in range(k)])
    votes = curves.votes_up_to(k)
    subsets = curves.row_subsets(first, votes, np.random.default_rng(seed))
    assert (subsets.sum(1) == votes.of_subset).all() and subsets[-1].all()
    cycle = min(n, k)
    for subset in subsets:
        shown = Counter(first[subset].tolist())
        assert max(shown.values()) - min(shown.get(order, 0) for order in first[:cycle]) <= 1


def test_all_subsets_are_drawn_alike() -> None:
    """Within orders where they rotate, and among all samples where they do not."""
    votes = curves.votes_up_to(6)
    place = votes.places[votes.sizes.index(2)]
    for first, allowed in (
        ([0, 1, 0, 1, 0, 1], [(a, b) for a, b in combinations(range(6), 2) if (a + b) % 2]),
        ([0, 0, 1, 0, 1, 1], list(combinations(range(6), 2))),
        ([1, 1, 1, 1, 1, 1], list(combinations(range(6), 2))),
    ):
        rng = np.random.default_rng(0)
        counts: Counter[tuple[int, ...]] = Counter()
        for _ in range(100):
            subsets = curves.row_subsets(np.array(first), votes, rng)[place]
            counts.update(tuple(np.flatnonzero(each).tolist()) for each in subsets)
        assert set(counts) == set(allowed)
        mean = 100 * SUBSETS / len(allowed)
        squares = sum((count - mean) ** 2 / mean for count in counts.values())
        assert squares < len(allowed) + 6 * math.sqrt(2 * len(allowed))  # chi-squared


def test_a_row_of_fewer_samples_has_them_all() -> None:
    votes = curves.votes_up_to(8)
    subsets = curves.row_subsets(np.array([0, 1, 0]), votes, np.random.default_rng(0))
    assert subsets.sum(1).tolist() == [min(size, 3) for size in votes.of_subset]


SAMPLE = st.tuples(
    st.one_of(st.none(), st.tuples(*[st.integers(1, 4)] * 3)),
    st.one_of(st.just(math.nan), st.just(-math.inf), st.integers(-2, 2).map(float)),
)


@settings(max_examples=50)
@given(st.lists(SAMPLE, min_size=1, max_size=9))
@example([((3, 1, 2), 0.0), ((1, 2, 3), 1.0), ((1, 1, 4), 0.5)])
def test_ways_are_those_of_the_vote(
    samples: list[tuple[tuple[int, ...] | None, float]],
) -> None:
    """All samples' means against those of the operation that the engine votes with."""
    scores, metas = zip(*samples, strict=True)
    if not any(scores):
        return
    k = len(samples)
    row = votes_of("r", scores, metas)
    votes = curves.votes_up_to(k)
    scale = 0.5
    kinds = [Way(), Way(meta="weights"), *(Way(meta="filter", k_meta=i) for i in (None, 1, 2, 5))]
    ways = [way._replace(points=rule) for rule in curves.POINTS for way in kinds]
    found = curves.ways_scores(row, 3, ways, votes, scale)
    assert found.by_first.shape == (0, len(ways) * len(votes.of_subset), 3)
    at_k = found.means.reshape(len(ways), -1, 3)[:, -1]
    for way, means in zip(ways, at_k, strict=True):
        meta = None
        if way.meta is not None:
            meta = torch.tensor([metas]) * (scale if way.meta == "weights" else 1.0)
        expected = vote(
            torch.tensor([[each or (0, 0, 0) for each in scores]]),
            torch.arange(3).expand(1, k, 3),
            torch.tensor([[each is not None for each in scores]]),
            torch.tensor([3]),
            torch.zeros(1),
            meta,
            (way.k_meta or (k + 1) // 2) if way.meta == "filter" else None,
            rule=way.points,
        ).mean[0]
        assert means.tolist() == pytest.approx(expected.tolist(), abs=2e-9, nan_ok=True)


def test_curves_are_means_over_subsets() -> None:
    """Of many rows with the same samples, beside the mean over all subsets that may be drawn."""
    scores = [(5, 3), (2, 4), None, (1, 6), (9, 1), (3, 3)]
    metas = [0.3, -1.0, math.nan, 2.0, 0.1, 0.7]
    expected_scores = [(4.5, 3.0), (2.5, 2.0), None, (1.0, 5.0), (8.0, 2.0), (3.0, 3.5)]
    count = 60
    items = [item(f"i{i}") for i in range(count)]
    rows = [votes_of(f"i{i}", scores, metas, expected=expected_scores) for i in range(count)]
    votes = curves.votes_up_to(6)
    ways = curves.ways_of(6, most=2, expected=True, meta=True)
    assert len({way.name for way in ways}) == len(ways) == 2 * 2 * (3 + 4)
    (values,) = curves.values_of(items, rows, [VOTE], ways, votes, meta_scale=0.5)
    assert values.draws is None and values.means.shape == (count, len(ways), 4)
    for number, way in enumerate(ways):
        table = expected_scores if way.expected else scores
        for column, size in enumerate(votes.sizes):
            allowed = [
                each for each in combinations(range(6), size)
                if abs(sum(i % 2 for i in each) - size / 2) <= 0.5
            ]  # fmt: skip
            exact = [plain_value([table[i] for i in each], [metas[i] for i in each], way, size)
                     for each in allowed]  # fmt: skip
            error = np.std(exact) / math.sqrt(count * (1 if size == 6 else SUBSETS))
            found = values.means[:, number, column].mean()
            assert abs(found - np.mean(exact)) <= 4.5 * error + 1e-9, (way.name, size)


def plain_value(
    scores: Sequence[Sequence[float] | None], metas: Sequence[float], way: Way, size: int
) -> float:
    """The chance that a vote of these samples names the first response."""
    voters = [(points_of(s, way.points), m) for s, m in zip(scores, metas, strict=True) if s]
    weights = [1.0] * len(voters)
    if way.meta == "filter":
        keep = way.k_meta or (size + 1) // 2
        voters = sorted(voters, key=lambda each: -each[1])[:keep]
        weights = [1.0] * len(voters)
    elif way.meta == "weights":
        weights = [math.exp(0.5 * meta) for _, meta in voters]
    if not voters:
        return 0.0
    totals = [sum(w * points[i] for w, (points, _) in zip(weights, voters, strict=True))
              for i in range(2)]  # fmt: skip
    return chance_right([round(total, 9) for total in totals], 0, 0.0)


def test_a_row_that_failed_has_no_scores() -> None:
    """Its shapes are those of any row, so that rules need not know."""
    votes = curves.votes_up_to(4)
    ways = curves.ways_of(4, most=2, expected=False, meta=False)
    for n in (1, 2, 5):
        broken = curves.ways_scores(failed("r"), n, ways, votes, 1.0)
        whole = curves.ways_scores(votes_of("r", [[1] * n] * 4), n, ways, votes, 1.0)
        assert broken.means.shape == whole.means.shape
        assert broken.by_first.shape == whole.by_first.shape
        assert np.isnan(broken.means).all() and np.isnan(broken.by_first).all()
    (values,) = curves.values_of([item("r")], [failed("r")], [VOTE], ways, votes)
    assert (values.means == 0.0).all()


def test_values_that_cannot_be_said() -> None:
    """They are left out of a mean over draws; a statistic keeps all draws."""

    def value(chosen: Item, scores: Sequence[RowScores]) -> np.ndarray:
        (by_first,) = (each.by_first for each in scores)
        return np.where(np.isnan(by_first[1, :, 0]), np.nan, 0.25)

    votes = curves.votes_up_to(4)
    rules = [Rule("a", "", value),
             Rule("b", "", value, Total(statistic=lambda values, facts: 0.0))]  # fmt: skip
    rows = [votes_of("r", [(1, 2)] * 4)]
    found = curves.values_of([item("r")], rows, rules, [Way()], votes)
    assert found[0].means[0, 0].tolist() == [0.25, 0.25, 0.25] and found[0].draws is None
    draws = found[1].draws
    assert draws is not None and draws.shape == (1, 1, 2 * SUBSETS + 1)
    at_1 = np.isnan(draws[0, 0, :SUBSETS])
    assert 0 < at_1.sum() < SUBSETS and not np.isnan(draws[0, 0, SUBSETS:]).any()
    one_order = [votes_of("r", [(1, 2)] * 4, first=[0] * 4)]
    found = curves.values_of([item("r")], one_order, rules, [Way()], votes)
    assert np.isnan(found[0].means).all()


def test_rows_of_an_item_have_subsets_of_their_own() -> None:
    """Drawn by their ids: the same whatever else is judged."""
    votes, ways = curves.votes_up_to(8), [Way()]
    scores = [(i, 0) for i in range(8)]
    one, other = (curves.ways_scores(votes_of(name, scores), 2, ways, votes, 1.0)
                  for name in ("a", "b"))  # fmt: skip
    again = curves.ways_scores(votes_of("a", scores), 2, ways, votes, 1.0)
    assert (one.means == again.means).all() and (one.means != other.means).any()


def test_means_that_differ_by_the_order_of_a_sum_are_equal() -> None:
    """0.1 + 0.2 + 0.3 is not 0.3 + 0.2 + 0.1."""
    points = np.array([[0.1, 0.3], [0.2, 0.2], [0.3, 0.1]])
    assert sum(points[:, 0].tolist()) != sum(points[:, 1].tolist())
    means = row_scores(points, np.ones((1, 3)), np.array([0, 1, 0])).means
    assert means[0, 0] == means[0, 1]


def test_rules_that_count_some_items_and_need_both_orders() -> None:
    """One vote has one order. A filter that drops all of an order leaves it what the others say."""
    votes = curves.votes_up_to(4)
    items = [item("r", 0), item("s", 1), item("t", 0)]
    rows = [votes_of(name, [(9, 1)] * 4, [0.0] * 4) for name in "rst"]
    rule = VOTE._replace(counts=lambda each: each.rows[0].label == 0, both_orders=True)
    ways = [Way(), Way(meta="filter"), Way(meta="filter", k_meta=1), Way(meta="weights")]
    (values,) = curves.values_of(items, rows, [rule], ways, votes)
    assert values.places.tolist() == [0, 2]
    for found in values.means:
        assert np.isnan(found).tolist() == [[True, False, False]] * 4
        assert (found[~np.isnan(found)] == 1.0).all()
    rows = [row._replace(first=np.full(4, -1)) for row in rows]  # a sample is of both orders
    (values,) = curves.values_of(items, rows, [rule], ways, votes)
    assert (values.means == 1.0).all()
    (values,) = curves.values_of(items, [*rows[:2], failed("t")], [rule], ways, votes)
    assert (values.means[1] == 0.0).all()


def both_right(item: Item, scores: Sequence[RowScores]) -> np.ndarray:
    first, second = by_order(scores[0].by_first, 0)
    return ((first > 0).astype(float) + (second > 0)) / 2


def test_both_orders_of_a_judge_that_is_always_right() -> None:
    """However its samples are filtered; not where all saw the same order, and an order of invalid
    samples alone is wrong."""
    rng = np.random.default_rng(0)
    votes = curves.votes_up_to(8)
    ways = curves.ways_of(8, most=2, expected=False, meta=True)
    rule = VOTE._replace(value=both_right, both_orders=True)
    items = [item(str(i), 0) for i in range(40)]

    def values(**changes: Any) -> np.ndarray:
        rows = [votes_of(each.id, [(9, 1)] * 8, rng.normal(size=8).tolist(), **changes)
                for each in items]  # fmt: skip
        (found,) = curves.values_of(items, rows, [rule], ways, votes)
        return found.means

    found = values()
    assert np.isnan(found[:, :, 0]).all() and (found[:, :, 1:] == 1.0).all()
    found = values(first=[0, 1, 1, 0, 0, 0, 1, 1])  # drawn
    assert (found[~np.isnan(found)] == 1.0).all() and not np.isnan(found[:, :, 2:]).any()
    assert np.isnan(values(first=[0] * 8)).all()
    row = votes_of("0", [(9, 1), None] * 4, [0.0] * 8)
    (one,) = curves.values_of(items[:1], [row], [rule], ways, votes)
    assert (one.means[:, :, 1:] == 0.5).all()


def test_a_row_without_a_valid_sample_has_no_expected_scores_either() -> None:
    rows = [votes_of("a", [(9, 1)] * 2, expected=[(8.5, 1.5)] * 2), votes_of("b", [(9, 1)] * 2)]
    rows[1] = rows[1]._replace(scores=np.full((2, 2), np.nan))
    ways = curves.ways_of(2, most=2, expected=True, meta=False)
    (values,) = curves.values_of([item("a"), item("b")], rows, [VOTE], ways, curves.votes_up_to(2))
    assert (values.means[0] == 1.0).all() and (values.means[1] == 0.0).all()


@pytest.mark.parametrize(
    ("most", "own", "first"),
    [
        (2, Way("borda"), "borda"), (2, Way("standardised"), "borda"), (3, Way(), "sum"),
        (2, Way("sum", True, "weights"), "expected sum, meta weights"),
        (2, Way("sum", False, "filter", 2), "sum, meta filter 2"), (2, None, "sum"),
    ],
)  # fmt: skip
def test_the_way_that_a_run_voted_by_comes_first(most: int, own: Way | None, first: str) -> None:
    plain = curves.ways_of(4, most=most, expected=True, meta=True)
    found = curves.ways_of(4, most=most, expected=True, meta=True, own=own)
    assert found[0].name == first and sorted(map(str, found)) == sorted(map(str, plain))


def test_chances_are_those_of_labels() -> None:
    """Of an index, of gold scores with two best, and of a single response and its threshold."""
    rows = [
        votes_of("a", [(9, 1), None]),
        votes_of("b", [(3, 3, 1)] * 2),
        votes_of("c", [(1,)] * 2),
    ]
    found = curves.chances(rows, [0, (1.0, 0.0, 1.0), 0], [Way()], curves.votes_up_to(2))
    assert found[:, 0, 1].tolist() == [1.0, 0.5, 0.0]
    assert 0 < found[0, 0, 0] < 1  # one of both, of which one is invalid
