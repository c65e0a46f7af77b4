"""The chance that a vote still turns, against simulation and enumeration; the size of rounds."""

import math
import random
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import decided
from engine.decided import chance_of_upset, samples_to_draw, student_tail
from engine.settings import JudgeSettings
from kernels.vote import Rule

SETTINGS = JudgeSettings()
SURE = 0.99

Votes = list[tuple[int, ...]]


def draw_votes(rng: random.Random, count: int, means: list[float]) -> Votes:
    """Scores of 1 to 10 around these means."""
    return [
        tuple(min(10, max(1, round(rng.gauss(mean, 2.0)))) for mean in means) for _ in range(count)
    ]


@pytest.mark.parametrize("dof", [1, 2, 3, 4, 7, 8, 33, 120])
def test_the_tail_is_the_integral_of_the_density(dof: int) -> None:
    """By the trapezoid rule over the angle a, t = sqrt(dof) tan a; its error is below 1e-9 here."""

    def integral(start: float) -> float:
        angles = np.linspace(start, math.pi / 2, 200_001)
        return float(np.trapezoid(np.cos(angles) ** (dof - 1), angles))

    for t in (0.0, 0.1, 0.7, 2.0, 4.0, 15.0):
        expected = integral(math.atan(t / math.sqrt(dof))) / (2 * integral(0.0))
        assert abs(student_tail(t, dof) - expected) < 1e-9


@pytest.mark.parametrize(
    ("means", "count", "invalid", "remaining"),
    [([6, 5.5], 4, 0, 28), ([6, 5], 6, 3, 23), ([7, 6, 6], 12, 1, 9), ([6.2], 5, 1, 3)],
)
def test_the_chance_is_that_of_the_model_simulated(
    means: list[float], count: int, invalid: int, remaining: int
) -> None:
    """The model itself, drawn step by step: a variance, a mean, and each sample to come."""
    votes = draw_votes(random.Random(count), count, means)
    totals = np.sum(votes, axis=0)
    if len(totals) == 1:
        leads = np.array(votes, float) - SETTINGS.threshold
        leads *= math.copysign(1.0, leads.sum())
    else:
        best = int(totals.argmax())
        others = [i for i in range(len(totals)) if i != best]
        leads = np.array([[vote[best] - vote[i] for i in others] for vote in votes], float)
    leads = np.concatenate([leads, np.zeros((invalid, leads.shape[1]))])
    rng = np.random.default_rng(0)
    draws, drawn = 50_000, len(leads)
    dof = drawn - 1 + decided.PRIOR_SAMPLES
    prior_sd = decided.PRIOR_SD * 9
    expected = 0.0
    for lead in leads.T:
        squares = ((lead - lead.mean()) ** 2).sum() + decided.PRIOR_SAMPLES * prior_sd**2
        sd = np.sqrt(squares / rng.chisquare(dof, draws))
        mean = rng.normal(lead.mean(), sd / math.sqrt(drawn))
        more = rng.normal(mean[:, None], sd[:, None], (draws, remaining)).sum(1)
        expected += float((lead.sum() + more < 0).mean())
    chance = chance_of_upset(votes, invalid, remaining, SETTINGS)
    assert 0.005 < chance < 0.5
    assert abs(chance - expected) < 4 * math.sqrt(expected * len(leads.T) / draws)


def test_a_tie_counts_half() -> None:
    """Against every way in which 8 more votes can fall, when the votes so far say nearly all."""
    steps = (-1, 0, 1)
    votes: Votes = [(5, 5 - step) for step in steps for _ in range(2000)]
    votes += [(5, 4)] * 4
    sums = [4 + sum(more) for more in product(steps, repeat=8)]
    loss, tie = (sum(map(test, sums)) / len(sums) for test in ((0).__gt__, (0).__eq__))
    chance = chance_of_upset(votes, 0, 8, SETTINGS)
    assert abs(chance - (loss + tie / 2)) < 0.1 * tie < 0.01


