"""Chat data: conversations, of which a model learns what the assistant says.

A line holds `messages`, or `prompt` and `completion`, each a list of messages `{role, content}`; of
the second form only the completion is learnt. Every turn of the assistant is learnt by itself: its
prompt is what the model's chat template makes of the messages before it, up to where the model is
to write, and its completion is what the template writes there once the turn is there too, up to the
end token. So a template that rewrites the past, as Qwen3's drops what was thought, is followed; one
that also rewrites the last turn is not, there: its end is the template's, its text the line's.

What messages say is only text: a control token in it is hidden from the template and encoded as
text. Only `<think>` and `</think>` of the assistant are the tokens that the model writes itself.

Not done here: tools, content in parts, roles of one's own.
"""

import re
import secrets
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from engine.labels import quote
from engine.prompt import PromptBuilder
from engine.request import check_json
from engine.thinking import open_thinking
from models.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")
_THINKING = ("<think>", "</think>")
# Columns that say something else of the line, or change what a template writes.
_UNREAD = ("judgement", "tools", "documents", "images", "chat_template_kwargs")


class ChatMessage(NamedTuple):
    """A message, and where its line has it; `learnt`: a turn of the assistant to learn from."""

    role: str
    content: str
    place: str
    learnt: bool


class Turn(NamedTuple):
    """A turn to learn: where its line has it, its prompt in segments, the end token last."""

    place: str
    prompt: list[tuple[int, ...]]
    completion: list[int]


def is_chat(fields: Mapping[str, Any]) -> bool:
    """Whether a line's fields are a conversation."""
    return fields.get("messages") is not None or fields.get("completion") is not None


def read_chat(fields: Mapping[str, Any]) -> list[ChatMessage]:
    """The messages of a line. Raises ValueError for what is no conversation of system, user and
    assistant in plain text, and for one in which there is nothing to learn."""
    check_json(fields, "line")
    for name in _UNREAD:
        if fields.get(name):
            raise ValueError(f"it has {name} beside a conversation, which is not read")
    names = ("prompt", "completion") if fields.get("messages") is None else ("messages",)
    messages = []
    for name in names:
        given = fields.get(name)
        if not isinstance(given, list):
            raise ValueError(f"{name} of a conversation is a list of messages, not {quote(given)}")
        messages += [_message(each, f"{name}[{i}]", name != "prompt")
                     for i, each in enumerate(given)]  # fmt: skip
    if not any(message.learnt for message in messages):
        raise ValueError(f"{names[-1]} has no turn of the assistant")
    return messages


