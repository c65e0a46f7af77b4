"""ReaLMistake (psunlpgroup/ReaLMistake, arXiv 2404.03602): whether an answer of a model has an
error."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from bench.evaluate.benchmark import BadItem, Benchmark, Item, Layout, RowScores, Rule, Total
from bench.evaluate.files import Record, one_of, read_items, records
from bench.evaluate.rules import roc_auc
from bench.statistics import detection
from engine.request import make_row

PASSWORD = b"open-realmistake"  # its authors' README states it
ERROR, NO_ERROR, NO_VOTE = 0.0, 1.0, 0.5


def read(path: Path, layout: Layout) -> Iterator[Item | BadItem]:
    """{input, llm_response, error_label: "error" or "no_error", metadata: {id, task_name,
    llm_response_model}}, as `data.zip` or unpacked. A subset for each task and model. The paper's
    examples beside them are no part of the set."""
    found = records(path, PASSWORD, only=lambda name: PurePath(name).stem != "example")
    return read_items(found, _item)


def _item(record: Record) -> Item:
    fields = record.fields
    label = one_of(fields["error_label"], {"error": 0, "no_error": 1})
    about = fields["metadata"]
    name = f"realmistake-{about['id']}"
    row = make_row(fields["input"], [fields["llm_response"]], id=name, label=label)
    model = about["llm_response_model"].rpartition("/")[2]
    return Item(name, f"{about['task_name']} {model}", (row,), {"gold": float(label)})


def _said(item: Item, scores: Sequence[RowScores]) -> np.ndarray:
    means = scores[0].means[:, 0]
    return np.where(np.isnan(means), NO_VOTE, np.where(means > 0, NO_ERROR, ERROR))


def _mended(item: Item, scores: Sequence[RowScores]) -> np.ndarray:
    said = _said(item, scores)
    return np.where(said == NO_VOTE, 1 - item.facts["gold"], said)


def _right(item: Item, scores: Sequence[RowScores]) -> np.ndarray:
    return (_said(item, scores) == item.facts["gold"]).astype(float)


def _score(item: Item, scores: Sequence[RowScores]) -> np.ndarray:
    return np.nan_to_num(scores[0].means[:, 0])


def _of_errors(index: int) -> Total:
    def statistic(values: np.ndarray, facts: Sequence[Mapping[str, Any]]) -> float:
        gold = np.array([each["gold"] for each in facts])
        return detection(values == ERROR, gold == ERROR)[index]

    return Total(statistic=statistic)


BENCHMARK = Benchmark(
    "realmistake",
    "ReaLMistake",
    "psunlpgroup/ReaLMistake",
    read,
    (
        Rule(
            "official",
            "F1 of finding errors, of each task and model, averaged; no vote finds none",
            _said,
            _of_errors(2),
        ),
        Rule("precision", "precision of finding errors, averaged likewise", _said, _of_errors(0)),
        Rule("recall", "recall of finding errors, averaged likewise", _said, _of_errors(1)),
        Rule("accuracy", "right about the error, averaged likewise; no vote is wrong", _right),
        Rule("voted", "F1 as official, and no vote is wrong either way", _mended, _of_errors(2)),
        Rule(
            "roc_auc",
            "area under the ROC curve of the mean score, of all answers; no vote is the threshold",
            _score,
            Total(over="items", statistic=roc_auc),
            ranks=True,
        ),
    ),
)
