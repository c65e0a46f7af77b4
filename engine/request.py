"""One line of JSON -> one checked row: a prompt, n responses, perhaps a label.

Two forms of a line are read:

- `{id?, prompt: str | messages, responses: [str], label?, reference?, principles?, meta?}`;
- TRL's `{prompt?, chosen, rejected}`, with strings or with lists of messages, and beside them
  `id`, `reference`, `principles` and `meta`. It becomes responses = [chosen, rejected], label = 0.
  The chosen response is then always response 0; the order in which a sample sees the responses is
  drawn per row (`--orders rotate`), so a judge that prefers a position gains nothing by it. With
  `--orders fixed` it would.

A message is `{role: system | user | assistant, content: str}`; a conversation ends with the user's.
An optional field that is null counts as absent. Any other column belongs under `meta`: an unknown
key is an error, so that a misspelt one is not ignored.

Nothing is coerced and nothing is repaired: repeated keys (which decoders resolve silently), NaN,
infinities, lone surrogates and deep nesting are errors. Text may be empty, identical in all
responses, and may hold control characters. Datasets in other layouts are not read here.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, BinaryIO, Literal, NoReturn

import msgspec

MAX_RESPONSES = 20
MAX_DEPTH = 64  # levels of nesting; real rows have 3, and `meta` a few more
MAX_ERROR_CHARS = 300
_UTF8_BOM = b"\xef\xbb\xbf"
_CHUNK_BYTES = 1 << 16


class RowError(ValueError):
    """A row that cannot be judged, and why; `id` is the row's own id where it could be read."""

    def __init__(self, message: str) -> None:
        if len(message) > MAX_ERROR_CHARS:
            message = message[:MAX_ERROR_CHARS] + " ..."
        super().__init__(message)
        self.id: str | None = None


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True)
class Row:
    """One request, checked.

    `label` is the index of the best response or one gold score per response (n >= 2), or 0 or 1 for
    wrong or right (n = 1). `digest` is the SHA-256, in hex, of all that the row says; `line` is its
    1-based line in the input, where it has one, and no part of the digest.
    """

    id: str
    messages: tuple[Message, ...]
    responses: tuple[str, ...]
    label: int | tuple[float, ...] | None
    reference: str | None
    principles: str | None
    meta: Any
    digest: str
    line: int | None = field(default=None, compare=False)


@dataclass(frozen=True)
class BadRow:
    """An input line that is no row: its id where it could be read, 1-based line, and the reason.

    `digest` is the SHA-256, in hex, of the line's bytes without its end.
    """

    id: str | None
    line: int
    error: str
    digest: str


class _Common(msgspec.Struct, kw_only=True):
    id: str | None = None
    reference: str | None = None
    principles: str | None = None
    meta: Any = None


class _Request(_Common, kw_only=True):
    prompt: str | list[Message]
    responses: list[str]
    label: int | list[float] | None = None


class _Preference(_Common, kw_only=True):
    prompt: str | list[Message] | None = None
    chosen: str | list[Message]
    rejected: str | list[Message]


def make_row(
    prompt: str | Sequence[Message | Mapping[str, str]],
    responses: Sequence[str],
    *,
    id: str | None = None,
    label: int | Sequence[float] | None = None,
    reference: str | None = None,
    principles: str | None = None,
    meta: Any = None,
) -> Row:
    """Build a row from Python values, under the same checks as a line of JSON; raises RowError."""
    turns: object = prompt
    if isinstance(prompt, list | tuple):
        turns = [
            {"role": message.role, "content": message.content}
            if isinstance(message, Message)
            else message
            for message in prompt
        ]
    fields = {"prompt": turns, "responses": responses, "id": id, "label": label}
    return _build(fields | {"reference": reference, "principles": principles, "meta": meta})


