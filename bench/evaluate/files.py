"""The records of published files: JSON, lines of JSON, Parquet, gzipped or in a zip archive.

A folder is all files in it that can be read so, by name. What is no record, and what is no item, is
a `BadItem` in its place, and reading goes on.
"""

import io
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

from bench.evaluate.benchmark import BadItem, Item
from engine.labels import quote
from engine.reading import open_rows, parse_lines
from engine.request import BadRow, parse_fields

SUFFIXES = (".json", ".jsonl", ".parquet", ".gz", ".zip")
MOST_BYTES = 1 << 26  # of a record
T = TypeVar("T")


class Record(NamedTuple):
    """An object of a file: the path within what was given, the line from 1, and the fields."""

    source: str
    line: int
    fields: dict[str, Any]


def records(path: Path, password: bytes | None = None) -> Iterator[Record | BadItem]:
    """All records of a file or a folder. password: of an archive.

    Raises OSError, and ValueError for a folder without any such file and for an archive that cannot
    be opened.
    """
    if not path.is_dir():
        yield from _records_of(path, path.name, password)
        return
    files = sorted(each for each in path.rglob("*") if each.suffix in SUFFIXES and each.is_file())
    if not files:
        raise ValueError(f"{path} has no file of {', '.join(SUFFIXES)}")
    for file in files:
        yield from _records_of(file, str(file.relative_to(path)), password)


def read_items(
    records: Iterable[Record | BadItem], make: Callable[[Record], Item]
) -> Iterator[Item | BadItem]:
    """What `make` makes of each record. A record is bad that lacks a key, one that `make` raises
    ValueError or TypeError for, and one whose item has the id of an earlier one."""
    seen: dict[str, Record] = {}
    for record in records:
        if isinstance(record, BadItem):
            yield record
            continue
        try:
            item = make(record)
            first = seen.setdefault(item.id, record)
            if first is not record:
                place = f"{first.source}, line {first.line}"
                raise ValueError(f"the id {quote(item.id)} is that of {place}")
        except KeyError as error:
            yield BadItem(record.source, record.line, f"no {error}")
        except (ValueError, TypeError) as error:
            yield BadItem(record.source, record.line, str(error))
        else:
            yield item


def one_of(value: Any, meanings: Mapping[str, T]) -> T:
    """What a value of a record means; a number is looked up as text. Raises ValueError."""
    if str(value) not in meanings:
        raise ValueError(f"{quote(value)} is none of {', '.join(meanings)}")
    return meanings[str(value)]


def _records_of(path: Path, source: str, password: bytes | None) -> Iterator[Record | BadItem]:
    if path.suffix != ".zip":
        with open_rows(path) as stream:
            yield from _parsed(stream, source)
        return
    try:
        with zipfile.ZipFile(path) as archive:
            for name in sorted(archive.namelist()):
                if Path(name).suffix in SUFFIXES[:2] and "__MACOSX" not in name:
                    data = archive.read(name, pwd=password)
                    yield from _parsed(io.BytesIO(data), f"{source}/{name}")
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:
        raise ValueError(f"{path}: {error}") from None


def _parsed(stream: BinaryIO, source: str) -> Iterator[Record | BadItem]:
    for line, fields in parse_lines(stream, parse_fields, MOST_BYTES):
        if isinstance(fields, BadRow):
            yield BadItem(source, line, fields.error)
        else:
            yield Record(source, line, fields)
