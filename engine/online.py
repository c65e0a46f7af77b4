"""Rows that come one by one, from any thread: one thread judges them side by side.

A row joins those under way as soon as there is room for it. Rows whose options need a session of
their own wait until those before them are done. Outcomes come as they are done.

An outcome is the same as in a batch: a sample depends on its row, its index, the seed and the
options alone. A row that ends before all its samples are done is the exception, and says so.
"""

import asyncio
import atexit
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from engine.options import JudgeOptions
from engine.request import BadRow, Row
from engine.verdict import RowFailure, Verdict

if TYPE_CHECKING:
    from engine.session import Flight, RowJudge, Session

TOO_LATE = "no judgement was done when its time was over"


class Pending(Future[Verdict | RowFailure]):
    """A row's outcome, which is to come."""

    def __init__(self, deadline: float | None) -> None:
        """deadline: of time.monotonic(); None is none."""
        super().__init__()
        self._deadline = deadline
        self._ended = False

    def end(self) -> None:
        """Let the row end with the samples that are done, soon; nothing where it is done."""
        self._ended = True

    def is_over(self) -> bool:
        """Whether it is to end now."""
        return self._ended or (self._deadline is not None and time.monotonic() >= self._deadline)


@dataclass
class _Submitted:
    entry: Row | BadRow
    options: JudgeOptions
    pending: Pending


@dataclass
class _Call:
    work: Callable[[], None]
    done: Future[None]


class Worker:
    """The thread that judges what is submitted to it."""

    def __init__(self, judge: "RowJudge") -> None:
        self._judge = judge
        self._queue: deque[_Submitted | _Call] = deque()
        self._changed = threading.Condition()
        self._is_closed = False
        self._under_way: dict[int, Pending] = {}  # by the identity of their flights
        self._thread = threading.Thread(target=self._work, name="quorum-judge", daemon=True)
        self._thread.start()
        atexit.register(self._abandon)

    @property
    def num_pending(self) -> int:
        """Rows that are submitted and not done."""
        with self._changed:
            return len(self._queue) + len(self._under_way)

    @property
    def is_alive(self) -> bool:
        """Whether it judges what is submitted: until it is closed, or a fault ends the thread."""
        return self._thread.is_alive()

    def submit(
        self, entry: Row | BadRow, options: JudgeOptions, seconds: float | None = None
    ) -> Pending:
        """Judge an entry; options: checked. Raises RuntimeError after `close`."""
        pending = Pending(None if seconds is None else time.monotonic() + seconds)
        self._put(_Submitted(entry, options, pending))
        return pending

    def call(self, work: Callable[[], None]) -> Future[None]:
        """Run `work` in the judge's thread, once what was submitted before is done."""
        done: Future[None] = Future()
        self._put(_Call(work, done))
        return done

    async def stream(
        self,
        entries: Iterable[Row | BadRow] | AsyncIterator[Row | BadRow],
        options: JudgeOptions,
        ahead: int,
    ) -> AsyncIterator[Verdict | RowFailure]:
        """Outcomes as they are done; at most `ahead` entries are taken that are not."""
        loop = asyncio.get_running_loop()
        done: asyncio.Queue[Pending | None] = asyncio.Queue()
        room = asyncio.Semaphore(ahead)
        under_way: set[Pending] = set()

        def tell(pending: Pending, _: object) -> None:
            loop.call_soon_threadsafe(done.put_nowait, pending)

        async def feed() -> None:
            source = _each(entries)
            while True:
                await room.acquire()
                entry = await anext(source, None)
                if entry is None:
                    return
                pending = self.submit(entry, options)
                under_way.add(pending)
                pending.add_done_callback(partial(tell, pending))

        feeding = asyncio.create_task(feed())
        feeding.add_done_callback(lambda _: done.put_nowait(None))
        try:
            while under_way or not feeding.done():
                pending = await done.get()
                if pending is not None:
                    under_way.remove(pending)
                    room.release()
                    yield pending.result()
            feeding.result()  # or what the source has raised
        finally:
            feeding.cancel()
            for pending in under_way:  # nobody waits for them any more
                if not pending.cancel():
                    pending.end()

    def close(self) -> None:
        """Finish what is submitted, and end the thread."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()
        atexit.unregister(self._abandon)

    def _abandon(self) -> None:
        """At the end of the process: end all rows as they are. A thread that ran on into that end
        would find the library's own threads gone."""
        with self._changed:
            self._is_closed = True
            for item in self._queue:
                (item.pending if isinstance(item, _Submitted) else item.done).cancel()
            self._queue.clear()
            for pending in list(self._under_way.values()):
                pending.end()
            self._changed.notify()
        self._thread.join()

    def _put(self, item: _Submitted | _Call) -> None:
        with self._changed:
            if self._is_closed:
                raise RuntimeError("the judge is closed")
            self._queue.append(item)
            self._changed.notify()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._is_closed)
                if not self._queue:
                    return
                first = self._queue[0]
                if isinstance(first, _Call):
                    self._queue.popleft()
            if isinstance(first, _Call):
                self._run_call(first)
            else:
                self._run_rows(first.options)

    def _run_call(self, call: _Call) -> None:
        try:
            call.work()
        except BaseException as error:  # whoever waits for it has to know
            call.done.set_exception(error)
        else:
            call.done.set_result(None)

    def _run_rows(self, options: JudgeOptions) -> None:
        """Judge what the next session serves, until something else comes first."""
        try:
            session = self._judge.take_session(options)
            for flight in session.run(self._flights(session)):
                pending = self._under_way.pop(id(flight))
                assert flight.outcome is not None
                pending.set_result(flight.outcome)
        except BaseException as error:  # memory, a panic of a library: rows that follow go on
            self._fail(options, error)
        else:
            self._judge.keep_session(session)

    def _fail(self, options: JudgeOptions, error: BaseException) -> None:
        with self._changed:
            failed = [*self._under_way.values()]
            self._under_way.clear()
            first = self._queue[0] if self._queue else None
            if not failed and isinstance(first, _Submitted) and first.options == options:
                self._queue.popleft()  # there is no session for it
                failed = [first.pending] if first.pending.set_running_or_notify_cancel() else []
        for pending in failed:
            pending.set_exception(error)

    def _flights(self, session: "Session") -> "Iterator[Flight | None]":
        """What is submitted, as long as this session serves it; None while others are under way and
        nothing is there."""
        while True:
            with self._changed:
                if not self._under_way:
                    self._changed.wait_for(lambda: self._queue or self._is_closed)
                if not self._queue:
                    if self._is_closed:
                        return
                    taken = None
                else:
                    first = self._queue[0]
                    if isinstance(first, _Call) or not session.serves(first.options):
                        return
                    self._queue.popleft()
                    taken = first
            if taken is None:
                yield None
                continue
            pending = taken.pending
            if not pending.set_running_or_notify_cancel():
                continue
            try:
                flight = self._judge._flight(taken.entry, taken.options, None)
            except BaseException as error:  # likewise
                pending.set_exception(error)
                continue
            if pending.is_over():
                pending.set_result(flight.failure(TOO_LATE))
                continue
            flight.is_over = pending.is_over
            self._under_way[id(flight)] = pending
            yield flight


async def _each(
    entries: Iterable[Row | BadRow] | AsyncIterator[Row | BadRow],
) -> AsyncIterator[Row | BadRow]:
    if isinstance(entries, AsyncIterator):
        async for entry in entries:
            yield entry
    else:
        for entry in entries:
            yield entry
