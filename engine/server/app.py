"""The server as an ASGI application: what comes over HTTP becomes rows, and outcomes go out.

A request is read whole, within limits, before anything is judged; then all of its rows are
submitted, or none where too many are waiting. A client that goes away ends its rows. What the
client got wrong is a 4xx that says so; a row that cannot be judged is a 422, or its own place in a
list. Every request is one line of JSON on standard error, without a text of its rows.

Judges run in a thread of their own (`engine/online.py`); here is one event loop and nothing slow.
Not done here: signals and sockets (`engine/serve.py`), TLS, rate limits for each client.
"""

import asyncio
import hashlib
import hmac
import json
import re
import secrets
import sys
import time
import traceback
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any, Literal, TextIO

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from engine.online import Pending
from engine.server.asked import Asked, Outcome, Refused, parse_body, to_json
from engine.server.metrics import Metrics
from engine.server.shapes import Shapes
from engine.verdict import RowFailure, to_line

Reader = Callable[[dict[str, Any]], Asked]
STOPPING = "the server is stopping"
_RETRY = {"Retry-After": "1"}
_CLOSE = {"Connection": "close"}  # what is left of the body is not read
_CLIENT_GONE = 499  # in the log alone: nobody reads an answer
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_DOCS = Path(__file__).with_name("docs.html")


class _Gone(Exception):
    """The client has gone away."""


class _Ticket:
    """The rows of one request that were accepted, until it is answered."""

    def __init__(self, entries: Sequence[Pending | RowFailure]) -> None:
        self.entries = entries
        self.faults: dict[int, BaseException] = {}  # of places whose outcome is no row's fault
        self.done: asyncio.Queue[int | Literal["gone", "stopped"]] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        for place, entry in enumerate(entries):
            if isinstance(entry, Pending):
                entry.add_done_callback(self._tell(loop, place))
            else:
                self.done.put_nowait(place)

    def _tell(self, loop: asyncio.AbstractEventLoop, place: int) -> Callable[[Any], None]:
        def tell(_: Any) -> None:
            with suppress(RuntimeError):  # the loop has ended: nobody waits
                loop.call_soon_threadsafe(self.done.put_nowait, place)

        return tell

    async def outcomes(self, request: Request) -> AsyncGenerator[tuple[int, Outcome]]:
        """Outcomes with their places, as they are done. Raises _Gone once the client has left, and
        Refused where the server stops. However it ends, no row of it goes on."""
        watch = asyncio.create_task(self._watch(request))
        try:
            for _ in self.entries:
                place = await self.done.get()
                if place == "gone":
                    raise _Gone
                if place == "stopped":
                    raise Refused(503, STOPPING, _RETRY)
                yield place, self._outcome(place)
        finally:
            watch.cancel()
            for entry in self.entries:
                if isinstance(entry, Pending) and not entry.cancel():
                    entry.end()

    async def _watch(self, request: Request) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self.done.put_nowait("gone")

    def _outcome(self, place: int) -> Outcome:
        entry = self.entries[place]
        if isinstance(entry, RowFailure):
            return entry
        error = entry.exception()
        if error is None:
            return entry.result()
        # No row's fault, but options that no session can be made for, or a fault of the engine.
        self.faults[place] = error
        return RowFailure(None, None, None, f"{type(error).__name__}: {error}")


