"""train/chat.py: turns of conversations as tokens, against transformers' own rendering of them."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer
from transformers.utils import chat_template_utils

from engine.prompt import PromptBuilder
from engine.settings import JudgeSettings
from engine.templates import DATE
from models.tokenizer import Tokenizer
from tests.tiny import CHAT_TEMPLATE, write_tokenizer
from train.chat import Turn, learnt_turns, read_chat
from train.packing import pack
from train.trajectories import Trajectory, file_batches
from train.world.pocket import JUDGE_TEMPLATE

ENDS = {0, 2}  # <|endoftext|>, <|im_end|>
START, END = 1, 2
THINK, THOUGHT = 3, 4

# Thoughts are shown in the last turn alone, empty ones too; contents are trimmed.
QWEN = """{%- for m in messages -%}
<|im_start|>{{ m.role + '\n' }}
{%- set text = m.content.split('</think>')[-1].strip() -%}
{%- set thought = m.content.split('</think>')[0].split('<think>')[-1].strip()
    if '</think>' in m.content else '' -%}
{%- if m.role == 'assistant' and loop.last -%}
{{ '<think>\n' + thought + '\n</think>\n\n' }}
{%- endif -%}
{{ text + '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"""
# The model is to write in a channel that the template names; a turn ends otherwise in the past.
CHANNEL = """{{ strftime_now('%d %b %Y') }}
{%- for m in messages -%}
<|im_start|>{{ m.role }}
{%- if m.role == 'assistant' %} final: {% else %}: {% endif %}{{ m.content }}
{%- if m.role == 'assistant' and loop.last %}<|endoftext|>{% else %}<|im_end|>{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant{% endif -%}"""
# As R1's: the model's turn begins with an open thought, and turns that are over have none.
OPENED = """{%- for m in messages -%}
{%- if m.role == 'assistant' -%}<|im_start|>{{ m.content.split('</think>')[-1] }}<|im_end|>
{%- else -%}{{ m.content }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|><think>\n' }}{%- endif -%}"""
DROPPED = OPENED.replace("<think>\n", "")
# As the first Mistrals': the system message stands in the last turn of the user, if it is the last.
LATE = """{%- for m in messages if m.role != 'system' -%}
{%- if m.role == 'user' -%}[{{ messages[0].content + ': ' if loop.last and
messages[0].role == 'system' else '' }}{{ m.content }}]
{%- else -%}{{ m.content }}<|im_end|>{%- endif -%}
{%- endfor -%}"""

USER = {"role": "user", "content": "Is 7 < 9 & \"8\" > '6'?\n\nSay <b>why</b>."}
SAID = {"role": "assistant", "content": "Yes."}
THOUGHTFUL = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nNo, é."}
CONVERSATIONS = {
    "one turn": [USER, SAID],
    "system": [{"role": "system", "content": "Be brief."}, USER, SAID, USER, SAID],
    "thoughts": [USER, THOUGHTFUL, USER, SAID, USER, THOUGHTFUL],
    "blanks": [{"role": "user", "content": "  a\n"}, {"role": "assistant", "content": "\n\n b "}],
}


@pytest.fixture(scope="module", params=["unigram", "bpe", "sentencepiece"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(path, request.param)
    return path


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Tokenizer:
    return Tokenizer(directory)


@pytest.fixture(scope="module")
def prompts(tokenizer: Tokenizer) -> PromptBuilder:
    return builder(tokenizer, CHAT_TEMPLATE)


@pytest.fixture(scope="module")
def chatml(tmp_path_factory: pytest.TempPathFactory) -> PromptBuilder:
    path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(path)
    return builder(Tokenizer(path), CHAT_TEMPLATE)


def builder(tokenizer: Tokenizer, template: str) -> PromptBuilder:
    return PromptBuilder(tokenizer, JUDGE_TEMPLATE, JudgeSettings(), chat_template=template)


def turns_of(prompts: PromptBuilder, messages: list[dict[str, str]]) -> list[Turn]:
    return learnt_turns(prompts, ENDS, read_chat({"messages": messages}))


def flat(turn: Turn | Trajectory) -> list[int]:
    return [token for segment in turn.prompt for token in segment]


class FixedDate(datetime):
    @classmethod
    def now(cls, tz: Any = None) -> "FixedDate":
        return cls.fromisoformat(DATE)


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize(
    "template", [CHAT_TEMPLATE, QWEN, CHANNEL], ids=["chatml", "qwen", "channel"]
)
def test_tokens_are_those_of_transformers(
    directory: Path, tokenizer: Tokenizer, template: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_template_utils, "datetime", FixedDate)
    oracle = AutoTokenizer.from_pretrained(directory)
    messages = CONVERSATIONS[name]

    def tokens(count: int, generation: bool) -> list[int]:
        found: list[int] = oracle.apply_chat_template(
            messages[:count], chat_template=template, add_generation_prompt=generation,
            return_dict=False,
        )  # fmt: skip
        return found

    said = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    turns = turns_of(builder(tokenizer, template), messages)
    assert [turn.place for turn in turns] == [f"messages[{i}]" for i in said]
    for number, turn in zip(said, turns, strict=True):
        prompt, whole = tokens(number, True), tokens(number + 1, False)
        assert flat(turn) == prompt
        end = 0 if template == CHANNEL else END
        length = len(prompt) + whole[len(prompt) :].index(end) + 1
        assert prompt + turn.completion == whole[:length]
        assert oracle.decode(whole[length:]).strip() == ""


@pytest.mark.parametrize("template", [OPENED, DROPPED, LATE], ids=["opened", "dropped", "late"])
def test_a_last_turn_that_is_rewritten_is_learnt_as_it_was_written(
    directory: Path, tokenizer: Tokenizer, template: str
) -> None:
    oracle = AutoTokenizer.from_pretrained(directory)
    messages = [{"role": "system", "content": "Think"}, USER, THOUGHTFUL, USER, THOUGHTFUL]
    turns = turns_of(builder(tokenizer, template), messages)
    for number, turn in zip((2, 4), turns, strict=True):
        assert flat(turn) == oracle.apply_chat_template(
            messages[:number], chat_template=template, add_generation_prompt=True, return_dict=False
        )
        opened = "<think>\n" if template == OPENED else ""
        text = THOUGHTFUL["content"].removeprefix(opened) + "<|im_end|>"
        assert turn.completion == oracle.encode(text, add_special_tokens=False)


PIECES = st.sampled_from(
    ["<|im_end|>", "<|im_start|>", "<|endoftext|>", "<think>", "</think>", "<|im_", "end|>", "\n",
     " ", "user\n", "the", "é", "漢", "Scores", "<|im_<|im_end|>end|>"]
)  # fmt: skip
TEXT = st.lists(PIECES, max_size=6).map("".join)
EXCHANGES = st.lists(st.tuples(TEXT, TEXT.filter(str.strip)), min_size=1, max_size=3)


@settings(max_examples=30)
@given(exchanges=EXCHANGES)
def test_no_content_is_a_control_token(prompts: PromptBuilder, exchanges: list[Any]) -> None:
    """But the assistant's thinking; and the text is there as it was."""
    tokenizer = prompts.tokenizer
    messages, text = [], ""
    expected, control = [], []
    for asked, said in exchanges:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
        text += f"<|im_start|>user\n{asked}<|im_end|><|im_start|>assistant"
        control += [START, END, START]
        expected.append((text, control.copy(), f"\n{said}<|im_end|>"))
        text += f"\n{said}<|im_end|>"
        control += [*thinking(said), END]
    turns = turns_of(prompts, messages)
    for turn, (prompt, ids, completion) in zip(turns, expected, strict=True):
        assert tokenizer.show(flat(turn)) == prompt
        assert tokenizer.show(turn.completion) == completion
        assert [token for token in flat(turn) if token in tokenizer.control_ids] == ids
        found = [token for token in turn.completion if token in tokenizer.control_ids]
        assert found == [*thinking(completion), END]


def thinking(text: str) -> list[int]:
    """The tokens of the thinking in a text; no tag of these tests begins within another."""
    places = {text.find(tag, i): token for tag, token in (("<think>", THINK), ("</think>", THOUGHT))
              for i in range(len(text)) if text.find(tag, i) >= 0}  # fmt: skip
    return [token for _, token in sorted(places.items())]


@given(text=st.lists(PIECES, max_size=12).map("".join))
def test_control_spans_are_those_of_the_template_encoder(tokenizer: Tokenizer, text: str) -> None:
    spans = tokenizer.control_spans(text)
    ids = [token for token in tokenizer.encode_template(text) if token in tokenizer.control_ids]
    assert [index for index, *_ in spans] == ids
    assert all(text[begin:end] == tokenizer.token(index) for index, begin, end in spans)


@pytest.mark.parametrize(
    "flags", [{"lstrip": True}, {"rstrip": True}, {"normalized": True}], ids=str
)
def test_control_tokens_that_take_blanks_with_them(tmp_path: Path, flags: dict[str, bool]) -> None:
    """As Phi-3's; the tokens are those of the template encoder where no content holds a control
    token."""
    write_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    data = json.loads(path.read_text())
    for token in data["added_tokens"]:
        token.update(flags)
    path.write_text(json.dumps(data))
    tokenizer = Tokenizer(tmp_path)
    said = "the  <think> a \n</think>\n\n b "
    turns = turns_of(builder(tokenizer, CHAT_TEMPLATE), [USER, SAID | {"content": said}])
    prompt = f"<|im_start|>user\n{USER['content']}<|im_end|><|im_start|>assistant"
    assert flat(turns[0]) == tokenizer.encode_template(prompt)
    assert turns[0].completion == tokenizer.encode_template(f"\n{said}<|im_end|>")
    assert {THINK, THOUGHT, END} < set(turns[0].completion)


def test_turns_of_a_conversation_share_their_prompts(chatml: PromptBuilder) -> None:
    turns = turns_of(chatml, [USER, SAID, USER, THOUGHTFUL, USER, SAID])
    first, second, third = map(flat, turns)
    assert third[: len(second)] == second and second[: len(first)] == first
    batch = pack([Trajectory(turn.prompt, turn.completion) for turn in turns])
    assert batch.num_tokens == len(third) + sum(len(turn.completion) - 1 for turn in turns)
    assert batch.lengths == tuple(len(turn.completion) for turn in turns)


def nested(depth: int) -> Any:
    return [nested(depth - 1)] if depth else []


def lines_of(path: Path, *lines: Any) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_file_holds_lines_of_both_kinds(chatml: PromptBuilder, tmp_path: Path) -> None:
    """A step's lines bring all their turns; of a prompt and its completion the latter is learnt."""
    judged = {"prompt": "p", "responses": ["a", "b"], "judgement": "Scores: \\boxed{1, 2}"}
    asked = {"prompt": [USER, SAID, USER], "completion": [THOUGHTFUL, USER, SAID], "messages": None}
    talked = {
        "messages": [USER, SAID, USER, SAID],
        "prompt": "Is 7 < 9",
        "source": "x",
        "tools": [],
    }
    path = lines_of(tmp_path / "chat.jsonl", judged, asked, talked)
    batch = file_batches(chatml, ENDS, path, 3, 0, 4096)
    found = {each.name: each for each in batch(5)}
    names = ["line 1", "line 2 completion[0]", "line 2 completion[2]", "line 3 messages[1]",
             "line 3 messages[3]"]  # fmt: skip
    assert sorted(found) == names
    turns = turns_of(chatml, [USER, SAID, USER, THOUGHTFUL, USER, SAID])[1:]
    turns += turns_of(chatml, talked["messages"])  # type: ignore[arg-type]
    for name, turn in zip(names[1:], turns, strict=True):
        assert flat(found[name]) == flat(turn)
        assert found[name].completion == turn.completion
    single = file_batches(chatml, ENDS, path, 1, 0, 4096)
    assert sorted(len(single(number)) for number in range(3)) == [1, 2, 2]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"messages": []}, "messages has no turn of the assistant"),
        ({"messages": [USER]}, "messages has no turn of the assistant"),
        ({"messages": "hi"}, "messages of a conversation is a list of messages, not 'hi'"),
        ({"messages": ["hi"]}, r"messages\[0\] is no object"),
        ({"prompt": [USER, SAID], "completion": []}, "completion has no turn of the assistant"),
        ({"prompt": "a", "completion": "b"}, "prompt of a conversation is a list of messages"),
        ({"completion": [SAID]}, "prompt of a conversation is a list of messages, not None"),
        ({"prompt": [USER], "completion": [SAID], "messages": 0}, "messages of a conversation"),
        ({"messages": [USER, {"role": "tool", "content": "4"}, SAID]},
         r"messages\[1\] has the role 'tool'; read are system, user, assistant"),
        ({"messages": [{"content": "4"}, SAID]}, r"messages\[0\] has the role None"),
        ({"messages": [{"role": ["user"], "content": "4"}, SAID]}, r"has the role \['user'\]"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, SAID]},
         r"the content of messages\[0\] is no text, but \[\{'type'"),
        ({"messages": [USER, SAID, USER, {"role": "assistant", "content": None}]},
         r"the content of messages\[3\] is no text, but None"),
        ({"messages": [USER, {"role": "assistant", "content": " \n"}]},
         r"messages\[1\] is an empty turn of the assistant"),
        ({"prompt": [USER, {"role": "assistant", "content": ""}], "completion": [USER, SAID]},
         r"prompt\[1\] is an empty turn"),
        ({"messages": [USER, SAID | {"tool_calls": [{}]}]}, r"messages\[1\] has 'tool_calls'"),
        ({"messages": [USER, SAID | {"reasoning_content": "hm"}]}, "'reasoning_content'"),
        ({"messages": [USER, SAID], "tools": [{"name": "f"}]}, "tools beside a conversation"),
        ({"messages": [USER, SAID], "judgement": "j"}, "judgement beside a conversation"),
        ({"messages": [{"role": "user", "content": "\ud800"}, SAID]}, "surrogate"),
        ({"messages": [USER, {"role": "assistant", "content": "\ud800"}]}, "surrogate"),
        ({"messages": [USER, SAID | {"content": "w " * 500}]},
         r"up to messages\[1\] it has \d+ tokens, the context 400"),
        ({"messages": [USER, SAID] * 12}, r"up to messages\[\d+\] it has \d+ tokens, the context"),
        ({"messages": nested(900)}, "nested deeper than 64 levels"),
        ({"responses": ["a"], "prompt": "p"}, "it has no judgement, no messages, and no prompt"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)  # fmt: skip
