"""Verdicts of many rows, with and without meta scores."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bench.figures import Figure, Peer, Work, assert_equal, calls_on
from bench.timing import DEVICE, ON_GPU, num_sets
from kernels.vote import VoteResult, vote, vote_ref

# Rows, samples of a row, responses.
CASES = [(1024, 32, 4), (64, 128, 8)] if ON_GPU else [(64, 32, 4), (256, 32, 4)]
CHECKED = 8  # rows


def eager(
    scores: Tensor,
    order: Tensor,
    valid: Tensor,
    n: Tensor,
    tie_uniform: Tensor,
    meta: Tensor | None = None,
    k_meta: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Totals, means and the first best response, for rows of as many responses as there is room:
    what one writes in torch without ties, padding and NaN in mind."""
    voted = valid
    if meta is not None and k_meta is not None:
        key = meta.masked_fill(~valid, -math.inf)
        voted = torch.zeros_like(valid).scatter(1, key.topk(k_meta, 1).indices, True) & valid
    shown = torch.zeros_like(scores).scatter_(2, order, scores)
    total = (shown * voted[..., None]).sum(1)
    return total, total.double() / voted.sum(1, keepdim=True), total.argmax(1)


def make_sets(
    rows: int, samples: int, responses: int, meta: bool, count: int
) -> list[tuple[Tensor | int, ...]]:
    """Arguments of `vote`: an eighth of the samples is invalid."""
    sets: list[tuple[Tensor | int, ...]] = []
    for seed in range(count):
        draw = torch.Generator().manual_seed(seed)
        tensors = [
            torch.randint(1, 11, (rows, samples, responses), generator=draw),
            torch.rand(rows, samples, responses, generator=draw).argsort(-1),
            torch.rand(rows, samples, generator=draw) > 1 / 8,
            torch.full((rows,), responses),
            torch.rand(rows, generator=draw),
        ]
        if meta:
            tensors.append(torch.randn(rows, samples, generator=draw))
        moved = [tensor.to(DEVICE) for tensor in tensors]
        sets.append((*moved, *([samples // 2] if meta else [])))
    return sets


def make_work(rows: int, samples: int, responses: int, meta: bool) -> Work:
    """Verdicts of `rows` rows."""
    read = rows * (samples * (16 * responses + (5 if meta else 1)) + 12)
    num_bytes = read + rows * (samples + 16 * responses + 17)
    sets = make_sets(rows, samples, responses, meta, num_sets(num_bytes))

    def check(out: VoteResult, factor: float) -> None:
        first = [x[:CHECKED].cpu() if isinstance(x, Tensor) else x for x in sets[0]]
        expected = vars(vote_ref(*first))  # type: ignore[arg-type]
        for name, value in vars(out).items():
            assert_equal(f"vote: {name}", value[:CHECKED], expected[name])

    return Work(
        "vote",
        f"{rows} rows of {samples} samples, {responses} responses{', meta' if meta else ''}",
        num_bytes,
        rows * samples * responses,
        calls_on(vote, sets),
        check,
        {"eager": Peer(lambda: calls_on(eager, sets), compare=False)},
    )


@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize(("rows", "samples", "responses"), CASES)
def test_vote(
    rows: int, samples: int, responses: int, meta: bool, measured: Callable[[Work], Figure]
) -> None:
    measured(make_work(rows, samples, responses, meta))
