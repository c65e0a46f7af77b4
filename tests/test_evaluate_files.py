"""Files as people have them, damaged ones among them, become records; none is lost silently."""

import base64
import gzip
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.evaluate.benchmark import BadItem, Item
from bench.evaluate.files import Record, one_of, read_items, records
from engine.request import make_row

# d/t/m.jsonl with two entries in the form of ReaLMistake and d/example.jsonl with one, encrypted
# with its password.
LOCKED = base64.b64decode(
    "UEsDBBQACwAIAFCJfV1m8D5YegAAABUBAAALAAAAZC90L20uanNvbmwva2GDXwui6LDGeNtOP02+jTQscYlcL5u8cEha"
    "0Y+g1kJgbKc7zI5VbiGGQXxAuyrzgC/xDMWMEqpUb+Fw1+Bqn6s8XycmJkNch00cQ0Ec8PfUEV3zYpRDFv9bPr8UULXc"
    "0AJGNPchJN7D+mZ96m9Rg5VVhLvmvjiv3lBLBwhm8D5YegAAABUBAABQSwMEFAALAAgAUIl9XTq+aL1uAAAAiQAAAA8A"
    "AABkL2V4YW1wbGUuanNvbmzHWKoocs2JVgZI8QCEk5i7a136ONTyCL6BtWMU1U7F8ewvJhm2VyVsJQpslZGU+UPci1/c"
    "BxviKUx4V7EtolxHooTm2wQHGxSgloI4QUZZPWLfF267YlfuDxEY6fEGnUsynJM/CgK4dtWspztqIlBLBwg6vmi9bgAA"
    "AIkAAABQSwECHgMUAAsACABQiX1dZvA+WHoAAAAVAQAACwAAAAAAAAABAAAApIEAAAAAZC90L20uanNvbmxQSwECHgMU"
    "AAsACABQiX1dOr5ovW4AAACJAAAADwAAAAAAAAABAAAApIGzAAAAZC9leGFtcGxlLmpzb25sUEsFBgAAAAACAAIAdgAA"
    "AF4BAAAAAA=="
)
A, B = b'{"n": 1}', b'{"n": 2}'