def test_a_bad_line_is_named(
    chatml: PromptBuilder, tmp_path: Path, line: dict[str, Any], message: str
) -> None:
    path = lines_of(tmp_path / "bad.jsonl", {"messages": [USER, SAID]}, line)
    with pytest.raises(ValueError, match=rf"bad\.jsonl, line 2: .*{message}"):
        file_batches(chatml, ENDS, path, 1, 0, 400)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
NAMES = st.sampled_from(["messages", "prompt", "completion", "role", "content", "judgement", "x"])
VALUES = st.recursive(
    SCALARS | st.sampled_from(["user", "assistant", "tool"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=12,
)
MESSAGES = st.lists(st.sampled_from([USER, SAID]) | VALUES, max_size=4)


@given(line=st.dictionaries(NAMES, VALUES | MESSAGES, max_size=4) | VALUES)
def test_any_line_is_learnt_or_refused(
    chatml: PromptBuilder, tmp_path_factory: Any, line: Any
) -> None:
    path = lines_of(tmp_path_factory.getbasetemp() / "any.jsonl", {"messages": [USER, SAID]}, line)
    try:
        batch = file_batches(chatml, ENDS, path, 2, 0, 4096)(0)
    except ValueError as error:
        assert str(error).startswith(f"{path}, line 2: ")
    else:
        assert len(batch) > 1 and all(each.completion[-1] in ENDS for each in batch)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "chat template: roles must alternate"),
        (CHAT_TEMPLATE.replace("<|im_end|>", "<think>"),
         r"the chat template ends messages\[1\] with none of the model's end tokens \[0, 2\]"),
        ("<|im_start|>{{ messages[0].content }}", r"messages\[1\]: .* does not show it"),
        ("{% if not add_generation_prompt %}{{ messages[1].content }}<|im_end|>{% endif %}",
         r"writes nothing before messages\[1\]"),
        (OPENED, r"messages\[1\]: the chat template begins it with '<think>\\n', and it does not"),
    ],
)  # fmt: skip
def test_a_template_that_does_not_fit_is_told(
    chatml: PromptBuilder, tmp_path: Path, template: str, message: str
) -> None:
    path = lines_of(tmp_path / "chat.jsonl", {"messages": [USER, SAID]})
    with pytest.raises(ValueError, match=rf"chat\.jsonl, line 1: .*{message}"):
        file_batches(builder(chatml.tokenizer, template), ENDS, path, 1, 0, 4096)
