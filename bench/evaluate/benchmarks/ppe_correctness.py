"""PPE's correctness sets (lmarena/PPE, arXiv 2410.14872): right and wrong ones among 32 answers to
questions of MMLU-Pro, MATH, GPQA, IFEval and MBPP-Plus.

The data sets are lmarena-ai/PPE-MMLU-Pro-Best-of-K and the like. An entry is a question and the
model that answered it; `sampled_conflict_pairs` are pairs of a right and a wrong answer, counted
from 0. Accuracy is over all pairs of a set, and its mean over sets is the total. A pair may be
listed twice, or once in each order; it is judged once, and the official rule counts it as often as
it is listed.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench.evaluate.benchmark import BadItem, Benchmark, Item, Layout, RowScores, Rule, Total
from bench.evaluate.files import Record, name_of, read_items, records
from bench.evaluate.rules import drawn, strict
from engine.labels import quote
from engine.request import make_row

SETS = {"mmlu": "mmlu-pro", "math": "math", "gpqa": "gpqa", "ifeval": "ifeval", "mbpp": "mbpp-plus"}


def read(path: Path, layout: Layout) -> Iterator[Item | BadItem]:
    """{question_id, model_name, prompt, response_1 .. response_32, scores, sampled_conflict_pairs}.
    Which set a file is of, the words of its path say, the last one first."""
    return read_items(records(path), partial(_item, folder=path))


def _item(record: Record, folder: Path) -> Item:
    fields = record.fields
    subset = _set_of(folder.absolute() / record.source)
    question, model = name_of(fields["question_id"]), name_of(fields["model_name"])
    times = _times(fields["sampled_conflict_pairs"], fields["scores"])
    rows = [
        make_row(
            fields["prompt"],
            [fields[f"response_{right + 1}"], fields[f"response_{wrong + 1}"]],
            id=f"{subset}-{question}-{model}-{right}-{wrong}",
            label=0,
        )
        for right, wrong in times
    ]
    listed = list(times.values())
    facts = {"times": listed, "listed": sum(listed), "pairs": len(listed)}
    return Item(f"{subset}-{question}-{model}", subset, tuple(rows), facts)


def _set_of(path: Path) -> str:
    words = re.split(r"[^a-z0-9]+", str(path).lower())
    for word in reversed(words):
        if word in SETS:
            return SETS[word]
    raise ValueError(f"the path has none of the words {', '.join(SETS)}")


def _times(pairs: Any, scores: Any) -> dict[tuple[int, int], int]:
    """How often each pair of a right and a wrong answer is listed, in either order."""
    if not isinstance(scores, list) or not all(isinstance(s, bool | int | float) for s in scores):
        raise ValueError(f"scores is {quote(scores)} and no list of numbers or truth values")
    if not isinstance(pairs, list) or not pairs:
        raise ValueError(f"sampled_conflict_pairs is {quote(pairs)} and no list of pairs")
    found: Counter[tuple[int, int]] = Counter()
    for pair in pairs:
        indices = pair if isinstance(pair, list) else []
        if len(indices) != 2 or not all(
            type(index) is int and 0 <= index < len(scores) for index in indices
        ):
            raise ValueError(f"{quote(pair)} is no pair of {len(scores)} answers")
        right, wrong = sorted(indices, key=lambda index: -scores[index])
        if scores[right] == scores[wrong]:
            raise ValueError(f"answers {right} and {wrong} have the same score")
        found[right, wrong] += 1
    return dict(found)


def _listed(item: Item, scores: Sequence[RowScores]) -> np.ndarray:
    found = np.stack([strict(each.means, 0) for each in scores])
    return np.average(found, axis=0, weights=item.facts["times"])


def _drawn(item: Item, scores: Sequence[RowScores]) -> np.ndarray:
    return np.mean([drawn(each.means, 0) for each in scores], 0)


def _over(count: str) -> Callable[[np.ndarray, Sequence[Mapping[str, Any]]], float]:
    def statistic(values: np.ndarray, facts: Sequence[Mapping[str, Any]]) -> float:
        weights = np.array([each[count] for each in facts])
        return float(values @ weights / weights.sum())

    return statistic


SECTIONS: dict[str, dict[str, float | None]] = {name: {name: None} for name in SETS.values()}
BENCHMARK = Benchmark(
    "ppe_correctness",
    "PPE correctness",
    "lmarena/PPE",
    read,
    (
        Rule(
            "official",
            "the right answer of a pair wins, over all pairs as they are listed; a tie is wrong",
            _listed,
            Total(SECTIONS, statistic=_over("listed")),
        ),
        Rule(
            "vote",
            "each pair counts once, and a tie is drawn",
            _drawn,
            Total(SECTIONS, statistic=_over("pairs")),
        ),
    ),
    ("pairs",),
)
