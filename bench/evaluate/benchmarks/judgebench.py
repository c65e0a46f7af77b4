"""JudgeBench (ScalerLab/JudgeBench, arXiv 2410.12784): a right and a wrong answer of one model to a
hard question."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath

import numpy as np

from bench.evaluate.benchmark import BadItem, Benchmark, Item, Layout, RowScores, Rule, Total
from bench.evaluate.files import Record, one_of, read_items, records
from bench.evaluate.rules import best_is_drawn, by_order
from engine.request import make_row

CATEGORIES = {
    "mmlu-pro": "Knowledge",
    "livebench-reasoning": "Reasoning",
    "livebench-math": "Math",
    "livecodebench": "Coding",
}
_ANSWERS_OF_GPT = re.compile(r"(dataset=judgebench,response_model=)?gpt[^,]*")


def read(path: Path, layout: Layout) -> Iterator[Item | BadItem]:
    """{pair_id, source, question, response_A, response_B, label: "A>B" or "B>A"}. Of a folder only
    the answers of GPT-4o, which the published figures are of; those of another model are a file of
    their own."""
    of_gpt = records(path, only=lambda name: bool(_ANSWERS_OF_GPT.fullmatch(PurePath(name).name)))
    return read_items(of_gpt, _item)


def _item(record: Record) -> Item:
    fields = record.fields
    row = make_row(
        fields["question"],
        [fields["response_A"], fields["response_B"]],
        id=f"judgebench-{fields['pair_id']}",
        label=one_of(fields["label"], {"A>B": 0, "B>A": 1}),
    )
    source = fields["source"]
    name = next((name for name in CATEGORIES if source.startswith(name)), source)
    return Item(row.id, one_of(name, CATEGORIES), (row,), {"source": source})


def _both_orders(item: Item, scores: Sequence[RowScores]) -> np.ndarray:
    assert item.rows[0].label is not None
    first, second = by_order(scores[0].by_first, item.rows[0].label)
    return (first + second > 0).astype(float)


TOTAL = Total(over="items")
BENCHMARK = Benchmark(
    "judgebench",
    "JudgeBench",
    "ScalerLab/JudgeBench",
    read,
    (
        Rule(
            "official",
            "of both orders more are right than wrong; a tie is neither",
            _both_orders,
            TOTAL,
            both_orders=True,
        ),
        Rule("vote", "the vote of both orders is right; a tie is drawn", best_is_drawn, TOTAL),
    ),
)
