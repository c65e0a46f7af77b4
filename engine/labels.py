"""Whether scores agree with a row's label.

A label is the index of the best response or one gold score per response (n >= 2), or 0 or 1 for
wrong or right (n = 1), which a threshold splits. Three questions are asked, of a vote whose ties
have been drawn (`is_correct`), of one judgement, which a tie makes wrong (`is_right`), and of
votes that were not drawn (`chance_right`).
"""

from collections.abc import Sequence


def gold_index(label: int | Sequence[float]) -> int:
    """The labelled response for n >= 2: the label, or the place of the largest gold score."""
    if isinstance(label, int):
        return label
    return max(range(len(label)), key=label.__getitem__)


def is_correct(
    best: int | None,
    mean_scores: Sequence[float] | None,
    label: int | Sequence[float] | None,
    threshold: float,
) -> bool | None:
    """Whether the verdict agrees with the label; None without a label, False without a vote.

    n = 1: (mean score > threshold) == label. n >= 2: best is the labelled response.
    """
    if label is None:
        return None
    if best is None or mean_scores is None:
        return False
    if len(mean_scores) == 1:
        return (mean_scores[0] > threshold) == bool(label)
    return best == gold_index(label)


def chance_right(scores: Sequence[float], label: int | Sequence[float], threshold: float) -> float:
    """The chance that the best of these scores, drawn among equals, agrees with the label."""
    if len(scores) == 1:
        return float((scores[0] > threshold) == bool(label))
    top = max(scores)
    best = [index for index, score in enumerate(scores) if score == top]
    return float(gold_index(label) in best) / len(best)


def is_right(scores: Sequence[int] | None, label: int | Sequence[float], threshold: float) -> bool:
    """Whether one judgement, its scores in the row's own order, agrees with the row's label."""
    return scores is not None and chance_right(scores, label, threshold) == 1.0
