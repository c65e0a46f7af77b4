"""The statistics, against scipy, and against plain loops where scipy has none."""

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from bench import statistics
from engine.decided import student_tail
from engine.summary import wilson


@pytest.fixture
def rng() -> np.random.Generator:
    """A test draws the same values whatever has run before it."""
    return np.random.default_rng(8)


def test_the_interval_of_a_mean_is_scipys(rng: np.random.Generator) -> None:
    """scipy's percentile bootstrap draws other resamples: ends agree to what B of them tell."""
    values = rng.gamma(2.0, size=120)
    expected = stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=1
    ).confidence_interval  # fmt: skip
    error = values.std() / math.sqrt(len(values))
    found = statistics.interval(values)
    # the quantile's own error: sqrt(p (1 - p) / B) over the density at 2 sd, 0.054
    assert found == pytest.approx(tuple(expected), abs=4 * error * math.sqrt(0.024 / 2000) / 0.054)


def test_resampled_means_are_those_of_rows() -> None:
    """Every mean is one of as many rows with repetition, the same for all columns; a resample is
    drawn a part at a time, and is the same for a seed."""
    values = np.stack([2.0 ** np.arange(5), 10.0 + 2.0 ** np.arange(5)], 1)
    found = statistics.resampled_means(values, 3, resamples=400)
    possible = {sum(each) / 5 for each in product(values[:, 0].tolist(), repeat=5)}
    assert found.shape == (400, 2) and set(found[:, 0].tolist()) <= possible
    assert np.allclose(found[:, 1] - found[:, 0], 10.0) and len(set(found[:, 0].tolist())) > 30
    assert (found == statistics.resampled_means(values, 3, resamples=400)).all()
    assert (found != statistics.resampled_means(values, 4, resamples=400)).any()


def test_parts_of_resamples_are_drawn_alike(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = rng.random((7, 2))
    whole = statistics.resampled_means(values, 0)
    monkeypatch.setattr(statistics, "_CELLS", 21)
    assert (statistics.resampled_means(values, 0) == whole).all()


def test_the_interval_covers_the_mean_as_often_as_it_says() -> None:
    covered = 0
    for seed in range(200):
        right = (np.random.default_rng(seed).random(60) < 0.7).astype(float)
        low, high = statistics.interval(right)
        covered += low <= 0.7 <= high
    assert stats.binomtest(covered, 200, 0.94).pvalue > 1e-4


def test_the_interval_over_seeds_and_rows(rng: np.random.Generator) -> None:
    """Its variance is that of both: of a table that only seeds tell apart, and only rows."""
    of_rows = np.tile(rng.random(80), (4, 1))
    assert np.ptp(statistics.seed_interval(of_rows)) == pytest.approx(
        np.ptp(statistics.interval(of_rows[0])), rel=0.1
    )
    of_seeds = np.tile(np.array([[0.1], [0.2], [0.6], [0.7]]), (1, 80))
    means = {sum(each) / 4 for each in product((0.1, 0.2, 0.6, 0.7), repeat=4)}
    low, high = statistics.seed_interval(of_seeds)
    assert min(abs(low - mean) for mean in means) < 1e-12 and 0.1 <= low < 0.2 < 0.6 < high <= 0.7


@given(st.lists(st.integers(-6, 6), min_size=2, max_size=9))
def test_sign_flips_are_all_gone_through(differences: list[int]) -> None:
    values = np.array(differences, dtype=float)
    found = statistics.sign_flip(values)
    if not any(differences):
        assert found == 1.0
        return
    expected = stats.permutation_test(
        (values,), np.sum, permutation_type="samples", n_resamples=np.inf
    ).pvalue
    assert found == pytest.approx(expected)


def test_sign_flips_are_drawn_where_there_are_many(rng: np.random.Generator) -> None:
    values = rng.normal(0.25, 1.0, 60)
    found = statistics.sign_flip(values)
    expected = stats.permutation_test(
        (values,), np.sum, permutation_type="samples", n_resamples=50_000, rng=0
    ).pvalue
    assert 0.002 < expected < 0.5
    assert abs(found - expected) < 5 * math.sqrt(expected / statistics.FLIPS)
    assert statistics.sign_flip(np.ones(200)) == 1 / (statistics.FLIPS + 1)


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilsons_interval_is_scipys(share: tuple[int, int]) -> None:
    expected = stats.binomtest(*share).proportion_ci(method="wilson")
    assert wilson(*share) == pytest.approx((expected.low, expected.high), abs=1e-7)


@given(st.floats(0, 60), st.integers(1, 80))
def test_students_tail_is_scipys(t: float, dof: int) -> None:
    assert student_tail(t, dof) == pytest.approx(stats.t.sf(t, dof), abs=1e-13)


SCORED = st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=1, max_size=30)


@given(SCORED)
def test_the_area_under_the_roc_curve(scored: list[tuple[int, bool]]) -> None:
    scores = np.array([score for score, _ in scored])
    positive = np.array([is_positive for _, is_positive in scored])
    found = statistics.roc_auc(scores, positive)
    if positive.all() or not positive.any():
        assert math.isnan(found)
        return
    above = stats.mannwhitneyu(scores[positive], scores[~positive]).statistic
    assert found == pytest.approx(above / (positive.sum() * (~positive).sum()))


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=20))
def test_what_is_found(pairs: list[tuple[bool, bool]]) -> None:
    hits = pairs.count((True, True))
    precision = hits / found if (found := sum(a for a, _ in pairs)) else 0.0
    recall = hits / positive if (positive := sum(b for _, b in pairs)) else 0.0
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    got = statistics.detection(*map(np.array, zip(*pairs, strict=True)))
    assert got == pytest.approx((precision, recall, f1))
