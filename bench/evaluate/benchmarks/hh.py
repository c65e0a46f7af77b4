"""Anthropic's HH (anthropics/hh-rlhf, arXiv 2204.05862): which of two replies in a conversation
people found more helpful, or less harmful."""

import re
from collections.abc import Iterator
from pathlib import Path, PurePath

from bench.evaluate.benchmark import BadItem, Benchmark, Item, Layout
from bench.evaluate.files import Record, named, read_items, records
from bench.evaluate.rules import BY_VOTE, STRICT
from engine.request import make_row

ROLES = {"Human": "user", "Assistant": "assistant"}
_SPEAKER = re.compile(r"\n\n(Human|Assistant): ?")


def read(path: Path, layout: Layout) -> Iterator[Item | BadItem]:
    """{chosen, rejected}, transcripts of "\\n\\nHuman: " and "\\n\\nAssistant: ". A subset for each
    folder. Of a folder only the files named `test`."""
    tests = records(path, only=named("test"))
    return read_items(tests, _item)


def _item(record: Record) -> Item:
    chosen, rejected = (_turns(record.fields[name]) for name in ("chosen", "rejected"))
    shared = _length_of_history(chosen, rejected)
    folder = PurePath(record.source).parent
    row = make_row(
        [{"role": ROLES[speaker], "content": text} for speaker, text in chosen[:shared]],
        [_reply(chosen[shared:]), _reply(rejected[shared:])],
        id=f"{folder / record.file}-{record.line}",
        label=0,
    )
    return Item(row.id, folder.name or record.file, (row,))


def _turns(transcript: str) -> list[tuple[str, str]]:
    """Speakers and texts; where one speaks twice in a row, both texts as one turn."""
    start, *parts = _SPEAKER.split(transcript)
    if start.strip():
        raise ValueError("a transcript that does not begin with a speaker")
    turns: list[tuple[str, str]] = []
    for speaker, text in zip(parts[::2], parts[1::2], strict=True):
        if turns and turns[-1][0] == speaker:
            text = f"{turns.pop()[1]}\n\n{text}"
        turns.append((speaker, text))
    return turns


def _length_of_history(one: list[tuple[str, str]], two: list[tuple[str, str]]) -> int:
    """How many turns both begin with, up to one of the human's that a reply comes after in both."""
    shared = 0
    for first, second in zip(one[:-1], two[:-1], strict=False):
        if first != second:
            break
        shared += 1
    while shared and one[shared - 1][0] != "Human":
        shared -= 1
    if not shared:
        raise ValueError("two transcripts that differ before the first reply")
    return shared


def _reply(turns: list[tuple[str, str]]) -> str:
    """What comes after the history: a reply, or where the conversations part earlier, all of it."""
    (_, first), *later = turns
    return first + "".join(f"\n\n{speaker}: {text}" for speaker, text in later)


BENCHMARK = Benchmark("hh", "Anthropic HH", "anthropics/hh-rlhf", read, (BY_VOTE, STRICT))
