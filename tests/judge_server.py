"""A server of `POST /v1/judge`, for tests of what asks one: plain, and busy when told to be."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from engine.request import build_row
from engine.verdict import to_line


@dataclass
class Served:
    """A server that is up, and the bodies that it was sent. busy: how many requests it refuses,
    with `refusal` as status and headers; with a status of 0 it says nothing at all."""

    url: str
    bodies: list[dict[str, Any]] = field(default_factory=list)
    busy: int = 0
    refusal: tuple[int, dict[str, str]] = (429, {"Retry-After": "7"})


@contextmanager
def serving(judge: Any, api_key: str | None = None) -> Iterator[Served]:
    """Serve what has `submit`."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                served.bodies.append(body)
                served.busy -= 1
                is_busy = served.busy >= 0
            if is_busy and served.refusal[0] == 0:
                self.close_connection = True
                return None
            if is_busy:
                return self.answer(*served.refusal, {"error": "busy"})
            if api_key is not None and self.headers["Authorization"] != f"Bearer {api_key}":
                return self.answer(401, {}, {"error": "no such key"})
            if self.path != "/v1/judge":
                return self.answer(404, {}, {"error": f"no route {self.path}"})
            try:
                seconds, options = body.get("deadline_seconds"), body["options"]
                pending = [
                    judge.submit(build_row(fields), deadline_seconds=seconds, **options)
                    for fields in body["rows"]
                ]
            except ValueError as error:
                return self.answer(400, {}, {"error": str(error)})
            lines = [json.loads(to_line(each.result())) for each in pending]
            self.answer(200, {}, {"outcomes": lines})

        def answer(self, status: int, headers: dict[str, str], body: object) -> None:
            content = json.dumps(body).encode()
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 128  # many clients at once

    server = Server(("127.0.0.1", 0), Handler)
    served = Served(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, args=[0.01], daemon=True)
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
