"""What a run's samples tell beside its figures: votes lost, ties, position, length, tokens.

Shares are of what they can be told of, which is counted beside them; None where that is nothing. A
`first` fact is of valid samples that score one of several responses highest: how often it was the
one shown first, and how often it would be for a judge that does not look at places. A `flips` fact
is of rows of two responses that samples of both orders decide: how often the two orders disagree. A
`longest` fact is of rows that have one longest response, and whose vote (all samples, by the sum of
scores) has one winner.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bench.evaluate.benchmark import Item
from bench.evaluate.curves import Votes
from bench.evaluate.votes import RowVotes, row_scores
from engine.labels import best_of
from engine.request import Row
from engine.summary import wilson


@dataclass
class Counts:
    """Counts over rows, and over their samples."""

    rows: int = 0
    failed: Counter[str] = field(default_factory=Counter)  # rows by reason
    undecided: int = 0  # rows judged without a valid sample
    without_threshold: int = 0  # rows of one response, by a model that has none
    samples: int = 0
    valid: int = 0
    invalid: Counter[str] = field(default_factory=Counter)  # samples by reason
    compared: int = 0  # valid samples of several responses
    tied: int = 0  # of those, by which no response is above all others
    first_won: int = 0
    first_expected: float = 0.0
    both_orders: int = 0
    flips: int = 0
    longest: int = 0
    longest_won: int = 0
    longest_expected: float = 0.0
    longest_labelled: int = 0
    longest_best: int = 0
    tokens: int = 0
    tree_tokens: int = 0

    def add(self, row: Row, votes: RowVotes) -> None:
        """Count a row."""
        self.rows += 1
        if votes.error is not None:
            self.failed[votes.error] += 1
            return
        valid = ~np.isnan(votes.scores[:, 0])
        self.samples += len(valid)
        self.valid += int(valid.sum())
        self.invalid.update(reason for reason in votes.invalid if reason is not None)
        self.undecided += not valid.any()
        self.without_threshold += len(row.responses) == 1 and not votes.has_threshold
        self.tokens += int(votes.tokens.sum())
        self.tree_tokens += votes.row_tokens
        if len(row.responses) > 1 and valid.any():
            if votes.first[0] >= 0:  # else no sample was shown one first
                self._add_comparisons(votes.scores[valid], votes.first[valid])
            self._add_verdict(row, votes)

    def _add_comparisons(self, scores: np.ndarray, first: np.ndarray) -> None:
        top = scores == scores.max(1, keepdims=True)
        decided = top.sum(1) == 1
        self.compared += len(scores)
        self.tied += num_tied(scores)
        self.first_won += int(top[np.arange(len(scores)), first][decided].sum())
        self.first_expected += int(decided.sum()) / scores.shape[1]

    def _add_verdict(self, row: Row, votes: RowVotes) -> None:
        scores = row_scores(votes.scores, np.ones((1, len(votes.scores))), votes.first)
        winners = [_winner(means[0]) for means in scores.by_first]
        if winners and None not in winners and votes.first[0] >= 0:
            self.both_orders += 1
            self.flips += winners[0] != winners[1]
        lengths = np.array([len(response) for response in row.responses])
        longest, winner = _winner(lengths), _winner(scores.means[0])
        if longest is None or winner is None:
            return
        self.longest += 1
        self.longest_won += winner == longest
        self.longest_expected += 1 / len(lengths)
        if row.label is not None:
            self.longest_labelled += 1
            self.longest_best += longest in best_of(row.label)

    def facts(self) -> dict[str, Any]:
        """All of it, for JSON."""
        judged = self.rows - self.failed.total()
        decided = self.compared - self.tied
        return {
            "rows": self.rows,
            "failed": {"rows": self.failed.total(), "reasons": _by_count(self.failed)},
            "undecided_rows": self.undecided,
            "without_threshold": self.without_threshold,
            "samples": self.samples,
            "valid": self.valid,
            "invalid": _by_count(self.invalid),
            "tied": _share(self.tied, self.compared),
            "first": {
                "samples": decided,
                "won": _share(self.first_won, decided),
                "ci95": list(wilson(self.first_won, decided)) if decided else None,
                "expected": _share(self.first_expected, decided),
            },
            "flips": {"rows": self.both_orders, "share": _share(self.flips, self.both_orders)},
            "longest": {
                "rows": self.longest,
                "won": _share(self.longest_won, self.longest),
                "ci95": list(wilson(self.longest_won, self.longest)) if self.longest else None,
                "expected": _share(self.longest_expected, self.longest),
                "best": _share(self.longest_best, self.longest_labelled),
            },
            "tokens_per_judgement": _share(self.tokens, self.samples),
            "prompt_tokens_per_row": _share(self.tree_tokens, judged),
            "tokens_per_row": _share(self.tree_tokens + self.tokens, judged),
        }


def num_tied(scores: np.ndarray) -> int:
    """Of (k, n) scores: the valid samples by which no response is above all others."""
    top = scores == scores.max(1, keepdims=True)
    return int((top.sum(1) > 1).sum())


def _winner(scores: np.ndarray) -> int | None:
    """The place of the one highest number; None for a tie, and where there is none."""
    (places,) = np.nonzero(scores == scores.max())
    return int(places[0]) if len(places) == 1 else None


def _share(part: float, whole: int) -> float | None:
    return part / whole if whole else None


def _by_count(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda entry: (-entry[1], entry[0])))


def facts_of(items: Sequence[Item], rows: Sequence[RowVotes]) -> dict[str, Any]:
    """Of the rows of all items, one after another."""
    counts = Counts()
    for row, votes in zip((row for item in items for row in item.rows), rows, strict=True):
        counts.add(row, votes)
    return counts.facts()


def tokens_of(rows: Sequence[RowVotes], items: int, votes: Votes) -> np.ndarray:
    """(sizes,) float64: the tokens that each number of votes costs per item: the prompts, those
    that samples share counted once, and as many judgements of each row's mean length.

    A row's prompts are its tree, or as many of them as there are votes where that is less. A row
    that failed costs nothing.
    """
    found = np.zeros(len(votes.sizes))
    sizes = np.array(votes.sizes)
    for row in rows:
        if row.error is None:
            drawn = np.minimum(sizes, len(row.tokens))
            found += np.minimum(row.row_tokens, drawn * row.prompt_tokens / len(row.tokens))
            found += drawn * row.tokens.mean()
    return found / items
