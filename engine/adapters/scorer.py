"""What the adapters have in common: rows in, the scores of their responses out.

A scorer asks a judge in this process (`LocalScorer`) or one that is served (`HttpScorer`). Both may
be called from any thread, and give the same scores for the same rows, options and model. A row
that could not be judged, or whose samples are all invalid, has no scores, and the reason beside
them. It is never a score of 0.

Needs no torch where the judge is served. Not done here: what a trainer calls.
"""

import asyncio
import json
import logging
import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from engine.request import Row, RowError, make_row
from engine.verdict import RowFailure, Verdict

if TYPE_CHECKING:
    from engine.session import RowJudge

Shape = Literal["mean", "rank", "standardised"]
Prompt = str | Sequence[Mapping[str, str]]

FIRST_PAUSE = 1.0  # seconds before a request is sent again, where the server does not say
LONGEST_PAUSE = 30.0
BUSY = (429, 503)
TOO_LONG = 413

log = logging.getLogger(__name__)
_threads = ThreadPoolExecutor(256, "quorum-http")  # they only wait; each starts when it is needed


class NoVerdict(RuntimeError):
    """A response without a score, where the trainer takes nothing but a number."""


class TooLong(RuntimeError):
    """A row that a server takes to be too long."""


@dataclass(frozen=True)
class Question:
    """Responses to one prompt, which are judged together. reference and principles: as of a row."""

    prompt: Prompt
    responses: Sequence[str]
    reference: str | None = None
    principles: str | None = None

    def row(self) -> Row:
        """Raises RowError where it is no row."""
        return make_row(
            self.prompt, self.responses, reference=self.reference, principles=self.principles
        )


@dataclass(frozen=True)
class Scored:
    """The mean score of each response, None where there was no vote, and then `error` says why.
    `valid` of `drawn` samples had scores."""

    scores: tuple[float, ...] | None
    valid: int
    drawn: int
    error: str | None

    @property
    def valid_share(self) -> float | None:
        """None where no sample was drawn."""
        return self.valid / self.drawn if self.drawn else None


class Scorer(ABC):
    """Asks a judge about questions."""

    def score(self, questions: Sequence[Question]) -> list[Scored]:
        """Judge all of them side by side; one answer for each, in their order."""
        rows, found = _rows(questions)
        answers = iter(self._ask([row for row in rows if row is not None]))
        return _told([next(answers) if lost is None else lost for lost in found])

    async def score_async(self, questions: Sequence[Question]) -> list[Scored]:
        """`score`, for a loop of asyncio."""
        rows, found = _rows(questions)
        answers = iter(await self._ask_async([row for row in rows if row is not None]))
        return _told([next(answers) if lost is None else lost for lost in found])

    @abstractmethod
    def _ask(self, rows: Sequence[Row]) -> list[Scored]: ...

    @abstractmethod
    async def _ask_async(self, rows: Sequence[Row]) -> list[Scored]: ...


@dataclass(frozen=True)
class LocalScorer(Scorer):
    """A judge in this process. options: those of `RowJudge.rows`; deadline_seconds: for each row,
    which then ends with the samples that it has."""

    judge: "RowJudge"
    options: Mapping[str, Any] = field(default_factory=dict)
    deadline_seconds: float | None = None

    def _ask(self, rows: Sequence[Row]) -> list[Scored]:
        return [_of_outcome(pending.result()) for pending in self._submit(rows)]

    async def _ask_async(self, rows: Sequence[Row]) -> list[Scored]:
        pending = [asyncio.wrap_future(each) for each in self._submit(rows)]
        return [_of_outcome(outcome) for outcome in await asyncio.gather(*pending)]

    def _submit(self, rows: Sequence[Row]) -> list[Any]:
        seconds = self.deadline_seconds
        return [self.judge.submit(row, deadline_seconds=seconds, **self.options) for row in rows]


