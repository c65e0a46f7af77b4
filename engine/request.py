"""One line of JSON -> one checked row: a prompt, n responses, perhaps a label.

Two forms of a line are read:

- `{id?, prompt: str | messages, responses: [str], label?, reference?, principles?, meta?}`;
- the pairs of TRL, `{prompt?, chosen, rejected}`, with strings or with lists of messages, and
  RewardBench 2's, where both are lists of texts. It becomes responses = [*chosen, *rejected], and
  the chosen ones are best. With `--orders rotate` a judge gains nothing by their place.

A message is `{role, content}`; its content is text or a list of parts of text. A conversation ends
with a message of the user or of a tool. An optional field that is null counts as absent, and so
does an unknown key in the first form. Other columns of a pair go to `meta`; in the first form an
unknown key is an error, so that a misspelt one is not ignored. Labels are read by
`engine/labels.py`, files by `engine/reading.py`.

Nothing is repaired: repeated keys (which decoders resolve silently), NaN, infinities, lone
surrogates and deep nesting are errors. Text may be empty, identical in all responses, and may hold
control characters.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn

import msgspec

from engine.labels import Label, quote, read_label

MAX_RESPONSES = 256
MAX_DEPTH = 64  # levels of nesting; real rows have 3, and `meta` a few more
MAX_ERROR_CHARS = 300
TEXT_PARTS = ("text", "input_text", "output_text")


class RowError(ValueError):
    """A row that cannot be judged, and why; `id` is the row's own id where it could be read."""

    def __init__(self, message: str) -> None:
        if len(message) > MAX_ERROR_CHARS:
            message = message[:MAX_ERROR_CHARS] + " ..."
        super().__init__(message)
        self.id: str | None = None


Role = Literal["system", "developer", "user", "assistant", "tool"]


class Message(msgspec.Struct, frozen=True):
    """One turn of a conversation."""

    role: Role
    content: str


class _Part(msgspec.Struct):
    type: str
    text: str | None = None


class _Turn(msgspec.Struct):
    """A message as people write it; what else it says is not shown."""

    role: Role
    content: str | list[_Part] | None
    tool_calls: Any = None
    function_call: Any = None


@dataclass(frozen=True)
class Row:
    """One request, checked.

    `label` is as in `engine/labels.py`. `digest` is the SHA-256, in hex, of all that the row says;
    no part of it are `line`, the 1-based line in the input, where it has one, and `unread`, the
    columns that went to `meta` and the keys of messages that are not shown.
    """

    id: str
    messages: tuple[Message, ...]
    responses: tuple[str, ...]
    label: Label | None
    reference: str | None
    principles: str | None
    meta: Any
    digest: str
    line: int | None = field(default=None, compare=False)
    unread: tuple[str, ...] = field(default=(), compare=False)


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
    id: str | int | None = None
    reference: str | int | float | None = None
    principles: str | list[str] | None = None
    meta: Any = None


class _Request(_Common, kw_only=True):
    prompt: str | list[_Turn]
    responses: list[str]
    label: Any = None


class _Preference(_Common, kw_only=True):
    prompt: str | list[_Turn] | None = None
    chosen: str | list[str | _Turn]
    rejected: str | list[str | _Turn]


