"""LLMBar (princeton-nlp/LLMBar, arXiv 2310.07641): the better of two answers to an instruction,
natural, and adversarial, where the worse one looks better."""

from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath

import numpy as np

from bench.evaluate.benchmark import BadItem, Benchmark, Item, Layout, RowScores, Rule, Total
from bench.evaluate.files import Record, one_of, read_items, records
from bench.evaluate.rules import best_is_drawn, by_order
from engine.request import make_row

SECTIONS = {name: {name: None} for name in ("Natural", "Neighbor", "GPTInst", "GPTOut", "Manual")}


def read(path: Path, layout: Layout) -> Iterator[Item | BadItem]:
    """{input, output_1, output_2, label: 1 or 2}, in a file for each of the five sets, or in its
    folder as `dataset.json`. Other files beside them, the authors' copies of other sets among them,
    are no part of LLMBar."""
    return read_items(records(path, only=lambda name: _subset(name) in SECTIONS), _item)


def _subset(source: str) -> str:
    file = PurePath(source)
    name = file.name.split(".")[0]
    return file.parent.name if name == "dataset" else name


def _item(record: Record) -> Item:
    subset = one_of(_subset(record.source), {each: each for each in SECTIONS})
    name = f"{subset}-{record.line}"
    fields = record.fields
    responses = [fields["output_1"], fields["output_2"]]
    label = one_of(fields["label"], {"1": 0, "2": 1})
    return Item(name, subset, (make_row(fields["input"], responses, id=name, label=label),))


def _both_orders(item: Item, scores: Sequence[RowScores]) -> np.ndarray:
    assert item.rows[0].label is not None
    first, second = by_order(scores[0].by_first, item.rows[0].label)
    return ((first > 0).astype(float) + (second > 0)) / 2


BENCHMARK = Benchmark(
    "llmbar",
    "LLMBar",
    "princeton-nlp/LLMBar",
    read,
    (
        Rule(
            "official",
            "right in each of the two orders, averaged",
            _both_orders,
            Total(SECTIONS),
            both_orders=True,
        ),
        Rule(
            "vote",
            "the vote of both orders is right; a tie is drawn",
            best_is_drawn,
            Total(SECTIONS),
        ),
    ),
)
