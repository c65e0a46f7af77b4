"""Rewards of the judgements of a labelled row, which a training loop takes by name.

    rule            +1 for a judgement that is right, -1 for any other
    ties            the same, but 0 where the labelled best is tied for the highest score
    leave_one_out   what the judgement does for the verdict of its group: the chance that the mean
                    of all scores is right, less that of the others' alone; ties are drawn
    MODULE:NAME     any function of the type `Reward`

A judgement is right when it says so strictly: with n >= 2 responses the labelled best alone has the
highest score; with one response its score is on the label's side of the threshold. An invalid
judgement is wrong, is counted, and does nothing for a verdict.
"""

from collections.abc import Callable, Sequence
from importlib import import_module

from engine.labels import chance_correct, is_right
from engine.request import Row
from engine.verdict import Sample

# reward(row, all its judgements, the threshold for n = 1) -> one number for each judgement
Reward = Callable[[Row, Sequence[Sample], float], list[float]]


def rule(row: Row, samples: Sequence[Sample], threshold: float) -> list[float]:
    """+1 for a judgement that is right, -1 for any other."""
    assert row.label is not None
    return [1.0 if is_right(s.scores, row.label, threshold) else -1.0 for s in samples]


def ties(row: Row, samples: Sequence[Sample], threshold: float) -> list[float]:
    """As `rule`, but 0 for a judgement whose highest score the labelled best shares."""
    rewards = rule(row, samples, threshold)
    for i, sample in enumerate(samples):
        if sample.scores is not None and _chance([sample.scores], row, threshold) not in (0.0, 1.0):
            rewards[i] = 0.0
    return rewards


def leave_one_out(row: Row, samples: Sequence[Sample], threshold: float) -> list[float]:
    """The chance that the group's verdict is right, less that of the group without the judgement;
    a group without a valid judgement is never right."""
    votes = [sample.scores for sample in samples]
    whole = _chance(votes, row, threshold)
    return [
        whole - _chance([*votes[:i], *votes[i + 1 :]], row, threshold) for i in range(len(votes))
    ]


def _chance(votes: Sequence[Sequence[float] | None], row: Row, threshold: float) -> float:
    assert row.label is not None
    valid = [scores for scores in votes if scores is not None]
    return chance_correct(valid, row.label, threshold)


REWARDS: dict[str, Reward] = {"rule": rule, "ties": ties, "leave_one_out": leave_one_out}


def reward_of(name: str) -> Reward:
    """A reward by its name, or by MODULE:NAME. Raises ValueError where there is none."""
    if name in REWARDS:
        return REWARDS[name]
    module, _, function = name.partition(":")
    try:
        found: Reward = getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        known = ", ".join(REWARDS)
        raise ValueError(f"reward = {name!r} is not {known}, or MODULE:NAME: {error}") from error
    return found
