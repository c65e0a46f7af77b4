"""A judge that is ready: what draws samples and reads scores, kept from call to call.

A session belongs to one set of the options that decide how samples are drawn (`Session.serves`).
Rows of any other options share it. Between two calls it keeps what prompts begin with, so that a
call pays for its template once. Where the model has learnt meanwhile it forgets that.

`RowJudge` is what all judges have in common: rows in, outcomes out, in input order here, or as they
are done from any thread (`engine/online.py`).
"""

import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from engine.generate import Usage
from engine.online import Pending, Worker
from engine.options import JudgeOptions
from engine.request import BadRow, Row
from engine.verdict import RowFailure, Verdict
from kernels.sample_token import SamplingOptions, stream_key

Outcome = Verdict | RowFailure
Entry = Row | BadRow
Hint = Callable[[Row, Sequence[int]], str | None]  # a row and a sample's order -> its hint
# The options that rows of one session share.
SHARED = (
    "temperature", "top_p", "top_k", "min_p", "max_new_tokens", "stop", "force_scores", "score",
    "deterministic", "attention",
)  # fmt: skip


@dataclass
class Flight:
    """An entry between its arrival and its outcome. is_over: whether it ends now with the samples
    that are done."""

    entry: Entry
    key: str
    options: JudgeOptions
    outcome: Outcome | None = None
    is_over: Callable[[], bool] | None = None

    def failure(self, error: str) -> RowFailure:
        return RowFailure(self.entry.id, self.entry.line, self.key, error)


class Session(ABC):
    """Judges rows of one set of SHARED options."""

    def __init__(self, options: JudgeOptions, weights: Iterable[Tensor]) -> None:
        """weights: of all models that have a part in an outcome."""
        self._shared = _shared(options)
        self._weights = list(weights)
        self._versions = self._current()

    def serves(self, options: JudgeOptions) -> bool:
        """Whether rows of these options can be judged here."""
        return _shared(options) == self._shared

    @abstractmethod
    def run(self, flights: Iterable[Flight | None]) -> Iterator[Flight]:
        """Judge flights, taken as there is room for them; yields them as they get their outcomes.
        None stands for none at present."""

    @abstractmethod
    def forget(self) -> None:
        """Compute anew whatever rows have in common."""

    def refresh(self) -> bool:
        """Follow weights that have changed in place. Returns whether the session is of any use: not
        where they lie elsewhere now."""
        versions = self._current()
        if versions != self._versions:
            self.forget()
            places = [place for place, _ in self._versions]
            self._versions = versions
            return places == [place for place, _ in versions]
        return True

    def _current(self) -> list[tuple[int, int]]:
        # An inference tensor has no version, and cannot change.
        return [(w.data_ptr(), 0 if w.is_inference() else w._version) for w in self._weights]


def sampling_of(options: JudgeOptions) -> SamplingOptions:
    """How tokens are drawn; raises ValueError for what is out of range."""
    return SamplingOptions(options.temperature, options.top_k, options.top_p, options.min_p)


def check_draws(options: JudgeOptions) -> None:
    """Raise ValueError for draws that could not be made: before any row, not at one."""
    sampling_of(options)
    stream_key(options.seed, "", "token")


def _shared(options: JudgeOptions) -> tuple[Any, ...]:
    return tuple(getattr(options, name) for name in SHARED)


class RowJudge(ABC):
    """Rows in, one outcome for each out."""

    usage: Usage

    def __init__(self) -> None:
        self._idle: list[Session] = []  # at most one
        self._worker: Worker | None = None
        self._starting = threading.Lock()

    @abstractmethod
    def _options(self, given: Mapping[str, Any]) -> JudgeOptions:
        """The options of `rows`, checked."""

    @abstractmethod
    def _flight(self, entry: Entry, options: JudgeOptions, hint: Hint | None) -> Flight:
        """An entry that is to be judged."""

    @abstractmethod
    def _new_session(self, options: JudgeOptions) -> Session:
        """A session for these options; raises ValueError where there can be none."""

    def rows(
        self, entries: Iterable[Entry | None], *, hint: Hint | None = None, **options: Any
    ) -> Iterator[Outcome]:
        """Judge rows, taken as there is room for them; one outcome for each, in input order. That
        of a line that is no row is its failure. None has no outcome: it says that no entry is there
        at present, so that those under way go on. Options are the fields of `JudgeOptions`, checked
        now: ValueError for those out of range, or that this judge has no use for."""
        chosen = self._checked(options)
        return self._in_order(self.take_session(chosen), entries, chosen, hint)

    def submit(
        self, entry: Entry, *, deadline_seconds: float | None = None, **options: Any
    ) -> Pending:
        """Judge one row beside all others that are submitted, from any thread; returns a future of
        its outcome. Options are those of `rows`, checked now. Rows of like SHARED options run
        together, those of others after them.

        deadline_seconds: from now on; then the row ends with the samples that are done, as
        a verdict that is `partial`, or a failure where none is. `Pending.end` does the same."""
        chosen = self._checked(options)
        return self._online().submit(entry, chosen, deadline_seconds)

    async def stream(
        self, entries: Iterable[Entry] | AsyncIterator[Entry], *, ahead: int = 256, **options: Any
    ) -> AsyncIterator[Outcome]:
        """`submit` rows, at most `ahead` that are not done; yields outcomes as they are done."""
        chosen = self._checked(options)
        async for outcome in self._online().stream(entries, chosen, ahead):
            yield outcome

    def check(self, **options: Any) -> None:
        """Raise ValueError for options that `rows` and `submit` would refuse."""
        self._checked(options)

    @property
    def is_alive(self) -> bool:
        """Whether what is submitted is judged: not where a fault has ended the thread that does."""
        return self._worker is None or self._worker.is_alive

    def between_rows(self, work: Callable[[], None]) -> None:
        """Call `work` while no submitted row is under way; returns when it has run."""
        if self._worker is None:
            work()
        else:
            self._worker.call(work).result()

    def close(self) -> None:
        """Finish what is submitted, and let go of the cache. The judge can be used again."""
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.close()
        self._idle.clear()

    def take_session(self, options: JudgeOptions) -> Session:
        """A session for these options, which is the caller's alone until it is kept again."""
        try:
            session = self._idle.pop()
        except IndexError:
            return self._new_session(options)
        if session.serves(options) and session.refresh():
            return session
        del session  # before another takes as much memory
        return self._new_session(options)

    def keep_session(self, session: Session) -> None:
        """Give back a session that has nothing under way."""
        if not self._idle:
            self._idle.append(session)

    def _checked(self, given: Mapping[str, Any]) -> JudgeOptions:
        options = self._options(given)
        check_draws(options)
        return options

    def _online(self) -> Worker:
        with self._starting:  # the first rows may come from several threads at once
            if self._worker is None:
                self._worker = Worker(self)
            return self._worker

    def _in_order(
        self,
        session: Session,
        entries: Iterable[Entry | None],
        options: JudgeOptions,
        hint: Hint | None,
    ) -> Iterator[Outcome]:
        flying: deque[Flight] = deque()

        def flights() -> Iterator[Flight | None]:
            for entry in entries:
                flight = None if entry is None else self._flight(entry, options, hint)
                if flight is not None:
                    flying.append(flight)
                yield flight

        for _ in session.run(flights()):
            while flying and (outcome := flying[0].outcome) is not None:
                flying.popleft()
                yield outcome
        assert not flying, "a row without an outcome"
        self.keep_session(session)
