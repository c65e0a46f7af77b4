"""PPE's human preferences (lmarena/PPE, arXiv 2410.14872): the better of two answers in 16,038
battles of Chatbot Arena.

The data set is lmarena-ai/PPE-Human-Preference-V1. The rule is the paper's: accuracy over battles
that are no tie.
"""

from collections.abc import Iterator
from pathlib import Path

from bench.evaluate.benchmark import BadItem, Benchmark, Item, Layout
from bench.evaluate.files import Record, name_of, one_of, read_items, records
from bench.evaluate.rules import BY_VOTE, STRICT, TIES
from engine.request import make_row

WINNERS = {"model_a": "A", "model_b": "B", "tie": "tie", "tie (bothbad)": "tie"}


def read(path: Path, layout: Layout) -> Iterator[Item | BadItem]:
    """{question_id, prompt, response_1, response_2, winner: model_a, model_b, tie or
    tie (bothbad)}."""
    return read_items(records(path), _item)


def _item(record: Record) -> Item:
    fields = record.fields
    row = make_row(
        fields["prompt"],
        [fields["response_1"], fields["response_2"]],
        id=name_of(fields["question_id"]),
        label=one_of(fields["winner"], WINNERS),
    )
    return Item(row.id, "preference", (row,))


BENCHMARK = Benchmark(
    "ppe_preference",
    "PPE preference",
    "lmarena/PPE",
    read,
    (
        STRICT._replace(
            name="official",
            says="of battles that are no tie: the preferred answer wins; a tie of scores is wrong",
        ),
        BY_VOTE,
        TIES,
    ),
)
