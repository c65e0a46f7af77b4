"""engine/request.py: what is a row, and what is refused with which words."""

import hashlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.request import Message, Row, RowError, make_row, parse_row

PLAIN = {"prompt": "p", "responses": ["a", "b"]}
# JSON text can hold everything but lone surrogates.
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


def parse(**fields: object) -> Row:
    return parse_row(json.dumps(fields).encode())


# What a row is


def test_plain_row() -> None:
    row = parse(
        **PLAIN, id="x", label=1, reference="ref", principles="be kind", meta={"source": [1, 2.5]}
    )
    assert row.messages == (Message(role="user", content="p"),)
    assert row.responses == ("a", "b")
    assert (row.id, row.label, row.reference, row.principles) == ("x", 1, "ref", "be kind")
    assert row.meta == {"source": [1, 2.5]}


def test_optional_fields_may_be_null() -> None:
    row = parse(**PLAIN, id=None, label=None, reference=None, principles=None, meta=None)
    assert row == parse(**PLAIN)


def test_conversation() -> None:
    turns = [("system", "s"), ("user", "u"), ("assistant", ""), ("user", "v")]
    row = parse(prompt=[{"role": r, "content": c} for r, c in turns], responses=["a"])
    assert row.messages == tuple(Message(role=r, content=c) for r, c in turns)  # type: ignore[arg-type]


def test_make_row_gives_the_row_of_the_line() -> None:
    messages = [Message(role="system", content="s"), Message(role="user", content="u")]
    made = make_row(messages, ("a", "b"), id="i", label=[1, 2.5], reference="r", meta={"m": None})
    parsed = parse(
        prompt=[{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
        responses=["a", "b"], id="i", label=[1, 2.5], reference="r", meta={"m": None},
    )  # fmt: skip
    assert made == parsed
    assert make_row([{"role": "user", "content": "p"}], ["a", "b"]) == make_row("p", ["a", "b"])


@given(prompt=TEXT, responses=st.lists(TEXT, min_size=1, max_size=20), reference=st.none() | TEXT)
def test_any_text_survives(prompt: str, responses: list[str], reference: str | None) -> None:
    fields = {"prompt": prompt, "responses": responses, "reference": reference}
    for ensure_ascii in (True, False):
        row = parse_row(json.dumps(fields, ensure_ascii=ensure_ascii).encode())
        assert row.messages[0].content == prompt
        assert row.responses == tuple(responses)
        assert row.reference == reference


@pytest.mark.parametrize(
    "responses",
    [
        [""], ["", ""], [" \t\n", "\u3000"], ["same"] * 20, [":"], ["{}", "{{7*7}}"],
        ["%s", "${x}"], ["<|im_end|>", "<bos>"], ["Scores: \\boxed{10, 1}"],
        ["\u202eabc", "\x00\x1b[2J\x7f"], ["\uff11\uff10", "\ufeff"], ["x" * 500_000],
    ],
)  # fmt: skip
def test_odd_but_legal_responses(responses: list[str]) -> None:
    assert parse(prompt="", responses=responses).responses == tuple(responses)


# What is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"responses": None}, "responses"),
        ({"responses": []}, "0 responses"),
        ({"responses": ["a"] * 257}, "257 responses; a row has 1 to 256"),
        ({"responses": ["a", None]}, r"null.*responses\[1\]"),
        ({"responses": ["a", 7]}, r"int.*responses\[1\]"),
        ({"responses": "ab"}, "responses"),
        ({"responses": {"a": 1}}, "responses"),
        ({"prompt": None}, "prompt"),
        ({"prompt": 3}, "prompt"),
        ({"prompt": []}, "no message"),
        ({"prompt": ["hello"]}, r"prompt\[0\]"),
        ({"prompt": [{"role": "user", "content": None}]}, "content"),
        ({"prompt": [{"role": "user"}]}, "content"),
        ({"prompt": [{"role": "robot", "content": "x"}]}, "robot"),
        (
            {"prompt": [{"role": "user", "content": [{"type": "image_url", "image_url": "u"}]}]},
            r"prompt\[0\] has a part of type 'image_url'; only text is read",
        ),
        (
            {"prompt": [{"role": "assistant", "content": None, "tool_calls": [{"id": "c"}]}]},
            r"prompt\[0\] calls a tool",
        ),
        ({"responses": [], "label": []}, "0 responses"),
        ({"id": True}, "bool.*id"),
        ({"reference": [1]}, "reference"),
        ({"principles": [1]}, "principles"),
        ({"label": 2}, "label 2 is no index of 2 responses"),
        ({"prompt": [{"role": "assistant", "content": "x"}]}, "ends with a message of the assist"),
        ({"prompt": [{"role": "developer", "content": "x"}]}, "ends with a message of the develo"),
        ({"id": ""}, "id is empty"),
        ({"lable": 0}, "unknown key 'lable'.*under meta"),
    ],
)
def test_refused_fields(change: dict[str, object], message: str) -> None:
    fields = PLAIN | change
    with pytest.raises(RowError, match=message) as error:
        parse(**fields)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("missing", ["prompt", "responses"])
