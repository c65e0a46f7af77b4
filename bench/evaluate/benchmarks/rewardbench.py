"""RewardBench (allenai/reward-bench, arXiv 2403.13787): the better of two answers, in 23 subsets.

Rules and weights are those of the repository's `rewardbench/constants.py`, `rewardbench/utils.py`,
`scripts/run_generative.py` and `scripts/run_rm.py`; the data set of the same name holds two splits.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from bench.evaluate.benchmark import BadItem, Benchmark, Item, Layout, RowScores, Rule, Total
from bench.evaluate.files import Record, name_of, one_of, read_items, records, these_or_all
from bench.evaluate.rules import beats_all, best_is_drawn, or_guess
from engine.request import make_row

# The counts of the filtered split, but for math-prm: its 447 rows count as much as all code.
WEIGHTS = {
    "Chat": {
        "alpacaeval-easy": 100, "alpacaeval-length": 95, "alpacaeval-hard": 95,
        "mt-bench-easy": 28, "mt-bench-med": 40,
    },
    "Chat Hard": {
        "mt-bench-hard": 37, "llmbar-natural": 100, "llmbar-adver-neighbor": 134,
        "llmbar-adver-GPTInst": 92, "llmbar-adver-GPTOut": 47, "llmbar-adver-manual": 46,
    },
    "Safety": {
        "refusals-dangerous": 100, "refusals-offensive": 100, "xstest-should-refuse": 154,
        "xstest-should-respond": 250, "donotanswer": 136,
    },
    "Reasoning": {
        "math-prm": 984, "hep-cpp": 164, "hep-go": 164, "hep-java": 164, "hep-js": 164,
        "hep-python": 164, "hep-rust": 164,
    },
}  # fmt: skip
SUBSETS = {name: name for section in WEIGHTS.values() for name in section}


def read(path: Path, layout: Layout) -> Iterator[Item | BadItem]:
    """{prompt: text or messages, chosen, rejected, subset, id}. Of a folder that holds the filtered
    split, the official one, the raw split is not read."""
    return read_items(records(path, only=these_or_all(path, "filtered")), _item)


def _item(record: Record) -> Item:
    fields = record.fields
    subset = one_of(fields["subset"], SUBSETS)
    row = make_row(
        fields["prompt"],
        [fields["chosen"], fields["rejected"]],
        id=f"{subset}-{name_of(fields['id'])}",
        label=0,
    )
    return Item(row.id, subset, (row,))


def _or_half(item: Item, scores: Sequence[RowScores]) -> np.ndarray:
    return or_guess(best_is_drawn(item, scores), scores[0].means, 0.5)


TOTAL = Total(WEIGHTS)
BENCHMARK = Benchmark(
    "rewardbench",
    "RewardBench",
    "allenai/reward-bench",
    read,
    (
        Rule(
            "official",
            "the chosen answer wins; a tie, and a row without a vote, is worth a half",
            _or_half,
            TOTAL,
        ),
        Rule("vote", "as official, and a row without a vote is wrong", best_is_drawn, TOTAL),
        Rule(
            "strict",
            "what the official runner of scalar models counts: a tie is wrong too",
            beats_all,
            TOTAL,
        ),
    ),
)
