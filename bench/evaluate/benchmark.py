"""What a benchmark is: items, which are rows for a judge, and rules that score them.

S subsets of a row's samples, n responses. An item is an entry of the published files. Most items
are one row; where responses are compared in pairs, or rated one by one, an item is several. A rule
gives an item a value from 0 to 1 for each subset, from the mean scores of its rows. Values are
averaged, or a statistic is taken of them, and sections make a total (`Total`).

Files are read by `bench/evaluate/files.py`; judging and voting are not done here.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from engine.request import Row

# All responses of an entry in a row, two in a row, each by itself, or as the benchmark's file says.
Layout = Literal["group", "pairs", "single", "mixed"]


@dataclass(frozen=True)
class Item:
    """An entry of a benchmark. `id` is unique among its items. `facts` are what the rules need
    beside the labels of the rows; they can be written as JSON."""

    id: str
    subset: str
    rows: tuple[Row, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)


class BadItem(NamedTuple):
    """An entry that could not be read: its file, its line or number there from 1, and why."""

    source: str
    line: int
    error: str


class RowScores(NamedTuple):
    """What the votes of a row came to, in S subsets of its samples.

    means: (S, n) float64, the mean points of each response, NaN where no sample voted; where n = 1
    the judge's threshold is subtracted, so that the response is right where it is above 0.
    by_first: of a pair (2, S, 2), the same of the samples alone that were shown each response
    first; of other rows (0, S, n).
    """

    means: np.ndarray
    by_first: np.ndarray


class Total(NamedTuple):
    """How values become figures.

    statistic: of values and facts of many items, in place of their mean: (items,) float64 without
    NaN, and what `Item.facts` holds of each. sections: by name, the subsets of each and their
    weights; None makes each subset a section. A weight of None is the number of the subset's items.
    over: the total is the mean over sections, or over all items.
    """

    sections: Mapping[str, Mapping[str, float | None]] | None = None
    over: Literal["sections", "items"] = "sections"
    statistic: Callable[[np.ndarray, Sequence[Mapping[str, Any]]], float] | None = None


def every(item: Item) -> bool:
    """Of `Rule.counts`: all items."""
    return True


class Rule(NamedTuple):
    """A way to score: `official` is that of the authors' own runner, others mend what is wrong with
    it. says: the rule in a sentence. value: (S,) float64 for an item, NaN where it cannot be said
    of so few votes. counts: whether an item is part of the rule's figures at all. ranks: only the
    order of items' scores matters, so that they need no threshold, which scalar models have not.
    both_orders: it can be said only where samples have seen a pair in both orders."""

    name: str
    says: str
    value: Callable[[Item, Sequence[RowScores]], np.ndarray]
    total: Total = Total()
    counts: Callable[[Item], bool] = every
    ranks: bool = False
    both_orders: bool = False


class Benchmark(NamedTuple):
    """A published set. read: its items from a file or a folder as the authors publish it. layouts:
    how an entry of many responses may be shown, the first one by default. rules: the first one
    decides where one figure is shown. facts: figures of the items themselves, such as how well
    people agree on them."""

    name: str
    title: str
    source: str
    read: Callable[[Path, Layout], Iterator[Item | BadItem]]
    rules: tuple[Rule, ...]
    layouts: tuple[Layout, ...] = ("group",)
    facts: Callable[[Sequence[Item]], Mapping[str, float]] | None = None