def test_missing_fields(missing: str) -> None:
    with pytest.raises(RowError, match=missing):
        parse(**{key: value for key, value in PLAIN.items() if key != missing})


def test_what_real_rows_say_otherwise() -> None:
    """Parts of text, tools and developers, numbers for ids and references, lists of principles."""
    parts = [{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}]
    turns = [
        {"role": "developer", "content": "d"},
        {"role": "user", "content": parts, "language": "English"},
        {"role": "assistant", "content": "c", "tool_calls": [], "reasoning_content": None},
        {"role": "tool", "content": "t"},
    ]
    row = parse(prompt=turns, responses=["x"], id=7, reference=4.5, principles=["be", "kind"])
    said = [("developer", "d"), ("user", "ab"), ("assistant", "c"), ("tool", "t")]
    assert [(m.role, m.content) for m in row.messages] == said
    assert (row.id, row.reference, row.principles) == ("7", "4.5", "be\nkind")
    assert row.unread == ("prompt[].language", "prompt[].tool_calls")
    assert parse(**PLAIN, id="7").id == parse(**PLAIN, id=7).id


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("[]", "a row is a JSON object"),
        ('"text"', "a row is a JSON object"),
        ("{}", "prompt"),
        ('{"prompt": "p", "responses": ["a", "b"', "not JSON"),
        ('{"prompt": "p", "responses": ["a"]} {}', "not JSON"),
        ('{"prompt": "p", "prompt": "q", "responses": ["a"]}', "'prompt' is repeated"),
        ('{"prompt": "p", "responses": ["a"], "meta": {"a": [{"k": 1, "k": 1}]}}', "'k' is rep"),
        ('{"prompt": "p", "responses": ["a"], "\\u0070rompt": "q"}', "'prompt' is repeated"),
        (
            '{"prompt": [{"role": "user", "content": "a", "content": "b"}], "responses": [""]}',
            "rep",
        ),
        ('{"prompt": "p", "responses": ["a", "b"], "label": [NaN, 1]}', "NaN"),
        ('{"prompt": "p", "responses": ["a"], "meta": -Infinity}', "-Infinity"),
        ('{"prompt": "p", "responses": ["a"], "meta": [1e999]}', r"meta.*\[0\]: inf"),
        ('{"prompt": "p", "responses": ["a"], "meta": ' + "1" * 5000 + "}", "not JSON: .*digits"),
        ('{"prompt": "\\ud800", "responses": ["a"]}', r"'prompt': the lone surrogate '\\ud800'"),
        ('{"prompt": "p", "responses": ["a", "x\\udfffy"]}', r"responses.\[1\]: the lone surr"),
        ('{"prompt": "p", "responses": ["a"], "meta": {"\\ud83d": 1}}', "lone surrogate"),
        ('{"prompt": "p", "responses": ["a"], "id": "\\udead"}', "lone surrogate"),
        ('{"prompt": "p", "responses": ["a"], "\\ud800": 1, "\\ud800": 1}', "repeated"),
        ('{"prompt": "a\x00b", "responses": ["a"]}', "not JSON"),
        ("[" * 100_000, "nested deeper"),
        ('{"a":' * 50_000, "nested deeper"),
        ('{"prompt": "p", "responses": ["a"], "meta": ' + "[" * 80 + "]" * 80 + "}", "nested deep"),
        ('\ufeff{"prompt": "p", "responses": ["a"]}', "not JSON"),
    ],
)
def test_refused_text(text: str, message: str) -> None:
    with pytest.raises(RowError, match=message) as error:
        parse_row(text.encode())
    str(error.value).encode("utf-8")  # a reason must fit into an error line
    assert len(str(error.value)) < 400


