"""engine/reading.py: how files of rows are read, in lines, arrays, tables and other layouts."""

import gzip
import hashlib
import io
import json
import os
import tracemalloc
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from engine.labels import is_tie
from engine.reading import Columns, Pipe, RowFiles, open_rows, read_rows
from engine.request import BadRow, Row, RowError, parse_row

LIMIT = 1 << 20
PLAIN = {"prompt": "p", "responses": ["a", "b"]}
SHARED = Path(__file__).parents[2] / "shared" / "data"


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
        + line(**PLAIN, id=4, lable=1)
        + line(**PLAIN, id="\udc00")
        + line(**PLAIN, id="six")
    )
    assert [entry.line for entry in entries] == [1, 2, 3, 4, 5, 6]
    assert [entry.id for entry in entries] == ["one", None, "three", "4", None, "six"]
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
    assume(not b"".join(contents[:1]).lstrip().startswith(b"["))  # an array has no lines
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


def test_the_files_of_a_directory_are_read_as_one(tmp_path: Path) -> None:
    """Whatever the form of each: lines are counted on, and ids are those of all."""
    first = [line(id="a", **PLAIN), b"bad\n", b"\n"]
    array = b"[" + b",".join(line(id=name, **PLAIN).strip() for name in "bca") + b"]"
    (tmp_path / "2.jsonl").write_bytes(b"".join(first))
    (tmp_path / "3.json.gz").write_bytes(gzip.compress(array))
    (tmp_path / "4.json").write_bytes(b"[1,")
    (tmp_path / "5.jsonl").write_bytes(b"\xef\xbb\xbf" + line(id="d", **PLAIN) + b"torn")
    for name in ("1.csv", ".2.jsonl.swp", "README.md"):
        (tmp_path / name).write_bytes(b"of something else\n")
    (tmp_path / "6.jsonl").mkdir()
    entries = list(read_rows(RowFiles(tmp_path), LIMIT))
    assert [(entry.id, entry.line) for entry in entries] == [
        ("a", 1), (None, 2), ("b", 4), ("c", 5), ("a", 6), (None, 7), ("d", 8), (None, 9),
    ]  # fmt: skip
    assert "the id 'a' is that of line 1" in refused(entries[4]).error
    assert "not a JSON array" in refused(entries[5]).error
    assert "without its newline" in refused(entries[7]).error


