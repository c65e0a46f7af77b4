"""Values that many benchmarks share. S subsets of samples, n responses; `means` (S, n) are mean
points, NaN where no sample voted, and values (S,) float64 from 0 to 1."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from bench.evaluate.benchmark import Item, RowScores
from engine.labels import Label, best_of, has_best


def strict(means: np.ndarray, label: Label) -> np.ndarray:
    """1 where a best response beats every other; 0 for a tie with another, and without a vote."""
    best = list(best_of(label))
    others = [i for i in range(means.shape[1]) if i not in best]
    return (means[:, best].max(1) > means[:, others].max(1)).astype(float)


def drawn(means: np.ndarray, label: Label) -> np.ndarray:
    """The chance that the best of the means, drawn among equals, is a best response; 0 without a
    vote. With one response: whether it is right (above 0) as the label says."""
    if means.shape[1] == 1:
        found = (means[:, 0] > 0) == bool(label)
        return np.where(np.isnan(means[:, 0]), 0.0, found)
    top = means == means.max(1, keepdims=True)
    right = top[:, list(best_of(label))].sum(1)
    return np.where(np.isnan(means[:, 0]), 0.0, right / np.maximum(top.sum(1), 1))


def or_guess(values: np.ndarray, means: np.ndarray, guess: float) -> np.ndarray:
    """The values, and a guess where there was no vote."""
    return np.where(np.isnan(means[:, 0]), guess, values)


def by_order(scores: np.ndarray, label: Label) -> Sequence[np.ndarray]:
    """Of a pair's `RowScores.by_first`: for each order +1 where the best response won, -1 where the
    other did, 0 for a tie or without a vote."""
    (best,) = best_of(label)
    return [np.nan_to_num(np.sign(means[:, best] - means[:, 1 - best])) for means in scores]


def best_is_drawn(item: Item, scores: Sequence[RowScores]) -> np.ndarray:
    """`drawn`, of an item of one row with a label."""
    assert item.rows[0].label is not None
    return drawn(scores[0].means, item.rows[0].label)


def has_one_best(item: Item) -> bool:
    """Of `Rule.counts`: items of one row whose label calls one response the best."""
    return has_best(item.rows[0].label)


def preferred(means: np.ndarray) -> np.ndarray:
    """Of a pair: 1 where the first response is better, -1 where the second is, 0 for a tie and
    without a vote."""
    return np.nan_to_num(np.sign(means[:, 0] - means[:, 1]))


def preference(item: Item, scores: Sequence[RowScores]) -> np.ndarray:
    """`preferred` as a class: 1, 0, and 0.5 for a tie and without a vote."""
    return (1 + preferred(scores[0].means)) / 2


def precision_recall_f1(
    predicted: np.ndarray, gold: np.ndarray, positive: float
) -> tuple[float, float, float]:
    """Of a class; what would be divided by 0 is 0."""
    hits = int(((predicted == positive) & (gold == positive)).sum())
    found, there = int((predicted == positive).sum()), int((gold == positive).sum())
    precision, recall, f1 = hits / max(found, 1), hits / max(there, 1), 2 * hits
    return precision, recall, f1 / max(found + there, 1)


def macro(index: int) -> Callable[[np.ndarray, Sequence[Mapping[str, Any]]], float]:
    """A `Total.statistic`: precision, recall or F1 (0, 1, 2), each class by itself, averaged over
    the classes that are predicted or that `facts["gold"]` has."""

    def statistic(values: np.ndarray, facts: Sequence[Mapping[str, Any]]) -> float:
        gold = np.array([each["gold"] for each in facts])
        classes = np.union1d(values, gold)
        return float(np.mean([precision_recall_f1(values, gold, c)[index] for c in classes]))

    return statistic
