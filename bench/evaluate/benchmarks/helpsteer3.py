"""HelpSteer3-Preference (nvidia/HelpSteer3, arXiv 2505.11475): which of two answers people prefer,
and how much."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath

from bench.evaluate.benchmark import BadItem, Benchmark, Item, Layout
from bench.evaluate.benchmarks.helpsteer2 import STRENGTHS
from bench.evaluate.files import Record, one_of, read_items, records
from bench.evaluate.rules import BY_VOTE, STRICT, TIES, agreement
from engine.request import make_row


def read(path: Path, layout: Layout) -> Iterator[Item | BadItem]:
    """{domain, context: messages, response1, response2, overall_preference: -3 to 3, below 0 where
    the first is better, 0 for no preference}. A subset for each domain. Of a folder only the
    validation split of the preferences."""
    return read_items(records(path, only=_is_validation), _item)


def _is_validation(name: str) -> bool:
    file = PurePath(name)
    return file.name.startswith("validation") and file.parent.name in ("", "preference")


def _item(record: Record) -> Item:
    fields = record.fields
    strength = one_of(fields["overall_preference"], STRENGTHS)
    row = make_row(
        fields["context"],
        [fields["response1"], fields["response2"]],
        id=f"{record.file}-{record.line}",
        label="tie" if strength == 0 else int(strength > 0),
    )
    people = [one_of(each["score"], STRENGTHS) for each in fields.get("individual_preference", ())]
    return Item(row.id, fields["domain"], (row,), {"strength": strength, "people": people})


def people(items: Sequence[Item]) -> Mapping[str, float]:
    """`agreement` about which answer is better, if any, and how many have no preference."""
    votes = [[(each > 0) - (each < 0) for each in item.facts["people"]] for item in items]
    without = sum(item.facts["strength"] == 0 for item in items)
    return agreement(votes) | {"without_preference": without}


BENCHMARK = Benchmark(
    "helpsteer3",
    "HelpSteer3-Preference",
    "nvidia/HelpSteer3",
    read,
    (BY_VOTE, STRICT, TIES),
    facts=people,
)