def make_row(
    prompt: str | Sequence[Message | Mapping[str, str]],
    responses: Sequence[str],
    *,
    id: str | None = None,
    label: int | str | Sequence[float] | None = None,
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
    return build_row(fields | {"reference": reference, "principles": principles, "meta": meta})


def parse_row(
    line: bytes, convert: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None
) -> Row:
    """Read one line of UTF-8 JSON, of other columns that `convert` makes fields of; raises RowError
    naming what is wrong with it."""
    fields = parse_fields(line)
    try:
        return build_row(fields if convert is None else convert(fields))
    except RowError as error:
        error.id = readable_id(fields.get("id"))
        raise


def parse_fields(line: bytes) -> dict[str, Any]:
    """The JSON object of a line of UTF-8; raises RowError naming what is wrong with it."""
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
        raise RowError(f"a row is a JSON object, not {quote(fields)}")
    return fields


def build_row(fields: Mapping[str, Any]) -> Row:
    """The row of an object as a line holds it; raises RowError naming what is wrong with it."""
    check_json(fields, "row")
    sides = [fields[name] for name in ("chosen", "rejected") if name in fields]
    pair = any(side is not None for side in sides) or (sides != [] and "responses" not in fields)
    form: type[_Request] | type[_Preference] = _Preference if pair else _Request
    extra = {key: value for key, value in fields.items() if key not in form.__struct_fields__}
    if not pair:  # tables fill what a row has not with nulls
        extra = {key: value for key, value in extra.items() if value is not None}
    if beside := [key for key in ("label", "responses") if pair and extra.get(key) is not None]:
        raise RowError(f"{beside[0]} beside chosen and rejected, which say which is best")
    if extra and not pair:
        known = ", ".join(form.__struct_fields__)
        raise RowError(
            f"unknown key {quote(next(iter(extra)))}; known are {known}; put others under meta"
        )
    try:
        request = msgspec.convert(fields, form)
    except msgspec.ValidationError as error:
        raise RowError(str(error)) from None
    label: Label | None
    if isinstance(request, _Request):
        messages = _conversation(request.prompt, "prompt")
        responses = tuple(request.responses)
        given = request.label
    else:
        messages, responses, given = _split_preference(request)
    if not 1 <= len(responses) <= MAX_RESPONSES:
        raise RowError(f"{len(responses)} responses; a row has 1 to {MAX_RESPONSES}")
    try:
        label = read_label(given, len(responses))
    except ValueError as error:
        raise RowError(str(error)) from None
    if not messages:
        raise RowError("the prompt has no message")
    if messages[-1].role not in ("user", "tool"):
        raise RowError(
            f"the prompt ends with a message of the {messages[-1].role}; it must end with one of "
            "the user"
        )
    if request.id == "":
        raise RowError("the id is empty")
    meta = request.meta
    if extra:
        if not (meta is None or isinstance(meta, Mapping)):
            raise RowError(f"other columns go to meta, which is {quote(meta)} and no object")
        meta = {**extra, **(meta or {})}
    reference, principles = request.reference, request.principles
    if not (reference is None or isinstance(reference, str)):
        reference = json.dumps(reference)
    if isinstance(principles, list):
        principles = "\n".join(principles)
    turns = [[message.role, message.content] for message in messages]
    content = [turns, responses, reference, principles]
    row_id = _canonical_digest(content) if request.id is None else str(request.id)
    return Row(
        id=row_id,
        messages=messages,
        responses=responses,
        label=label,
        reference=reference,
        principles=principles,
        meta=meta,
        digest=_canonical_digest([row_id, *content, label, meta]),
        unread=(*extra, *_unread_keys(fields)),
    )


def _unread_keys(fields: Mapping[str, Any]) -> list[str]:
    """Keys of messages that are not shown, each once, with the column that they stand in."""
    found = {
        f"{name}[].{key}"
        for name in ("prompt", "chosen", "rejected")
        if isinstance(fields.get(name), list | tuple)
        for message in fields[name]
        if isinstance(message, Mapping)
        for key, value in message.items()
        if key not in ("role", "content") and value is not None
    }
    return sorted(found)


def _message(turn: _Turn, place: str) -> Message:
    if turn.tool_calls or turn.function_call:
        raise RowError(f"{place} calls a tool, which no template shows: say it in its content")
    if isinstance(turn.content, str):
        return Message(turn.role, turn.content)
    if turn.content is None:
        raise RowError(f"{place} has no content")
    for part in turn.content:
        if part.type not in TEXT_PARTS or part.text is None:
            raise RowError(f"{place} has a part of type {quote(part.type)}; only text is read")
    return Message(turn.role, "".join(part.text or "" for part in turn.content))


def _conversation(prompt: str | list[_Turn], name: str) -> tuple[Message, ...]:
    if isinstance(prompt, str):
        return (Message(role="user", content=prompt),)
    return tuple(_message(turn, f"{name}[{i}]") for i, turn in enumerate(prompt))


def _split_preference(pair: _Preference) -> tuple[tuple[Message, ...], tuple[str, ...], Any]:
    """The conversation, [*chosen, *rejected] and the label of a pair."""
    prompt = () if pair.prompt is None else _conversation(pair.prompt, "prompt")
    sides = [_texts(side) for side in (pair.chosen, pair.rejected)]
    if all(side is not None for side in sides):
        chosen, rejected = (side or [] for side in sides)
        if pair.prompt is None:
            raise RowError("chosen and rejected are text, and there is no prompt")
        label = 0 if len(chosen) == 1 else list(range(len(chosen)))
        if not chosen or not rejected:
            raise RowError("chosen and rejected need a text each")
        return prompt, (*chosen, *rejected), label
    if any(side is not None for side in sides):
        raise RowError("of chosen and rejected one is text and one a list of messages")
    conversations = []
    for name, side in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        turns = [turn for turn in side if isinstance(turn, _Turn)]
        if len(turns) < len(side):
            raise RowError(f"{name} has texts among its messages")
        if not turns or turns[-1].role != "assistant":
            raise RowError(f"{name} must end with a message of the assistant")
        conversations.append(_conversation(turns, name))
    ours, theirs = conversations
    history = ours[:-1]
    if history != theirs[:-1]:
        raise RowError("chosen and rejected differ before their last message")
    # Some sets give the prompt as a column and again at the start of both conversations.
    if history and prompt and history[-len(prompt) :] != prompt:
        raise RowError("chosen and rejected begin with a conversation that is not the prompt")
    return history or prompt, (ours[-1].content, theirs[-1].content), 0


def _texts(side: str | list[str | _Turn]) -> list[str] | None:
    """The responses of one side of a pair; None where it is a conversation."""
    if isinstance(side, str):
        return [side]
    texts = [each for each in side if isinstance(each, str)]
    return texts if side and len(texts) == len(side) else None


def check_json(value: object, path: str, depth: int = 1) -> None:
    """Raise RowError for what JSON or UTF-8 cannot say, and for deep nesting; `path` names the
    place, `depth` counts from 1."""
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
                raise RowError(f"{path}: the key {quote(key)} is not a string")
            check_json(key, f"{path}: key", depth)
            check_json(item, f"{path}.{quote(key)}", depth + 1)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            check_json(item, f"{path}[{index}]", depth + 1)
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
                raise RowError(f"the key {quote(key)} is repeated")
            seen.add(key)
    return fields


def _refuse_constant(name: str) -> NoReturn:
    raise RowError(f"{name} is not a finite number")


def readable_id(value: object) -> str | None:
    """A row's own id where it is one, though the row be none."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
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
