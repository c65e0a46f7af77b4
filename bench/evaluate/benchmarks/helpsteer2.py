"""HelpSteer2 (nvidia/HelpSteer2, arXiv 2406.08673 and 2410.01257): which of two answers people
prefer, or which they rate as more helpful."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from bench.evaluate.benchmark import BadItem, Benchmark, Item, Layout
from bench.evaluate.files import Record, named, one_of, read_items, records
from bench.evaluate.rules import BY_VOTE, STRICT, TIES
from engine.request import make_row

STRENGTHS = {str(each): each for each in range(-3, 4)}
RATINGS = {str(each): float(each) for each in range(5)}
_TURN = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")


def read(path: Path, layout: Layout) -> Iterator[Item | BadItem]:
    """Preferences, {split, prompt, response_1, response_2, preference_strength: -3 to 3, below 0
    where the first is better, 0 for neither}, without those of the split `train`. Or ratings,
    {prompt, response, helpfulness: 0 to 4}, two in a row of the same prompt. Of a folder only the
    preferences."""
    of_set = records(path, only=named("preference"))
    held_out = (
        each for each in of_set if isinstance(each, BadItem) or each.fields.get("split") != "train"
    )
    return read_items(_joined(held_out), _item)


def _joined(found: Iterable[Record | BadItem]) -> Iterator[Record | BadItem]:
    """Two ratings in a row of one prompt as a record {first, second}; all else as it is."""
    held: Record | None = None
    for record in found:
        if isinstance(record, BadItem) or "helpfulness" not in record.fields:
            yield record
        elif held is None:
            held = record
        elif held.fields.get("prompt") == record.fields.get("prompt"):
            yield held._replace(fields={"first": held.fields, "second": record.fields})
            held = None
        else:
            yield _alone(held)
            held = record
    if held is not None:
        yield _alone(held)


def _alone(record: Record) -> BadItem:
    return BadItem(record.source, record.line, "a rating without another of its prompt after it")


def _item(record: Record) -> Item:
    fields = record.fields
    name = f"{record.file}-{record.line}"
    label: int | str | list[float]
    if "first" in fields:
        both = fields["first"], fields["second"]
        prompt, responses = both[0]["prompt"], [each["response"] for each in both]
        label = [one_of(each["helpfulness"], RATINGS) for each in both]
        subset = "ratings"
    else:
        prompt, responses = fields["prompt"], [fields["response_1"], fields["response_2"]]
        strength = one_of(fields["preference_strength"], STRENGTHS)
        label = "tie" if strength == 0 else int(strength > 0)
        subset = fields["split"]
    return Item(name, subset, (make_row(_conversation(prompt), responses, id=name, label=label),))


def _conversation(prompt: str) -> list[dict[str, str]]:
    """The turns of a prompt, whose first is the user's and has no mark."""
    parts = ["User", *_TURN.split(prompt)]
    return [
        {"role": role.lower(), "content": text}
        for role, text in zip(parts[::2], parts[1::2], strict=True)
    ]


BENCHMARK = Benchmark(
    "helpsteer2", "HelpSteer2", "nvidia/HelpSteer2", read, (BY_VOTE, STRICT, TIES)
)
