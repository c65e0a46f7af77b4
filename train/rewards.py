"""Rewards of the judgements of a labelled row.

A judgement is right when it says so strictly: with n >= 2 responses the labelled best alone has the
highest score; with one response its score is on the label's side of the threshold. An invalid
judgement is wrong, and is counted.
"""

from collections.abc import Callable, Sequence

from engine.labels import is_right
from engine.request import Row
from engine.verdict import Sample

# reward(row, all its judgements, the threshold for n = 1) -> one number for each judgement
Reward = Callable[[Row, Sequence[Sample], float], list[float]]


def rule_rewards(row: Row, samples: Sequence[Sample], threshold: float) -> list[float]:
    """+1 for a judgement that is right, -1 for any other."""
    assert row.label is not None
    return [1.0 if is_right(s.scores, row.label, threshold) else -1.0 for s in samples]
