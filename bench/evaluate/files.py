"""The records of published files: JSON, lines of JSON, Parquet, gzipped or in a zip archive.

A folder is all files in it that can be read so, by name, without hidden ones. What is no record,
and what is no item, is a `BadItem` in its place, and reading goes on.
"""

import io
import lzma
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, BinaryIO, NamedTuple, TypeVar

from bench.evaluate.benchmark import BadItem, Item
from engine.labels import quote
from engine.reading import open_rows, parse_lines
from engine.request import BadRow, RowError, check_json, parse_fields

SUFFIXES = (".json", ".jsonl", ".parquet", ".gz", ".zip")
HIDDEN = (".", "__MACOSX")
POINTER = b"version https://git-lfs"
MOST_BYTES = 1 << 26  # of a record
T = TypeVar("T")


class Record(NamedTuple):
    """An object of a file: the path within what was given, the line from 1, and the fields."""

    source: str
    line: int
    fields: dict[str, Any]

    @property
    def file(self) -> str:
        """The file's name without its endings."""
        return PurePath(self.source).name.split(".")[0]


def every_file(name: str) -> bool:
    """Of `records`: all files."""
    return True


def records(
    path: Path, password: bytes | None = None, only: Callable[[str], bool] = every_file
) -> Iterator[Record | BadItem]:
    """All records of a file or a folder.

    password: of an archive. only: whether a file of a folder or an archive is read, by its path in
    there; a file that is given by itself always is. Raises OSError, and ValueError for a folder or
    an archive without any such file, for an archive that cannot be opened, and for a Parquet file
    without pyarrow.
    """
    if not path.is_dir():
        yield from _records_of(path, path.name, password, only)
        return
    names = sorted(str(each.relative_to(path)) for each in path.rglob("*") if each.is_file())
    names = [each for each in names if each.endswith(".zip") or only(each)]
    for name in _readable(names, SUFFIXES, path):
        yield from _records_of(path / name, name, password, only)


def read_items(
    records: Iterable[Record | BadItem], make: Callable[[Record], Item]
) -> Iterator[Item | BadItem]:
    """What `make` makes of each record. A record is bad that lacks a key, one that `make` cannot
    take, one whose subset or facts JSON cannot say, and one whose item has an earlier one's id."""
    seen: dict[str, Record] = {}
    for record in records:
        if isinstance(record, BadItem):
            yield record
            continue
        try:
            item = make(record)
            if not isinstance(item.subset, str):
                raise ValueError(f"the subset {quote(item.subset)} is no text")
            check_json({"subset": item.subset, "facts": item.facts}, "entry")
            first = seen.setdefault(item.id, record)
            if first is not record:
                place = f"{first.source}, line {first.line}"
                raise ValueError(f"the id {quote(item.id)} is that of {place}")
        except KeyError as error:
            yield BadItem(record.source, record.line, f"no {error}")
        except (ValueError, TypeError, AttributeError, OverflowError) as error:
            yield BadItem(record.source, record.line, str(error))
        else:
            yield item


def one_of(value: Any, meanings: Mapping[str, T]) -> T:
    """What a value of a record means; a number is looked up as text. Raises ValueError."""
    if str(value) not in meanings:
        raise ValueError(f"{quote(value)} is none of {', '.join(meanings)}")
    return meanings[str(value)]


def _readable(names: list[str], suffixes: Sequence[str], path: Path) -> list[str]:
    """The names that end so and are not hidden; raises ValueError where none does."""
    shown = [each for each in names if not any(p.startswith(HIDDEN) for p in PurePath(each).parts)]
    if found := [each for each in shown if PurePath(each).suffix in suffixes]:
        return found
    raise ValueError(f"{path} has no file of this set that ends in {', '.join(suffixes)}")


def _records_of(
    path: Path, source: str, password: bytes | None, only: Callable[[str], bool]
) -> Iterator[Record | BadItem]:
    with path.open("rb") as file:
        if file.read(len(POINTER)) == POINTER:
            raise ValueError(f"{path} is Git LFS's pointer to the file, not the file")
    if path.suffix != ".zip":
        with open_rows(path) as stream:
            yield from _parsed(stream, source)
        return
    try:
        with zipfile.ZipFile(path) as archive:
            names = [each for each in sorted(archive.namelist()) if only(each)]
            for name in _readable(names, SUFFIXES[:2], path):
                data = archive.read(name, pwd=password)
                yield from _parsed(io.BytesIO(data), f"{source}/{name}")
    except (
        zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError, NotImplementedError
    ) as error:  # fmt: skip
        raise ValueError(f"{path}: {error}") from None


def _parsed(stream: BinaryIO, source: str) -> Iterator[Record | BadItem]:
    if source.endswith(".json"):
        data = stream.read()
        if (whole := _object(data)) is not None:
            yield Record(source, 1, whole)
            return
        stream = io.BytesIO(data)
    for line, fields in parse_lines(stream, parse_fields, MOST_BYTES):
        if isinstance(fields, BadRow):
            yield BadItem(source, line, fields.error)
        else:
            yield Record(source, line, fields)


def _object(data: bytes) -> dict[str, Any] | None:
    """The one object of a file; None where it holds an array, or lines."""
    try:
        return parse_fields(data) if data.lstrip().startswith(b"{") else None
    except RowError:
        return None


def name_of(value: Any) -> str:
    """A record's own id as text. Raises ValueError for what is neither an integer nor text."""
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        raise ValueError(f"the id {quote(value)} is neither an integer nor text")
    return str(value)


def texts_of(fields: Mapping[str, Any], key: str) -> list[str]:
    """A field that is a list of texts, of one at least. Raises KeyError and ValueError."""
    value = fields[key]
    if not isinstance(value, list) or not value or not all(isinstance(each, str) for each in value):
        raise ValueError(f"{key} is {quote(value)} and no list of texts")
    return value


def named(start: str) -> Callable[[str], bool]:
    """Of `records`: files whose names begin so."""
    return lambda name: PurePath(name).name.startswith(start)


def these_or_all(path: Path, start: str) -> Callable[[str], bool]:
    """Of `records`: files of a folder that are named so, or lie in a folder that is; where there is
    none, every file. start: of the name."""

    def named(name: str) -> bool:
        return any(part.startswith(start) for part in PurePath(name).parts)

    files = (str(each.relative_to(path)) for each in path.rglob("*") if each.is_file())
    return named if any(map(named, files)) else every_file
