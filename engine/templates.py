"""Jinja templates, rendered byte for byte as transformers renders them, in a process of their own.

A template comes with a model, and it is a program: it may loop for ever or fill the memory. So it
runs in a child process (`engine/template_process.py`), which has SECONDS for one text and half a
gigabyte. There is one child per process; it starts with the first template, serves all threads, and
is replaced when a template has ended it.

A request is a line of JSON: the template's source, its variables (null: only parse it), the date
that `strftime_now` formats, whether an unknown name is an error, the mark around the roles that
`turn` writes, and a long text that stays in the child: in variables and in the reply its mark
stands for it. A reply is a line too: the text, or an error and its line.
"""

import atexit
import datetime
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from engine.labels import quote

SECONDS = 8
DATE = "2024-07-26"
_CHILD = Path(__file__).with_name("template_process.py")
# What a chat template is given of the judge; no variable of the user's may take their place.
_OWN_VARIABLES = ("messages", "tools", "documents", "add_generation_prompt")


class TemplateError(ValueError):
    """A template that does not parse or render, named in the message with the line."""


@dataclass(frozen=True)
class LongText:
    """`text` repeated `times`, where variables and what is rendered of them say `mark`."""

    mark: str
    text: str
    times: int


@dataclass(frozen=True)
class Template:
    """The source of a judge template or of a chat template.

    `date` (YYYY-MM-DD) is what `strftime_now` formats, at midnight, so that a prompt is the same on
    every day. In a judge template an unknown name is an error; in a chat template it is empty.
    Raises ValueError for another form of date.
    """

    name: Literal["judge", "chat"]
    source: str
    date: str = DATE

    def __post_init__(self) -> None:
        try:
            plain = datetime.date.fromisoformat(self.date).isoformat() == self.date
        except ValueError:
            plain = False
        if not plain:
            raise ValueError(f"date {self.date!r} is not a day as YYYY-MM-DD")

    def check(self) -> None:
        """Raise TemplateError if it does not parse."""
        self._ask(None)

    def render(
        self,
        variables: Mapping[str, Any],
        turn_mark: str | None = None,
        long: LongText | None = None,
    ) -> str:
        """The text for these variables, plain JSON values.

        With turn_mark, `turn(role)` is there and writes the role between two such marks. Raises
        TemplateError where it fails, or takes too long or too much memory.
        """
        return self._ask(variables, turn_mark, long)

    def _ask(
        self,
        variables: Mapping[str, Any] | None,
        turn_mark: str | None = None,
        long: LongText | None = None,
    ) -> str:
        request = {
            "source": self.source,
            "date": self.date,
            "strict": self.name == "judge",
            "variables": variables,
            "turn_mark": turn_mark,
            "long": None if long is None else asdict(long),
            "seconds": SECONDS,
        }
        reply = _CHILD_PROCESS.ask(request)
        if "error" in reply:
            line = "" if reply.get("line") is None else f" (line {reply['line']})"
            raise TemplateError(f"{self.name} template: {reply['error']}{line}")
        text: str = reply["text"]
        return text


def check_variables(variables: Mapping[str, Any]) -> None:
    """Raise ValueError unless these are variables for a chat template that a user may set: plain
    JSON values, by names other than those of what the judge itself shows."""
    for name in _OWN_VARIABLES:
        if name in variables:
            raise ValueError(f"chat template variables: {name!r} is the judge's own")
    try:
        plain = json.loads(json.dumps(variables, allow_nan=False)) == variables
    except (TypeError, ValueError) as error:
        raise ValueError(f"chat template variables {quote(variables)}: {error}") from None
    if not plain:
        raise ValueError(f"chat template variables {quote(variables)} are not plain JSON values")


def parse_variables(text: str) -> dict[str, Any]:
    """Variables for a chat template, from a JSON object; ValueError as for `check_variables`."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) != len(pairs):
            raise ValueError(f"chat template variables: a key of {quote(text)} is repeated")
        return fields

    try:
        given = json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise ValueError(f"chat template variables {quote(text)} are not JSON: {error}") from None
    if not isinstance(given, dict):
        raise ValueError(f"chat template variables are a JSON object, not {quote(given)}")
    check_variables(given)
    return given


class _Child:
    """The child process, started when it is needed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Its reply to a request, or an `error` if that ends it or takes SECONDS."""
        line = json.dumps(request).encode() + b"\n"
        with self._lock:
            process = self._running()
            assert process.stdin is not None and process.stdout is not None
            late = threading.Event()

            def end() -> None:
                late.set()
                process.kill()

            timer = threading.Timer(SECONDS, end)
            timer.daemon = True
            timer.start()
            reply = b""
            try:
                process.stdin.write(line)
                process.stdin.flush()
                reply = process.stdout.readline()
            except BrokenPipeError:
                pass
            finally:
                timer.cancel()
                timer.join()
                if late.is_set() or not reply.endswith(b"\n"):  # or an exception came in between
                    self._stop()
        if reply.endswith(b"\n"):
            answer: dict[str, Any] = json.loads(reply)
            return answer
        if late.is_set():
            return {"error": f"it takes more than {SECONDS} seconds"}
        return {"error": f"it ended the process that renders it (status {process.returncode})"}

    def stop(self) -> None:
        """End it; the next request starts another."""
        with self._lock:
            self._stop()

    def forget(self) -> None:
        """In a fork: the process and its pipes are the parent's."""
        self._lock = threading.Lock()
        self._process = None

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                # -P: the folder of the file is no place to import from. The group of its own keeps
                # the terminal's signals away: rows under way are finished after them.
                [sys.executable, "-P", str(_CHILD)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                process_group=0,
            )
        return self._process

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()


_CHILD_PROCESS = _Child()
atexit.register(_CHILD_PROCESS.stop)
os.register_at_fork(after_in_child=_CHILD_PROCESS.forget)
