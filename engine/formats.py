r"""How other published judges write their verdicts: a text -> a score for each response.

    pairwise     [[A]] or [[B]], in tags or not (MT-Bench, arXiv 2306.05685; RM-R1, 2505.02387;
                 Skywork-Critic); [[C]] is a tie of two, and [[7]] rates one response
    answer-tags  <answer>7</answer><answer>3</answer> (JudgeLRM, arXiv 2504.00050)
    json         {"scores": {"model-1": 4, "model-2": 2}, ...} (RewardAnything, arXiv 2506.03637)
    rating       [RESULT] 4, for one response, or [RESULT] A, for several (Prometheus 2, arXiv
                 2405.01535)

The last verdict outside of thinking counts, as it does for boxes (`kernels/score_grammar.py`). A
format that names a winner gives it the largest score and the others the smallest; a tie gives all
the largest. A text is read on the host, once, when its sample has ended.
"""

import json
import re
from collections.abc import Callable

from engine.thinking import after_thinking
from kernels.score_grammar import Outcome, Reason

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_PAIRWISE = re.compile(r"\[\[([A-Z])\]\]")
_RATED = re.compile(r"\[\[([^\[\]]*)\]\]")
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_RESULT = re.compile(r"\[RESULT\]\s*(?:\(?\s*)([+-]?\d+|[A-Z]\b)")
_INTEGER = re.compile(r"[+-]?[0-9]{1,18}(?:\.0*)?")

_Reader = Callable[[str, int, int, int], Outcome | None]  # text, n, smallest, largest score


def read_verdict(
    format: str, text: str, n: int, score_min: int, score_max: int, finished: bool
) -> Outcome:
    """The reason, and the n scores if it is VALID, of a judgement in one of FORMATS. finished: it
    ended by itself, so that an absent verdict is MISSING and not TRUNCATED."""
    absent = Reason.MISSING if finished else Reason.TRUNCATED
    return FORMATS[format](after_thinking(text), n, score_min, score_max) or (absent, ())


def _winner(letter: str, n: int, score_min: int, score_max: int) -> Outcome:
    best = _LETTERS.index(letter)
    if n == 2 and letter == "C":
        return Reason.VALID, (score_max,) * n
    if best >= n:
        return Reason.RANGE, ()
    return Reason.VALID, tuple(score_max if i == best else score_min for i in range(n))


def _scores(items: list[object], n: int, score_min: int, score_max: int) -> Outcome:
    scores = []
    for item in items:
        text = item.strip() if isinstance(item, str) else json.dumps(item)
        if not _INTEGER.fullmatch(text):
            return Reason.NOT_AN_INTEGER, ()
        scores.append(int(text.split(".")[0]))
    if len(scores) != n:
        return Reason.COUNT, ()
    if not all(score_min <= score <= score_max for score in scores):
        return Reason.RANGE, ()
    return Reason.VALID, tuple(scores)


def _read_pairwise(text: str, n: int, score_min: int, score_max: int) -> Outcome | None:
    if n == 1:
        rated = _RATED.findall(text)
        return _scores(rated[-1:], n, score_min, score_max) if rated else None
    letters = _PAIRWISE.findall(text)
    return _winner(letters[-1], n, score_min, score_max) if letters else None


def _read_answer_tags(text: str, n: int, score_min: int, score_max: int) -> Outcome | None:
    answers: list[object] = [*_ANSWER.findall(text)]
    if len(answers) == 1:  # one pair of tags around all
        answers = [*re.split(r"[,;]", str(answers[0]))]
    return _scores(answers[-n:], n, score_min, score_max) if answers else None


def _read_json(text: str, n: int, score_min: int, score_max: int) -> Outcome | None:
    decoder, found, place = json.JSONDecoder(), None, text.find("{")
    while place >= 0:
        try:
            value, end = decoder.raw_decode(text, place)
        except (json.JSONDecodeError, RecursionError):
            place = text.find("{", place + 1)
            continue
        found = value if isinstance(value.get("scores"), dict) else found
        place = text.find("{", end)
    if found is None:
        return None
    scores = {name.strip().lower(): score for name, score in found["scores"].items()}
    names = [f"model-{i + 1}" for i in range(n)]
    if len(scores) != len(found["scores"]) or set(scores) != set(names):
        return Reason.COUNT, ()
    return _scores([scores[name] for name in names], n, score_min, score_max)


def _read_rating(text: str, n: int, score_min: int, score_max: int) -> Outcome | None:
    results = _RESULT.findall(text)
    if not results:
        return None
    if results[-1] in _LETTERS:
        if n == 1:
            return Reason.NOT_AN_INTEGER, ()
        return _winner(results[-1], n, score_min, score_max)
    return _scores([results[-1]], n, score_min, score_max)


FORMATS: dict[str, _Reader] = {
    "pairwise": _read_pairwise,
    "answer-tags": _read_answer_tags,
    "json": _read_json,
    "rating": _read_rating,
}
