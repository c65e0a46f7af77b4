"""Labelled rows of a file, in batches: endless, and shuffled anew each epoch."""

import random
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

from engine.labels import has_best
from engine.reading import open_rows, read_rows
from engine.request import BadRow, Row
from train import parallel

Rows = Callable[[int], list[Row]]  # batch number -> its rows


def file_rows(
    path: Path, seed: int, rows: int, skip: frozenset[str] = frozenset()
) -> tuple[Rows, Counter[str]]:
    """Rows of a JSONL file, in a new seeded permutation every epoch, without those whose ids are in
    `skip`; and how many lines were left out for which reason. Raises ValueError where no row is
    left."""
    found, left_out = labelled_rows(path)
    kept = [row for row in found if row.id not in skip]
    left_out["too easy"] = len(found) - len(kept)
    if not kept:
        raise ValueError(f"{path}: all {len(found)} rows are to be skipped")
    return lambda number: epochs(kept, number, rows, seed), +left_out


def tell_left_out(left_out: Counter[str]) -> None:
    """Say what lines of a file were left out, and why."""
    for reason, count in left_out.most_common() if parallel.is_first() else ():
        print(f"left out: {count} x {reason}", file=sys.stderr)


def labelled_rows(path: Path) -> tuple[list[Row], Counter[str]]:
    """The labelled rows of a file, and how many lines were left out for which reason: bad rows, and
    rows without a label or with a tie. Raises ValueError where there is no labelled row."""
    kept: list[Row] = []
    left_out: Counter[str] = Counter()
    with open_rows(path) as stream:
        for row in read_rows(stream):
            if isinstance(row, BadRow):
                left_out[f"line {row.line}: {row.error}"] += 1
            elif not has_best(row.label):
                left_out["no label" if row.label is None else "a tie"] += 1
            else:
                kept.append(row)
    if not kept:
        raise ValueError(f"{path} holds no row with a label: {dict(left_out)}")
    return kept, left_out


T = TypeVar("T")


def epochs(items: Sequence[T], number: int, size: int, seed: int) -> list[T]:
    """Batch `number`, of `size`, of an endless stream in which every epoch is a new seeded
    permutation of all items."""
    places = (divmod(i, len(items)) for i in range(number * size, (number + 1) * size))
    return [items[permutation(len(items), seed, epoch)[place]] for epoch, place in places]


@lru_cache(maxsize=4)  # a batch may lie across two epochs, and two files be read
def permutation(length: int, seed: int, epoch: int) -> list[int]:
    order = list(range(length))
    random.Random(f"quorum-epoch-{seed}-{epoch}").shuffle(order)
    return order
