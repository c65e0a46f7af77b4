"""Verdicts and the lines that record them: what a row's samples said, and what the vote made of it.

n responses, k samples. A line is a pure function of the verdict: compact JSON in UTF-8, floats as
Python's repr writes them, no times and nothing else that varies from run to run. Where there was no
vote, `best`, `scores` and `mean_scores` are null: an absent vote is never a score of 0. The last
field, `check`, is a hash of all before it, by which resuming sees that a line is as it was written.

Not done here: counting votes (kernels/vote.py) and writing files (engine/output.py).
"""

import hashlib
import json
import math
from dataclasses import dataclass
from typing import Any, Literal

_CHECK_STARTS = -len(b',"check":"0123456789abcdef"}\n')


@dataclass
class Sample:
    """One judgement.

    `order[j]` is the response shown in position j; it is empty where each was read by itself.
    `scores` are one integer per response, or what a head gave it, in the row's own order, or None,
    and then `invalid` says why. `expected` are the means of the distributions that they were drawn
    from, where those count. `meta` is the meta RM's score of a valid sample, NaN where it has none
    and so no vote; None without a meta RM. `tokens` counts generated tokens; `finish` says what
    ended them; `forced`, that it was then made to write its scores, whose tokens count. The
    log-probs, one per generated token, are natural logarithms under the model's own distribution
    and under the one sampled from.
    """

    order: tuple[int, ...]
    text: str
    scores: tuple[float, ...] | None
    invalid: str | None
    meta: float | None
    tokens: int
    finish: Literal["box", "eos", "length"]
    token_ids: list[int]
    logprobs: list[float]
    sampling_logprobs: list[float]
    forced: bool = False
    expected: tuple[float, ...] | None = None


@dataclass
class Verdict:
    """The vote of a row's samples, k of them or, where it was decided early, fewer.

    `best` is a response's index; `scores` are the votes' sums and `mean_scores` their means, one
    per response; all three are None where no sample voted. `score` says which scores of a sample
    count, "head" those that a head gave; `vote` what it counts for a response with them, and
    `meta_vote` what a meta model did, None without (engine/options.py); sums are integers where the
    scores that were drawn count themselves, and all alike. `tie` says that `best` was drawn among
    equals. `valid` counts samples with valid scores, `votes` those that were counted. `k_used`
    counts the samples drawn where a row may be decided before it has k, and is None elsewhere.
    `prompt_tokens` counts the full prompts of all samples, `tree_tokens` the distinct tokens of
    their tree, `decode_tokens` the generated ones. `label`, `correct` and `row_meta` are None
    without a label or meta. A label that is a tie has no `correct`, but `agrees`: whether `best` is
    among its best. With a meta model `unguided_best` and `unguided_correct` are what `best` and
    `correct` would be without it, each valid sample having one vote. `partial` says that the row
    ended before all its samples were done (`engine/online.py`); the samples are those that were.
    """

    id: str
    key: str
    best: int | None
    scores: list[int] | list[float] | None
    mean_scores: list[float] | None
    tie: bool
    k: int
    valid: int
    votes: int
    samples: list[Sample]
    prompt_tokens: int
    tree_tokens: int
    decode_tokens: int
    k_used: int | None = None
    score: Literal["drawn", "expected", "head"] = "drawn"
    vote: Literal["sum", "standardised", "borda"] = "sum"
    meta_vote: Literal["filter", "weight"] | None = None
    label: int | tuple[float, ...] | None = None
    correct: bool | None = None
    unguided_best: int | None = None
    unguided_correct: bool | None = None
    agrees: bool | None = None
    row_meta: Any = None
    partial: bool = False


@dataclass
class RowFailure:
    """A row or an input line that could not be judged, and why."""

    id: str | None
    line: int | None
    key: str | None
    error: str


def to_line(outcome: Verdict | RowFailure) -> bytes:
    """The JSON line of a verdict or a failure, newline included.

    Fields that are optional in a line (a failure's id, line and key; k_used, label, correct,
    unguided_best, unguided_correct, agrees, row_meta, partial; a sample's forced and expected) are
    left out where they are None or false, score where it was drawn, vote where it is the sum, and
    meta_vote where it filters. A meta score of NaN, which JSON cannot say, is written as null.
    """
    fields: dict[str, Any]
    if isinstance(outcome, RowFailure):
        fields = {
            name: value
            for name in ("id", "line", "key", "error")
            if (value := getattr(outcome, name)) is not None
        }
    else:
        voted = outcome.votes > 0
        fields = {
            "id": outcome.id,
            "key": outcome.key,
            "best": outcome.best if voted else None,
            "scores": outcome.scores if voted else None,
            "mean_scores": outcome.mean_scores if voted else None,
            "tie": outcome.tie,
            "k": outcome.k,
            "valid": outcome.valid,
            "votes": outcome.votes,
            "samples": [_sample_fields(sample) for sample in outcome.samples],
            "usage": {
                "prompt_tokens": outcome.prompt_tokens,
                "tree_tokens": outcome.tree_tokens,
                "decode_tokens": outcome.decode_tokens,
            },
        }
        if outcome.score != "drawn":
            fields["score"] = outcome.score
        if outcome.vote != "sum":
            fields["vote"] = outcome.vote
        if outcome.meta_vote == "weight":
            fields["meta_vote"] = outcome.meta_vote
        for name in (
            "k_used", "label", "correct", "unguided_best", "unguided_correct", "agrees", "row_meta",
        ):  # fmt: skip
            if (value := getattr(outcome, name)) is not None:
                fields[name] = value
        if outcome.partial:
            fields["partial"] = True
    return checked(_dumps(fields).encode("utf-8"))


def checked(record: bytes) -> bytes:
    """The line of a JSON object with fields, which gets one more: `check`, the first 16 hexadecimal
    digits of the SHA-256 of the object as it is given."""
    digest = hashlib.sha256(record).hexdigest()[:16]
    return record[:-1] + b',"check":"%s"}\n' % digest.encode("ascii")


def is_as_written(line: bytes) -> bool:
    """Whether the `check` of a line is that of the rest."""
    return line == checked(line[:_CHECK_STARTS] + b"}")


def _sample_fields(sample: Sample) -> dict[str, Any]:
    meta = sample.meta
    return {
        "order": sample.order,
        "text": sample.text,
        "scores": sample.scores,
        **({} if sample.expected is None else {"expected": sample.expected}),
        "invalid": sample.invalid,
        "meta": None if meta is not None and math.isnan(meta) else meta,
        "tokens": sample.tokens,
        "finish": sample.finish,
        **({"forced": True} if sample.forced else {}),
    }


def _dumps(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
