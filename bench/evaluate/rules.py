"""Values that many benchmarks share. S subsets of samples, n responses; `means` (S, n) are mean
points, NaN where no sample voted, and values (S,) float64 from 0 to 1."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from bench import statistics
from bench.evaluate.benchmark import Item, RowScores, Rule, Total
from engine.labels import Label, best_of, has_best, is_tie


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


def beats_all(item: Item, scores: Sequence[RowScores]) -> np.ndarray:
    """`strict`, of an item of one row with a label; with one response, `drawn`."""
    label, means = item.rows[0].label, scores[0].means
    assert label is not None
    return drawn(means, label) if means.shape[1] == 1 else strict(means, label)


def pair_or_tie(item: Item, scores: Sequence[RowScores]) -> np.ndarray:
    """Of a labelled pair: 1 for the better response, or for equal means where the label is a tie;
    0 without a vote."""
    label, means = item.rows[0].label, scores[0].means
    assert label is not None
    gold = 0 if is_tie(label) else 1 - 2 * best_of(label)[0]
    return ((preferred(means) == gold) & ~np.isnan(means[:, 0])).astype(float)


def pairs_in_order(item: Item, scores: Sequence[RowScores]) -> np.ndarray:
    """Of an item of one row with gold scores: how many pairs of responses that these tell apart the
    means put in order, a tie of the means being half; 0 without a vote."""
    gold, means = np.array(item.rows[0].label, dtype=float), scores[0].means
    one, two = np.triu_indices(len(gold), 1)
    truth = np.sign(gold[one] - gold[two])
    found = np.nan_to_num(np.sign(means[:, one] - means[:, two]))
    values = ((1 + truth * found) / 2)[:, truth != 0].mean(1)
    return np.where(np.isnan(means[:, 0]), 0.0, values)


def has_worse(item: Item) -> bool:
    """Of `Rule.counts`: items of one row whose label calls a response worse than another; of one
    response, all."""
    (row,) = item.rows
    return len(row.responses) == 1 or len(best_of(row.label or 0)) < len(row.responses)


def is_pair(item: Item) -> bool:
    """Of `Rule.counts`: items of one row of two responses."""
    return len(item.rows[0].responses) == 2


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


def macro(index: int) -> Callable[[np.ndarray, Sequence[Mapping[str, Any]]], float]:
    """A `Total.statistic`: precision, recall or F1 (0, 1, 2), each class by itself, averaged over
    the classes that are predicted or that `facts["gold"]` has."""

    def statistic(values: np.ndarray, facts: Sequence[Mapping[str, Any]]) -> float:
        gold = np.array([each["gold"] for each in facts])
        classes = np.union1d(values, gold)
        return float(
            np.mean([statistics.detection(values == c, gold == c)[index] for c in classes])
        )

    return statistic


def roc_auc(values: np.ndarray, facts: Sequence[Mapping[str, Any]]) -> float:
    """A `Total.statistic`: how often an item with `facts["gold"]` = 1 has a greater value than one
    with 0, a tie being half; NaN where one of both is missing."""
    gold = np.array([each["gold"] for each in facts])
    return statistics.roc_auc(values, gold == 1)


def majority_of(votes: Sequence[Any]) -> Any:
    """What most say; None where no answer has the most."""
    counts = Counter(votes).most_common(2)
    return None if len(counts) == 2 and counts[0][1] == counts[1][1] else counts[0][0]


def agreement(votes: Sequence[Sequence[Any]]) -> dict[str, float]:
    """How well the people who judged each item agree, as a ceiling for a judge.

    people_majority: how often one says what most say, where that can be said; each is one of them.
    people_others: how often one says what most others say, where that can be said. people_another:
    how often one says what another says. 0 where there is nothing to compare.
    """
    majority: list[bool] = []
    others: list[bool] = []
    another: list[bool] = []
    for said in votes:
        for i, vote in enumerate(said):
            rest = [*said[:i], *said[i + 1 :]]
            another += [vote == each for each in rest]
            for voters, found in ((said, majority), (rest, others)):
                if voters and (most := majority_of(voters)) is not None:
                    found.append(vote == most)
    shares = {"people_majority": majority, "people_others": others, "people_another": another}
    return {name: sum(found) / max(len(found), 1) for name, found in shares.items()}


BY_VOTE = Rule(
    "vote",
    "the best response of the vote is one that the label calls best; a tie is drawn",
    best_is_drawn,
    Total(over="items"),
    has_worse,
)
STRICT = Rule(
    "strict",
    "a response that the label calls best beats all others; a tie is wrong",
    beats_all,
    Total(over="items"),
    has_worse,
)
TIES = Rule(
    "ties",
    "of pairs: the better response, or equal means where the label is a tie",
    pair_or_tie,
    Total(over="items"),
    is_pair,
)
