"""Trajectories to learn from: prompt tokens, and the tokens of a judgement that ends by itself.

Batches of them are addressed by number, so that a resumed run continues with the very next one:
of a file, whose lines are shuffled anew each epoch, or of the synthetic world
(`train/world/rows.py`). A line is a row with its `judgement`, and perhaps the `order` in which the
responses were shown and a `hint`; or a conversation (`train/chat.py`), which makes a trajectory of
each turn of the assistant.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
from tqdm import tqdm

from engine.labels import has_best
from engine.prompt import PromptBuilder
from engine.reading import open_rows, parse_lines
from engine.request import BadRow, Row, RowError, build_row, parse_fields
from train import parallel
from train.chat import encode_said, is_chat, learnt_turns, read_chat
from train.sources import T, conversation_of, epochs


@dataclass(frozen=True)
class Trajectory:
    """One training sequence: a prompt as segments, and what loss falls on, the end token last; and
    where it comes from."""

    prompt: Sequence[tuple[int, ...]]
    completion: Sequence[int]
    name: str = ""


Batches = Callable[[int], list[Trajectory]]  # batch number -> its trajectories


def prompt_segments(
    builder: PromptBuilder, row: Row, order: Sequence[int], hint: str | None = None
) -> list[tuple[int, ...]]:
    """The prompt of a trajectory."""
    return [segment.token_ids for segment in builder.segments(row, order, hint)]


class JudgementLine(msgspec.Struct, kw_only=True):
    """What a line of such a file holds beside its row. `right`: whether the judgement is."""

    judgement: str
    order: list[int] | None = None
    hint: str | None = None
    right: bool | None = None


def file_batches(
    builder: PromptBuilder,
    eos_token_ids: Collection[int],
    path: Path,
    rows: int,
    seed: int,
    longest: int,
    held_out: Collection[str] = (),
) -> Batches:
    """Batches of the trajectories of `rows` lines of a JSONL file; every epoch is a new seeded
    permutation of all its lines, but for those with a row of a conversation (`conversation_of`)
    that is held out.

    A judgement ends with the tokenizer's end token, a turn of a conversation with what the chat
    template ends it with; both are of `eos_token_ids`. Raises ValueError naming file and line for a
    line with neither, with a bad row or conversation, or with more than `longest` tokens.
    """

    def trajectories(fields: dict[str, Any]) -> list[Trajectory]:
        if is_chat(fields):
            turns = learnt_turns(builder, eos_token_ids, read_chat(fields))
            made = [Trajectory(turn.prompt, turn.completion, turn.place) for turn in turns]
        elif fields.get("judgement") is None:
            raise ValueError("it has no judgement, no messages, and no prompt with a completion")
        else:
            row, line = judgement_of(fields)
            if conversation_of(row) in held_out:
                return []
            made = [judged_trajectory(builder, eos_token_ids, row, line)]
        for each in made:
            if (tokens := sum(map(len, each.prompt)) + len(each.completion)) > longest:
                it = f"up to {each.name} it" if each.name else "it"
                raise ValueError(f"{it} has {tokens} tokens, the context {longest}")
        return made

    lines = [
        [replace(each, name=f"line {number} {each.name}".rstrip()) for each in made]
        for number, made in read_lines(path, trajectories)
        if made
    ]
    if not lines:
        raise ValueError(f"{path} holds no trajectory")

    return lambda number: [each for line in epochs(lines, number, rows, seed) for each in line]


def labelled_trajectory_rows(path: Path) -> list[Row]:
    """The rows with a label of such a file, each once, for `hold_out`. Raises ValueError as
    `file_batches`."""

    def row_of(fields: dict[str, Any]) -> Row | None:
        return None if is_chat(fields) else judgement_of(fields)[0]

    rows = [row for _, row in read_lines(path, row_of) if row is not None and has_best(row.label)]
    return list({row.digest: row for row in rows}.values())


def judged_trajectory(
    builder: PromptBuilder, eos_token_ids: Collection[int], row: Row, line: JudgementLine
) -> Trajectory:
    """Of a line with a judgement. Raises ValueError where its order, or the model's own end token,
    is none."""
    prompt = prompt_segments(builder, row, order_of(row, line), line.hint)
    end_id = builder.tokenizer.end_id(eos_token_ids)
    return Trajectory(prompt, [*encode_said(builder.tokenizer, line.judgement), end_id])


def read_lines(path: Path, make: Callable[[dict[str, Any]], T]) -> list[tuple[int, T]]:
    """The number of each line, and what is made of its JSON object, in a file that is read as
    `engine/reading.py` does. Raises ValueError naming file and line for the first that is no
    object, or that `make` refuses."""

    def parse(line: bytes) -> T:
        fields = parse_fields(line)
        try:
            return make(fields)
        except (ValueError, msgspec.ValidationError) as error:
            raise RowError(str(error)) from error

    made = []
    with open_rows(path) as stream:
        lines = tqdm(
            parse_lines(stream, parse), desc=path.name, unit="line", delay=2, leave=False,
            disable=None if parallel.is_first() else True,
        )  # fmt: skip
        for number, entry in lines:
            if isinstance(entry, BadRow):
                raise ValueError(f"{path}, line {number}: {entry.error}")
            made.append((number, entry))
    return made


def judgement_of(fields: Mapping[str, Any]) -> tuple[Row, JudgementLine]:
    """A line's row, and what it holds beside it. Raises ValueError and msgspec.ValidationError."""
    own = {key: fields[key] for key in JudgementLine.__struct_fields__ if key in fields}
    line = msgspec.convert(own, JudgementLine)
    return build_row({key: value for key, value in fields.items() if key not in own}), line


def order_of(row: Row, line: JudgementLine) -> Sequence[int]:
    """In which a judgement saw the responses."""
    places = list(range(len(row.responses)))
    order = places if line.order is None else line.order
    if sorted(order) != places:
        raise ValueError(f"order {order} is not a permutation of {len(places)} responses")
    return order
