"""Labelled rows of a file: in batches, endless and shuffled anew each epoch, and some of them held
out for evaluation."""

import hashlib
import json
import random
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

from engine.labels import has_best
from engine.reading import open_rows, read_rows
from engine.request import BadRow, Row
from train import parallel

Rows = Callable[[int], list[Row]]  # batch number -> its rows
MIN_CONVERSATIONS = 5  # for some to be held out; a fifth of the rows is, at most


def tell_left_out(left_out: Counter[str]) -> None:
    """Say what lines of a file were left out, and why."""
    for reason, count in left_out.most_common() if parallel.is_first() else ():
        print(f"left out: {count} x {reason}", file=sys.stderr)


def labelled_rows(path: Path) -> tuple[list[Row], Counter[str]]:
    """The labelled rows of a file, and how many lines were left out for which reason: bad rows, and
    rows without a label or with a tie. Raises ValueError where there is no labelled row."""
    kept: list[Row] = []
    left_out: Counter[str] = Counter()
    with open_rows(path) as stream:
        for row in read_rows(stream):
            if isinstance(row, BadRow):
                left_out[f"{path}, line {row.line}: {row.error}"] += 1
            elif not has_best(row.label):
                left_out["no label" if row.label is None else "a tie"] += 1
            else:
                kept.append(row)
    if not kept:
        found = "; ".join(f"{count} x {reason}" for reason, count in left_out.most_common(3))
        raise ValueError(f"{path} holds no row with a label: {found or 'it is empty'}")
    return kept, left_out


def conversation_of(row: Row) -> str:
    """The SHA-256, in hex, of a row's prompt: equal for rows of one conversation."""
    turns = [[message.role, message.content] for message in row.messages]
    return hashlib.sha256(json.dumps(turns).encode()).hexdigest()


def hold_out(labelled: Sequence[Row], rows: int) -> tuple[list[Row], list[Row]]:
    """Split rows into those to train on, in their own order, and those to evaluate on: at most
    `rows`, and at most a fifth of all. Rows of one conversation lie on the same side.

    Conversations are held out by the rank of their hashes: in their order, each whose rows still
    fit. So neither side depends on the order of the rows; where there are more of them, a
    conversation may change sides as its rank changes, or the fifth.

    Raises ValueError, with what to do, for fewer than MIN_CONVERSATIONS, and where each has more
    rows than may be held out.
    """
    of_conversation = defaultdict(list)
    for row in labelled:
        of_conversation[conversation_of(row)].append(row)
    advice = "name other rows with --eval-data FILE"
    if len(of_conversation) < MIN_CONVERSATIONS:
        raise ValueError(
            f"{len(of_conversation)} distinct prompts are too few to hold some out for evaluation, "
            f"which takes {MIN_CONVERSATIONS}: {advice}"
        )
    most = min(rows, len(labelled) // MIN_CONVERSATIONS)
    evaluation: list[Row] = []
    for _, own in sorted(of_conversation.items()):
        if len(evaluation) + len(own) <= most:
            evaluation += sorted(own, key=lambda row: row.digest)
    if not evaluation:
        raise ValueError(
            f"each prompt has more than the {most} rows that may be held out for evaluation: "
            f"hold out more, {advice}"
        )
    held = {conversation_of(row) for row in evaluation}
    return [row for row in labelled if conversation_of(row) not in held], evaluation


T = TypeVar("T")


def batches_of(rows: Sequence[Row], size: int, seed: int) -> Rows:
    """Batches of so many rows, in a new seeded permutation of all rows every epoch."""
    return lambda number: epochs(rows, number, size, seed)


def epochs(items: Sequence[T], number: int, size: int, seed: int) -> list[T]:
    """Batch `number`, of `size`, of an endless stream in which every epoch is a new seeded
    permutation of all items."""
    places = (divmod(i, len(items)) for i in range(number * size, (number + 1) * size))
    return [items[permutation(len(items), seed, epoch)[place]] for epoch, place in places]


@lru_cache(maxsize=4)  # a batch may lie across two epochs, and two files be read
def permutation(length: int, seed: int, epoch: int) -> list[int]:
    order = list(range(length))
    random.Random(f"quorum-epoch-{seed}-{epoch}").shuffle(order)
    return order
