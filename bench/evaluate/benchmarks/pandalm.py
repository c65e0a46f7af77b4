"""PandaLM's test set (WeOpenML/PandaLM, arXiv 2306.05087): the better of two answers of small
models, or a tie, by three people each."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.evaluate.benchmark import BadItem, Benchmark, Item, Layout, RowScores, Rule, Total
from bench.evaluate.files import Record, named, one_of, read_items, records
from bench.evaluate.rules import (
    agreement,
    best_is_drawn,
    has_one_best,
    macro,
    majority_of,
    preference,
)
from engine.request import make_row

ANNOTATORS = ("annotator1", "annotator2", "annotator3")
GOLD = {0: 0.5, 1: 1.0, 2: 0.0}  # what people say, as `preference` says it
LABELS: dict[int, int | str] = {0: "tie", 1: 0, 2: 1}


def read(path: Path, layout: Layout) -> Iterator[Item | BadItem]:
    """{idx, cmp_key, instruction, input, response1, response2, annotator1, annotator2, annotator3:
    1 or 2, the better one, 0 a tie}. A subset for each pair of models. Where three people say three
    things the row has no label. Of a folder only `testset-v1.json`."""
    test_set = records(path, only=named("testset-v"))
    return read_items(test_set, _item)


def _item(record: Record) -> Item:
    fields = record.fields
    votes = [one_of(fields[name], {"0": 0, "1": 1, "2": 2}) for name in ANNOTATORS]
    majority = majority_of(votes)
    prompt = "\n\n".join(filter(None, (fields["instruction"], fields["input"])))
    row = make_row(
        prompt,
        [_text(fields["response1"]), _text(fields["response2"])],
        id=f"pandalm-{fields['idx']}",
        label=None if majority is None else LABELS[majority],
    )
    gold = None if majority is None else GOLD[majority]
    return Item(row.id, fields["cmp_key"], (row,), {"annotators": votes, "gold": gold})


def _text(response: Any) -> Any:
    """In the published file six answers, "True", have become truth values."""
    return str(response) if isinstance(response, bool) else response


def _has_majority(item: Item) -> bool:
    return item.facts["gold"] is not None


def _accuracy(item: Item, scores: Sequence[RowScores]) -> np.ndarray:
    return (preference(item, scores) == item.facts["gold"]).astype(float)


def _mended(item: Item, scores: Sequence[RowScores]) -> np.ndarray:
    return np.where(np.isnan(scores[0].means[:, 0]), 0.0, _accuracy(item, scores))


def people(items: Sequence[Item]) -> Mapping[str, float]:
    """`agreement`, and how many rows have no majority, or one for a tie."""
    golds = [item.facts["gold"] for item in items]
    return agreement([item.facts["annotators"] for item in items]) | {
        "without_majority": golds.count(None),
        "majority_tie": golds.count(GOLD[0]),
    }


TOTAL = Total(over="items")
BENCHMARK = Benchmark(
    "pandalm",
    "PandaLM",
    "WeOpenML/PandaLM",
    read,
    (
        Rule(
            "official",
            "the majority's choice of three, equal means and rows without a vote are a tie",
            _accuracy,
            TOTAL,
            _has_majority,
        ),
        *(
            Rule(
                name,
                f"{name} of the official rule's choices, averaged over the three classes",
                preference,
                Total(over="items", statistic=macro(index)),
                _has_majority,
            )
            for index, name in enumerate(("precision", "recall", "f1"))
        ),
        Rule(
            "voted", "as official, and a row without a vote is wrong", _mended, TOTAL, _has_majority
        ),
        Rule(
            "winners",
            "of rows whose majority names a better response; a tie is drawn",
            best_is_drawn,
            TOTAL,
            has_one_best,
        ),
    ),
    facts=people,
)
