"""Judgements of rows, and which of them are right: what a meta model learns from.

They are read from a JSONL file like that of trajectories, whose lines say whether the judgement is
`right`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from engine.request import Row
from train.sources import epochs
from train.trajectories import judgement_of, order_of, read_lines


@dataclass(frozen=True)
class Judgement:
    """A judgement of a row: the order that it saw, its text, whether it is right, what a meta model
    is to say of it, from 0 to 1, and its scores where they are known."""

    order: Sequence[int]
    text: str
    right: bool
    target: float
    scores: tuple[float, ...] | None = None


@dataclass(frozen=True)
class JudgedRow:
    """A row and some of its judgements."""

    row: Row
    judgements: list[Judgement]


def batches_of_judgements(
    judged: Sequence[JudgedRow], rows: int, seed: int
) -> Callable[[int], list[JudgedRow]]:
    """Batches of so many rows, in a new seeded permutation of all rows every epoch."""
    return lambda number: epochs(judged, number, rows, seed)


def read_judgements(path: Path) -> list[JudgedRow]:
    """The rows of a JSONL file of judgements, each of them with `right`; the lines of a row lie
    together. Raises ValueError naming file and line for a line that is no such judgement."""

    def judgement(fields: dict[str, Any]) -> tuple[Row, Judgement]:
        row, line = judgement_of(fields)
        if line.right is None:
            raise ValueError("it does not say whether its judgement is right")
        return row, Judgement(order_of(row, line), line.judgement, line.right, float(line.right))

    made = [each for _, each in read_lines(path, judgement)]
    lines = groupby(made, key=lambda line: (line[0].id, line[0].digest))
    judged_rows = []
    for _, group in lines:
        found = list(group)
        judged_rows.append(JudgedRow(found[0][0], [own for _, own in found]))
    if not judged_rows:
        raise ValueError(f"{path} holds no judgement")
    return judged_rows
