"""What a row draws beside tokens: the orders in which samples see its responses, its nonce."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import TypeVar

import torch

from engine.options import JudgeOptions
from engine.request import Row
from kernels.sample_token import stream_key, uniforms

N = TypeVar("N", int, float)


def draw_orders(row: Row, options: JudgeOptions) -> list[tuple[int, ...]]:
    """The order of each of a row's k samples, from the row's own "order" stream."""
    n, k = len(row.responses), options.k
    if options.orders == "fixed":
        return [tuple(range(n))] * k
    key = torch.tensor([stream_key(options.seed, row.id, "order")])
    if options.orders == "rotate":
        zero = torch.zeros(1, dtype=torch.int64)
        first = int(uniforms(key, zero, zero)[0] * n)
        distinct = min(options.max_orders or min(n, k), n)
        rotations = [(first + j % distinct) % n for j in range(k)]
        return [tuple((place + rotation) % n for place in range(n)) for rotation in rotations]
    places = torch.arange(n).expand(k, n)
    draws = uniforms(key.expand(k, 2), torch.arange(k), places)
    return [tuple(order) for order in draws.argsort(dim=1, stable=True).tolist()]


def parts_of(order: tuple[int, ...], size: int) -> list[tuple[int, ...]]:
    """The order cut into as few parts of at most `size` as can be, the longer ones first."""
    count = -(-len(order) // size)
    short, longer = divmod(len(order), count)
    sizes = [short + 1] * longer + [short] * (count - longer)
    stops = list(accumulate(sizes))
    return [order[stop - length : stop] for stop, length in zip(stops, sizes, strict=True)]


def seen_by(row: Row, part: tuple[int, ...]) -> tuple[Row, tuple[int, ...]]:
    """The row as a judgement of these responses sees it, and their order in it."""
    if len(part) == len(row.responses):
        return row, part
    return replace(row, responses=tuple(row.responses[i] for i in part)), tuple(range(len(part)))


def draw_nonce(row: Row, seed: int) -> str:
    """Six digits that stand in no text of the row, so that no response can have written them.

    They follow from the row and the seed. Raises ValueError for a row that holds a hundred of them.
    """
    texts = [*(message.content for message in row.messages), *row.responses]
    texts += [text for text in (row.reference, row.principles) if text is not None]
    for attempt in range(100):
        digest = hashlib.sha256(f"nonce {seed} {attempt} {row.digest}".encode()).digest()
        nonce = str(100_000 + int.from_bytes(digest[:8]) % 900_000)
        if not any(nonce in text for text in texts):
            return nonce
    raise ValueError("the row holds every nonce that was drawn for it")


def in_row_order(scores: Sequence[N] | None, order: Sequence[int]) -> tuple[N, ...] | None:
    """A sample's scores by response, from those by place; None where they are invalid."""
    if scores is None:
        return None
    shown = dict(zip(order, scores, strict=True))
    return tuple(shown[response] for response in range(len(order)))
