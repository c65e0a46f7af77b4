"""Trajectories to learn from: prompt tokens, and the tokens of a judgement that ends by itself.

Batches of them are addressed by number, so that a resumed run continues with the very next one:
of a JSONL file of rows, each with a `judgement` and perhaps the `order` in which the responses were
shown and a `hint`, shuffled anew each epoch, or of the synthetic world (`train/world/rows.py`).
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from engine.prompt import PromptBuilder
from engine.request import Row, parse_row
from models.config import parse_json
from train.sources import T, epochs


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
    builder: PromptBuilder, end_id: int, path: Path, rows: int, seed: int, longest: int
) -> Batches:
    """Batches from a JSONL file; every epoch is a new seeded permutation of all its lines.

    Raises ValueError naming file and line for a line without a judgement, with a bad row, or with
    more than `longest` tokens.
    """

    def trajectory(row: Row, line: JudgementLine) -> Trajectory:
        prompt = prompt_segments(builder, row, order_of(row, line), line.hint)
        completion = [*builder.tokenizer.encode_text(line.judgement), end_id]
        if (tokens := sum(map(len, prompt)) + len(completion)) > longest:
            raise ValueError(f"it has {tokens} tokens, the context {longest}")
        return Trajectory(prompt, completion)

    made = read_lines(path, trajectory)
    trajectories = [replace(each, name=f"line {i}") for i, each in enumerate(made, 1)]
    if not trajectories:
        raise ValueError(f"{path} holds no trajectory")

    return lambda number: epochs(trajectories, number, rows, seed)


def read_lines(path: Path, make: Callable[[Row, JudgementLine], T]) -> list[T]:
    """What is made of each line of a JSONL file, which holds a row and its judgement."""
    made = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            place = f"{path}, line {number}"
            fields = parse_json(Path(place), line)
            own = {key: fields.pop(key) for key in JudgementLine.__struct_fields__ if key in fields}
            try:
                judged = msgspec.convert(own, JudgementLine)
                made.append(make(parse_row(json.dumps(fields).encode()), judged))
            except (ValueError, msgspec.ValidationError) as error:
                raise ValueError(f"{place}: {error}") from error
    return made


def order_of(row: Row, line: JudgementLine) -> Sequence[int]:
    """In which a judgement saw the responses."""
    places = list(range(len(row.responses)))
    order = places if line.order is None else line.order
    if sorted(order) != places:
        raise ValueError(f"order {order} is not a permutation of {len(places)} responses")
    return order
