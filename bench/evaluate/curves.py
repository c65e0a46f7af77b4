"""What fewer votes would have come to: rows' votes to items' values, for every number of votes and
way to vote.

k samples of a row, n responses. For j = 1, 2, 4 ... k votes a row has SUBSETS random orderings of
its samples, and of each the first j are a subset; all k are one subset. S subsets are those of all
j, side by side. All ways to vote see the same ones, so that differences are paired.

A run of j samples shows the orders of the responses in turn. Where the samples rotate through their
orders, every ordering does so too: a subset holds each order equally often, or once more. Where
orders were drawn, subsets are drawn among all samples.
"""

import zlib
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np

from bench.evaluate.benchmark import Item, RowScores, Rule
from bench.evaluate.rules import drawn
from bench.evaluate.votes import RowVotes, points, row_scores
from engine.labels import Label
from kernels.vote import Rule as Points

SUBSETS = 32
POINTS: tuple[Points, ...] = ("sum", "standardised", "borda")


class Way(NamedTuple):
    """A way to vote: what a sample counts for each response, by its scores or by their expected
    values, and what its meta score does: a filter keeps the best k_meta of a subset's valid
    samples, by default half of the subset, rounded up; weights are exp(meta score x scale)."""

    points: Points = "sum"
    expected: bool = False
    meta: Literal["filter", "weights"] | None = None
    k_meta: int | None = None

    @property
    def name(self) -> str:
        """As results call it."""
        words = f"expected {self.points}" if self.expected else self.points
        if self.meta is not None:
            words += f", meta {self.meta}"
        return words if self.k_meta is None else f"{words} {self.k_meta}"


class Votes(NamedTuple):
    """The numbers of votes that a run of k samples has figures for, and where among the S subsets
    those of each are."""

    sizes: tuple[int, ...]

    @property
    def places(self) -> tuple[slice, ...]:
        """One for each size."""
        starts = [SUBSETS * i for i in range(len(self.sizes))]
        return tuple(slice(a, b) for a, b in pairwise([*starts, starts[-1] + 1]))

    @property
    def of_subset(self) -> np.ndarray:
        """(S,) int64: the number of votes of each subset."""
        return np.repeat(self.sizes, [place.stop - place.start for place in self.places])


def votes_up_to(k: int) -> Votes:
    """1, 2, 4 ... k."""
    return Votes((*(1 << i for i in range(k.bit_length()) if 1 << i < k), k))


def ways_of(k: int, *, most: int, expected: bool, meta: bool, own: Way | None = None) -> list[Way]:
    """All ways to vote that differ, the run's own first. most: responses of a row: a single one has
    its score alone, and of two, standardised scores vote as ranks do. expected, meta: the samples
    have expected scores, and meta scores."""
    if own is not None and own.points == "standardised" and most < 3:
        own = own._replace(points="borda" if most == 2 else "sum")
    found: list[Way] = []
    rules: tuple[Points, ...] = ("sum",) if most == 1 else ("sum", "borda")
    for is_expected in (False, True)[: 1 + expected]:
        for rule in rules if most < 3 else POINTS:
            found.append(Way(rule, is_expected))
            if meta:
                found += [Way(rule, is_expected, "filter"), Way(rule, is_expected, "weights")]
                found += [Way(rule, is_expected, "filter", size) for size in votes_up_to(k).sizes]
    return sorted(found, key=lambda way: way != own)


def row_subsets(first: np.ndarray, votes: Votes, rng: np.random.Generator) -> np.ndarray:
    """(S, k) bool: which samples a row's subsets hold.

    first: (k,), the response that each sample was shown first, which tells the orders apart where
    they rotate. A row of fewer samples than votes has them all.
    """
    k = len(first)
    cycle = len(set(first.tolist()))
    if (first != np.resize(first[:cycle], k)).any():
        cycle = 1
    drawn = rng.random((SUBSETS, k))
    turn = np.empty((SUBSETS, k), dtype=np.int64)
    for order in range(cycle):
        turn[:, order::cycle] = drawn[:, order::cycle].argsort(1).argsort(1)
    place = (turn + rng.random((SUBSETS, k))).argsort(1).argsort(1)
    return np.concatenate([
        place[: each.stop - each.start] < size
        for size, each in zip(votes.sizes, votes.places, strict=True)
    ])  # fmt: skip


def subsets_of(row: RowVotes, votes: Votes) -> np.ndarray:
    """(S, k) bool: those that a row's id draws."""
    return row_subsets(row.first, votes, np.random.default_rng(zlib.crc32(row.id.encode())))


def lacks_an_order(row: RowVotes, votes: Votes) -> np.ndarray:
    """(S,) bool: of a pair, the subsets whose samples were all shown the same response first."""
    if row.error is not None or (row.first < 0).any():
        return np.zeros(len(votes.of_subset), dtype=bool)
    subsets = subsets_of(row, votes)
    return ~((subsets & (row.first == 0)).any(1) & (subsets & (row.first == 1)).any(1))


def way_weights(
    subsets: np.ndarray,
    valid: np.ndarray,
    meta: np.ndarray,
    way: Way,
    sizes: np.ndarray,
    meta_scale: float,
) -> np.ndarray:
    """(S, k) float64: what each sample weighs in each subset, as `kernels/vote.py` has it.

    subsets: (S, k) bool. valid: (k,) bool. meta: (k,) float64; a sample whose score is NaN has no
    vote where meta scores count. sizes: (S,), the number of votes of each subset.
    """
    if way.meta is None:
        return subsets.astype(np.float64)
    eligible = subsets & valid & ~np.isnan(meta)
    if way.meta == "filter":
        ranking = np.where(np.isnan(meta), np.inf, -meta).argsort(kind="stable")
        ranked = eligible[:, ranking]
        weights = np.zeros(subsets.shape)
        weights[:, ranking] = ranked & (ranked.cumsum(1) <= _voters(way, sizes)[:, None])
        return weights
    quality = np.where(eligible, meta, -np.inf)
    top = quality.max(1, keepdims=True)
    with np.errstate(invalid="ignore"):
        power = np.where(quality == top, 0.0, meta_scale * (quality - top))
    return np.where(eligible, np.exp(power), 0.0)