class Server:
    """The application. `drain` ends it."""

    def __init__(
        self, shapes: Shapes, keys: Sequence[bytes] = (), log: TextIO | None = None
    ) -> None:
        """keys: those that a request for judging must show one of; none are asked for where there
        are none. log: where lines go, standard error by default."""
        self.shapes = shapes
        self.limits = shapes.limits
        self._keys = [hashlib.sha256(key).digest() for key in keys]
        self._log_stream = log
        self._pending: set[Pending] = set()
        self._tickets: set[_Ticket] = set()
        self._began = int(time.time())
        self.is_draining = False
        self.dropped = 0  # rows that were accepted and not answered, since a drain was too short
        self.metrics = Metrics(shapes.judge.usage, lambda: len(self._pending))
        readers: dict[str, Reader] = {
            "/v1/judge": shapes.judge_rows,
            "/get_reward": shapes.get_reward,
            "/compare": shapes.compare,
            "/rerank": shapes.rerank,
            "/v1/rerank": shapes.rerank,
            "/v2/rerank": shapes.rerank,
            "/classify": shapes.classify,
            "/v1/chat/completions": shapes.chat,
        }
        pages = {
            "/health": self._health,
            "/ready": self._ready,
            "/metrics": self._metrics,
            "/v1/models": self._models,
            "/docs": self._docs,
        }
        routes = [
            Route(path, self._judging(read), methods=["POST"]) for path, read in readers.items()
        ]
        routes += [Route(path, page, methods=["GET"]) for path, page in pages.items()]
        self._paths = {*readers, *pages}
        self._app = Starlette(
            routes=routes,
            exception_handlers={HTTPException: _http_error, Refused: _refusal, Exception: _fault},
        )
        self._app.router.redirect_slashes = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI. Answers whatever happens, and logs it."""
        if scope["type"] != "http":
            return
        started, status = time.perf_counter(), 0
        request = Request(scope)
        given = request.headers.get("x-request-id", "")
        name = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
        facts: dict[str, Any] = {"rows": 0, "failures": 0}  # for the log
        scope["quorum"] = facts
        route = scope["path"] if scope["path"] in self._paths else "other"

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", name.encode())]
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except (_Gone, ClientDisconnect):
            status = _CLIENT_GONE
        except Exception as error:  # a fault of ours: it is answered, and told; the server goes on
            facts["error"] = _where(error)
        seconds = time.perf_counter() - started
        self.metrics.count_request(route, status, seconds)
        self._log({
            "id": name, "method": scope["method"], "route": route, "status": status,
            "seconds": round(seconds, 4), **facts,
        })  # fmt: skip

    def _log(self, fields: dict[str, Any]) -> None:
        stream = sys.stderr if self._log_stream is None else self._log_stream
        line = json.dumps({"time": round(time.time(), 3), **fields})
        with suppress(OSError):  # nobody reads it
            print(line, file=stream, flush=True)

    # -- judging -----------------------------------------------------------------------------------

    def _judging(self, read: Reader) -> Callable[[Request], Any]:
        async def endpoint(request: Request) -> Response:
            self._authorize(request)
            self._check_room(1)
            body = await self._body(request)
            asked = await run_in_threadpool(lambda: read(parse_body(body)))
            accepts = request.headers.get("accept", "")
            streams = asked.streams or (
                read == self.shapes.judge_rows and "text/event-stream" in accepts
            )
            ticket = self._accept(asked)
            request.scope["quorum"]["rows"] = len(ticket.entries)
            if streams:
                return _Events(self._events(request, ticket))
            return await self._answer(request, asked, ticket)

        return endpoint

    def _authorize(self, request: Request) -> None:
        """Raise Refused without one of the keys. All are compared, each in the same time whatever
        is sent: what is compared are hashes."""
        if not self._keys:
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        digest = hashlib.sha256(key.strip().encode("latin-1")).digest()
        found = [hmac.compare_digest(digest, each) for each in self._keys]
        if scheme.lower() != "bearer" or not any(found):
            raise Refused(
                401, "no valid key: Authorization: Bearer KEY", {"WWW-Authenticate": "Bearer"}
            )

    def _check_room(self, rows: int) -> None:
        if self.is_draining:
            raise Refused(503, STOPPING, _RETRY | _CLOSE)
        if len(self._pending) + rows > self.limits.max_pending:
            message = (
                f"{len(self._pending)} rows are waiting; the limit is {self.limits.max_pending}"
            )
            raise Refused(429, message, _RETRY)

    async def _body(self, request: Request) -> bytes:
        """The whole body; raises Refused for one of another type, too long or too slow."""
        kind, _, more = request.headers.get("content-type", "").partition(";")
        charset = more.strip().lower().replace('"', "")
        if kind.strip().lower() != "application/json" or charset not in ("", "charset=utf-8"):
            raise Refused(415, "the body has to be Content-Type: application/json", _CLOSE)
        if request.headers.get("content-encoding", "identity").lower() != "identity":
            raise Refused(415, "the body must not be compressed", _CLOSE)
        most, too_long = self.limits.max_body_bytes, "the body is longer than {} bytes"
        length = request.headers.get("content-length", "")
        if length.isdecimal() and (len(length) > 18 or int(length) > most):
            raise Refused(413, too_long.format(most), _CLOSE)
        body = bytearray()
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > most:
                        raise Refused(413, too_long.format(most), _CLOSE)
        except TimeoutError:
            raise Refused(408, f"no whole body in {self.limits.body_seconds} s", _CLOSE) from None
        return bytes(body)

    def _accept(self, asked: Asked) -> _Ticket:
        """Submit all rows; raises Refused where there is no room for them, or no judge for their
        options."""
        rows = [entry for entry in asked.entries if not isinstance(entry, RowFailure)]
        self._check_room(len(rows))
        entries: list[Pending | RowFailure] = []
        for entry in asked.entries:
            if isinstance(entry, RowFailure):
                entries.append(entry)
                continue
            try:
                pending = self.shapes.judge.submit(
                    entry, deadline_seconds=asked.deadline_seconds, **asked.options
                )
            except ValueError as error:  # of the options, so of the first row or of none
                raise Refused(400, f"options: {error}") from None
            self._pending.add(pending)
            pending.add_done_callback(self._pending.discard)
            entries.append(pending)
        ticket = _Ticket(entries)
        self._tickets.add(ticket)
        return ticket

    async def _outcomes(
        self, request: Request, ticket: _Ticket
    ) -> AsyncGenerator[tuple[int, Outcome]]:
        """Those of the ticket, counted."""
        facts = request.scope["quorum"]
        try:
            async with aclosing(ticket.outcomes(request)) as outcomes:
                async for place, outcome in outcomes:
                    self.metrics.count_outcome(outcome)
                    facts["failures"] += isinstance(outcome, RowFailure)
                    if _status(ticket.faults.get(place)) == 500:
                        facts["error"] = _where(ticket.faults[place])
                    yield place, outcome
        finally:
            self._tickets.discard(ticket)

    async def _answer(self, request: Request, asked: Asked, ticket: _Ticket) -> Response:
        found: dict[int, Outcome] = {}
        async with aclosing(self._outcomes(request, ticket)) as outcomes:
            async for place, outcome in outcomes:
                found[place] = outcome
        ordered = [found[place] for place in range(len(found))]
        if asked.one and isinstance(ordered[0], RowFailure):
            failure = ordered[0]
            status = _status(ticket.faults.get(0))
            raise Refused(status, failure.error, id=failure.id, key=failure.key)
        return Response(asked.answer(ordered), media_type="application/json")

    async def _events(self, request: Request, ticket: _Ticket) -> AsyncGenerator[bytes]:
        """Server-sent events of a ticket."""
        counts = {"verdicts": 0, "failures": 0}
        try:
            async with aclosing(self._outcomes(request, ticket)) as outcomes:
                async for place, outcome in outcomes:
                    failed = isinstance(outcome, RowFailure)
                    counts["failures" if failed else "verdicts"] += 1
                    name, line = b"failure" if failed else b"verdict", to_line(outcome)
                    yield b"event: %s\nid: %d\ndata: %s\n" % (name, place, line)
        except Refused as refused:  # the server stops
            yield b"event: error\ndata: %s\n\n" % to_json({"error": str(refused)})
            return
        yield b"event: done\ndata: %s\n\n" % to_json(counts)

    # -- the end -----------------------------------------------------------------------------------

    async def drain(self, seconds: float) -> None:
        """Accept nothing more, and wait until all that was accepted is answered; after so many
        seconds drop what is not."""
        self.is_draining = True
        deadline = time.monotonic() + seconds
        while self._tickets and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        for ticket in self._tickets:
            self.dropped += sum(isinstance(e, Pending) and not e.done() for e in ticket.entries)
            ticket.done.put_nowait("stopped")

    # -- pages -------------------------------------------------------------------------------------

    async def _health(self, request: Request) -> Response:
        if self.shapes.judge.is_alive:
            return _json({"status": "ok"})
        return _json({"status": "the engine's thread has ended"}, 503)

    async def _ready(self, request: Request) -> Response:
        if self.is_draining:
            return _json({"status": STOPPING}, 503)
        if len(self._pending) >= self.limits.max_pending:
            return _json({"status": "no room"}, 503)
        return await self._health(request)

    async def _metrics(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def _models(self, request: Request) -> Response:
        name = self.shapes.names[0]
        model = {"id": name, "object": "model", "created": self._began, "owned_by": "quorum"}
        return _json({"object": "list", "data": [model]})

    async def _docs(self, request: Request) -> Response:
        return Response(_DOCS.read_bytes(), media_type="text/html")


class _Events(Response):
    """An answer that is sent as it is made."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes]) -> None:
        super().__init__(headers={"Cache-Control": "no-store"})
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = self.raw_headers
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async with aclosing(self._events) as events:
            async for event in events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


def _status(fault: BaseException | None) -> int:
    """Of a row without a verdict. fault: of the engine, where it is not the row's; a ValueError
    says that no session can be made for its options."""
    if fault is None:
        return 422
    return 400 if isinstance(fault, ValueError) else 500


def _where(error: BaseException) -> str:
    """The kind of an error and its traceback, without what it says, which may hold a row's text."""
    frames = "".join(traceback.format_tb(error.__traceback__))
    return f"{type(error).__name__}\n{frames}"


def _json(value: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(to_json(value), status, headers, media_type="application/json")


def _error(
    status: int, message: str, headers: dict[str, str] | None = None, **more: Any
) -> Response:
    return _json({"error": message, **more}, status, headers)


async def _refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return _error(error.status, str(error), error.headers, **error.fields)


async def _fault(request: Request, error: Exception) -> Response:
    return _error(500, "a fault of the server, which its log tells")


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _error(error.status_code, error.detail, dict(error.headers or {}))