@dataclass(frozen=True)
class HttpScorer(Scorer):
    """A judge that is served at `url`, whose route is `/v1/judge`.

    A server that is busy (429, 503), cannot be reached or ends the connection is asked again until
    patience_seconds are over. A row that is too long for it (413) has no verdict; every other
    refusal is a RuntimeError with what the server said. timeout_seconds: for an answer that does
    not come, a TimeoutError.
    """

    url: str
    options: Mapping[str, Any] = field(default_factory=dict)
    deadline_seconds: float | None = None
    api_key: str | None = field(default=None, repr=False)
    timeout_seconds: float = 3600.0
    patience_seconds: float = 600.0

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url = {self.url!r} does not begin with http:// or https://")

    def _ask(self, rows: Sequence[Row]) -> list[Scored]:
        ended = threading.Event()
        found = [_threads.submit(self._post, row, ended) for row in rows]
        try:
            done, _ = wait(found, return_when=FIRST_EXCEPTION)
            for each in done:
                each.result()  # raises at once, whatever the others wait for
            return [each.result() for each in found]
        finally:
            ended.set()  # where one raised, the others are not asked again
            for each in found:
                each.cancel()

    async def _ask_async(self, rows: Sequence[Row]) -> list[Scored]:
        loop = asyncio.get_running_loop()
        ended = threading.Event()
        found = [loop.run_in_executor(_threads, self._post, row, ended) for row in rows]
        try:
            return list(await asyncio.gather(*found))
        finally:
            ended.set()

    def _post(self, row: Row, ended: threading.Event) -> Scored:
        # A request for each row: none is too long, or refused, because of another.
        body: dict[str, Any] = {"rows": [_fields(row)], "options": self.options}
        if self.deadline_seconds is not None:
            body["deadline_seconds"] = self.deadline_seconds
        headers = {"Content-Type": "application/json"}
        if self.api_key is not None:
            headers["Authorization"] = f"Bearer {self.api_key}"
        address = f"{self.url.rstrip('/')}/v1/judge"
        try:
            answer = self._answer(Request(address, json.dumps(body).encode(), headers), ended)
        except TooLong as error:
            return Scored(None, 0, 0, str(error))
        (outcome,) = answer["outcomes"]
        return _of_fields(outcome)

    def _answer(self, request: Request, ended: threading.Event) -> Any:
        until = time.monotonic() + self.patience_seconds
        pause = FIRST_PAUSE
        while True:
            seconds = pause
            try:
                with urlopen(request, timeout=self.timeout_seconds) as answer:
                    return json.load(answer)
            except HTTPError as error:
                said = error.read(300).decode("utf-8", "replace")
                failure = f"{request.full_url}: {error.code} {error.reason}: {said}"
                if error.code not in BUSY:
                    kind = TooLong if error.code == TOO_LONG else RuntimeError
                    raise kind(failure) from error
                seconds = _seconds(error.headers.get("Retry-After"), pause)
            except (URLError, ConnectionError) as error:  # not there, or gone in the middle
                reason = error.reason if isinstance(error, URLError) else error
                failure = f"{request.full_url}: {reason}"
            if time.monotonic() + seconds > until or ended.wait(seconds):
                raise RuntimeError(f"{failure}; asked for {self.patience_seconds:g} s")
            pause = min(2 * pause, LONGEST_PAUSE)


def scorer_of(
    judge: "RowJudge | str",
    options: Mapping[str, Any],
    *,
    deadline_seconds: float | None = None,
    api_key: str | None = None,
) -> Scorer:
    """The scorer of a judge, or of the address where one is served."""
    if isinstance(judge, str):
        return HttpScorer(judge, options, deadline_seconds, api_key)
    if api_key is not None:
        raise ValueError("api_key has no meaning for a judge in this process")
    return LocalScorer(judge, options, deadline_seconds)


def scorer_of_environment() -> Scorer:
    """The judge at QUORUM_URL (with QUORUM_API_KEY, if it is set), or else that of the directory
    QUORUM_MODEL, loaded here; QUORUM_OPTIONS is a JSON object of options. Raises ValueError where
    neither or both are set."""
    url, model = os.environ.get("QUORUM_URL"), os.environ.get("QUORUM_MODEL")
    if (url is None) == (model is None):
        raise ValueError("set QUORUM_URL, where a judge is served, or QUORUM_MODEL, a directory")
    given = os.environ.get("QUORUM_OPTIONS", "{}")
    options = json.loads(given)
    if not isinstance(options, dict):
        raise ValueError(f"QUORUM_OPTIONS = {given} is no JSON object")
    if url is not None:
        return HttpScorer(url, options, api_key=os.environ.get("QUORUM_API_KEY"))
    from engine.judge import Judge

    assert model is not None
    return LocalScorer(Judge.load(model), options)


