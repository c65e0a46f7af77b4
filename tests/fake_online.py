"""A judge without a model behind the same worker as every other, for tests of the server.

Its verdicts are those of `tests/fake_judge.py`. A row whose prompt says WAIT is under way until
`gate` is set, or the row is over; one that says FAULT raises.
"""

import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any

from engine.generate import Usage
from engine.key import line_key
from engine.online import TOO_LATE
from engine.options import JudgeOptions
from engine.request import BadRow
from engine.session import Entry, Flight, Hint, RowJudge, Session
from engine.verdict import Verdict
from tests import fake_judge


class Judge(RowJudge):
    """The interface of a judge that the server uses."""

    def __init__(self) -> None:
        super().__init__()
        self.usage = Usage()
        self.gate = threading.Event()
        self.ended: list[str] = []  # ids of rows that were over before they were done

    def _options(self, given: Mapping[str, Any]) -> JudgeOptions:
        return JudgeOptions(**given)

    def _flight(self, entry: Entry, options: JudgeOptions, hint: Hint | None) -> Flight:
        return Flight(entry, line_key(entry, asdict(options), "fake"), options)

    def _new_session(self, options: JudgeOptions) -> "FakeSession":
        if options.max_new_tokens == 7777:
            raise ValueError("no cache for a sample of 7777 tokens")
        return FakeSession(self, options)


class FakeSession(Session):
    def __init__(self, judge: Judge, options: JudgeOptions) -> None:
        super().__init__(options, [])
        self.judge = judge
        self.fake = fake_judge.Judge()

    def run(self, flights: Iterable[Flight | None]) -> Iterator[Flight]:
        flying: list[Flight] = []
        for flight in flights:
            if flight is None:
                time.sleep(0.001)
            else:
                flying.append(flight)
            for each in list(flying):
                if self.finish(each):
                    flying.remove(each)
                    yield each
        for each in flying:
            while not self.finish(each):
                time.sleep(0.001)
            yield each

    def finish(self, flight: Flight) -> bool:
        row = flight.entry
        assert not isinstance(row, BadRow)
        text = row.messages[-1].content
        if "FAULT" in text:
            raise RuntimeError("out of memory")
        is_over = flight.is_over is not None and flight.is_over()
        if "WAIT" in text and not self.judge.gate.is_set() and not is_over:
            return False
        if is_over:
            self.judge.ended.append(row.id)
        outcome = self.fake._judge(row, asdict(flight.options))
        if isinstance(outcome, Verdict) and is_over:
            outcome = replace(outcome, partial=True)
            if "NOTHING" in text:
                flight.outcome = flight.failure(TOO_LATE)
                return True
        flight.outcome = outcome
        return True

    def forget(self) -> None:
        pass
