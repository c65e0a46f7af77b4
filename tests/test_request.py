"""engine/request.py: what is a row, what is refused and with which words, how lines are read."""

import hashlib
import io
import json
import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.request import BadRow, Message, Row, RowError, make_row, parse_row, read_rows

LIMIT = 1 << 20
PLAIN = {"prompt": "p", "responses": ["a", "b"]}
# JSON text can hold everything but lone surrogates.
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


def parse(**fields: object) -> Row:
    return parse_row(json.dumps(fields).encode())


def read(data: bytes, limit: int = LIMIT) -> list[Row | BadRow]:
    return list(read_rows(io.BytesIO(data), limit))


def line(**fields: object) -> bytes:
    return json.dumps(fields).encode() + b"\n"


def refused(entry: Row | BadRow) -> BadRow:
    assert isinstance(entry, BadRow), entry
    return entry


def accepted(entry: Row | BadRow) -> Row:
    assert isinstance(entry, Row), entry
    return entry


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
        ({"responses": ["a"] * 21}, "21 responses"),
        ({"responses": ["a", None]}, r"null.*responses\[1\]"),
        ({"responses": ["a", 7]}, r"int.*responses\[1\]"),
        ({"responses": "ab"}, "responses"),
        ({"responses": {"a": 1}}, "responses"),
        ({"prompt": None}, "prompt"),
        ({"prompt": 3}, "prompt"),
        ({"prompt": []}, "no message"),
        ({"prompt": ["hello"]}, r"prompt\[0\]"),
        ({"prompt": [{"role": "tool", "content": "x"}]}, "tool"),
        ({"prompt": [{"role": "user", "content": None}]}, "content"),
        ({"prompt": [{"role": "user", "content": "x", "name": "y"}]}, "name"),
        ({"prompt": [{"role": "user"}]}, "content"),
        ({"prompt": [{"role": "assistant", "content": "x"}]}, "ends with a message of the assist"),
        ({"id": ""}, "id is empty"),
        ({"id": 7}, "int.*id"),
        ({"reference": 7}, "reference"),
        ({"principles": ["x"]}, "principles"),
        ({"lable": 0}, "unknown key 'lable'.*under meta"),
        ({"label": True}, "bool"),
        ({"label": "0"}, "label"),
        ({"label": 1.0}, "float"),
        ({"label": 2}, "label 2 is no index of 2 responses"),
        ({"label": -1}, "label -1"),
        ({"label": [1.0]}, "1 gold scores for 2 responses"),
        ({"label": [1.0, 2.0, 3.0]}, "3 gold scores"),
        ({"label": [2, 2.0]}, "two maxima"),
        ({"label": [True, 0]}, "bool"),
        ({"label": []}, "0 gold scores"),
        ({"responses": ["a"], "label": 2}, "0 .wrong. or 1"),
        ({"responses": ["a"], "label": [0.5]}, "0 .wrong. or 1"),
        ({"responses": ["a", "b"], "label": 10**4000}, "label 1000"),
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


def test_labels() -> None:
    assert parse(**PLAIN, label=0).label == 0
    assert parse(**PLAIN, label=[1, 2]).label == (1.0, 2.0)
    assert [parse(prompt="p", responses=["a"], label=label).label for label in (0, 1)] == [0, 1]


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
        {"prompt": [Message(role="tool", content="x")]},  # type: ignore[arg-type]
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
        ({"prompt": "u", "chosen": "a"}, "rejected"),
        ({"prompt": "u", "chosen": "a", "rejected": messages(("assistant", "b"))}, "one is text"),
        ({"chosen": [], "rejected": []}, "chosen must end"),
        ({"chosen": messages(U), "rejected": messages(U)}, "chosen must end"),
        (
            {"chosen": messages(U, ("assistant", "a")), "rejected": messages(("assistant", "b"))},
            "differ before",
        ),
        (TRL["implicit"] | {"prompt": "another"}, "not the prompt"),
        (TRL["explicit text"] | {"label": 0}, "unknown key 'label'"),
        (TRL["explicit text"] | {"score_chosen": 9}, "unknown key 'score_chosen'"),
        ({"prompt": "u", "chosen": ["a"], "rejected": ["b"]}, "chosen"),
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


# Reading lines


def test_line_ends_blank_lines_and_bom() -> None:
    one, two = line(prompt="1", responses=["a"]), line(prompt="2", responses=["a"])
    data = b"\xef\xbb\xbf" + one[:-1] + b"\r\n\n  \r\n" + two + b"\n"
    rows = [accepted(entry) for entry in read(data)]
    assert [(row.messages[0].content, row.line) for row in rows] == [("1", 1), ("2", 4)]
    assert rows == [parse(prompt=text, responses=["a"]) for text in "12"]
    assert read(b"") == read(b"\xef\xbb\xbf") == read(b"\n\n") == []


