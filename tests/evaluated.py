"""Rows that were judged, made by hand: for the tests of bench.evaluate."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bench.evaluate.benchmark import Item
from bench.evaluate.votes import RowVotes, failed_row
from engine.labels import Label
from engine.request import make_row

Scores = Sequence[float] | None


def item(
    name: str,
    label: Label | None = 0,
    *,
    subset: str = "a",
    responses: Sequence[str] = ("x", "y"),
    facts: Mapping[str, Any] | None = None,
) -> Item:
    """An item of one row."""
    row = make_row("p", list(responses), id=name, label=label)
    return Item(name, subset, (row,), facts or {})


def votes_of(
    name: str,
    scores: Sequence[Scores],
    meta: Sequence[float] | None = None,
    first: Sequence[int] | None = None,
    tokens: Sequence[int] | None = None,
    expected: Sequence[Scores] | None = None,
) -> RowVotes:
    """The samples of a row; None for an invalid one. They rotate through the orders by default."""
    k = len(scores)
    n = len(next(each for each in scores if each is not None))
    nothing = [np.nan] * n

    def table(given: Sequence[Scores]) -> np.ndarray:
        return np.array([nothing if each is None else each for each in given], dtype=np.float64)

    return RowVotes(
        name,
        table(scores),
        None if expected is None else table(expected),
        np.array([np.nan] * k if meta is None else meta, dtype=np.float64),
        np.array([i % n for i in range(k)] if first is None else first),
        np.array([10] * k if tokens is None else tokens),
        tuple("missing" if each is None else None for each in scores),
        row_tokens=100,
        prompt_tokens=60 * k,
        facts=None,
    )


def failed(name: str, error: str = "too long") -> RowVotes:
    """A row that could not be judged."""
    return failed_row(name, error)


def line_of(votes: RowVotes) -> dict[str, Any]:
    """The line that `engine.sample` would have written of it; the threshold is 0."""
    if votes.error is not None:
        return {"id": votes.id, "error": votes.error}
    n = votes.scores.shape[1]
    samples = []
    for i, scores in enumerate(votes.scores.tolist()):
        first = int(votes.first[i])
        meta = float(votes.meta[i])
        samples.append({
            "order": [(first + place) % n for place in range(n)],
            "text": "",
            "scores": None if votes.invalid[i] else [int(score) for score in scores],
            **({} if votes.expected is None else {"expected": votes.expected[i].tolist()}),
            "invalid": votes.invalid[i],
            "meta": None if np.isnan(meta) else meta,
            "tokens": int(votes.tokens[i]),
            "finish": "eos",
        })  # fmt: skip
    usage = {
        "prompt_tokens": votes.prompt_tokens,
        "tree_tokens": votes.row_tokens,
        "decode_tokens": int(votes.tokens.sum()),
    }
    return {"id": votes.id, "samples": samples, "usage": usage}
