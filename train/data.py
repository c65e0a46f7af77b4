"""Trajectories to learn from: prompt tokens, and the tokens of a judgement that ends by itself.

Two sources: the synthetic world, endless and addressed by batch number, so that a resumed run
continues with the very next batch; and a JSONL file of rows, each with a `judgement` and perhaps
the `order` in which the responses were shown and a `hint`, shuffled anew each epoch. Lines that say
whether the judgement is `right` are read as rows of judgements, for a meta model.
"""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby, islice
from pathlib import Path
from typing import TypeVar

import msgspec

from engine.prompt import PromptBuilder
from engine.request import Row, make_row, parse_row
from models.config import parse_json
from train.world import CRITERIA, Case, cases, judge, list_criteria


@dataclass(frozen=True)
class Trajectory:
    """One training sequence: a prompt as segments, and what loss falls on, the end token last; and
    where it comes from."""

    prompt: Sequence[tuple[int, ...]]
    completion: Sequence[int]
    name: str = ""


Batches = Callable[[int], list[Trajectory]]  # batch number -> its trajectories


def world_batches(builder: PromptBuilder, end_id: int, rows: int, seed: int) -> Batches:
    """Batches of fresh world rows with the teacher's judgements.

    One row in ten gives the principles to judge by, one in ten the reference answer; one in sixty
    hints at the response that the judgement will prefer.
    """

    def batch(number: int) -> list[Trajectory]:
        rng = random.Random(f"quorum-sft-{seed}-{number}")
        stream = cases(f"sft-{seed}-{number}", "train")
        return [
            _world_trajectory(builder, end_id, case, rng, f"sft-{seed}-{number}-{i}")
            for i, case in enumerate(islice(stream, rows))
        ]

    return batch


def _world_trajectory(
    builder: PromptBuilder, end_id: int, case: Case, rng: random.Random, name: str
) -> Trajectory:
    listed = list_criteria(case, rng)
    principles = reference = hint = None
    chance = rng.random()
    if chance < 0.1:
        names = rng.sample(CRITERIA, len(listed))
        listed = [(name, weight) for name, (_, weight) in zip(names, listed, strict=True)]
        principles = ", ".join(f"{name} {weight}" for name, weight in listed)
    elif chance < 0.2:
        reference = case.task.write(case.task.answer)
    text, scores = judge(case, listed)
    if chance > 0.97 and len(scores) > 1 and scores.count(max(scores)) == 1:
        hint = hint_at(scores.index(max(scores)))
    fields = case.row()
    row = make_row(
        fields["prompt"], fields["responses"], reference=reference, principles=principles
    )
    prompt = prompt_segments(builder, row, range(len(row.responses)), hint)
    return Trajectory(prompt, [*builder.tokenizer.encode_text(text), end_id], name)


def hint_at(place: int) -> str:
    """The hint that the best response is the one shown at this place, counted from 0."""
    return f"The best response is: Response {place + 1}"


def prompt_segments(
    builder: PromptBuilder, row: Row, order: Sequence[int], hint: str | None = None
) -> list[tuple[int, ...]]:
    """The prompt of a trajectory."""
    return [segment.token_ids for segment in builder.segments(row, order, hint)]


class _Line(msgspec.Struct, kw_only=True):
    """What a line of such a file holds beside its row. `right`: whether the judgement is."""

    judgement: str
    order: list[int] | None = None
    hint: str | None = None
    right: bool | None = None


def file_batches(
    builder: PromptBuilder, end_id: int, path: Path, rows: int, seed: int, longest: int
) -> Batches:
    """Batches from a JSONL file; every epoch is a new seeded permutation of all its lines.

    Raises ValueError naming file and line for a line without a judgement, with a bad row, or with
    more than `longest` tokens.
    """

    def trajectory(row: Row, line: _Line) -> Trajectory:
        prompt = prompt_segments(builder, row, _order(row, line), line.hint)
        completion = [*builder.tokenizer.encode_text(line.judgement), end_id]
        if (tokens := sum(map(len, prompt)) + len(completion)) > longest:
            raise ValueError(f"it has {tokens} tokens, the context {longest}")
        return Trajectory(prompt, completion)

    made = _read_lines(path, trajectory)
    trajectories = [replace(each, name=f"line {i}") for i, each in enumerate(made, 1)]
    if not trajectories:
        raise ValueError(f"{path} holds no trajectory")

    return lambda number: epochs(trajectories, number, rows, seed)


@dataclass(frozen=True)
class Judgement:
    """A judgement of a row: the order that it saw, its text, whether it is right."""

    order: Sequence[int]
    text: str
    right: bool


@dataclass(frozen=True)
class JudgedRow:
    """A row and some of its judgements."""

    row: Row
    judgements: list[Judgement]


def file_judgements(path: Path, rows: int, seed: int) -> Callable[[int], list[JudgedRow]]:
    """Batches of rows from a JSONL file of judgements, each of them with `right`; the lines of a
    row lie together. Every epoch is a new seeded permutation of all rows.

    Raises ValueError naming file and line for a line that is no such judgement.
    """

    def judgement(row: Row, line: _Line) -> tuple[Row, Judgement]:
        if line.right is None:
            raise ValueError("it does not say whether its judgement is right")
        return row, Judgement(_order(row, line), line.judgement, line.right)

    lines = groupby(_read_lines(path, judgement), key=lambda line: (line[0].id, line[0].digest))
    judged_rows = []
    for _, group in lines:
        found = list(group)
        judged_rows.append(JudgedRow(found[0][0], [own for _, own in found]))
    if not judged_rows:
        raise ValueError(f"{path} holds no judgement")
    return lambda number: epochs(judged_rows, number, rows, seed)


_T = TypeVar("_T")


def epochs(items: Sequence[_T], number: int, size: int, seed: int) -> list[_T]:
    """Batch `number`, of `size`, of an endless stream in which every epoch is a new seeded
    permutation of all items."""
    places = (divmod(i, len(items)) for i in range(number * size, (number + 1) * size))
    return [items[permutation(len(items), seed, epoch)[place]] for epoch, place in places]


def _read_lines(path: Path, make: Callable[[Row, _Line], _T]) -> list[_T]:
    """What is made of each line of a JSONL file, which holds a row and its judgement."""
    made = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            place = f"{path}, line {number}"
            fields = parse_json(Path(place), line)
            own = {key: fields.pop(key) for key in _Line.__struct_fields__ if key in fields}
            try:
                judged = msgspec.convert(own, _Line)
                made.append(make(parse_row(json.dumps(fields).encode()), judged))
            except (ValueError, msgspec.ValidationError) as error:
                raise ValueError(f"{place}: {error}") from error
    return made


def _order(row: Row, line: _Line) -> Sequence[int]:
    """In which a judgement saw the responses."""
    places = list(range(len(row.responses)))
    order = places if line.order is None else line.order
    if sorted(order) != places:
        raise ValueError(f"order {order} is not a permutation of {len(places)} responses")
    return order


@lru_cache(maxsize=4)  # a batch may lie across two epochs, and two files be read
def permutation(length: int, seed: int, epoch: int) -> list[int]:
    order = list(range(length))
    random.Random(f"quorum-epoch-{seed}-{epoch}").shuffle(order)
    return order
