"""The statistics of measurements: intervals, tests, and figures of answers that are right or wrong.

B resamples. Intervals are of 95 %, by a bootstrap over rows unless they say otherwise. What draws
takes a seed: with the same one, measurements of the same rows are resampled alike, and stay paired.

Wilson's interval of a share is the engine's (`engine/summary.py`).
"""

from typing import NamedTuple

import numpy as np
import torch

from train.auc import chance_above

BOOTSTRAPS = 2000
FLIPS = 10_000
_CELLS = 1 << 23  # of a matrix of resamples that is made at once


def resampled_means(
    values: np.ndarray, seed: int | tuple[int, ...] = 0, resamples: int = BOOTSTRAPS
) -> np.ndarray:
    """The means of B resamples of rows: (rows, ...) float64 -> (B, ...)."""
    rng = np.random.default_rng(seed)
    rows = len(values)
    flat = values.reshape(rows, -1)
    found = np.empty((resamples, flat.shape[1]))
    step = max(1, _CELLS // rows)
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        chosen = rng.integers(rows, size=(size, rows)) + rows * np.arange(size)[:, None]
        times = np.bincount(chosen.ravel(), minlength=size * rows).reshape(size, rows)
        found[start : start + size] = times @ flat / rows
    return found.reshape(resamples, *values.shape[1:])


def bounds(resampled: np.ndarray) -> np.ndarray:
    """What 95 % of B resamples lie within: (B, ...) -> (2, ...), the lower and the upper end."""
    found: np.ndarray = np.quantile(resampled, (0.025, 0.975), axis=0)
    return found


def interval(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Of the mean of (rows,) values."""
    low, high = bounds(resampled_means(values, seed))
    return float(low), float(high)


def seed_interval(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Of the mean of (seeds, rows) values, by a bootstrap over seeds and rows."""
    rng = np.random.default_rng(seed)
    seeds, rows = values.shape
    means = []
    for _ in range(BOOTSTRAPS):
        some = values[rng.integers(seeds, size=seeds)].mean(0)
        means.append(some[rng.integers(rows, size=rows)].mean())
    low, high = bounds(np.array(means))
    return float(low), float(high)


def sign_flip(differences: np.ndarray, seed: int = 0, flips: int = FLIPS) -> float:
    """The two-sided p of paired differences (items,): the chance that their sum is as far from 0 if
    each has either sign alike.

    All signs are gone through where there are at most `flips` of them; else `flips` are drawn, and
    the differences as they are count as one more. Differences may be weighed beforehand.
    """
    moved = differences[differences != 0]
    least = abs(moved.sum()) - 1e-12 * abs(moved).sum()
    if 2 ** len(moved) <= flips:
        bits = np.arange(2 ** len(moved))[:, None] >> np.arange(len(moved)) & 1
        return float(np.mean(abs((2 * bits - 1) @ moved) >= least))
    rng = np.random.default_rng(seed)
    step, reached = max(1, _CELLS // len(moved)), 1
    for start in range(0, flips, step):
        size = (min(step, flips - start), len(moved))
        signs = 2.0 * rng.integers(2, size=size, dtype=np.int8) - 1
        reached += int((abs(signs @ moved) >= least).sum())
    return reached / (flips + 1)


def roc_auc(scores: np.ndarray, positive: np.ndarray) -> float:
    """The area under the ROC curve of (items,) scores: the chance that one of the positive items
    scores above one of the others, a tie being half. NaN where either is missing."""
    found = torch.from_numpy(np.asarray(scores, dtype=np.float64))
    is_positive = torch.from_numpy(np.asarray(positive, dtype=bool))
    return chance_above(found[is_positive], found[~is_positive])


class Detection(NamedTuple):
    """How well the positive items are found; 0 for what would be a share of nothing."""

    precision: float
    recall: float
    f1: float


def detection(found: np.ndarray, positive: np.ndarray) -> Detection:
    """Of (items,) bool: those that are found to be positive, and those that are."""
    hits, claimed, there = (int(each.sum()) for each in (found & positive, found, positive))
    return Detection(
        hits / max(claimed, 1), hits / max(there, 1), 2 * hits / max(claimed + there, 1)
    )
