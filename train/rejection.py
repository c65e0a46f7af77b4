"""What becomes of a judgement in rejective fine-tuning, its *fate*, and the line that it leaves.

kept
too_easy     as all others of its row it is right
truncated    it did not end by itself, whatever it says
invalid      it has no valid scores
wrong        its scores do not agree with the label
garbled      it would be kept, but its text is not what was sampled: it holds control tokens other
             than those of thinking, or is no UTF-8
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from engine.labels import gold_index, is_right
from engine.request import Row
from engine.verdict import Sample
from models.tokenizer import Tokenizer

_THINKING = (b"<think>", b"</think>")  # control tokens that a judge may write, and learns to


def hint_at(place: int) -> str:
    """The hint that the best response is the one shown at this place, counted from 0."""
    return f"The best response is: Response {place + 1}"


Fate = Literal["kept", "too_easy", "truncated", "invalid", "wrong", "garbled"]


FATES: tuple[Fate, ...] = ("kept", "too_easy", "truncated", "invalid", "wrong", "garbled")


HintedFate = Fate | Literal["failed"]  # failed: the prompt with the hint cannot be judged


HINTED_FATES: tuple[HintedFate, ...] = (*FATES, "failed")


RowFate = Literal["kept", "too_easy", "none_kept", "failed", "no_label", "bad_line"]


ROW_FATES: tuple[RowFate, ...] = (
    "kept", "too_easy", "none_kept", "failed", "no_label", "bad_line",
)  # fmt: skip


def best_hint(row: Row, order: Sequence[int]) -> str:
    """The hint at a labelled row's best response, at the place where `order` shows it."""
    assert row.label is not None and len(row.responses) > 1
    return hint_at(list(order).index(gold_index(row.label)))


@dataclass(frozen=True)
class Rule:
    """What decides over the judgements of a row: its label, the threshold for a single response,
    and whether any are rejected for what they say."""

    label: int | Sequence[float]
    threshold: float
    rejects: bool = True

    def is_right(self, sample: Sample) -> bool:
        return is_right(sample.scores, self.label, self.threshold)


def fates(samples: Sequence[Sample], rule: Rule, tokenizer: Tokenizer) -> list[Fate]:
    """What becomes of a row's judgements without a hint."""
    if rule.rejects and all(map(rule.is_right, samples)):
        return ["too_easy"] * len(samples)
    return [fate(sample, rule, tokenizer) for sample in samples]


def fate(sample: Sample, rule: Rule, tokenizer: Tokenizer) -> Fate:
    """What becomes of one judgement of a row that is not too easy."""
    if sample.finish == "length":
        return "truncated"
    if sample.scores is None:
        return "invalid"
    if rule.rejects and not rule.is_right(sample):
        return "wrong"
    body = sample.token_ids[:-1]  # without the end token
    thinking = {t for t in tokenizer.control_ids if tokenizer.token_bytes[t] in _THINKING}
    control = tokenizer.control_ids - thinking
    if not all(t < tokenizer.size and t not in control for t in body):
        return "garbled"
    written = b"".join(tokenizer.token_bytes[t] for t in body)
    return "kept" if written == sample.text.encode() else "garbled"


def judgement_line(
    row: Row, sample: Sample, *, hint: str | None = None, right: bool | None = None
) -> bytes:
    """A row with one of its judgements, newline included."""
    return row_line(row, judgement=sample.text, order=sample.order, hint=hint, right=right)


def row_line(row: Row, **more: Any) -> bytes:
    """A row as a line of JSON, newline included, with more fields, but for those that are None."""
    (first, *others) = row.messages
    prompt: Any = first.content
    if others:
        prompt = [{"role": m.role, "content": m.content} for m in row.messages]
    fields = {
        "id": row.id,
        "prompt": prompt,
        "responses": row.responses,
        "label": row.label,
        "reference": row.reference,
        "principles": row.principles,
        "meta": row.meta,
        **more,
    }
    there = {name: value for name, value in fields.items() if value is not None}
    return (json.dumps(there, ensure_ascii=False, separators=(",", ":")) + "\n").encode()
