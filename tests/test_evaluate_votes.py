"""Verdicts and their lines as arrays."""

import math
from pathlib import Path

import numpy as np
import pytest

from bench.evaluate.votes import RowVotes, read_votes, votes_of
from engine.verdict import RowFailure, Sample, Verdict, to_line


def verdict(name: str, samples: list[Sample]) -> Verdict:
    return Verdict(name, "k", 0, [1, 2], [1.0, 2.0], False, len(samples), 1, 1, samples, 90, 50, 7,
                   row_meta={"item": "i"})  # fmt: skip


def sample(
    order: tuple[int, ...],
    scores: tuple[int, ...] | None,
    meta: float | None = None,
    expected: tuple[float, ...] | None = None,
) -> Sample:
    invalid = None if scores else "truncated"
    return Sample(
        order, "text", scores, invalid, meta, 3, "box", [], [], [], expected=expected
    )  # fmt: skip


PAIR = verdict("a", [sample((1, 0), (4, 6), 0.5, (4.5, 6.0)), sample((0, 1), None),
                     sample((1, 0), (2, 2), math.nan, (2.0, 3.0))])  # fmt: skip
ALONE = verdict("b", [sample((0,), (7,)), sample((0,), None)])


def same(one: RowVotes, other: RowVotes) -> bool:
    return all(
        np.array_equal(a, b, equal_nan=True) if isinstance(a, np.ndarray) else a == b
        for a, b in zip(one, other, strict=True)
    )


def test_what_samples_said() -> None:
    found = votes_of(PAIR, 5.5)
    expected = np.array([[4, 6], [np.nan, np.nan], [2, 2]])
    assert np.array_equal(found.scores, expected, equal_nan=True)
    assert found.expected is not None and found.expected[0].tolist() == [4.5, 6.0]
    assert np.array_equal(found.meta, np.array([0.5, np.nan, np.nan]), equal_nan=True)
    assert found.first.tolist() == [1, 0, 1] and found.tokens.tolist() == [3, 3, 3]
    assert found.invalid == (None, "truncated", None) and found.facts == {"item": "i"}
    assert (found.row_tokens, found.prompt_tokens, found.error) == (50, 90, None)
    alone = votes_of(ALONE, 5.5)  # what it is above the threshold
    assert alone.expected is None and alone.scores[0, 0] == 1.5 and np.isnan(alone.scores[1, 0])


def test_lines_say_what_verdicts_do(tmp_path: Path) -> None:
    path = tmp_path / "verdicts.jsonl"
    failure = RowFailure("c", 3, "k", "too long")
    path.write_bytes(to_line(PAIR) + to_line(ALONE) + to_line(failure))
    pair, alone, failed = read_votes(path, 5.5)
    assert same(pair, votes_of(PAIR, 5.5)) and same(alone, votes_of(ALONE, 5.5))
    assert not same(pair, votes_of(PAIR, 5.5)._replace(row_tokens=51))
    assert (failed.id, failed.error, failed.scores.shape) == ("c", "too long", (0, 0))


def test_a_line_that_is_none_is_named(tmp_path: Path) -> None:
    path = tmp_path / "verdicts.jsonl"
    for wrong in (b"{", b'{"id": "a", "samples": [{"order": 1}]}', b"[]"):
        path.write_bytes(to_line(ALONE) + wrong + b"\n")
        with pytest.raises(ValueError, match="line 2: "):
            list(read_votes(path, 5.5))
