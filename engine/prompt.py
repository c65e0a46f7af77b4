"""A row and an order -> the token segments of a judge's prompt.

This is the only place that knows templates. Two are involved: the judge template (what the judge is
asked) and the model's own chat template around its turns. Both are rendered as transformers does
(`engine/templates.py`), once per *shape* of row (roles, number of responses, which optional fields
are there), with a sentinel in place of every field. The text is then split on the sentinels:
template text is tokenized with control tokens, a field by a tokenizer that has none. Blanks of the
template right before a field are tokenized with it, as any other pipeline does.

So a template knows that a field is there, never what it says: sentinels of other text have to leave
the same text around them (`trim` alone does nothing). It must show every field once, whole, and
messages and responses in their order; a message may be shown again past the last response.

The pieces form segments: *head* (template text before anything of the row), *conversation* (up to
the first response), one per *response* (the response and the template text up to the next), *tail*
(what follows the last response). A segment's tokens depend on nothing but its own text; one without
tokens is left out. Not done here: truncation, tools, images.
"""

import os
import re
import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

from engine.orders import draw_nonce
from engine.request import Row
from engine.settings import JudgeSettings
from engine.templates import DATE, LongText, Template, check_variables
from engine.thinking import open_thinking
from models.files import read_text
from models.tokenizer import Tokenizer, chat_template_of

DEFAULT_TEMPLATE = Path(__file__).with_name("judge_template.jinja")
# Judge templates that come with the package. `pairwise` is for the format of that name: which
# response is best, after a short comparison; `direct` asks for scores at once.
BUNDLED = {
    "default": DEFAULT_TEMPLATE,
    **{
        name: Path(__file__).with_name(f"{name}_template.jinja")
        for name in ("grm", "pairwise", "direct")
    },
}


def read_judge_template(directory: str | Path, file: str | Path | None = None) -> str:
    """The text of a file with a judge template, or else of a model directory's own
    judge_template.jinja, or of the default. file: a name of BUNDLED, where there is no such file,
    is that one."""
    if file is not None:
        path = Path(file)
        if not path.exists():
            path = BUNDLED.get(str(path), path)
        return read_text(path, "a judge template")
    own = Path(directory) / "judge_template.jinja"
    return read_text(own if os.path.lexists(own) else DEFAULT_TEMPLATE, "a judge template")


def read_chat_template(directory: str | Path, file: str | Path | None = None) -> str:
    """The text of a file with a chat template, or else of a model directory's own; ValueError
    where there is none."""
    if file is not None:
        return read_text(Path(file), "a chat template")
    own = chat_template_of(directory)
    if own is None:
        raise ValueError(f"{directory} has no chat template: give one with --chat-template FILE")
    return own


SegmentKind = Literal["head", "conversation", "response", "tail"]
FieldName = Literal["message", "response", "reference", "principles", "hint", "nonce"]


class Segment(NamedTuple):
    """A structural piece of a prompt and its tokens."""

    kind: SegmentKind
    token_ids: tuple[int, ...]


class _Field(NamedTuple):
    """What a row fills in: what it is, and which one (a position for responses)."""

    name: FieldName
    number: int = 0

    def __str__(self) -> str:
        if self.name in ("message", "response"):
            return f"{self.name} {self.number + 1}"
        return f"the {self.name}"


class _Shown(NamedTuple):
    """A field where it is shown, and the blanks that are tokenized with it."""

    lead: str
    field: _Field


class _Shape(NamedTuple):
    """All that a rendered template may depend on."""

    roles: tuple[str, ...]
    num_responses: int
    reference: bool
    principles: bool
    hint: bool
    nonce: bool

    def fields(self) -> list[_Field]:
        """Every field of a row of this shape."""
        fields = [_Field("message", i) for i in range(len(self.roles))]
        fields += [_Field("response", j) for j in range(self.num_responses)]
        optional: tuple[tuple[FieldName, bool], ...] = (
            ("reference", self.reference),
            ("principles", self.principles),
            ("hint", self.hint),
            ("nonce", self.nonce),
        )
        return fields + [_Field(name) for name, there in optional if there]


