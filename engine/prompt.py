"""A row and an order -> the token segments of a judge's prompt.

This is the only place that knows templates. Two are involved: the judge template (what the judge is
asked; variables: messages, responses, reference, principles, hint, score_min, score_max) and the
model's own chat template around its output, which becomes one user message. Both are rendered as
transformers does (`engine/templates.py`), once per *shape* of row (roles, number of responses,
which optional fields are there), with a random sentinel in place of every untrusted field. The
rendered text is then split on the sentinels:

- template text is tokenized with control tokens;
- an untrusted field is tokenized by a tokenizer that has no control token, whatever it says.

So a template knows that a field is there, never what it says. It must show every field it is given
once, whole, and messages and responses in their order; any other template is refused. A filter that
leaves a sentinel as it is (`trim`, `escape`) does nothing.

The pieces form segments: *head* (template text before anything of the row), *conversation* (up to
the first response), one per *response* (the response and the template text up to the next), *tail*
(what follows the last response). A segment is tokenized by itself, piece by piece, so its tokens
depend on nothing but its own text, and equal segments have equal tokens. A segment without tokens
is left out.

Not done here: truncation (a prompt that is too long is the caller's error line), tools, images.
"""

import re
import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

from engine.request import Row
from engine.settings import JudgeSettings
from engine.templates import DATE, Template, check_variables
from models.tokenizer import Tokenizer, chat_template_of

DEFAULT_TEMPLATE = Path(__file__).with_name("judge_template.jinja")


def read_judge_template(directory: str | Path, file: str | Path | None = None) -> str:
    """The text of a file with a judge template, or else of a model directory's own
    judge_template.jinja, or of the default."""
    if file is not None:
        return Path(file).read_text(encoding="utf-8")
    own = Path(directory) / "judge_template.jinja"
    return (own if own.exists() else DEFAULT_TEMPLATE).read_text(encoding="utf-8")


def read_chat_template(directory: str | Path, file: str | Path | None = None) -> str:
    """The text of a file with a chat template, or else of a model directory's own; ValueError
    where there is none."""
    if file is not None:
        return Path(file).read_text(encoding="utf-8")
    own = chat_template_of(directory)
    if own is None:
        raise ValueError(f"{directory} has no chat template: give one with --chat-template FILE")
    return own


SegmentKind = Literal["head", "conversation", "response", "tail"]
FieldName = Literal["message", "response", "reference", "principles", "hint"]


class Segment(NamedTuple):
    """A structural piece of a prompt and its tokens."""

    kind: SegmentKind
    token_ids: tuple[int, ...]


class _Field(NamedTuple):
    """An untrusted field: what it is, and which one (a position for responses)."""

    name: FieldName
    number: int


class _Shape(NamedTuple):
    """All that a rendered template may depend on."""

    roles: tuple[str, ...]
    num_responses: int
    reference: bool
    principles: bool
    hint: bool


# A rendered template as segments of pieces: template tokens, or a field to fill in.
_Layout = tuple[tuple[SegmentKind, tuple[tuple[int, ...] | _Field, ...]], ...]


