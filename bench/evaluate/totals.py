"""Items' values -> figures of subsets, of sections, and of a benchmark, with 95 % intervals.

c columns: a column is a way to vote and a number of votes. B resamples. Items are resampled within
their subsets, as often for all columns alike. A figure is NaN where one of its items has no value.

Where a rule takes a statistic, it is taken of each draw of votes and averaged over draws. Its
interval resamples items, each time with the first DRAWS draws: what varies from draw to draw is
mostly averaged out, as it is from the figure.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bench.evaluate.benchmark import Total
from bench.evaluate.curves import Values, Votes
from bench.statistics import bounds, resampled_means

RESAMPLES = 400  # of a statistic
DRAWS = 2  # of votes, in each of those


class Figures(NamedTuple):
    """By name, (c,) figures of means, or (B, c) of resamples."""

    subsets: dict[str, np.ndarray]
    sections: dict[str, np.ndarray]
    total: np.ndarray


class Interval(NamedTuple):
    """Figures, the lower and the upper ends of their intervals."""

    values: Figures
    low: Figures
    high: Figures


def places_of(subsets: Sequence[str]) -> dict[str, np.ndarray]:
    """The places of each subset's items, by subset in alphabetical order."""
    names = np.array(subsets)
    return {name: np.flatnonzero(names == name) for name in sorted(set(subsets))}


def combine(
    of_subsets: dict[str, np.ndarray],
    counts: Mapping[str, int],
    total: Total,
    of_all: Callable[[], np.ndarray],
) -> Figures:
    """Subsets' figures to those of sections and to the total, which is NaN where no item is of any
    section; of_all: the total over all items."""
    sections: dict[str, np.ndarray] = {}
    for section, given in (total.sections or {name: {name: None} for name in counts}).items():
        weights = {
            name: counts[name] if weight is None else weight
            for name, weight in given.items()
            if name in counts
        }
        if weights:
            parts = [of_subsets[name] for name in weights]
            sections[section] = np.average(parts, axis=0, weights=list(weights.values()))
    if total.over == "items":
        return Figures(of_subsets, sections, of_all())
    if not sections:
        return Figures(of_subsets, sections, np.nan * next(iter(of_subsets.values())))
    return Figures(of_subsets, sections, np.mean(list(sections.values()), axis=0))


def item_weights(subsets: Sequence[str], total: Total) -> np.ndarray:
    """(items,) float64: how much of the total is each item's value, where the total is of means."""
    places = places_of(subsets)
    counts = {name: len(place) for name, place in places.items()}
    unit = {name: np.eye(len(places))[i] for i, name in enumerate(places)}
    whole = np.array(list(counts.values())) / len(subsets)
    share = combine(unit, counts, total, lambda: whole).total
    weights = np.empty(len(subsets))
    for of_subset, place in zip(share, places.values(), strict=True):
        weights[place] = of_subset / len(place)
    return weights


def of_means(means: np.ndarray, subsets: Sequence[str], total: Total) -> Interval:
    """Figures of (items, c) values."""
    places = places_of(subsets)
    counts = {name: len(place) for name, place in places.items()}

    def combined(of_subsets: dict[str, np.ndarray]) -> Figures:
        def of_all() -> np.ndarray:
            parts = [of_subsets[name] for name in counts]
            return np.average(parts, axis=0, weights=list(counts.values()))

        return combine(of_subsets, counts, total, of_all)

    values = combined({name: means[place].mean(0) for name, place in places.items()})
    resampled = combined({
        name: resampled_means(means[place], seed=(0, number))
        for number, (name, place) in enumerate(places.items())
    })  # fmt: skip
    return _interval(values, resampled)


def _interval(values: Figures, resampled: Figures) -> Interval:
    subsets = {name: bounds(each) for name, each in resampled.subsets.items()}
    sections = {name: bounds(each) for name, each in resampled.sections.items()}
    total = bounds(resampled.total)
    low, high = (
        Figures(
            {name: each[end] for name, each in subsets.items()},
            {name: each[end] for name, each in sections.items()},
            total[end],
        )
        for end in (0, 1)
    )
    return Interval(values, low, high)


def _statistics(
    columns: Sequence[np.ndarray],
    chosen: Mapping[str, np.ndarray],
    facts: Sequence[Mapping[str, Any]],
    total: Total,
) -> Figures:
    """Figures of the chosen items of each subset: of c columns of (items, draws) values, means over
    draws."""
    statistic = total.statistic
    assert statistic is not None

    def over(place: np.ndarray) -> np.ndarray:
        own = [facts[i] for i in place]
        found = np.full(len(columns), np.nan)
        for number, column in enumerate(columns):
            values = column[place]
            if not np.isnan(values).any():
                found[number] = np.mean([statistic(draw, own) for draw in values.T])
        return found

    of_subsets = {name: over(place) for name, place in chosen.items()}
    counts = {name: len(place) for name, place in chosen.items()}
    everything = np.concatenate(list(chosen.values()))
    return combine(of_subsets, counts, total, lambda: over(everything))


def statistic_total(
    values: np.ndarray, facts: Sequence[Mapping[str, Any]], subsets: Sequence[str], total: Total
) -> float:
    """The total of a statistic of (items,) values."""
    return float(_statistics([values[:, None]], places_of(subsets), facts, total).total[0])


def of_statistic(
    draws: np.ndarray,
    votes: Votes,
    facts: Sequence[Mapping[str, Any]],
    subsets: Sequence[str],
    total: Total,
) -> Interval:
    """Figures of a statistic of (items, ways, S) values; a column for each way and, within it, each
    number of votes."""
    places = places_of(subsets)
    columns = [draws[:, way, place] for way in range(draws.shape[1]) for place in votes.places]
    few = [column[:, :DRAWS] for column in columns]
    rng = np.random.default_rng(0)
    resampled = []
    for _ in range(RESAMPLES):
        chosen = {name: rng.choice(place, len(place)) for name, place in places.items()}
        resampled.append(_statistics(few, chosen, facts, total))
    stacked = Figures(
        {name: np.array([each.subsets[name] for each in resampled]) for name in places},
        {name: np.array([each.sections[name] for each in resampled])
         for name in resampled[0].sections},
        np.array([each.total for each in resampled]),
    )  # fmt: skip
    return _interval(_statistics(columns, places, facts, total), stacked)


def intervals(
    values: Values,
    votes: Votes,
    facts: Sequence[Mapping[str, Any]],
    subsets: Sequence[str],
    total: Total,
) -> Interval:
    """A rule's figures; a column for each way and, within it, each number of votes."""
    if values.draws is None:
        return of_means(values.means.reshape(len(subsets), -1), subsets, total)
    return of_statistic(values.draws, votes, facts, subsets, total)