def test_bom_later_in_the_file_is_an_error() -> None:
    bad = refused(read(line(**PLAIN) + b"\xef\xbb\xbf" + line(**PLAIN))[1])
    assert bad.line == 2 and "not JSON" in bad.error


def test_torn_last_line() -> None:
    whole = line(prompt="1", responses=["a"])
    assert accepted(read(whole + whole.replace(b"1", b"2")[:-1])[1]).line == 2
    bad = refused(read(whole + whole[:-5])[1])
    assert (bad.line, bad.id) == (2, None)
    assert "without its newline" in bad.error


def test_errors_stand_in_their_places_with_their_ids() -> None:
    entries = read(
        line(**PLAIN, id="one")
        + b"nonsense\n"
        + line(**PLAIN, id="three", lable=1)
        + line(**PLAIN, id=4)
        + line(**PLAIN, id="\udc00")
        + line(**PLAIN, id="six")
    )
    assert [entry.line for entry in entries] == [1, 2, 3, 4, 5, 6]
    assert [entry.id for entry in entries] == ["one", None, "three", None, None, "six"]
    assert [isinstance(entry, BadRow) for entry in entries] == [
        False,
        True,
        True,
        True,
        True,
        False,
    ]
    assert refused(entries[1]).digest == hashlib.sha256(b"nonsense").hexdigest()


def test_repeated_ids() -> None:
    same = line(**PLAIN)
    entries = read(
        same + line(**PLAIN, id="x") + same + line(prompt="", responses=[], id="x") + same
    )
    assert isinstance(entries[0], Row) and isinstance(entries[1], Row)
    assert "is that of line 1" in refused(entries[2]).error
    assert "0 responses" in refused(entries[3]).error
    assert "is that of line 1" in refused(entries[4]).error
    # A bad row has an output line under its id, so the id is taken.
    entries = read(line(prompt="", responses=[], id="x") + line(**PLAIN, id="x"))
    assert "'x' is that of line 1" in refused(entries[1]).error


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b""])
def test_lines_around_the_limit(start: bytes, end: bytes) -> None:
    content = line(**PLAIN)[:-1]
    after = line(prompt="after", responses=["a"])
    for limit in range(len(content) - 7, len(content) + 4):
        entries = read(start + content + end + (after if end else b""), limit)
        assert isinstance(entries[0], Row) == (limit >= len(content))
        if isinstance(bad := entries[0], BadRow):
            assert f"more than max_row_bytes = {limit}" in bad.error
        assert [entry.line for entry in entries] == ([1, 2] if end else [1])


@given(st.lists(st.binary(max_size=12).map(lambda b: b.replace(b"\n", b"\r")), max_size=6))
def test_no_line_is_lost_or_split(contents: list[bytes]) -> None:
    entries = read(b"\xef\xbb\xbf" + b"".join(content + b"\n" for content in contents), 6)
    filled = [
        number
        for number, content in enumerate(contents, 1)
        if content.strip() or len(content.removesuffix(b"\r")) > 6
    ]
    assert [entry.line for entry in entries] == filled


class EndlessLine(io.RawIOBase):
    """A stream of one good row, `size` bytes without a line end, and another good row."""

    def __init__(self, size: int) -> None:
        self.parts: list[bytes | int] = [line(**PLAIN), size, b"\n" + line(**PLAIN, id="last")]

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self.parts:
            return 0
        part = self.parts.pop(0)
        if isinstance(part, int):
            count = min(part, len(buffer))
            buffer[:count] = b"x" * count
            if part > count:
                self.parts.insert(0, part - count)
            return count
        buffer[: len(part)] = part
        return len(part)


def test_a_100_mb_line_is_not_held() -> None:
    size = 100 * 1000 * 1000
    rows = read_rows(io.BufferedReader(EndlessLine(size)), 1 << 16)
    tracemalloc.start()
    try:
        entries = list(rows)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    bad = refused(entries[1])
    assert bad.line == 2 and f"has {size} bytes" in bad.error
    assert accepted(entries[2]).id == "last"
    assert peak < 1 << 20


def test_rows_are_read_as_they_are_asked_for() -> None:
    stream = io.BytesIO(b"".join(line(prompt=str(i), responses=["a"]) for i in range(100)))
    rows = read_rows(stream, LIMIT)
    for count in range(1, 4):
        next(rows)
        assert stream.getvalue()[: stream.tell()].count(b"\n") == count