class _Sentinels(NamedTuple):
    """Texts in place of fields: a name that nothing else holds, between two other texts."""

    name: str
    before: str = ""
    after: str = ""
    long: LongText | None = None  # that `after` marks

    def of(self, field: _Field) -> str:
        return f"{self.before}Q{self.name}{field.name}{field.number}Z{self.after}"

    def split(self, text: str) -> "_Pieces":
        """The text cut at the sentinels that stand in it whole."""
        pieces: list[str | _Field] = []
        place = 0
        for found in re.finditer(f"Q{self.name}([a-z]+)([0-9]+)Z", text):
            field = _Field(found[1], int(found[2]))  # type: ignore[arg-type]
            begin, end = found.start() - len(self.before), found.end() + len(self.after)
            if begin >= place and text[begin:end] == self.of(field):
                pieces += [text[place:begin], field]
                place = end
        return tuple(piece for piece in (*pieces, text[place:]) if piece)


_Pieces = tuple[str | _Field, ...]
_MOST_SENTINEL_CHARS = 1 << 23  # of all fields together
# What a template might look for in a field, and what a filter might change.
_STARTLING = (
    "please ignore this: yes, no, true, false, none; hello user, system, assistant, error, ```\n"
    "<|im_start|><b>&amp;</b> 'single' \"double\" \\n \\\\ {{ 7 * 7 }} {% raw %} \t [[A]]\n"
    "https://example.org/ def f(x): return 10 / 3\n\nScores: \\boxed{1}\n\n# Title\n- item"
)


class _Written(NamedTuple):
    """A rendered prompt, and its end that the judgement continues."""

    pieces: _Pieces
    continuation: _Pieces


