"""A request's JSON -> the rows that it asks about, and the form of the answer.

`Asked` is what every route makes of its body; this module reads what all of them share: options,
and a deadline. Rows are read by `engine/request.py`, as a line of `engine.sample` is.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from engine.labels import quote
from engine.options import JudgeOptions
from engine.request import Row, RowError, build_row, check_json, parse_fields, readable_id
from engine.server.limits import Limits
from engine.session import check_draws
from engine.verdict import RowFailure, Verdict

Outcome = Verdict | RowFailure
_OF_THE_SERVER = ("attention", "deterministic")  # options that no request may change
_MOST_TOP_K = 2**31 - 1


class Refused(Exception):
    """A request that gets no other answer than an error: its HTTP status, and what is said."""

    def __init__(
        self, status: int, message: str, headers: Mapping[str, str] | None = None, **more: Any
    ) -> None:
        """more: fields of the answer beside `error`."""
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})
        self.fields = {name: value for name, value in more.items() if value is not None}


@dataclass
class Asked:
    """What is to be judged, how, and what is said of the outcomes, one for each entry, in order.

    `options` are those of `RowJudge.submit`. Of `one` entry that cannot be judged the answer is an
    error. `streams`: outcomes are sent as they are done."""

    entries: Sequence[Row | RowFailure]
    options: Mapping[str, Any]
    answer: Callable[[Sequence[Outcome]], bytes]
    deadline_seconds: float | None = None
    one: bool = False
    streams: bool = False


def parse_body(body: bytes) -> dict[str, Any]:
    """The JSON object of a body; raises Refused for anything else."""
    try:
        return parse_fields(body)
    except RowError as error:
        raise Refused(400, f"the body is no request: {error}") from None


def read_rows(rows: object, limits: Limits) -> list[Row | RowFailure]:
    """The rows of a list; those that are none, with the reason. Raises Refused for no list, and for
    one that is empty or too long."""
    if not isinstance(rows, list) or not rows:
        raise Refused(400, f"rows is {quote(rows)} and no list of rows")
    if len(rows) > limits.max_rows:
        raise Refused(413, f"{len(rows)} rows; a request may have {limits.max_rows}")
    return [read_row(each) for each in rows]


def read_row(fields: object) -> Row | RowFailure:
    """One row of an object as a line holds it, or why it is none."""
    if not isinstance(fields, dict):
        return RowFailure(None, None, None, f"a row is a JSON object, not {quote(fields)}")
    try:
        return build_row(fields)
    except RowError as error:
        return RowFailure(readable_id(fields.get("id")), None, None, str(error))


def read_options(given: object, defaults: Mapping[str, Any], limits: Limits) -> dict[str, Any]:
    """The options of a request over the server's own. Raises Refused for one that is unknown, of
    the wrong type, out of range or past a limit."""
    if given is None:
        given = {}
    if not isinstance(given, dict):
        raise Refused(400, f"options is {quote(given)} and no object")
    for name in given:
        if name in _OF_THE_SERVER:
            raise Refused(400, f"options.{name} is for the server alone to set")
        if name not in defaults:
            known = ", ".join(each for each in defaults if each not in _OF_THE_SERVER)
            raise Refused(400, f"unknown option {quote(name)}; known are {known}")
    try:
        check_json(given, "options")
        options: JudgeOptions = msgspec.convert({**defaults, **given}, JudgeOptions)
        check_draws(options)
    except ValueError as error:  # of msgspec and RowError too
        raise Refused(400, f"options: {error}") from None
    for name, most in (
        ("k", limits.max_k), ("max_new_tokens", limits.limit_new_tokens), ("top_k", _MOST_TOP_K),
    ):  # fmt: skip
        if name in given and getattr(options, name) > most:
            raise Refused(400, f"options: {name} = {given[name]} is more than {most}")
    return {each.name: getattr(options, each.name) for each in dataclasses.fields(options)}


def read_deadline(given: object) -> float | None:
    """A deadline in seconds; raises Refused for what is no number of at least 0."""
    if given is None:
        return None
    if isinstance(given, bool) or not isinstance(given, int | float) or not 0 <= given < 1e9:
        raise Refused(400, f"deadline_seconds = {quote(given)} is not a number of at least 0")
    return float(given)


def read_flag(given: object, name: str) -> bool:
    """A truth value, false where it is left out; raises Refused for anything else."""
    if given is not None and not isinstance(given, bool):
        raise Refused(400, f"{name} = {quote(given)} is not true or false")
    return bool(given)


def to_json(value: object) -> bytes:
    """JSON in ASCII, so that any text has a form; floats as Python's repr writes them."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode("ascii")