def _message(given: Any, place: str, learnt: bool) -> ChatMessage:
    if not isinstance(given, dict):
        raise ValueError(f"{place} is no object of role and content, but {quote(given)}")
    for key, value in given.items():
        if key not in ("role", "content") and value is not None:
            raise ValueError(f"{place} has {quote(key)}, and only role and content are read")
    role, content = given.get("role"), given.get("content")
    if role not in ROLES:
        raise ValueError(f"{place} has the role {quote(role)}; read are {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise ValueError(f"the content of {place} is no text, but {quote(content)}")
    if role == "assistant" and not content.strip():
        raise ValueError(f"{place} is an empty turn of the assistant")
    return ChatMessage(role, content, place, learnt and role == "assistant")


def learnt_turns(
    builder: PromptBuilder, eos_token_ids: Collection[int], messages: Sequence[ChatMessage]
) -> list[Turn]:
    """The turns of a conversation that are to be learnt, as tokens; the segments of their prompts
    are equal as far as their tokens are.

    Raises ValueError where the chat template fails, does not show a turn, begins it with a thought
    that it has not, or ends it by none of `eos_token_ids`.
    """
    text = _Text(builder.tokenizer)
    shown = [(each.role, text.hide(each.content, each.role)) for each in messages]
    turns = []
    for number, message in enumerate(messages):
        if not message.learnt:
            continue
        prompt = builder.write_chat(shown[:number], generation=True)
        if not prompt:
            raise ValueError(f"the chat template writes nothing before {message.place}")
        try:
            completion = text.encode(_continuation(builder, prompt, shown[: number + 1]))
        except ValueError as error:
            raise ValueError(f"{message.place}: {error}") from error
        ends = [place for place, token in enumerate(completion) if token in eos_token_ids]
        if not ends:
            raise ValueError(
                f"the chat template ends {message.place} with none of the model's end tokens "
                f"{sorted(eos_token_ids)}: see eos_token_id in config.json"
            )
        turns.append((message.place, text.encode(prompt), completion[: ends[0] + 1]))
    cuts = {_num_shared(a[1], b[1]) for a, b in pairwise(turns)}
    return [Turn(place, _cut(prompt, cuts), completion) for place, prompt, completion in turns]


def _continuation(builder: PromptBuilder, prompt: str, turns: Sequence[tuple[str, str]]) -> str:
    """What a model writes after the prompt to say the last turn, and what the template adds."""
    role, content = turns[-1]
    whole = builder.write_chat(turns, generation=False)
    begin = open_thinking(prompt)
    opened = "" if begin is None else prompt[begin:]
    if whole.startswith(prompt):
        written = whole[len(prompt) :]
        if _without_blanks(content) in _without_blanks(opened + written):
            return written
    # The template shows a turn that is over in another way than it was written: R1's without its
    # thoughts, the first Mistrals' without the system message. So the content is what is written.
    if not content.startswith(opened):
        raise ValueError(
            f"the chat template begins it with {opened!r}, and it does not: give it its thoughts, "
            "or the model a chat template without them"
        )
    mark = f"E{secrets.token_hex(8)}E"
    ended = builder.write_chat([*turns[:-1], (role, content + mark)], generation=False)
    if mark not in ended:
        raise ValueError("the chat template does not show it")
    return content[len(opened) :] + ended.rpartition(mark)[2]


def encode_said(tokenizer: Tokenizer, said: str) -> list[int]:
    """Tokens of what an assistant says: the tags of its thinking are the model's own tokens, all
    else is text. Raises ValueError as `Tokenizer.encode_text`."""
    text = _Text(tokenizer)
    return text.encode(text.hide(said, "assistant"))


class _Text:
    """Text of messages that a chat template writes, on its way to tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._name = secrets.token_hex(8)
        self._hidden: list[str] = []
        self._known: dict[str, list[int]] = {}  # the turns of a conversation share most of it

    def hide(self, content: str, role: str) -> str:
        """The content with a mark in place of each control token, but the assistant's thinking."""
        pieces, place = [], 0
        for token, begin, end in self._tokenizer.control_spans(content):
            if role == "assistant" and self._tokenizer.token(token) in _THINKING:
                continue
            pieces += [content[place:begin], f"C{self._name}N{len(self._hidden)}Z"]
            self._hidden.append(content[begin:end])
            place = end
        return "".join([*pieces, content[place:]])

    def encode(self, text: str) -> list[int]:
        """Tokens of what a template wrote: its control tokens, and between them text."""
        ids: list[int] = []
        place = 0
        for token, begin, end in self._tokenizer.control_spans(text):
            ids += [*self._encode_text(text[place:begin]), token]
            place = end
        return ids + self._encode_text(text[place:])

    def _encode_text(self, text: str) -> list[int]:
        if text not in self._known:
            mark = f"C{self._name}N([0-9]+)Z"
            said = re.sub(mark, lambda found: self._hidden[int(found[1])], text)
            self._known[text] = self._tokenizer.encode_text(said)
        return self._known[text]


def _without_blanks(text: str) -> str:
    return "".join(text.split())


def _num_shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _cut(tokens: Sequence[int], cuts: Collection[int]) -> list[tuple[int, ...]]:
    """The tokens cut at these places."""
    places = [0, *sorted(cut for cut in cuts if 0 < cut < len(tokens)), len(tokens)]
    return [tuple(tokens[begin:end]) for begin, end in pairwise(places)]
