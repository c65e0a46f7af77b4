"""Rows of the synthetic world, and the judgements of its teacher, as training takes them."""

import random
from itertools import islice

from engine.prompt import PromptBuilder
from engine.request import Row, make_row
from train.rejection import hint_at
from train.sources import Rows
from train.trajectories import Batches, Trajectory, prompt_segments
from train.world.cases import CRITERIA, Case, Split, cases, judge, list_criteria


def world_rows(name: str, seed: int, rows: int, least: int = 1) -> Rows:
    """Fresh rows of the synthetic world's train split, of at least so many responses, the same for
    the same name and seed."""

    def batch(number: int) -> list[Row]:
        stream = f"{name}-{seed}-{number}"
        return split_rows(stream, "train", rows, stream, least)

    return batch


def dev_rows(name: str, rows: int) -> list[Row]:
    """Rows of the synthetic world's dev split, the same for the same name."""
    return split_rows(name, "dev", rows, "dev")


def split_rows(
    stream: str | int, split: Split, rows: int, prefix: str, least: int = 1
) -> list[Row]:
    """The first labelled rows, of at least so many responses, of a stream of the synthetic world's
    cases; ids are PREFIX-NUMBER."""
    fit = (case.row() for case in cases(stream, split) if len(case.responses) >= least)
    return [
        make_row(row["prompt"], row["responses"], id=f"{prefix}-{i}", label=row["label"])
        for i, row in enumerate(islice(fit, rows))
    ]


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
