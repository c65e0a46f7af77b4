"""In which order each sample of a row sees the responses."""

from collections.abc import Sequence

import torch

from engine.options import JudgeOptions
from engine.request import Row
from kernels.sample_token import stream_key, uniforms


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


def in_row_order(scores: Sequence[int] | None, order: Sequence[int]) -> tuple[int, ...] | None:
    """A sample's scores by response, from those by place; None where they are invalid."""
    if scores is None:
        return None
    shown = dict(zip(order, scores, strict=True))
    return tuple(shown[response] for response in range(len(order)))