class PromptBuilder:
    """Turns rows into segments for one model's tokenizer, chat template and judge template."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        judge_template: str,
        settings: JudgeSettings,
        *,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        date: str = DATE,
    ) -> None:
        """Parse both templates. chat_template: in place of the tokenizer's own;
        chat_template_kwargs: further variables for it, plain JSON values; date (YYYY-MM-DD): what
        templates take for today. Raises ValueError for a template that does not parse or is
        missing, for variables that are not plain or have a name of the judge's own, for a date in
        another form."""
        if chat_template is None:
            chat_template = tokenizer.chat_template
        if chat_template is None:
            raise ValueError("the tokenizer has no chat template, and none is given")
        self.tokenizer = tokenizer
        self.settings = settings
        self.judge_template = judge_template
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self.date = date
        check_variables(self.chat_template_kwargs)
        self._judge = Template("judge", judge_template, date)
        self._chat = Template("chat", chat_template, date)
        self._judge.check()
        self._chat.check()
        self._layout = lru_cache(maxsize=1024)(self._make_layout)

    @property
    def chat_template(self) -> str:
        """The source of the chat template that is rendered."""
        return self._chat.source

    def segments(
        self,
        row: Row,
        order: Sequence[int],
        hint: str | None = None,
        known: dict[Any, Any] | None = None,
    ) -> list[Segment]:
        """The segments of one sample's prompt.

        `order[j]` is the response shown in position j, a permutation of range(n). `hint` is text
        for the template's `hint` (rejective fine-tuning shows the best response there). `known`
        keeps what has been tokenized for the same row in another order.
        """
        assert sorted(order) == list(range(len(row.responses))), f"{order} is not a permutation"
        shape = _Shape(
            tuple(message.role for message in row.messages),
            len(row.responses),
            row.reference is not None,
            row.principles is not None,
            hint is not None,
        )
        known = {} if known is None else known
        optional = {"reference": row.reference, "principles": row.principles, "hint": hint}

        def text_of(field: _Field) -> str:
            if field.name == "message":
                return row.messages[field.number].content
            if field.name == "response":
                return row.responses[order[field.number]]
            text = optional[field.name]
            assert text is not None
            return text

        segments = []
        for number, (kind, pieces) in enumerate(self._layout(shape)):
            texts = tuple(text_of(piece) for piece in pieces if isinstance(piece, _Field))
            segment = known.get((shape, number, texts))
            if segment is None:
                for text in texts:
                    if text not in known:
                        known[text] = self.tokenizer.encode_text(text)
                left = iter(texts)
                tokens = [
                    known[next(left)] if isinstance(piece, _Field) else piece for piece in pieces
                ]
                segment = Segment(kind, tuple(chain.from_iterable(tokens)))
                known[shape, number, texts] = segment
            if segment.token_ids:
                segments.append(segment)
        return segments

    def render(self, row: Row, order: Sequence[int], hint: str | None = None) -> list[int]:
        """The whole prompt of one sample as one list of token ids."""
        return [t for segment in self.segments(row, order, hint) for t in segment.token_ids]

    def _make_layout(self, shape: _Shape) -> _Layout:
        pieces = self._pieces(shape, secrets.token_hex(16))
        # Sentinels of another text and length must leave the same template text around them.
        if pieces != self._pieces(shape, secrets.token_hex(20)):
            raise ValueError("the templates alter a field or depend on what it says")
        shown = [piece for piece in pieces if isinstance(piece, _Field)]
        times = Counter(shown)
        for field in _fields(shape):
            if times[field] != 1:
                shows = f"{field.name} {field.number} {times[field]} times"
                raise ValueError(f"the templates must show every field once, not {shows}")
        for name in ("message", "response"):
            places = [field.number for field in shown if field.name == name]
            if places != sorted(places):
                raise ValueError(f"the templates show every {name} in the order {places}")
        return self._cut(pieces, shape.num_responses)

    def _pieces(self, shape: _Shape, nonce: str) -> list["str | _Field"]:
        """Both templates rendered and cut at the sentinels: template text and fields, in turn."""
        marks = {field: f"Q{nonce}{field.name}{field.number}Z" for field in _fields(shape)}
        judge_text = self._judge.render(
            {
                "messages": [
                    {"role": role, "content": marks[_Field("message", i)]}
                    for i, role in enumerate(shape.roles)
                ],
                "responses": [marks[_Field("response", j)] for j in range(shape.num_responses)],
                "reference": marks.get(_Field("reference", 0)),
                "principles": marks.get(_Field("principles", 0)),
                "hint": marks.get(_Field("hint", 0)),
                "score_min": self.settings.score_min,
                "score_max": self.settings.score_max,
            }
        )
        text = self._chat.render(
            {
                **self.tokenizer.special_tokens,
                **self.chat_template_kwargs,
                "messages": [{"role": "user", "content": judge_text}],
                "tools": None,
                "documents": None,
                "add_generation_prompt": True,
            }
        )
        fields = {mark: field for field, mark in marks.items()}
        parts = re.split(f"(Q{nonce}[a-z]+[0-9]+Z)", text)
        return [fields.get(part, part) for part in parts if part]

    def _cut(self, pieces: list["str | _Field"], num_responses: int) -> _Layout:
        layout: list[tuple[SegmentKind, list[tuple[int, ...] | _Field]]] = [("head", [])]
        for piece in pieces:
            kind = layout[-1][0]
            if isinstance(piece, _Field):
                if piece.name == "response":
                    layout.append(("response", []))
                elif kind == "head":
                    layout.append(("conversation", []))
                layout[-1][1].append(piece)
                if piece.name == "response" and piece.number == num_responses - 1:
                    layout.append(("tail", []))
            else:
                layout[-1][1].append(tuple(self.tokenizer.encode_template(piece)))
        return tuple((kind, tuple(parts)) for kind, parts in layout if parts)


def _fields(shape: _Shape) -> list[_Field]:
    """Every field of a row of this shape."""
    fields = [_Field("message", i) for i in range(len(shape.roles))]
    fields += [_Field("response", j) for j in range(shape.num_responses)]
    optional: tuple[tuple[FieldName, bool], ...] = (
        ("reference", shape.reference),
        ("principles", shape.principles),
        ("hint", shape.hint),
    )
    return fields + [_Field(name, 0) for name, there in optional if there]