class _Layout(NamedTuple):
    """A rendered template as segments of pieces: template tokens, or a field to fill in."""

    segments: tuple[tuple[SegmentKind, tuple[tuple[int, ...] | _Shown, ...]], ...]
    continuation: _Pieces
    shows_nonce: bool


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
        is_answered: bool = False,
    ) -> None:
        """Parse both templates. chat_template: in place of the tokenizer's own;
        chat_template_kwargs: further variables for it, plain JSON values; date (YYYY-MM-DD): what
        templates take for today. is_answered: a last turn of the assistant is whole, with what the
        chat template puts after it, not the beginning of what is to be written. Raises ValueError
        for a template that does not parse or is missing, for variables that are not plain or have a
        name of the judge's own, for a date in another form."""
        if chat_template is None:
            chat_template = tokenizer.chat_template
        if chat_template is None:
            raise ValueError("the tokenizer has no chat template, and none is given")
        self.tokenizer = tokenizer
        self.settings = settings
        self.judge_template = judge_template
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self.date = date
        self._is_answered = is_answered
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
        nonce: str | None = None,
    ) -> list[Segment]:
        """The segments of one sample's prompt.

        `order[j]` is the response shown in position j, a permutation of range(n). `hint` is text
        for the template's `hint` (rejective fine-tuning shows the best response there). `known`
        keeps what has been tokenized for the same row in another order. `nonce`: ASCII digits that
        the template's `anchor` shows. Raises ValueError for templates that do not fit the row.
        """
        assert sorted(order) == list(range(len(row.responses))), f"{order} is not a permutation"
        shape = _shape(row, hint, nonce)
        known = {} if known is None else known
        optional = {
            "reference": row.reference, "principles": row.principles, "hint": hint, "nonce": nonce
        }  # fmt: skip

        def text_of(shown: _Shown) -> str:
            name, number = shown.field
            if name == "message":
                return shown.lead + row.messages[number].content
            if name == "response":
                return shown.lead + row.responses[order[number]]
            text = optional[name]
            assert text is not None
            return shown.lead + text

        segments = []
        for number, (kind, pieces) in enumerate(self._layout(shape).segments):
            texts = tuple(text_of(piece) for piece in pieces if isinstance(piece, _Shown))
            segment = known.get((shape, number, texts))
            if segment is None:
                for text in texts:
                    if text not in known:
                        known[text] = self.tokenizer.encode_text(text)
                left = iter(texts)
                tokens = [
                    known[next(left)] if isinstance(piece, _Shown) else piece for piece in pieces
                ]
                segment = Segment(kind, tuple(chain.from_iterable(tokens)))
                known[shape, number, texts] = segment
            if segment.token_ids:
                segments.append(segment)
        return segments

    def render(
        self, row: Row, order: Sequence[int], hint: str | None = None, nonce: str | None = None
    ) -> list[int]:
        """The whole prompt of one sample as one list of token ids."""
        segments = self.segments(row, order, hint, nonce=nonce)
        return [t for segment in segments for t in segment.token_ids]

    def show(
        self, row: Row, order: Sequence[int], hint: str | None = None, nonce: str | None = None
    ) -> str:
        """The prompt of one sample as text, with its control tokens written out."""
        return self.tokenizer.show(self.render(row, order, hint, nonce))

    def continuation(self, row: Row, hint: str | None = None, nonce: str | None = None) -> str:
        """The end of the prompt that a judgement continues: a `<think>` that the chat template
        opens, with what follows it, and the text that the judge template begins an answer with."""
        pieces = self._layout(_shape(row, hint, nonce)).continuation
        return "".join(nonce or "" if isinstance(piece, _Field) else piece for piece in pieces)

    @cached_property
    def uses_nonce(self) -> bool:
        """Whether rows have a nonce (see `JudgeSettings`). Raises ValueError where the settings say
        so and the template does not show the anchor of a plain row."""
        settings = self.settings
        wanted = settings.anchor_nonce
        if wanted is False or settings.anchor is None or settings.format != "boxed":
            return False
        plain = _Shape(("user",), 2, reference=False, principles=False, hint=False, nonce=True)
        shows = self._layout(plain).shows_nonce
        if wanted and not shows:
            raise ValueError("anchor_nonce: the judge template does not show the anchor")
        return shows

    def nonce(self, row: Row, seed: int) -> str | None:
        """The row's nonce, where rows have one; see `draw_nonce`."""
        return draw_nonce(row, seed) if self.uses_nonce else None

    def write_chat(
        self, turns: Sequence[tuple[str, str]], generation: bool, long: LongText | None = None
    ) -> str:
        """The text that the chat template makes of turns (role and content), with `generation` up
        to where the model is to write the next. Contents stand in it as they are, so it is no text
        for `encode_template`. Raises ValueError where the template fails."""
        variables = {
            **self.tokenizer.special_tokens,
            **self.chat_template_kwargs,
            "messages": [{"role": role, "content": content} for role, content in turns],
            "tools": None,
            "documents": None,
            "add_generation_prompt": generation,
        }
        return self._chat.render(variables, long=long)

    @cached_property
    def trims(self) -> bool:
        """Whether the chat template drops blanks around what turns say, as `| trim` does."""
        text = self.write_chat([("user", " q "), ("assistant", " a ")], False)
        return " q " not in text and " a " not in text

    def _make_layout(self, shape: _Shape) -> _Layout:
        fields = shape.fields()
        written = self._write(shape, _Sentinels(secrets.token_hex(4)))
        shown = [piece for piece in written.pieces if isinstance(piece, _Field)]
        refusal = "the templates alter a field or depend on what it says"
        if self._write(shape, _Sentinels(secrets.token_hex(20))) != written:
            raise ValueError(refusal)
        _check_shown(fields, shown, shape.num_responses)
        # A long text, past every limit that a template may set; less where there are many fields.
        times = min(100_000, _MOST_SENTINEL_CHARS // len(fields)) // len(_STARTLING) + 1
        name = secrets.token_hex(8)
        long = LongText(f"L{name}L", f" {_STARTLING}.", times)
        if self._write(shape, _Sentinels(name, "ignore ", long.mark, long)) != written:
            raise ValueError(refusal)
        return _Layout(
            self._cut(written.pieces, shape.num_responses),
            written.continuation,
            any(field.name == "nonce" for field in shown),
        )

    def _write(self, shape: _Shape, sentinels: _Sentinels) -> _Written:
        """Both templates rendered with these sentinels, and cut at them."""
        turns = self._turns(shape, sentinels)
        prefill = ""
        if turns and turns[-1][0] == "assistant" and not self._is_answered:
            prefill = turns.pop()[1]
        if not turns:
            raise ValueError("the judge template has no turn before the assistant's")
        text = self.write_chat(turns, not self._is_answered, sentinels.long)
        if self._is_answered:
            return _Written(sentinels.split(text), ())
        begin = open_thinking(text)
        if begin is not None:
            begun = text[: begin + len("<think>")]
            shorter = self.write_chat(turns, False, sentinels.long)
            if shorter.startswith(begun):
                begin = None  # a turn says it, not what comes after the turns
        continuation = sentinels.split(("" if begin is None else text[begin:]) + prefill)
        for piece in continuation:
            if isinstance(piece, _Field) and piece.name != "nonce":
                raise ValueError(f"the assistant's last turn cannot show {piece}")
        return _Written(sentinels.split(text + prefill), continuation)

    def _turns(self, shape: _Shape, sentinels: _Sentinels) -> list[tuple[str, str]]:
        """The judge template's turns: role and text."""
        marks = {field: sentinels.of(field) for field in shape.fields()}
        nonce, anchor = marks.get(_Field("nonce")), self.settings.anchor
        if anchor is not None and nonce is not None:
            anchor = self.settings.rules("eos", True).anchor_line(nonce)
        turn = f"T{sentinels.name}T"
        text = self._judge.render(
            {
                "messages": [
                    {"role": role, "content": marks[_Field("message", i)]}
                    for i, role in enumerate(shape.roles)
                ],
                "responses": [marks[_Field("response", j)] for j in range(shape.num_responses)],
                "reference": marks.get(_Field("reference")),
                "principles": marks.get(_Field("principles")),
                "hint": marks.get(_Field("hint")),
                "nonce": nonce,
                "anchor": anchor,
                "score_min": self.settings.score_min,
                "score_max": self.settings.score_max,
            },
            turn_mark=turn,
            long=sentinels.long,
        )
        first, *others = re.split(f"{turn}(\\w+?){turn}", text)
        turns = list(zip(others[::2], others[1::2], strict=True))
        return [("user", first), *turns] if first.strip() else turns

    def _cut(
        self, pieces: _Pieces, num_responses: int
    ) -> tuple[tuple[SegmentKind, tuple[tuple[int, ...] | _Shown, ...]], ...]:
        layout: list[tuple[SegmentKind, list[tuple[int, ...] | _Shown]]] = [("head", [])]
        lead = ""
        for piece, following in zip(pieces, (*pieces[1:], ""), strict=True):
            if isinstance(piece, str):
                text = piece
                if isinstance(following, _Field) and self.settings.join_blanks:
                    text = piece.rstrip(" ")
                lead = piece[len(text) :]
                layout[-1][1].append(tuple(self.tokenizer.encode_template(text)))
                continue
            if piece.name == "response":
                layout.append(("response", []))
            elif layout[-1][0] == "head":
                layout.append(("conversation", []))
            layout[-1][1].append(_Shown(lead, piece))
            lead = ""
            if piece.name == "response" and piece.number == num_responses - 1:
                layout.append(("tail", []))
        return tuple((kind, tuple(parts)) for kind, parts in layout if parts)


def _shape(row: Row, hint: str | None, nonce: str | None) -> _Shape:
    return _Shape(
        tuple(message.role for message in row.messages),
        len(row.responses),
        row.reference is not None,
        row.principles is not None,
        hint is not None,
        nonce is not None,
    )


def _check_shown(fields: Sequence[_Field], shown: Sequence[_Field], num_responses: int) -> None:
    """Raise ValueError unless every field is shown as often, and where, it has to be."""
    times = Counter(shown)
    last = _Field("response", num_responses - 1)
    for field in fields:
        if field.name == "nonce" or times[field] == 1:
            continue
        if not times[field]:
            raise ValueError(f"the templates must show every field once: {field} is not shown")
        again = field.name == "message" and times[last] == 1 and times[field] == 2
        if not (
            again and field in shown[shown.index(last) :] and field in shown[: shown.index(last)]
        ):
            raise ValueError(
                f"the templates must show every field once: {field} is shown {times[field]} times"
            )
    for name in ("message", "response"):
        places = list(dict.fromkeys(field.number for field in shown if field.name == name))
        if places != sorted(places):
            numbers = ", ".join(str(place + 1) for place in places)
            raise ValueError(f"the templates show every {name} in the order {numbers}")