def test_a_directory_without_rows(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_bytes(b"")
    with pytest.raises(ValueError, match=r"has no file of rows: \.jsonl"):
        RowFiles(tmp_path)


def test_one_warning_names_what_is_not_seen() -> None:
    data = line(prompt="u", chosen="a", rejected="b", id=1, score=3) * 1
    data += line(prompt="u", chosen="a", rejected="b", id=2, score=3)
    with pytest.warns(UserWarning, match=r"line 1: the judge does not see score") as warned:
        assert len(read(data)) == 2
    assert len(warned) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read(line(**PLAIN))


# Arrays, gzip, Parquet


def test_an_array_is_as_its_lines() -> None:
    elements: list[Any] = [PLAIN, {**PLAIN, "id": "x"}, 7, {**PLAIN, "id": "x"}]
    for data in (
        json.dumps(elements),
        json.dumps(elements, indent=1),
        "\ufeff " + json.dumps(elements),
    ):
        entries = read(data.encode())
        assert [entry.line for entry in entries] == [1, 2, 3, 4]
        assert accepted(entries[0]) == parse(**PLAIN) and accepted(entries[1]).id == "x"
        assert "a row is a JSON object" in refused(entries[2]).error
        assert "is that of line 2" in refused(entries[3]).error
    assert read(b"[]") == []


@pytest.mark.parametrize("data", [b"[", b"[{]", b"[1, 2", b"[1] 2", b"[" * 10_000, b'["\xff"]'])
def test_a_broken_array_is_one_error(data: bytes) -> None:
    (bad,) = read(data)
    assert refused(bad).line == 1
    assert bad.digest == hashlib.sha256(data).hexdigest() or "array" not in refused(bad).error


def test_an_element_of_an_array_is_checked_as_a_line_is() -> None:
    repeated = b'[{"prompt": "p", "prompt": "q", "responses": ["a"]}, {"prompt": NaN}]'
    entries = read(repeated)
    assert "repeated" in refused(entries[0]).error or "array" in refused(entries[0]).error
    assert (
        "more than max_row_bytes = 50"
        in refused(read(json.dumps([PLAIN, "x" * 60]).encode(), 50)[1]).error
    )


def test_gzip(tmp_path: Path) -> None:
    data = line(**PLAIN) + line(**PLAIN, id="x")
    (tmp_path / "rows.gz").write_bytes(gzip.compress(data))
    with open_rows(tmp_path / "rows.gz") as stream:
        assert list(read_rows(stream)) == read(data)


def test_a_damaged_gzip_file_ends_in_an_error_that_names_it(tmp_path: Path) -> None:
    """After the rows before the damage."""
    whole = gzip.compress(b"".join(line(**PLAIN, id=str(i)) for i in range(20_000)))
    for damage in (whole[: len(whole) // 2], whole[:9000] + b"\x00" * 999 + whole[9999:]):
        (tmp_path / "rows.gz").write_bytes(damage)
        entries: list[Row | BadRow] = []
        named = pytest.raises(OSError, match=r"rows\.gz is damaged")
        with open_rows(tmp_path / "rows.gz") as stream, named:
            for entry in read_rows(stream):
                entries.append(entry)
        assert accepted(entries[0]).id == "0"


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{**PLAIN, "label": 0, "id": 3}, {**PLAIN, "label": 1, "id": 4}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows")
    with open_rows(tmp_path / "rows") as stream:
        assert list(read_rows(stream)) == [parse(**row) for row in rows]


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "rows").write_bytes(b"PAR1....")
    with pytest.raises(ValueError, match="Parquet file: reading it needs pyarrow"):
        open_rows(tmp_path / "rows")


# Other layouts


LLMBAR = """{"prompt": "input", "responses": ["output_1", "output_2"],
             "label": {"column": "label", "values": {"1": 0, "2": 1}}}"""
PANDALM = """{"id": "idx", "prompt": ["instruction", "input"],
              "responses": ["response1", "response2"], "label":
              {"column": "annotator1", "values": {"1": 0, "2": 1, "0": "tie"}}}"""


def test_columns() -> None:
    record = {"idx": 5, "instruction": "do", "input": "", "response1": "a", "response2": "b",
              "annotator1": "0", "annotator2": "1"}  # fmt: skip
    (row,) = read_rows(io.BytesIO(line(**record)), LIMIT, Columns.parse(PANDALM))
    assert accepted(row) == parse(
        id="5", prompt="do", responses=["a", "b"], label="tie", meta={"annotator2": "1"}
    )
    (row,) = read_rows(
        io.BytesIO(line(q=7, answers=["a", 1])),
        columns=Columns.parse('{"prompt": "q", "responses": "answers"}'),
    )
    assert accepted(row) == parse(prompt="7", responses=["a", "1"])
    many = Columns.parse('{"prompt": "q", "responses": "answers", "label": "best"}')
    yes = {"idx": 6, "instruction": "ok?", "input": None, "response1": True, "response2": 0.5,
           "annotator1": "1"}  # fmt: skip
    (row,) = read_rows(io.BytesIO(line(**yes)), LIMIT, Columns.parse(PANDALM))
    assert accepted(row).responses == ("true", "0.5")
    (row,) = read_rows(io.BytesIO(line(q="p", answers=["a", "b", "c"], best=2)), LIMIT, many)
    assert accepted(row) == parse(prompt="p", responses=["a", "b", "c"], label=2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("FILE", "columns are an object, not"),
        ('{"prompt": "p"}', "do not say where the responses"),
        ('{"prompt": "p", "responses": 3}', "responses = 3 is no column"),
        ('{"prompt": "p", "responses": []}', "is no column"),
        ('{"prompt": "p", "responses": ["a"], "label": ["b"]}', "label = .* is no column"),
        ('{"prompt": "p", "responses": ["a"], "lable": "b"}', "no field 'lable'"),
        ('{"prompt": "p", "responses": ["a"], "label": {"column": "l"}}', "column, values"),
    ],
)
def test_columns_that_say_nothing(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "columns").write_text("[1]")
    with pytest.raises(ValueError, match=message):
        Columns.parse(text.replace("FILE", str(tmp_path / "columns")))


def test_a_record_that_columns_do_not_fit() -> None:
    columns = Columns.parse(LLMBAR)
    record = {"input": "p", "output_1": "a", "output_2": "b", "label": "3"}
    with pytest.raises(RowError, match="label '3' has no value"):
        columns.row(record)
    del record["output_2"]
    with pytest.raises(RowError, match="no column 'output_2'"):
        columns.row(record)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real rows are not here")
@pytest.mark.parametrize(
    ("pattern", "columns", "count", "ties"),
    [
        ("llmbar/[!P]*.json", LLMBAR, 419, 0),
        ("llmbar/Processed-*.json", LLMBAR, 266, 0),
        ("pandalm/*.json", PANDALM, 999, 97),
    ],
)
def test_real_files_as_they_are(pattern: str, columns: str, count: int, ties: int) -> None:
    entries = []
    for path in sorted(SHARED.glob(pattern)):
        with open_rows(path) as stream:
            entries += [
                accepted(entry) for entry in read_rows(stream, columns=Columns.parse(columns))
            ]
    labels = [entry.label for entry in entries if entry.label is not None]
    assert len(entries) == len(labels) == count
    assert sum(map(is_tie, labels)) == ties


# Pipes


PIECES = st.lists(st.sampled_from([b"ab\n", b"\n", b" ", b"c", b"defgh", b"\r\n", b"xyz\n"]))


@given(PIECES, st.data())
def test_a_pipe_is_ready_when_there_is_a_line_or_the_end(
    pieces: list[bytes], data: st.DataObject
) -> None:
    reader, writer = os.pipe()
    pipe, seen, written = Pipe(reader, 20), b"", b""
    try:
        for piece in pieces:
            os.write(writer, piece)
            written += piece
            left = written[len(seen) :].lstrip()
            assert pipe.ready() == (b"\n" in left or len(left) >= 26)
            while b"\n" in written[len(seen) :]:
                seen += pipe.readline(data.draw(st.integers(1, 9)))
        os.close(writer)
        writer = -1
        assert pipe.ready()
        while line := pipe.readline(7):
            seen += line
        assert seen == written and pipe.read(5) == b""
    finally:
        os.close(reader)
        if writer >= 0:
            os.close(writer)


def test_lines_of_a_pipe_are_those_of_a_file() -> None:
    content = b"".join(b"x" * n + b"\n" for n in (0, 3, 50, 7)) + b"end"
    reader, writer = os.pipe()
    os.write(writer, content)
    os.close(writer)
    pipe, file = Pipe(reader, 20), io.BytesIO(content)
    while line := file.readline(10):
        assert pipe.readline(10) == line
    assert pipe.readline(10) == b""
    os.close(reader)
