"""What a run amounts to: counts over its rows, and what follows from them."""

import math
import re
from collections import Counter
from dataclasses import dataclass, field, fields
from typing import Any

from engine.output import LineFacts, SampleFacts
from engine.thinking import open_thinking
from engine.verdict import RowFailure, Sample, Verdict

_SCORE_LINE = re.compile(r"^.*boxed.*$|^.*\bscores?\b.*$", re.IGNORECASE | re.MULTILINE)
_LINE_CHARS = 80
_MOST_LINES = 1000  # different unread lines that are counted


@dataclass
class Tally:
    """Counts over the lines of an output, those of resumed runs included."""

    rows: int = 0
    errors: int = 0
    samples: int = 0
    valid: int = 0
    invalid: Counter[str] = field(default_factory=Counter)  # samples by reason
    forced: int = 0  # of the valid ones, made to write their scores
    cut_while_thinking: int = 0  # of the truncated ones
    undecided: int = 0
    labelled: int = 0  # with one best response
    labelled_undecided: int = 0
    correct: int = 0
    guided: int = 0  # labelled rows whose votes a meta model guided
    unguided_correct: int = 0  # of them, without it
    ties: int = 0  # labels that call several responses best
    ties_agreed: int = 0
    winners: int = 0  # samples that score one of several responses highest
    first_won: int = 0  # those where it was the one shown first
    first_expected: float = 0.0  # as many of a judge that does not look at places
    unread: Counter[str] = field(default_factory=Counter)  # lines that look like scores

    def add(self, outcome: Verdict | RowFailure | LineFacts, opens_thinking: bool = False) -> None:
        """Count an outcome, or a line that an earlier run wrote; opens_thinking: its prompt ends in
        an open `<think>`."""
        self.rows += 1
        old_error = isinstance(outcome, LineFacts) and outcome.error is not None
        if isinstance(outcome, RowFailure) or old_error:
            self.errors += 1
            return
        self.samples += outcome.k if outcome.k_used is None else outcome.k_used
        self.valid += outcome.valid
        self.undecided += outcome.votes == 0
        self.labelled += outcome.correct is not None
        self.labelled_undecided += outcome.correct is not None and outcome.votes == 0
        self.correct += outcome.correct is True
        self.guided += outcome.unguided_correct is not None
        self.unguided_correct += outcome.unguided_correct is True
        self.ties += outcome.agrees is not None
        self.ties_agreed += outcome.agrees is True
        for sample in outcome.samples:
            self._add_sample(sample, opens_thinking)

    def _add_sample(self, sample: Sample | SampleFacts, opens_thinking: bool) -> None:
        if sample.scores is None:
            self.invalid[sample.invalid or "missing"] += 1
            text = "<think>" + sample.text if opens_thinking else sample.text
            if open_thinking(text) is not None:
                self.cut_while_thinking += sample.invalid == "truncated"
            for line in _SCORE_LINE.findall(sample.text)[-1:]:
                shown = line.strip()[:_LINE_CHARS]
                if shown in self.unread or len(self.unread) < _MOST_LINES:
                    self.unread[shown] += 1
            return
        self.forced += sample.forced
        top = max(sample.scores)
        if sample.order and len(sample.scores) > 1 and sample.scores.count(top) == 1:
            self.winners += 1
            self.first_won += sample.scores[sample.order[0]] == top
            self.first_expected += 1 / len(sample.scores)

    def __add__(self, other: "Tally") -> "Tally":
        """The counts over both outputs."""
        names = [each.name for each in fields(self)]
        return Tally(**{name: getattr(self, name) + getattr(other, name) for name in names})

    def facts(self) -> dict[str, Any]:
        """All of it for the closing summary. Shares are None where there is nothing to share.

        accuracy: correct verdicts over labelled rows, where a row without a vote is not correct;
        accuracy_of_decided: over those that have one; unguided_accuracy: without the meta model;
        agreement: over labelled rows and ties.
        """
        decided = self.labelled - self.labelled_undecided
        labels = self.labelled + self.ties
        commonest = self.unread.most_common(1)
        return {
            "rows": self.rows,
            "errors": self.errors,
            "undecided": self.undecided,
            "samples": self.samples,
            "valid": self.valid,
            "valid_share": _share(self.valid, self.samples),
            "forced": self.forced,
            "invalid": dict(self.invalid.most_common()),
            "cut_while_thinking": self.cut_while_thinking,
            "unread_line": commonest[0][0] if commonest else None,
            "labelled": self.labelled,
            "correct": self.correct,
            "accuracy": _share(self.correct, self.labelled),
            "accuracy_95": wilson(self.correct, self.labelled) if self.labelled else None,
            "accuracy_of_decided": _share(self.correct, decided),
            "unguided_accuracy": _share(self.unguided_correct, self.guided),
            "ties": self.ties,
            "ties_agreed": self.ties_agreed,
            "agreement": _share(self.correct + self.ties_agreed, labels),
            "first_wins": _share(self.first_won, self.winners),
            "first_wins_95": wilson(self.first_won, self.winners) if self.winners else None,
            "first_wins_expected": _share(self.first_expected, self.winners),
        }

    @property
    def is_in_vain(self) -> bool:
        """Whether rows were judged, and none of them got a verdict."""
        return 0 < self.undecided == self.rows - self.errors


def _share(part: float, whole: int) -> float | None:
    return part / whole if whole else None


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of n trials."""
    z, share = 1.959964, successes / n
    middle = share + z * z / (2 * n)
    spread = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low, high = (middle - spread) / (1 + z * z / n), (middle + spread) / (1 + z * z / n)
    return max(low, 0.0), min(high, 1.0)  # rounding may step over the ends