def parse_row(line: bytes) -> Row:
    """Read one line of UTF-8 JSON; raises RowError naming what is wrong with it."""
    try:
        fields = json.loads(
            line.decode("utf-8"), object_pairs_hook=_unique_keys, parse_constant=_refuse_constant
        )
    except RowError:
        raise
    except RecursionError:
        raise RowError(f"nested deeper than {MAX_DEPTH} levels") from None
    except UnicodeDecodeError as error:
        raise RowError(f"not UTF-8: {error.reason} at byte {error.start}") from None
    except ValueError as error:
        raise RowError(f"not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise RowError(f"a row is a JSON object, not {_quote(fields)}")
    try:
        return _build(fields)
    except RowError as error:
        error.id = _readable_id(fields.get("id"))
        raise


def read_rows(stream: BinaryIO, max_row_bytes: int) -> Iterator[Row | BadRow]:
    """Read JSON lines one at a time, as the consumer asks for them.

    A byte-order mark at the start, CRLF and blank lines are accepted, and so is a last line without
    its newline if it is whole. A line of more than `max_row_bytes` bytes is read past in pieces and
    never held. An id seen before, whether given or the content's hash, makes a BadRow.
    """
    first_lines: dict[bytes, int] = {}  # digest of an id -> the line that has it
    number = 0
    # Room for a byte-order mark and \r\n: what comes without a line end is then over the limit.
    while line := stream.readline(max_row_bytes + 5):
        number += 1
        torn = not line.endswith(b"\n")
        if number == 1:
            line = line.removeprefix(_UTF8_BOM)
        content = line.removesuffix(b"\n").removesuffix(b"\r")
        if len(content) > max_row_bytes:
            yield _read_past(stream, line, number, max_row_bytes)
            continue
        if not content.strip():
            continue
        error = None
        row_id: str | None
        try:
            row = parse_row(content)
            row_id = row.id
        except RowError as refusal:
            row_id = refusal.id
            error = str(refusal) + (" (the last line, without its newline)" if torn else "")
        if row_id is not None:
            first = first_lines.setdefault(_id_digest(row_id), number)
            if first != number and error is None:
                error = f"the id {_quote(row_id)} is that of line {first}"
        if error is None:
            yield replace(row, line=number)
        else:
            yield BadRow(row_id, number, error, hashlib.sha256(content).hexdigest())


def _read_past(stream: BinaryIO, start: bytes, number: int, max_row_bytes: int) -> BadRow:
    """Read the rest of a line that is too long, in pieces of bounded size."""
    digest = hashlib.sha256()
    num_bytes = 0
    piece = start
    while piece:
        ends = piece.endswith(b"\n")
        digest.update(piece.removesuffix(b"\n"))
        num_bytes += len(piece) - ends
        piece = b"" if ends else stream.readline(_CHUNK_BYTES)
    error = f"the line has {num_bytes} bytes, more than max_row_bytes = {max_row_bytes}"
    return BadRow(None, number, error, digest.hexdigest())


def _build(fields: Mapping[str, Any]) -> Row:
    _check_json(fields, "row", 1)
    form: type[_Request] | type[_Preference] = _Request
    if "chosen" in fields or "rejected" in fields:
        form = _Preference
    for key in fields:
        if key not in form.__struct_fields__:
            known = ", ".join(form.__struct_fields__)
            raise RowError(f"unknown key {_quote(key)}; known are {known}; put others under meta")
    try:
        request = msgspec.convert(fields, form)
    except msgspec.ValidationError as error:
        raise RowError(str(error)) from None
    label: int | tuple[float, ...] | None = 0
    if isinstance(request, _Request):
        messages = _conversation(request.prompt)
        responses = tuple(request.responses)
        label = _check_label(request.label, len(responses))
    else:
        messages, responses = _split_preference(request)
    if not 1 <= len(responses) <= MAX_RESPONSES:
        raise RowError(f"{len(responses)} responses; a row has 1 to {MAX_RESPONSES}")
    if not messages or messages[-1].role != "user":
        raise RowError(
            "the prompt has no message"
            if not messages
            else "the prompt ends with a "
            f"message of the {messages[-1].role}; it must end with one of the user"
        )
    if request.id == "":
        raise RowError("the id is empty")
    turns = [[message.role, message.content] for message in messages]
    content = [turns, responses, request.reference, request.principles]
    row_id = _canonical_digest(content) if request.id is None else request.id
    return Row(
        id=row_id,
        messages=messages,
        responses=responses,
        label=label,
        reference=request.reference,
        principles=request.principles,
        meta=request.meta,
        digest=_canonical_digest([row_id, *content, label, request.meta]),
    )


def _conversation(prompt: str | list[Message]) -> tuple[Message, ...]:
    if isinstance(prompt, str):
        return (Message(role="user", content=prompt),)
    return tuple(prompt)


def _split_preference(pair: _Preference) -> tuple[tuple[Message, ...], tuple[str, ...]]:
    """The conversation and [chosen, rejected] of TRL's explicit and implicit forms."""
    chosen, rejected = pair.chosen, pair.rejected
    prompt = () if pair.prompt is None else _conversation(pair.prompt)
    if isinstance(chosen, str) and isinstance(rejected, str):
        if pair.prompt is None:
            raise RowError("chosen and rejected are text, and there is no prompt")
        return prompt, (chosen, rejected)
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise RowError("of chosen and rejected one is text and one a list of messages")
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        if not messages or messages[-1].role != "assistant":
            raise RowError(f"{name} must end with a message of the assistant")
    history = tuple(chosen[:-1])
    if history != tuple(rejected[:-1]):
        raise RowError("chosen and rejected differ before their last message")
    # Some sets give the prompt as a column and again at the start of both conversations.
    if history and prompt and history[-len(prompt) :] != prompt:
        raise RowError("chosen and rejected begin with a conversation that is not the prompt")
    return history or prompt, (chosen[-1].content, rejected[-1].content)


def _check_label(
    label: int | list[float] | None, num_responses: int
) -> int | tuple[float, ...] | None:
    if label is None:
        return None
    if num_responses == 1:
        if label not in (0, 1) or not isinstance(label, int):
            raise RowError(f"label {_quote(label)}; for one response it is 0 (wrong) or 1 (right)")
        return label
    if isinstance(label, int):
        if not 0 <= label < num_responses:
            raise RowError(f"label {_quote(label)} is no index of {num_responses} responses")
        return label
    if len(label) != num_responses:
        raise RowError(f"label has {len(label)} gold scores for {num_responses} responses")
    if label.count(max(label)) > 1:
        raise RowError(f"label {_quote(label)} has two maxima, so no response is the best")
    return tuple(label)


def _check_json(value: object, path: str, depth: int) -> None:
    """Refuse what JSON or UTF-8 cannot say; `path` names the place, `depth` counts from 1."""
    if depth > MAX_DEPTH:
        raise RowError(f"nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            surrogate = value[error.start]
            raise RowError(f"{path}: the lone surrogate {surrogate!r} cannot be encoded") from None
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise RowError(f"{path}: the key {_quote(key)} is not a string")
            _check_json(key, f"{path}: key", depth)
            _check_json(item, f"{path}.{_quote(key)}", depth + 1)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _check_json(item, f"{path}[{index}]", depth + 1)
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise RowError(f"{path}: {value} is not a finite number")
    elif not isinstance(value, bool | int | None):
        raise RowError(f"{path}: {type(value).__name__} is no JSON type")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise RowError(f"the key {_quote(key)} is repeated")
            seen.add(key)
    return fields


def _refuse_constant(name: str) -> NoReturn:
    raise RowError(f"{name} is not a finite number")


def _readable_id(value: object) -> str | None:
    if not isinstance(value, str) or not value:
        return None
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return None
    return value


def _canonical_digest(content: object) -> str:
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _id_digest(row_id: str) -> bytes:
    return hashlib.sha256(row_id.encode("utf-8")).digest()[:16]


def _quote(value: object) -> str:
    """The value as Python writes it, cut to a length that suits a message."""
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."