def ways_scores(
    row: RowVotes, n: int, ways: Sequence[Way], votes: Votes, meta_scale: float
) -> RowScores:
    """What the votes of a row of n responses came to by each way in S subsets: (ways x S, n) means.
    All are NaN for a row that failed."""
    sizes = votes.of_subset
    if row.error is not None:
        count = len(ways) * len(sizes)
        return RowScores(
            np.full((count, n), np.nan), np.full((2 if n == 2 else 0, count, n), np.nan)
        )
    subsets = subsets_of(row, votes)
    valid = ~np.isnan(row.scores[:, 0])
    kinds = {way[2:]: way for way in ways}
    weights = np.concatenate([
        way_weights(subsets, valid, row.meta, way, sizes, meta_scale) for way in kinds.values()
    ])  # fmt: skip
    drawn = np.tile(subsets, (len(kinds), 1))
    counted: dict[tuple[Points, bool], RowScores] = {}
    for way in ways:
        if way[:2] not in counted:
            scores = row.expected if way.expected else row.scores
            if scores is None:  # no sample is valid
                scores = np.full_like(row.scores, np.nan)
            counted[way[:2]] = row_scores(points(scores, way.points), weights, row.first, drawn)
    starts = {kind: number * len(sizes) for number, kind in enumerate(kinds)}
    found = []
    for way in ways:
        place = slice(starts[way[2:]], starts[way[2:]] + len(sizes))
        means, by_first = counted[way[:2]]
        found.append((means[place], by_first[:, place]))
    of_ways, of_orders = zip(*found, strict=True)
    return RowScores(np.concatenate(of_ways), np.concatenate(of_orders, axis=1))


class Values(NamedTuple):
    """What a rule makes of the items that it counts.

    places: (c,) int64, which items those are. means: (c, ways, sizes) float64, over the subsets of
    each number of votes that have a value; NaN where none has. draws: (c, ways, S) float64, the
    values of each, where the rule takes a statistic of them.
    """

    places: np.ndarray
    means: np.ndarray
    draws: np.ndarray | None


def values_of(
    items: Iterable[Item],
    rows: Iterable[RowVotes],
    rules: Sequence[Rule],
    ways: Sequence[Way],
    votes: Votes,
    meta_scale: float = 1.0,
) -> list[Values]:
    """Each rule's values of the items; rows: those of all items, one after another. What a rule
    asks of the threshold has no value where there is none."""
    given = iter(rows)
    needs_orders = any(rule.both_orders for rule in rules)
    places: list[list[int]] = [[] for _ in rules]
    means: list[list[np.ndarray]] = [[] for _ in rules]
    draws: list[list[np.ndarray]] = [[] for _ in rules]
    for place, item in enumerate(items):
        judged = [next(given) for _ in item.rows]
        of_rows = [
            ways_scores(each, len(row.responses), ways, votes, meta_scale)
            for each, row in zip(judged, item.rows, strict=True)
        ]
        lacking = lacks_an_order(judged[0], votes) if needs_orders else np.zeros(1, dtype=bool)
        compares = len(judged) > 1 or len(item.rows[0].responses) > 1
        for number, rule in enumerate(rules):
            if not rule.counts(item):
                continue
            found = rule.value(item, of_rows).reshape(len(ways), -1)
            if not (compares or rule.ranks or judged[0].has_threshold):
                found = np.full(found.shape, np.nan)
            if rule.both_orders:
                found = np.where(lacking, np.nan, found)
            places[number].append(place)
            means[number].append(_over_draws(found, votes))
            if rule.total.statistic is not None:
                draws[number].append(found)
    return [
        Values(np.array(at), np.array(of_means), np.array(of_draws) if of_draws else None)
        for at, of_means, of_draws in zip(places, means, draws, strict=True)
    ]


def chances(
    rows: Iterable[RowVotes],
    labels: Iterable[Label],
    ways: Sequence[Way],
    votes: Votes,
    meta_scale: float = 1.0,
) -> np.ndarray:
    """(rows, ways, sizes) float64: each row's chance that a vote is right by its label, ties being
    drawn; 0 where there is no vote. Rows that failed have no place here."""
    found = []
    for row, label in zip(rows, labels, strict=True):
        scores = ways_scores(row, row.scores.shape[1], ways, votes, meta_scale)
        found.append(_over_draws(drawn(scores.means, label).reshape(len(ways), -1), votes))
    return np.array(found)


def _voters(way: Way, sizes: np.ndarray) -> np.ndarray:
    """(S,): how many of that many votes are counted, where all are valid."""
    if way.meta != "filter":
        return sizes
    return np.minimum(sizes, (sizes + 1) // 2 if way.k_meta is None else way.k_meta)


def _over_draws(values: np.ndarray, votes: Votes) -> np.ndarray:
    """(..., S) -> (..., sizes)."""
    there = ~np.isnan(values)
    filled = np.where(there, values, 0.0)
    starts = [place.start for place in votes.places]
    counts = np.add.reduceat(there, starts, axis=-1, dtype=np.int64)
    with np.errstate(invalid="ignore"):
        found: np.ndarray = np.add.reduceat(filled, starts, axis=-1) / counts
    return found
