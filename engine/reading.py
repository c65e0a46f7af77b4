"""Files of rows -> rows, one entry for each line, and none of them ends a run.

A file holds lines of JSON, one JSON array, or, with pyarrow, a Parquet table; lines and arrays may
be gzipped. `columns` reads tables in other layouts: for each field of a row the column that it is
in, or how it is made of several.
"""

import gzip
import hashlib
import io
import json
import os
import select
import warnings
import zlib
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import msgspec

from engine.labels import quote
from engine.request import BadRow, Row, RowError, parse_row

MAX_ROW_BYTES = 1 << 20
_UTF8_BOM = b"\xef\xbb\xbf"
_GZIP, _PARQUET = b"\x1f\x8b", b"PAR1"
_FILES_OF_ROWS = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
_CHUNK_BYTES = 1 << 16
_ARRAY_BYTES = 1 << 30  # an array is held whole
T = TypeVar("T")


@dataclass(frozen=True)
class Columns:
    """Where a table has what a row needs.

    fields: for `prompt`, `reference` and `principles` a column, or a list of columns that are
    joined by blank lines, those that are empty left out; for `responses` a list of columns, or one
    that holds a list; for `id` and `label` a column. values: what a label in the table stands for.
    A number or a truth value where text is needed is shown as JSON writes it. All other columns go
    to `meta`.
    """

    fields: Mapping[str, str | list[str]]
    values: Mapping[str, Any] | None = None

    @staticmethod
    def parse(text: str) -> "Columns":
        """From JSON, or the path of a file of it: `{"prompt": "input", "responses": ["a", "b"],
        "label": {"column": "label", "values": {"1": 0, "2": 1, "0": "tie"}}}`. Raises ValueError
        naming what is wrong."""
        if not text.lstrip().startswith("{"):
            text = Path(text).read_text(encoding="utf-8")
        try:
            given = json.loads(text)
        except ValueError as error:
            raise ValueError(f"columns are not JSON: {error}") from None
        if not isinstance(given, dict):
            raise ValueError(f"columns are an object, not {quote(given)}")
        values = None
        if isinstance(label := given.get("label"), dict):
            if set(label) != {"column", "values"} or not isinstance(label["values"], dict):
                raise ValueError(f"columns: label {label!r} is not {{column, values}}")
            given["label"], values = label["column"], label["values"]
        for name, column in given.items():
            if name not in ("id", "prompt", "responses", "label", "reference", "principles"):
                raise ValueError(f"columns: a row has no field {name!r}")
            listed = column if isinstance(column, list) else [column]
            many = name in ("prompt", "responses", "reference", "principles")
            if (
                not listed
                or not all(isinstance(c, str) for c in listed)
                or (isinstance(column, list) and not many)
            ):
                raise ValueError(f"columns: {name} = {column!r} is no column")
        for name in ("prompt", "responses"):
            if name not in given:
                raise ValueError(f"columns do not say where the {name} is")
        return Columns(given, values)

    def row(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of a row, from a record of the table. Raises RowError."""
        used: set[str] = set()

        def take(column: str) -> Any:
            if column not in record:
                raise RowError(f"there is no column {quote(column)}")
            used.add(column)
            return record[column]

        row: dict[str, Any] = {}
        for name, column in self.fields.items():
            if isinstance(column, str):
                row[name] = take(column) if name in ("id", "label") else _text(take(column))
            elif name == "responses":
                row[name] = _text([take(each) for each in column])
            else:
                texts = _text([take(each) for each in column])
                if not all(isinstance(text, str | None) for text in texts):
                    raise RowError(f"the columns of {name} are not all text")
                row[name] = "\n\n".join(text for text in texts if text)
        if self.values is not None and row["label"] is not None:
            label = row["label"]
            if str(label) not in self.values:
                raise RowError(f"the label {quote(label)} has no value in columns")
            row["label"] = self.values[str(label)]
        rest = {name: value for name, value in record.items() if name not in used}
        return row | ({"meta": rest} if rest else {})


def _text(value: Any) -> Any:
    """Numbers and truth values, also those of a list, as JSON writes them; all else as it is."""
    if isinstance(value, list):
        return [_text(each) for each in value]
    return json.dumps(value) if isinstance(value, bool | int | float) else value


class _Gzip(gzip.GzipFile):
    """A gzipped file whose damage is an OSError, as that of a disk is."""

    def readline(self, size: int | None = -1) -> bytes:
        return self._checked(super().readline, size)

    def read(self, size: int | None = -1) -> bytes:
        return self._checked(super().read, size)

    def _checked(self, read: Callable[[int | None], bytes], size: int | None) -> bytes:
        try:
            return read(size)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise OSError(f"{self.name} is damaged: {error}") from None


class Pipe:
    """A descriptor that rows come through, and whether one is there: `ready` never waits."""

    def __init__(self, descriptor: int, max_row_bytes: int) -> None:
        self._descriptor = descriptor
        self._enough = max_row_bytes + 6  # for `read_rows` to see that a line is too long
        self._held = bytearray()
        self._ended = False

    def ready(self) -> bool:
        """Whether `read_rows` has an entry, or the end, without waiting for more."""
        while True:
            text = self._held.lstrip()
            if self._ended or b"\n" in text or len(text) >= self._enough:
                return True
            if not select.select([self._descriptor], [], [], 0)[0]:
                return False
            self._fill()

    def _fill(self) -> None:
        chunk = os.read(self._descriptor, _CHUNK_BYTES)
        self._held += chunk
        self._ended = not chunk

    def readline(self, size: int) -> bytes:
        """At most `size` bytes, up to a line's end."""
        start = 0
        while (end := self._held.find(b"\n", start)) < 0 and not self._ended:
            if len(self._held) >= size:
                break
            start = len(self._held)
            self._fill()
        return self._take(min(end + 1, size) if end >= 0 else min(len(self._held), size))

    def read(self, size: int) -> bytes:
        """At most `size` bytes, up to the end."""
        while len(self._held) < size and not self._ended:
            self._fill()
        return self._take(min(len(self._held), size))

    def _take(self, size: int) -> bytes:
        taken = bytes(self._held[:size])
        del self._held[:size]
        return taken


def open_rows(path: Path) -> BinaryIO:
    """Open a file of rows for `read_rows`, unpacked where it is gzipped. Raises OSError, and
    ValueError for a Parquet file without pyarrow."""
    with path.open("rb") as file:
        start = file.read(4)
    if start.startswith(_GZIP):
        return _Gzip(path)  # type: ignore[return-value]
    return _lines_of_parquet(path) if start == _PARQUET else path.open("rb")


def _lines_of_parquet(path: Path) -> BinaryIO:
    try:
        from pyarrow import parquet
    except ImportError:
        raise ValueError(f"{path} is a Parquet file: reading it needs pyarrow") from None
    lines = io.BytesIO()
    for batch in parquet.ParquetFile(path).iter_batches():
        for record in batch.to_pylist():
            lines.write(msgspec.json.encode(record) + b"\n")
    lines.seek(0)
    return lines


class RowFiles:
    """The files of rows in a directory, which are read as one, in the order of their names; their
    lines are counted on from file to file. Others that it holds are passed over."""

    def __init__(self, directory: Path) -> None:
        """Raises ValueError where there is none."""
        names = [path for path in directory.iterdir() if path.name.endswith(_FILES_OF_ROWS)]
        self._paths = sorted(path for path in names if path.is_file())
        if not self._paths:
            raise ValueError(
                f"the directory {directory} has no file of rows: {', '.join(_FILES_OF_ROWS)}"
            )

    def parse_lines(
        self, parse: Callable[[bytes], T], max_row_bytes: int
    ) -> Iterator[tuple[int, T | BadRow]]:
        """As `parse_lines` does with one file."""
        start = 0
        for path in self._paths:
            with open_rows(path) as stream:
                start = yield from parse_lines(stream, parse, max_row_bytes, start)


def read_rows(
    source: BinaryIO | Pipe | RowFiles,
    max_row_bytes: int = MAX_ROW_BYTES,
    columns: Columns | None = None,
) -> Iterator[Row | BadRow]:
    """Read rows one at a time, as the consumer asks for them.

    Lines and arrays are read as `parse_lines` does. An id that an earlier entry has, whether given
    or the content's hash, makes a BadRow. Warns once of columns and keys that no template shows.
    """
    first_lines: dict[bytes, int] = {}  # digest of an id -> the line that has it
    warned = False
    convert = None if columns is None else columns.row
    parse = partial(parse_row, convert=convert)
    if isinstance(source, RowFiles):
        lines = source.parse_lines(parse, max_row_bytes)
    else:
        lines = parse_lines(source, parse, max_row_bytes)
    for line, entry in lines:
        if isinstance(entry, Row):
            entry = replace(entry, line=line)
        if entry.id is not None:
            first = first_lines.setdefault(_id_digest(entry.id), line)
            if first != line and isinstance(entry, Row):
                error = f"the id {quote(entry.id)} is that of line {first}"
                entry = BadRow(entry.id, line, error, entry.digest)
        if isinstance(entry, Row) and entry.unread and not warned:
            warned = True
            warnings.warn(
                f"line {line}: the judge does not see {', '.join(entry.unread)}",
                UserWarning,
                stacklevel=2,
            )
        yield entry


def parse_lines(
    stream: BinaryIO | Pipe,
    parse: Callable[[bytes], T],
    max_row_bytes: int = MAX_ROW_BYTES,
    start: int = 0,
) -> Generator[tuple[int, T | BadRow], None, int]:
    """What `parse` makes of each line of a file, or of each element of its array, and its number
    from start + 1; a BadRow for what `parse` refuses with a RowError. Returns the last number.

    Of lines: a byte-order mark at the start, CRLF and blank lines are accepted, and so is a last
    line without its newline if it is whole. A line of more than `max_row_bytes` bytes is read past
    in pieces and never held.
    """
    number = start
    # Room for a byte-order mark and \r\n: what comes without a line end is then over the limit.
    while line := stream.readline(max_row_bytes + 5):
        number += 1
        if number == start + 1:
            line = line.removeprefix(_UTF8_BOM)
            if line.lstrip().startswith(b"["):
                content = line + stream.read(_ARRAY_BYTES)
                return (yield from _array(content, max_row_bytes, parse, start))
        torn = not line.endswith(b"\n")
        content = line.removesuffix(b"\n").removesuffix(b"\r")
        if len(content) > max_row_bytes:
            yield number, _read_past(stream, line, number, max_row_bytes)
        elif content.strip():
            entry = _entry(content, number, parse)
            if torn and isinstance(entry, BadRow):
                end = " (the last line, without its newline)"
                entry = replace(entry, error=entry.error + end)
            yield number, entry
    return number


def _entry(content: bytes, number: int, parse: Callable[[bytes], T]) -> T | BadRow:
    try:
        return parse(content)
    except RowError as refusal:
        return BadRow(refusal.id, number, str(refusal), hashlib.sha256(content).hexdigest())


def _array(
    content: bytes, max_row_bytes: int, parse: Callable[[bytes], T], start: int
) -> Generator[tuple[int, T | BadRow], None, int]:
    """The elements of a JSON array, counted as lines are."""
    try:
        elements = msgspec.json.decode(content, type=list[msgspec.Raw])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        digest = hashlib.sha256(content).hexdigest()
        yield start + 1, BadRow(None, start + 1, f"not a JSON array: {error}", digest)
        return start + 1
    for number, element in enumerate(elements, start + 1):
        row = bytes(element)
        if len(row) > max_row_bytes:
            reason = f"the row has {len(row)} bytes, more than max_row_bytes = {max_row_bytes}"
            yield number, BadRow(None, number, reason, hashlib.sha256(row).hexdigest())
        else:
            yield number, _entry(row, number, parse)
    return start + len(elements)


def _read_past(stream: BinaryIO | Pipe, start: bytes, number: int, max_row_bytes: int) -> BadRow:
    """Read the rest of a line that is too long, in pieces of bounded size."""
    digest = hashlib.sha256()
    num_bytes = 0
    piece = start
    while piece:
        ends = piece.endswith(b"\n")
        digest.update(piece.removesuffix(b"\n"))
        num_bytes += len(piece) - ends
        piece = b"" if ends else stream.readline(_CHUNK_BYTES)
    error = f"the line has {num_bytes} bytes, more than max_row_bytes = {max_row_bytes}"
    return BadRow(None, number, error, digest.hexdigest())


def _id_digest(row_id: str) -> bytes:
    return hashlib.sha256(row_id.encode("utf-8")).digest()[:16]