def numbers(path: Path, **options: object) -> list[object]:
    """What each record's n is, and the error of what is none."""
    found = records(path, **options)  # type: ignore[arg-type]
    return [each.error if isinstance(each, BadItem) else each.fields.get("n") for each in found]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", A + b"\n" + B),
        ("a.jsonl", b"\xef\xbb\xbf" + A + b"\r\n\r\n" + B + b"\r\n"),
        ("a.json", b" [" + A + b",\n" + B + b"]"),
        ("a.json", A + b"\n" + B + b"\n"),
        ("a.json", b"\xef\xbb\xbf[" + A + b"," + B + b"]"),
        ("a.jsonl.gz", gzip.compress(A + b"\n" + B, mtime=0)),
        ("a.json.gz", gzip.compress(b"[" + A + b"," + B + b"]", mtime=0)),
        ("no_ending", A + b"\n" + B),
    ],
)
def test_the_same_records_in_many_files(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert numbers(tmp_path / name) == [1, 2]


def test_a_file_that_is_one_object_is_one_record(tmp_path: Path) -> None:
    path = tmp_path / "README.json"
    path.write_text(json.dumps({"n": 3, "authors": ["A.", "B."]}, indent=2))
    assert [(each.line, each.fields["n"]) for each in records(path)] == [(1, 3)]  # type: ignore[union-attr]
    path.write_bytes(b"")
    assert numbers(path) == []


def test_what_is_no_record_has_its_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(A + b"\n[1]\n\n{\n" + b'{"n": NaN}\n"\xff"\n' + B)
    found = list(records(path))
    assert [each.line for each in found] == [1, 2, 4, 5, 6, 7]
    errors = [each.error for each in found if isinstance(each, BadItem)]
    assert len(errors) == 4
    assert "a row is a JSON object" in errors[0]
    assert "not JSON" in errors[1]
    assert "NaN is not a finite number" in errors[2]
    assert "not UTF-8" in errors[3]


def test_a_folder_is_its_files_by_name(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a/deep/c.json", ".hidden/d.json", "__MACOSX/e.json", "f.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(A)
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        for name in ("in/", "in/g.json", "in/h.md", "__MACOSX/in/._g.json"):
            archive.writestr(name, b"" if name.endswith("/") else B)
    found = [(each.source, each.line) for each in records(tmp_path)]
    assert found == [("a/deep/c.json", 1), ("b.jsonl", 1), ("z.zip/in/g.json", 1)]
    assert numbers(tmp_path, only=lambda name: name.startswith(("a", "in"))) == [1, 2]
    with pytest.raises(
        ValueError, match=r"z.zip has no file of this set that ends in .json, .jsonl"
    ):
        numbers(tmp_path, only=lambda name: name.startswith("a"))
    assert numbers(tmp_path / "b.jsonl", only=lambda name: False) == [1]
    with pytest.raises(ValueError, match="has no file of this set"):
        numbers(tmp_path / "a", only=lambda name: False)
    with pytest.raises(OSError, match="nothing"):
        numbers(tmp_path / "nothing")


def test_an_archive_with_a_password(tmp_path: Path) -> None:
    path = tmp_path / "data.zip"
    path.write_bytes(LOCKED)
    assert len(numbers(path, password=b"open-realmistake")) == 3
    with pytest.raises(ValueError, match=r"data.zip: .*password required"):
        numbers(path)
    for i in range(600):  # of 256 wrong ones one is found out by the content alone
        with pytest.raises(ValueError, match=r"data.zip: "):
            numbers(path, password=b"wrong%d" % i)
    path.write_bytes(LOCKED[:-30])
    with pytest.raises(ValueError, match=r"data.zip: File is not a zip file"):
        numbers(path)


def test_damage_that_ends_the_reading(tmp_path: Path) -> None:
    packed = gzip.compress(b"".join(b'{"n": %d}\n' % i for i in range(2000)))
    (tmp_path / "a.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    reader = records(tmp_path)
    assert isinstance(next(reader), Record)
    with pytest.raises(OSError, match="damaged"):
        list(reader)
    (tmp_path / "a.jsonl.gz").write_bytes(
        b"version https://git-lfs.github.com/spec/v1\noid sha256:1"
    )
    with pytest.raises(ValueError, match="Git LFS's pointer"):
        list(records(tmp_path))


def test_parquet_needs_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and more")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"a.parquet is a Parquet file: reading it needs pyarrow"):
        list(records(tmp_path))


def test_what_no_item_can_hold_is_a_bad_item() -> None:
    """The next record is read all the same."""
    row = make_row("p", ["x", "y"], id="r", label=0)
    made: list[Callable[[], Item]] = [
        lambda: Item("a", ["list"], (row,)),  # type: ignore[arg-type]
        lambda: Item("b", "\ud800", (row,)),
        lambda: Item("c", "s", (row,), {"gold": float("nan")}),
        lambda: Item("d", str(float(10**400)), (row,)),
        lambda: Item("e", (5).startswith("x"), (row,)),  # type: ignore[attr-defined]
        lambda: Item("f", "s", (row,)),
    ]
    given = [Record("f", number, {}) for number in range(len(made))]
    found = list(read_items(given, lambda record: made[record.line]()))
    assert [isinstance(each, BadItem) for each in found] == [True] * 5 + [False]


def test_records_become_items_or_say_why_not(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"id": "x", "p": "Hi?"}\n{"id": "y"}\n{"id": "x", "p": "Ho?"}\n'
        '{"id": "z", "p": 3}\n{"id": "v", "p": "Hi?", "label": 2}\n{\n'
    )

    def make(record: Record) -> Item:
        label = one_of(record.fields.get("label", 0), {"0": 0, "1": 1})
        row = make_row(record.fields["p"], ["a", "b"], id=record.fields["id"], label=label)
        return Item(row.id, "s", (row,))

    item, *bad = read_items(records(path), make)
    assert isinstance(item, Item)
    assert item.id == "x"
    errors = [each.error for each in bad if isinstance(each, BadItem)]
    assert [each.line for each in bad if isinstance(each, BadItem)] == [2, 3, 4, 5, 6]
    assert errors[:2] == ["no 'p'", "the id 'x' is that of a.jsonl, line 1"]
    assert errors[3] == "2 is none of 0, 1"