def groups_of(keys: Sequence[Hashable], size: int | None = None) -> list[list[int]]:
    """The places of responses that are judged together: runs of `size` equal keys where all are
    such, and else all places of a key."""
    if size is not None and len(keys) % size == 0:
        runs = [list(range(start, start + size)) for start in range(0, len(keys), size)]
        if all(keys[place] == keys[run[0]] for run in runs for place in run):
            return runs
    groups: dict[Hashable, list[int]] = {}
    for place, key in enumerate(keys):
        groups.setdefault(key, []).append(place)
    return list(groups.values())


def rewards_of(scores: Sequence[float] | None, shape: Shape) -> list[float] | None:
    """What a group's scores are as rewards: themselves (mean), the share of the others that each
    beats, a tie being half (rank), or standard deviations from their mean, 0 where all are equal
    (standardised). None without scores; a lone response has a reward only as `mean`."""
    if scores is None or (len(scores) == 1 and shape != "mean"):
        return None
    if shape == "mean":
        return list(scores)
    if shape == "rank":
        others = len(scores) - 1
        return [
            (sum(s > t for t in scores) + 0.5 * (sum(s == t for t in scores) - 1)) / others
            for s in scores
        ]
    mean = sum(scores) / len(scores)
    deviation = (sum((s - mean) ** 2 for s in scores) / len(scores)) ** 0.5
    return [(s - mean) / deviation if deviation else 0.0 for s in scores]


def check_shape(shape: str) -> None:
    """Raises ValueError for what `rewards_of` does not know."""
    if shape not in ("mean", "rank", "standardised"):
        raise ValueError(f"reward = {shape!r} is not mean, rank or standardised")


def key_of(value: object) -> str:
    """Equal for equal prompts, whatever types they are of; raises TypeError for what is no JSON."""
    return json.dumps(value, sort_keys=True)


def number(reward: float | None, no_verdict: float | None, reason: str | None) -> float:
    """The reward where a trainer takes nothing but numbers: no_verdict stands for none. Raises
    NoVerdict without either."""
    if reward is not None:
        return reward
    if no_verdict is None:
        raise NoVerdict(f"no verdict: {reason}; no_verdict, if given, is the reward for that")
    return no_verdict


def _rows(questions: Sequence[Question]) -> tuple[list[Row | None], list[Scored | None]]:
    """For each question its row, or what becomes of it without one."""
    rows: list[Row | None] = []
    lost: list[Scored | None] = []
    for question in questions:
        try:
            rows.append(question.row())
            lost.append(None)
        except RowError as error:
            rows.append(None)
            lost.append(Scored(None, 0, 0, str(error)))
    return rows, lost


def _told(answers: list[Scored]) -> list[Scored]:
    lost = [answer for answer in answers if answer.scores is None]
    if lost:
        log.warning("%d of %d rows without a verdict: %s", len(lost), len(answers), lost[0].error)
    return answers


def _of_outcome(outcome: Verdict | RowFailure) -> Scored:
    if isinstance(outcome, RowFailure):
        return Scored(None, 0, 0, outcome.error)
    reasons = [sample.invalid for sample in outcome.samples]
    return _scored(outcome.mean_scores, outcome.valid, reasons)


def _of_fields(outcome: Mapping[str, Any]) -> Scored:
    """Of an outcome as JSON has it."""
    if "error" in outcome:
        return Scored(None, 0, 0, outcome["error"])
    reasons = [sample["invalid"] for sample in outcome["samples"]]
    return _scored(outcome["mean_scores"], outcome["valid"], reasons)


def _scored(means: Sequence[float] | None, valid: int, reasons: Sequence[str | None]) -> Scored:
    if means is not None:
        return Scored(tuple(means), valid, len(reasons), None)
    lost = sorted({reason for reason in reasons if reason is not None})
    return Scored(None, valid, len(reasons), f"no sample voted ({', '.join(lost) or 'no reason'})")


def _fields(row: Row) -> dict[str, Any]:
    prompt = [{"role": message.role, "content": message.content} for message in row.messages]
    fields: dict[str, Any] = {"prompt": prompt, "responses": row.responses}
    for name in ("reference", "principles"):
        if (value := getattr(row, name)) is not None:
            fields[name] = value
    return fields


def _seconds(given: str | None, otherwise: float) -> float:
    return float(given) if given is not None and given.strip().isdecimal() else otherwise
