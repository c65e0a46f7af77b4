"""UltraFeedback (openbmb/UltraFeedback, arXiv 2310.01377), and its pairs by HuggingFaceH4: which
answers GPT-4 scored higher."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath

from bench.evaluate.benchmark import BadItem, Benchmark, Item, Layout, Rule, Total
from bench.evaluate.files import Record, read_items, records
from bench.evaluate.rules import BY_VOTE, STRICT, pairs_in_order
from engine.request import Row, build_row, make_row

_NOT_HELD_OUT = re.compile(r"train|test_gen|test_sft")


def read(path: Path, layout: Layout) -> Iterator[Item | BadItem]:
    """{source, instruction, completions: [{response, overall_score}]}, a subset for each source; or
    pairs {prompt, chosen: messages, rejected: messages, score_chosen, score_rejected}, of a folder
    those of `test_prefs` alone, a subset for each file."""
    held_out = records(path, only=lambda name: not _NOT_HELD_OUT.match(PurePath(name).name))
    return read_items(held_out, _item)


def _item(record: Record) -> Item:
    fields = record.fields
    file = re.split(r"[.-]", PurePath(record.source).name)[0]
    name = f"{record.file}-{record.line}"
    if "completions" in fields:
        return Item(name, fields["source"], (_scored(record, name),))
    row = build_row({key: fields[key] for key in ("prompt", "chosen", "rejected")} | {"id": name})
    golds = [float(fields["score_chosen"]), float(fields["score_rejected"])]
    row = make_row(row.messages, row.responses, id=name, label=golds)
    return Item(name, file, (row,))


def _scored(record: Record, name: str) -> Row:
    answers = record.fields["completions"]
    if len(answers) < 2:
        raise ValueError(f"{len(answers)} completions, which cannot be compared")
    golds = [float(each["overall_score"]) for each in answers]
    responses = [each["response"] for each in answers]
    return make_row(record.fields["instruction"], responses, id=name, label=golds)


def _tells_apart(item: Item) -> bool:
    return len(set(_golds(item))) > 1


def _golds(item: Item) -> Sequence[float]:
    label = item.rows[0].label
    assert isinstance(label, tuple)
    return label


BENCHMARK = Benchmark(
    "ultrafeedback",
    "UltraFeedback",
    "openbmb/UltraFeedback",
    read,
    (
        Rule(
            "pairs",
            "pairs of answers in the order of their scores, equal ones left out; a tie is half",
            pairs_in_order,
            Total(over="items"),
            _tells_apart,
        ),
        BY_VOTE,
        STRICT,
    ),
)
