"""Groups whose responses come one by one, each in a call of its own, as verl has them.

The responses of one key wait for one another, and are judged as one row once there are `size`.
Where no response has come for `patience_seconds`, of any group, those that wait are judged as they
are; one that comes later begins a new group. A row holds its responses sorted, so that a verdict
does not depend on which came first.

For one event loop: a group whose members are in several processes is never whole.
"""

import asyncio
from collections.abc import Hashable
from dataclasses import dataclass, field, replace

from engine.adapters.scorer import Question, Scored, Scorer


@dataclass
class _Group:
    question: Question
    done: "asyncio.Future[tuple[Scored, list[int]]]"  # and the row's place of each response
    responses: list[str] = field(default_factory=list)


class GroupCollector:
    """Judges responses together that are asked about one by one."""

    def __init__(self, scorer: Scorer, size: int, patience_seconds: float) -> None:
        """Raises ValueError for a size of less than 1, or no patience."""
        if size < 1:
            raise ValueError(f"size = {size} is less than 1")
        if not patience_seconds > 0:
            raise ValueError(f"patience_seconds = {patience_seconds} is not above 0")
        self.scorer = scorer
        self.size = size
        self.patience_seconds = patience_seconds
        self._groups: dict[Hashable, _Group] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def score(self, key: Hashable, question: Question) -> tuple[Scored, int]:
        """Judge the question's one response with the others of its key. Returns what the row got,
        and the response's place in it."""
        (response,) = question.responses
        loop = asyncio.get_running_loop()
        group = self._groups.get(key)
        if group is None:
            group = self._groups[key] = _Group(question, loop.create_future())
        index = len(group.responses)
        group.responses.append(response)
        if len(group.responses) == self.size:
            self._close(key)
        if self._timer is not None:
            self._timer.cancel()
        self._timer = loop.call_later(self.patience_seconds, self._close_all)
        scored, places = await asyncio.shield(group.done)  # one caller's end is not the group's
        return scored, places[index]

    def _close_all(self) -> None:
        for key in list(self._groups):
            self._close(key)

    def _close(self, key: Hashable) -> None:
        task = asyncio.get_running_loop().create_task(self._judge(self._groups.pop(key)))
        self._tasks.add(task)  # a loop holds its tasks by weak references only
        task.add_done_callback(self._tasks.discard)

    async def _judge(self, group: _Group) -> None:
        order = sorted(range(len(group.responses)), key=group.responses.__getitem__)
        row = replace(group.question, responses=[group.responses[index] for index in order])
        try:
            (scored,) = await self.scorer.score_async([row])
        except Exception as error:  # whoever waits for the group has to know
            group.done.set_exception(error)
            return
        group.done.set_result((scored, [order.index(index) for index in range(len(order))]))
