"""What a run amounts to: counts over its rows, and what follows from them."""

import math
from dataclasses import dataclass

from engine.output import LineFacts
from engine.verdict import RowFailure, Verdict


@dataclass
class Tally:
    """Counts over the lines of an output, those of resumed runs included."""

    rows: int = 0
    errors: int = 0
    samples: int = 0
    valid: int = 0
    undecided: int = 0
    labelled: int = 0  # with one best response
    correct: int = 0
    ties: int = 0  # labels that call several responses best
    ties_agreed: int = 0

    def add(self, outcome: Verdict | RowFailure | LineFacts) -> None:
        """Count an outcome, or a line that an earlier run wrote."""
        self.rows += 1
        old_error = isinstance(outcome, LineFacts) and outcome.error is not None
        if isinstance(outcome, RowFailure) or old_error:
            self.errors += 1
            return
        self.samples += outcome.k if outcome.k_used is None else outcome.k_used
        self.valid += outcome.valid
        self.undecided += outcome.votes == 0
        self.labelled += outcome.correct is not None
        self.correct += outcome.correct is True
        self.ties += outcome.agrees is not None
        self.ties_agreed += outcome.agrees is True

    @property
    def valid_share(self) -> float | None:
        """Valid samples over all samples."""
        return self.valid / self.samples if self.samples else None

    @property
    def accuracy(self) -> float | None:
        """Correct verdicts over labelled rows; a row without a vote is not correct."""
        return self.correct / self.labelled if self.labelled else None

    @property
    def agreement(self) -> float | None:
        """Verdicts that agree with the label over labelled rows, ties among them."""
        rows = self.labelled + self.ties
        return (self.correct + self.ties_agreed) / rows if rows else None

    @property
    def accuracy_95(self) -> tuple[float, float] | None:
        """Wilson's 95 % interval of the accuracy."""
        return wilson(self.correct, self.labelled) if self.labelled else None


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of n trials."""
    z, share = 1.959964, successes / n
    middle = share + z * z / (2 * n)
    spread = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low, high = (middle - spread) / (1 + z * z / n), (middle + spread) / (1 + z * z / n)
    return max(low, 0.0), min(high, 1.0)  # rounding may step over the ends