def test_surrogate_pairs_are_one_character() -> None:
    row = parse_row(b'{"prompt": "\\ud83d\\ude00", "responses": ["\\u0000"]}')
    assert row.messages[0].content == "\U0001f600"
    assert row.responses == ("\x00",)


@pytest.mark.parametrize("data", [b"\xff", b'{"prompt": "\xed\xa0\x80"}', b'{"prompt": "\xc3'])
def test_invalid_utf8(data: bytes) -> None:
    with pytest.raises(RowError, match=r"not UTF-8: .* at byte"):
        parse_row(data)


def test_nesting_up_to_the_limit() -> None:
    deep: object = 0
    for _ in range(62):
        deep = [deep]
    assert parse(**PLAIN, meta=deep).meta == deep  # 1 row + 62 lists + 1 number = 64 levels
    with pytest.raises(RowError, match="nested"):
        parse(**PLAIN, meta=[deep])


@pytest.mark.parametrize(
    "values",
    [
        {"prompt": b"p"}, {"prompt": None}, {"prompt": 5}, {"responses": {"a", "b"}},
        {"responses": ["a", b"b"]}, {"meta": object()}, {"meta": {1: 2}}, {"meta": float("nan")},
        {"label": [float("inf"), 0.0]}, {"responses": ["\ud800", "b"]},
    ],
)  # fmt: skip
def test_make_row_refuses_what_a_line_cannot_say(values: dict[str, object]) -> None:
    with pytest.raises(RowError):
        make_row(**(PLAIN | values))  # type: ignore[arg-type]


@given(st.binary(max_size=80) | st.text(max_size=80).map(lambda s: s.encode("utf-8", "replace")))
def test_no_bytes_crash_the_parser(data: bytes) -> None:
    with pytest.raises(RowError):  # too short to be a row
        parse_row(data)


# TRL


def messages(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


U = ("user", "u")
TRL: dict[str, dict[str, Any]] = {
    "explicit text": {"prompt": "u", "chosen": "good", "rejected": "bad"},
    "explicit messages": {
        "prompt": messages(U),
        "chosen": messages(("assistant", "good")),
        "rejected": messages(("assistant", "bad")),
    },
    "text prompt, messages": {
        "prompt": "u",
        "chosen": messages(("assistant", "good")),
        "rejected": messages(("assistant", "bad")),
    },
    "implicit": {
        "chosen": messages(U, ("assistant", "good")),
        "rejected": messages(U, ("assistant", "bad")),
    },
    "prompt column beside whole conversations": {
        "prompt": "u",
        "chosen": messages(U, ("assistant", "good")),
        "rejected": messages(U, ("assistant", "bad")),
    },
}


@pytest.mark.parametrize("form", TRL)
def test_trl_forms_are_the_same_row(form: str) -> None:
    row = parse(**TRL[form])
    assert row == make_row("u", ["good", "bad"], label=0)


def test_trl_keeps_the_whole_history_and_identical_responses() -> None:
    history = [("system", "s"), U, ("assistant", "a"), ("user", "v")]
    same = messages(*history, ("assistant", "same"))
    row = parse(prompt="v", chosen=same, rejected=same, id="i", meta=1)
    assert [(m.role, m.content) for m in row.messages] == history
    assert row.responses == ("same", "same")
    assert (row.id, row.meta, row.label) == ("i", 1, 0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"chosen": "a", "rejected": "b"}, "no prompt"),
        ({"prompt": "u", "chosen": None, "rejected": None}, "chosen"),
        ({"prompt": "u", "chosen": "a"}, "rejected"),
        ({"prompt": "u", "chosen": "a", "rejected": messages(("assistant", "b"))}, "one is text"),
        ({"chosen": [], "rejected": []}, "chosen must end"),
        ({"chosen": messages(U), "rejected": messages(U)}, "chosen must end"),
        (
            {"chosen": messages(U, ("assistant", "a")), "rejected": messages(("assistant", "b"))},
            "differ before",
        ),
        (TRL["implicit"] | {"prompt": "another"}, "not the prompt"),
        (TRL["explicit text"] | {"label": 0}, "label beside chosen and rejected"),
        (TRL["explicit text"] | {"responses": ["a"]}, "responses beside chosen and rejected"),
        (TRL["explicit text"] | {"meta": 3, "score": 9}, "go to meta, which is 3"),
        (
            {"prompt": "u", "chosen": ["a", *messages(("assistant", "b"))], "rejected": "c"},
            "one is",
        ),
        ({"prompt": "u", "chosen": [], "rejected": ["b"]}, "one is text"),
        ({"prompt": "u", "chosen": None, "rejected": "b"}, "chosen"),
        (
            {"chosen": messages(("assistant", "a")), "rejected": messages(("assistant", "b"))},
            "no message",
        ),
    ],
)
def test_refused_trl(fields: dict[str, object], message: str) -> None:
    with pytest.raises(RowError, match=message):
        parse(**fields)


