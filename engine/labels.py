"""What a row's label says, and whether scores agree with it.

A label is the index of the best response or one gold score per response (n >= 2), or 0 or 1 for
wrong or right (n = 1), which a threshold splits. Gold scores with two maxima are a tie: such a row
has no best response, so a vote can agree with it and cannot be correct.

Three questions are asked: of a vote whose ties have been drawn (`is_correct`, `agrees`), of one
judgement, which a tie of its own makes wrong (`is_right`), and of votes that were not drawn
(`chance_right`).
"""

import re
from collections.abc import Sequence
from typing import Any

Label = int | tuple[float, ...]
_WORDS = {
    "right": 1, "correct": 1, "true": 1, "yes": 1, "no_error": 1,
    "wrong": 0, "incorrect": 0, "false": 0, "no": 0, "error": 0,
}  # fmt: skip
_COMPARISON = re.compile(r"([AB])\s*(>{1,2}|={1,2})\s*([AB])")


def read_label(label: Any, n: int) -> Label | None:
    """The label of a row of n responses as people write it.

    n = 1: 0, 1, a truth value, or a word for right or wrong. n >= 2: an index, a letter, "A>B",
    "tie", one gold score per response, or a shorter list of the indices that are best together. A
    number may be text. Raises ValueError for anything else, and for a list that could be two things
    but is not n numbers.
    """
    if label is None:
        return None
    wrong = ValueError(f"label {quote(label)} is {_expected(n)}")
    value = _number(label)
    if n == 1:
        if isinstance(value, str):
            value = _WORDS.get(value.strip().lower())
        if value not in (0, 1) or isinstance(value, list):
            raise wrong
        return int(value)
    if isinstance(label, bool):
        raise wrong
    if isinstance(value, str):
        value = _comparison(value.strip(), n)
    if isinstance(value, int) and 0 <= value < n:
        return value
    if not isinstance(value, list) or not value:
        raise wrong
    if any(isinstance(each, bool) or not isinstance(each, int | float) for each in value):
        raise wrong
    if len(value) == n:
        return tuple(float(each) for each in value)
    best = set(value)
    indices = len(best) == len(value) and all(isinstance(each, int) for each in value)
    if len(value) > n or not indices or not best <= set(range(n)):
        raise ValueError(f"label has {len(value)} gold scores for {n} responses")
    return tuple(float(index in best) for index in range(n))


def _expected(n: int) -> str:
    if n == 1:
        return "neither 0 (wrong) nor 1 (right), for one response"
    return f"no index of {n} responses, nor their gold scores"


def _number(label: Any) -> Any:
    """A label without the clothes of its type: text that is an integer, a float that is one."""
    if isinstance(label, str) and re.fullmatch(r"\s*[0-9]{1,3}\s*", label):
        return int(label)
    if isinstance(label, float) and label.is_integer():
        return int(label)
    return label


def _comparison(text: str, n: int) -> int | list[float] | None:
    if text.lower() == "tie":
        return [1.0] * n
    if len(text) == 1 and 0 <= ord(text) - ord("A") < n:
        return ord(text) - ord("A")
    found = _COMPARISON.fullmatch(text)
    if found is None or n != 2 or found[1] == found[3]:
        return None
    return [1.0, 1.0] if found[2].startswith("=") else "AB".index(found[1])


def quote(value: object) -> str:
    """The value as Python writes it, cut to a length that suits a message."""
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."


def best_of(label: int | Sequence[float]) -> tuple[int, ...]:
    """The responses that a label calls best, for n >= 2: one, or several that are tied."""
    if isinstance(label, int):
        return (label,)
    top = max(label)
    return tuple(index for index, score in enumerate(label) if score == top)


def is_tie(label: int | Sequence[float]) -> bool:
    """Whether a label calls no single response the best."""
    return len(best_of(label)) > 1


def has_best(label: int | Sequence[float] | None) -> bool:
    """Whether there is a label, and it calls one response the best."""
    return label is not None and not is_tie(label)


def gold_index(label: int | Sequence[float]) -> int:
    """The one best response of a label that is no tie."""
    (best,) = best_of(label)
    return best


def is_correct(
    best: int | None,
    mean_scores: Sequence[float] | None,
    label: int | Sequence[float] | None,
    threshold: float,
) -> bool | None:
    """Whether a vote found the best response; None without a label or for a tie, False without a
    vote.

    n = 1: (mean score > threshold) == label. n >= 2: best is the labelled response.
    """
    if label is None or is_tie(label):
        return None
    if best is None or mean_scores is None:
        return False
    if len(mean_scores) == 1:
        return (mean_scores[0] > threshold) == bool(label)
    return best == gold_index(label)


def agrees(best: int | None, label: int | Sequence[float] | None) -> bool | None:
    """Whether a vote's best response is among those of a tie; None for any other label."""
    return None if label is None or not is_tie(label) else best in best_of(label)


def chance_right(scores: Sequence[float], label: int | Sequence[float], threshold: float) -> float:
    """The chance that the best of these scores, drawn among equals, agrees with the label."""
    if len(scores) == 1:
        return float((scores[0] > threshold) == bool(label))
    top = best_of(scores)
    return len(set(top) & set(best_of(label))) / len(top)


def chance_correct(
    votes: Sequence[Sequence[float]], label: int | Sequence[float], threshold: float
) -> float:
    """The chance that the mean of these votes' scores agrees with the label; 0 without a vote."""
    if not votes:
        return 0.0
    means = [sum(column) / len(votes) for column in zip(*votes, strict=True)]
    return chance_right(means, label, threshold)


def is_right(
    scores: Sequence[float] | None, label: int | Sequence[float], threshold: float
) -> bool:
    """Whether one judgement, its scores in the row's own order, agrees with the row's label."""
    return scores is not None and chance_right(scores, label, threshold) == 1.0
