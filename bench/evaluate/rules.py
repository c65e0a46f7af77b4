"""Values that many benchmarks share. S subsets of samples, n responses; `means` (S, n) are mean
points, NaN where no sample voted, and values (S,) float64 from 0 to 1."""

from collections.abc import Sequence

import numpy as np

from engine.labels import Label, best_of


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