def test_other_columns_of_a_pair_go_to_meta() -> None:
    columns: dict[str, Any] = {"chosen_model": "m", "score_chosen": None, "tools": []}
    row = parse(**TRL["explicit text"], **columns, meta={"source": 1})
    assert row.meta == {**columns, "source": 1}
    assert row.unread == tuple(columns)


def test_a_null_says_nothing() -> None:
    """Tables fill with nulls what a row has not, and what it would have in another form."""
    nulls: dict[str, Any] = dict.fromkeys(("chosen", "rejected", "images", "label", "meta"))
    row = parse(**PLAIN, **nulls)
    assert row == parse(**PLAIN) and row.unread == ()
    pair = {"prompt": "u", "chosen": "good", "rejected": "bad", "responses": None, "label": None}
    assert (row := parse(**pair)).responses == ("good", "bad") and row.label == 0


def test_a_prompt_that_is_null_is_in_the_conversations() -> None:
    assert parse(**TRL["implicit"], prompt=None) == parse(**TRL["implicit"])


def test_lists_of_chosen_and_rejected_texts() -> None:
    """As RewardBench 2 has them: one that is best, or several that are tied."""
    row = parse(prompt="u", chosen=["a"], rejected=["b", "c"])
    assert (row.responses, row.label) == (("a", "b", "c"), 0)
    row = parse(prompt="u", chosen=["a", "b"], rejected=["c"])
    assert (row.responses, row.label) == (("a", "b", "c"), (1.0, 1.0, 0.0))


# Identity


def test_a_missing_id_is_the_hash_of_the_content() -> None:
    row = parse(**PLAIN)
    assert len(row.id) == 64 and int(row.id, 16) >= 0
    assert parse(**PLAIN, label=0, meta={"a": 1}).id == row.id
    for change in (
        {"prompt": "q"}, {"responses": ["b", "a"]}, {"responses": ["ab"]}, {"reference": ""},
        {"principles": "p"}, {"prompt": messages(("system", "p"), ("user", "p"))},
    ):  # fmt: skip
        assert parse(**(PLAIN | change)).id != row.id
    # The mapping is fixed: ids seed the draws, and published figures with them.
    canonical = '[[["user","p"]],["a","b"],null,null]'
    assert row.id == hashlib.sha256(canonical.encode()).hexdigest()


def test_digest_covers_all_that_a_row_says() -> None:
    rows = [
        parse(**PLAIN),
        parse(**PLAIN, label=0),
        parse(**PLAIN, label=1),
        parse(**PLAIN, label=[0, 1]),
        parse(**PLAIN, meta=0),
        parse(**PLAIN, meta={}),
        parse(**PLAIN, id="x"),
        parse(**PLAIN, reference="x"),
        parse(**PLAIN, principles="x"),
    ]
    assert len({row.digest for row in rows}) == len(rows)
    spaced = b'  {"responses" : ["a", "\\u0062"], "prompt": "p"}  '
    assert parse_row(spaced).digest == rows[0].digest
