"""Rows of one's own: whatever `engine.request` reads, with labels."""

from collections.abc import Iterator
from pathlib import Path

from bench.evaluate.benchmark import BadItem, Benchmark, Item, Layout
from bench.evaluate.files import Record, read_items, records
from bench.evaluate.rules import BY_VOTE, STRICT, TIES
from engine.reading import Columns
from engine.request import build_row


def read(path: Path, layout: Layout, columns: Columns | None = None) -> Iterator[Item | BadItem]:
    """Both forms of a row, or tables in the layout of `columns`. The subset is the column `subset`,
    or that key of `meta`, or else the file's name without its ending. A row without an id is named
    after its file and line; in a folder the file is part of every id."""

    def make(record: Record) -> Item:
        fields = dict(record.fields) if columns is None else columns.row(record.fields)
        subset = fields.pop("subset", None)
        row = build_row(fields)
        if row.label is None:
            raise ValueError("no label")
        if subset is None and isinstance(row.meta, dict):
            subset = row.meta.get("subset")
        if fields.get("id") is None:
            row = build_row(fields | {"id": f"{record.file}-{record.line}"})
        elif path.is_dir():
            row = build_row(fields | {"id": f"{record.source}:{row.id}"})
        return Item(row.id, record.file if subset is None else str(subset), (row,))

    return read_items(records(path), make)


BENCHMARK = Benchmark("plain", "Rows of one's own", "", read, (BY_VOTE, STRICT, TIES))
