"""Rows of one's own: whatever `engine.request` reads, with labels."""

from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath

import numpy as np

from bench.evaluate.benchmark import BadItem, Benchmark, Item, Layout, RowScores, Rule, Total
from bench.evaluate.files import Record, read_items, records
from bench.evaluate.rules import best_is_drawn, drawn, preferred, strict
from engine.labels import best_of, is_tie
from engine.reading import Columns
from engine.request import build_row


def read(path: Path, layout: Layout, columns: Columns | None = None) -> Iterator[Item | BadItem]:
    """Both forms of a row, or tables in the layout of `columns`. The subset is the column `subset`,
    or that key of `meta`, or else the file's name without its ending. A row without an id is named
    after its file and line; in a folder the file is part of every id."""

    def make(record: Record) -> Item:
        file = PurePath(record.source).name.split(".")[0]
        fields = dict(record.fields) if columns is None else columns.row(record.fields)
        subset = fields.pop("subset", None)
        row = build_row(fields)
        if row.label is None:
            raise ValueError("no label")
        if subset is None and isinstance(row.meta, dict):
            subset = row.meta.get("subset")
        if fields.get("id") is None:
            row = build_row(fields | {"id": f"{file}-{record.line}"})
        elif path.is_dir():
            row = build_row(fields | {"id": f"{record.source}:{row.id}"})
        return Item(row.id, file if subset is None else str(subset), (row,))

    return read_items(records(path), make)


def _strict(item: Item, scores: Sequence[RowScores]) -> np.ndarray:
    label, means = item.rows[0].label, scores[0].means
    assert label is not None
    return drawn(means, label) if means.shape[1] == 1 else strict(means, label)


def _pair_or_tie(item: Item, scores: Sequence[RowScores]) -> np.ndarray:
    label, means = item.rows[0].label, scores[0].means
    assert label is not None
    gold = 0 if is_tie(label) else 1 - 2 * best_of(label)[0]
    voted = ~np.isnan(means[:, 0])
    return ((preferred(means) == gold) & voted).astype(float)


def _tells_apart(item: Item) -> bool:
    """Whether some response is worse than the best; of one response, always."""
    (row,) = item.rows
    return len(row.responses) == 1 or len(best_of(row.label or 0)) < len(row.responses)


def _is_pair(item: Item) -> bool:
    return len(item.rows[0].responses) == 2


TOTAL = Total(over="items")
BENCHMARK = Benchmark(
    "plain",
    "Rows of one's own",
    "",
    read,
    (
        Rule(
            "vote",
            "the best response of the vote is one that the label calls best; a tie is drawn",
            best_is_drawn,
            TOTAL,
            _tells_apart,
        ),
        Rule(
            "strict",
            "a response that the label calls best beats all others; a tie is wrong",
            _strict,
            TOTAL,
            _tells_apart,
        ),
        Rule(
            "ties",
            "of pairs: the better response, or equal means where the label is a tie",
            _pair_or_tie,
            TOTAL,
            _is_pair,
        ),
    ),
)