@given(
    st.lists(st.tuples(*[st.integers(1, 10)] * 3), min_size=1, max_size=20),
    st.integers(0, 4),
    st.integers(1, 40),
    st.permutations(range(3)),
    st.randoms(use_true_random=False),
)
def test_what_moves_the_chance(
    votes: Votes, invalid: int, remaining: int, order: list[int], rng: random.Random
) -> None:
    chance = chance_of_upset(votes, invalid, remaining, SETTINGS)
    assert 0 <= chance <= 1
    totals = [sum(column) for column in zip(*votes, strict=True)]
    best = totals.index(max(totals))
    if totals.count(max(totals)) == 1:  # of equal leaders the first is taken
        moved = [tuple(vote[i] for i in order) for vote in votes]
        shuffled = rng.sample(moved, len(moved))
        again = chance_of_upset(shuffled, invalid, remaining, SETTINGS)
        assert again == pytest.approx(chance, rel=1e-9, abs=1e-12)
    else:
        assert chance >= 0.499
    # A larger lead is safer where all samples are valid; more samples to come are less safe.
    ahead = [tuple(s + (i == best) for i, s in enumerate(vote)) for vote in votes]
    assert chance_of_upset(ahead, 0, remaining, SETTINGS) <= (
        chance_of_upset(votes, 0, remaining, SETTINGS) + 1e-12
    )
    assert chance <= chance_of_upset(votes, invalid, remaining + 1, SETTINGS) + 1e-12
    single = [vote[:1] for vote in votes]
    mirrored = [(11 - vote[0],) for vote in single]  # about the threshold of 5.5
    assert chance_of_upset(single, invalid, remaining, SETTINGS) == pytest.approx(
        chance_of_upset(mirrored, invalid, remaining, SETTINGS), rel=1e-9
    )


def test_a_wider_range_of_scores_is_only_another_unit() -> None:
    votes = draw_votes(random.Random(1), 8, [6, 5])
    wide = [tuple(10 * score for score in vote) for vote in votes]
    settings = JudgeSettings(score_min=10, score_max=100, threshold=55.0)
    assert chance_of_upset(wide, 2, 9, settings) == pytest.approx(
        chance_of_upset(votes, 2, 9, SETTINGS), rel=1e-12
    )


def rounds(scores: list[tuple[int, ...] | None], cycle: int, sure: float = SURE) -> list[int]:
    """The sizes of all rounds of a row that would draw these samples."""
    sizes: list[int] = []
    while more := samples_to_draw(scores[: sum(sizes)], len(scores), cycle, sure, SETTINGS):
        sizes.append(more)
    return sizes


@pytest.mark.parametrize(
    ("k", "cycle", "sizes"),
    [(32, 1, [*[3] * 10, 2]), (32, 2, [4] * 8), (32, 3, [*[3] * 10, 2]), (32, 20, [20, 12]),
     (9, 4, [4, 4, 1]), (3, 3, [3]), (1, 1, [1])],
)  # fmt: skip
def test_rounds_are_whole_cycles_and_undecided_rows_draw_all(
    k: int, cycle: int, sizes: list[int]
) -> None:
    even: list[tuple[int, ...] | None] = [(8, 3) if i % 2 else (3, 8) for i in range(k)]
    assert rounds(even, cycle) == sizes
    assert rounds([None] * k, cycle) == sizes


def test_a_clear_row_stops_after_its_first_round() -> None:
    clear: list[tuple[int, ...] | None] = [(9, 2), (10, 1)] * 16
    assert rounds(clear, 2) == [4]
    silent: list[tuple[int, ...] | None] = [None] * 4
    assert rounds(silent + clear[4:], 2)[:2] == [4, 4]
    assert rounds([(9,), (10,)] * 16, 1) == rounds([(1,), (2,)] * 16, 1) == [3]
    assert sum(rounds([(6,), (5,)] * 16, 1)) == 32


@pytest.mark.parametrize("sure", [0.9, 0.97, 0.99])
def test_it_is_as_sure_as_it_says(sure: float) -> None:
    """Judges of all kinds: gaps between the responses small and large, some samples invalid. Of
    rows that stop early at most 1 - sure should turn; 4 standard errors above that is a fault."""
    rng = random.Random(7)
    stopped, turned, used = 0, 0, 0
    for _ in range(600):
        n = rng.choice((2, 3))
        means = [rng.gauss(5.5, 1.5) for _ in range(n)]
        scores = [None if rng.random() < 0.05 else v for v in draw_votes(rng, 32, means)]
        drawn = sum(rounds(scores, n, sure))
        used += drawn
        few, full = (np.sum([v for v in scores[:m] if v], axis=0) for m in (drawn, 32))
        stopped += drawn < 32
        turned += full[few.argmax()] < full.max()
    assert used < 600 * 32 * 0.6 and stopped > 300
    assert turned / stopped < 1 - sure + 4 * math.sqrt(sure * (1 - sure) / stopped)


@pytest.mark.parametrize("rule", ["standardised", "borda"])
def test_other_rules_decide_by_their_points(rule: Rule) -> None:
    """A sample that sets its responses far apart counts no more than one that hardly does: what is
    a landslide in scores is a close vote in points, and the other way round."""
    settings = JudgeSettings()
    landslide = [(10, 1)] * 3 + [(5, 6)] * 5
    steady = [(5, 4)] * 12 + [(1, 10)]
    for scores, decided_by_sum in ((landslide, True), (steady, False)):
        draw = [samples_to_draw(scores, 64, 1, 0.8, settings, each) for each in ("sum", rule)]
        assert [count == 0 for count in draw] == [decided_by_sum, not decided_by_sum], draw
