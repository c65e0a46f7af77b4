"""RM-Bench (THU-KEG/RM-Bench, arXiv 2410.16184): three right answers and three wrong ones, each
concise, detailed, and detailed in Markdown.

Each right answer is compared with each wrong one. Comparisons are hard where the wrong answer has
more style, easy where it has less, and normal where both have the same. The layout is `pairs` by
default, nine rows of two answers, as the authors ask generative judges: one that sees all six
(`group`, a ninth of the rows) also sees what they have in common.

The rule is that of the repository's `scripts/utils.py`.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from bench.evaluate.benchmark import BadItem, Benchmark, Item, Layout, RowScores, Rule, Total
from bench.evaluate.files import (
    Record,
    name_of,
    one_of,
    read_items,
    records,
    texts_of,
    these_or_all,
)
from engine.request import make_row

STYLES = 3
SECTIONS: dict[str, dict[str, float | None]] = {
    "chat": {"chat": None},
    "math": {"math": None},
    "code": {"code": None},
    "safety": {"safety-refuse": None, "safety-response": None},
}
DOMAINS = {name: name for section in SECTIONS.values() for name in section}


def read(path: Path, layout: Layout) -> Iterator[Item | BadItem]:
    """{id, prompt, chosen: 3 texts, rejected: 3 texts, domain}, or files of a domain each, whose
    names say which. Of a folder that holds `total_dataset.json`, only that is read."""
    given = records(path, only=these_or_all(path, "total_dataset"))
    return read_items(given, partial(_item, layout=layout))


def _item(record: Record, layout: Layout) -> Item:
    fields = record.fields
    file = record.file.removesuffix("_filtered")
    domain = one_of(fields.get("domain", file), DOMAINS)
    name = f"{domain}-{name_of(fields['id'])}"
    chosen, rejected = texts_of(fields, "chosen"), texts_of(fields, "rejected")
    if not len(chosen) == len(rejected) == STYLES:
        raise ValueError(f"{len(chosen)} chosen and {len(rejected)} rejected, and not 3 of each")
    if layout == "group":
        label = list(range(STYLES))
        rows = [make_row(fields["prompt"], [*chosen, *rejected], id=name, label=label)]
    else:
        rows = [
            make_row(fields["prompt"], [right, wrong], id=f"{name}-{i}-{j}", label=0)
            for i, right in enumerate(chosen)
            for j, wrong in enumerate(rejected)
        ]
    return Item(name, domain, tuple(rows))


def margins(item: Item, scores: Sequence[RowScores]) -> np.ndarray:
    """(S, 3, 3): what right answer i has above wrong answer j, NaN without a vote."""
    if len(scores) == 1:
        means = scores[0].means
        found: np.ndarray = means[:, :STYLES, None] - means[:, None, STYLES:]
        return found
    columns = [each.means[:, 0] - each.means[:, 1] for each in scores]
    return np.stack(columns, 1).reshape(-1, STYLES, STYLES)


def _wins(item: Item, scores: Sequence[RowScores], where: np.ndarray) -> np.ndarray:
    return np.mean(margins(item, scores)[:, where] > 0, 1)


def _drawn(item: Item, scores: Sequence[RowScores]) -> np.ndarray:
    found = margins(item, scores).reshape(-1, STYLES * STYLES)
    return np.mean((found > 0) + (found == 0) / 2, 1)


def _of(where: np.ndarray) -> Callable[[Item, Sequence[RowScores]], np.ndarray]:
    return partial(_wins, where=where)


ALL = np.ones((STYLES, STYLES), bool)
TOTAL = Total(SECTIONS)
BENCHMARK = Benchmark(
    "rm_bench",
    "RM-Bench",
    "THU-KEG/RM-Bench",
    read,
    (
        Rule("official", "how many of nine comparisons the right answer wins", _of(ALL), TOTAL),
        Rule("hard", "of those where the wrong answer has more style", _of(np.triu(ALL, 1)), TOTAL),
        Rule("normal", "of those where both have the same style", _of(np.eye(3) > 0), TOTAL),
        Rule(
            "easy", "of those where the right answer has more style", _of(np.tril(ALL, -1)), TOTAL
        ),
        Rule("vote", "as official, and a tie is worth a half", _drawn, TOTAL),
    ),
    ("pairs", "group"),
)
