"""A judge without a model, for tests of the command line: it draws scores from a hash.

It keeps a few rows in flight, as the real one does, refuses rows that say TOO LONG, and counts what
it has taken. `python -m tests.fake_judge` is `python -m engine.sample` with this judge.
Environment: FAKE_DELAY_S (seconds a row takes).
"""

import hashlib
import os
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from engine import sample
from engine.key import line_key
from engine.labels import agrees, is_correct
from engine.request import BadRow, Row
from engine.verdict import RowFailure, Sample, Verdict

IN_FLIGHT = 3


@dataclass
class Usage:
    prefill_tokens: int = 0
    decode_tokens: int = 0
    idle_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    meta_tokens: int = 0
    meta_seconds: float = 0.0


class Judge:
    """The interface of engine.judge.Judge that the command line uses."""

    loaded: dict[str, Any] | None = None

    def __init__(self) -> None:
        self.usage = Usage()

    @classmethod
    def load(cls, directory: Any, **options: Any) -> "Judge":
        cls.loaded = {"directory": directory, **options}
        if str(directory) == "nowhere":
            raise ValueError(f"{directory} is no model directory")
        return cls()

    def key(self, row: Row | BadRow, **options: Any) -> str:
        return line_key(row, options, "fake")

    def opens_thinking(self, row: Row, seed: int) -> bool:
        return row.messages[-1].content == "THINKS"

    def rows(
        self, rows: Iterable[Row | BadRow | None], **options: Any
    ) -> Iterator[Verdict | RowFailure]:
        if options["k"] < 1:
            raise ValueError(f"k = {options['k']} is less than 1")
        return self._rows(rows, options)

    def _rows(
        self, rows: Iterable[Row | BadRow | None], options: dict[str, Any]
    ) -> Iterator[Verdict | RowFailure]:
        flying: deque[Row | BadRow] = deque()
        for row in rows:
            if row is not None:
                flying.append(row)
            if len(flying) == IN_FLIGHT or row is None:
                yield self._judge(flying.popleft(), options)
        while flying:
            yield self._judge(flying.popleft(), options)

    def _judge(self, row: Row | BadRow, options: dict[str, Any]) -> Verdict | RowFailure:
        key = self.key(row, **options)
        if isinstance(row, BadRow):
            return RowFailure(row.id, row.line, key, row.error)
        time.sleep(float(os.environ.get("FAKE_DELAY_S", "0")))
        if "TOO LONG" in row.messages[-1].content:
            return RowFailure(row.id, row.line, key, "the prompt has 9000 tokens, the context 8192")
        if "UNREAD" in row.messages[-1].content:
            return _without_scores(row, key, options["k"], "missing", "**Scores:** 7")
        if row.messages[-1].content in ("THINKS", "CUT"):
            return _without_scores(row, key, options["k"], "truncated", "Hm")
        draws = hashlib.sha256(key.encode()).digest()
        n, k = len(row.responses), options["k"]
        votes = [tuple(draws[(i + j) % 32] % 10 + 1 for i in range(n)) for j in range(k)]
        sums = [sum(column) for column in zip(*votes, strict=True)]
        means = [total / k for total in sums]
        best = sums.index(max(sums))
        self.usage.prefill_tokens += 10
        self.usage.decode_tokens += 5 * k
        self.usage.idle_tokens += 1
        return Verdict(
            id=row.id, key=key, best=best, scores=sums, mean_scores=means, tie=False,
            k=k, valid=k, votes=k,
            samples=[
                Sample(tuple(range(n)), f"Scores: {vote}", vote, None, None, 5, "box", [], [], [])
                for vote in votes
            ],
            prompt_tokens=10 * k, tree_tokens=10, decode_tokens=5 * k,
            label=row.label, correct=is_correct(best, means, row.label, 5.5),
            agrees=agrees(best, row.label), row_meta=row.meta,
        )  # fmt: skip


def _without_scores(row: Row, key: str, k: int, reason: str, text: str) -> Verdict:
    order = tuple(range(len(row.responses)))
    lost = Sample(order, text, None, reason, None, 5, "eos", [], [], [])
    return Verdict(
        id=row.id, key=key, best=None, scores=None, mean_scores=None, tie=False, k=k, valid=0,
        votes=0, samples=[lost] * k, prompt_tokens=10 * k, tree_tokens=10, decode_tokens=5 * k,
    )  # fmt: skip


def as_module() -> ModuleType:
    """A stand-in for the module engine.judge."""
    module = ModuleType("engine.judge")
    module.Judge = Judge  # type: ignore[attr-defined]
    return module


if __name__ == "__main__":
    sys.modules["engine.judge"] = as_module()
    sys.exit(sample.main())
