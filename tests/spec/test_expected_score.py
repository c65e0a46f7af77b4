"""The expected score where a sample writes a number."""

import math
from collections.abc import Callable
from fractions import Fraction
from itertools import count
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.expected_score import (
    FIRST,
    MINUS,
    NumberEdges,
    expected_score,
    expected_score_ref,
)
from kernels.score_grammar import BEGINS, CONTINUES, NEGATIVE
from tests.implementations import DTYPES, Implementation

PLACES = torch.tensor([0, BEGINS, CONTINUES, NEGATIVE, 0])
VOCAB = 300


def digits(low: int, high: int) -> NumberEdges:
    """Those of a tokenizer that writes digit by digit: digit d is token d, and - is token 10."""
    rows = set()
    for score in range(low, high + 1):
        text = str(score)
        for i, symbol in enumerate(text):
            before, now = text[:i], text[: i + 1]
            prefix = FIRST if not before else MINUS if before == "-" else int(before)
            is_open = any(
                str(other).startswith(now) and str(other) != now for other in range(low, high + 1)
            )
            token, value = (10, 0) if symbol == "-" else (int(symbol), int(now))
            rows.add((prefix, token, value, is_open))
    columns = torch.tensor(sorted(rows), dtype=torch.int64).T.contiguous()
    prefix, token, value, is_open = columns
    return NumberEdges(prefix, token, value, is_open.bool())


def many_edges(generator: torch.Generator) -> NumberEdges:
    """More than one block of them, in no order, among tokens that are none."""
    size = 290
    prefix = torch.tensor([FIRST, MINUS, 3, 17, -4])[
        torch.randint(0, 5, (size,), generator=generator)
    ]
    token = torch.randperm(VOCAB, generator=generator)[:size]
    value = torch.randint(-20, 20, (size,), generator=generator)
    return NumberEdges(prefix, token, value, torch.rand(size, generator=generator) < 0.2)


def flat(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """An operation whose edges are arguments of their own."""
    return lambda *a: op(*a[:6], NumberEdges(*a[6:10]), *a[10:])


def inputs(
    on: Implementation, rows: int, edges: NumberEdges, dtype: torch.dtype, softcap: float | None
) -> tuple[Any, ...]:
    """Samples at all places, half of them at an edge; log-probs as they are of these logits."""
    generator = torch.Generator().manual_seed(rows)
    logits = torch.randn(rows, VOCAB, generator=generator).mul(3).to(dtype)
    control = torch.randint(0, len(PLACES), (rows,), generator=generator)
    value = torch.tensor([1, 2, -1, 17, 3, -4, 9])[
        torch.randint(0, 7, (rows,), generator=generator)
    ]
    at_edge = edges.token[torch.randint(0, len(edges.token), (rows,), generator=generator)]
    anywhere = torch.randint(0, VOCAB, (rows,), generator=generator)
    token = torch.where(torch.rand(rows, generator=generator) < 0.5, at_edge, anywhere)
    x = logits.float() if softcap is None else softcap * torch.tanh(logits.float() / softcap)
    logprob = x.log_softmax(1).gather(1, token[:, None])[:, 0]
    given = (logits, token, logprob, control, value, PLACES, *edges)
    return (*(each.to(on.device) for each in given), -20, 16, softcap)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_equals_its_reference(on: Implementation, softcap: float | None) -> None:
    """At every place and after every kind of token; what the reference gives in float64, within its
    own error in float32."""
    for dtype in DTYPES[on.name]:
        if dtype == torch.float64:
            continue
        for rows, edges in (
            (1, digits(1, 10)),
            (60, digits(-20, 20)),
            (60, many_edges(torch.Generator().manual_seed(0))),
        ):
            arguments = inputs(on, rows, edges, dtype, softcap)
            found = on.run(flat(expected_score), *arguments).cpu()
            wide = [x.cpu().double() if torch.is_floating_point(x) else x.cpu()
                    for x in arguments[:10]]  # fmt: skip
            exact = flat(expected_score_ref)(*wide, *arguments[10:])
            assert found.dtype == torch.float32 and exact.dtype == torch.float64
            torch.testing.assert_close(found.double(), exact, rtol=0, atol=4e-5, equal_nan=True)
            if rows > 1:
                known, place = ~exact.isnan(), PLACES[arguments[3].cpu()]
                places = {*place[known].tolist()}
                assert {BEGINS, CONTINUES} <= places <= {BEGINS, CONTINUES, NEGATIVE}
                after = arguments[4].cpu()[known & (place == CONTINUES)]
                assert torch.isin(after, edges.prefix).all()  # nothing goes on after the others


@pytest.mark.parametrize(("low", "high"), [(1, 10), (0, 1), (0, 12), (-12, 3), (5, 130), (7, 12)])
def test_over_all_that_may_be_drawn_its_mean_is_the_numbers(
    on: Implementation, low: int, high: int
) -> None:
    """A model over texts of digits with exact chances: every number that it may write is followed
    to its end, its expected score being the first that is known. The numbers' mean, and that of
    their expected scores, are the same; and where one token decides, all get that mean."""
    edges, numbers = digits(low, high), range(low, high + 1)
    weights = {str(number): Fraction(1 + (7 * number) % 5) for number in numbers}
    whole = sum(weights.values())
    device_edges = NumberEdges(*(x.to(on.device) for x in edges))

    def mass(text: str) -> Fraction:
        return sum((w for other, w in weights.items() if other.startswith(text)), Fraction())

    def expected_of(number: str) -> float:
        for at in count():
            before = number[:at]
            place = BEGINS if not before else NEGATIVE if before == "-" else CONTINUES
            chances = torch.zeros(1, 12, dtype=torch.float64)
            for token, symbol in enumerate("0123456789-"):
                chances[0, token] = float(mass(before + symbol) / mass(before))
            chances[0, 11] = float(weights.get(before, 0) / mass(before))  # the number ends
            drawn = "0123456789-".index(number[at]) if at < len(number) else 11
            logits = chances.log().float().clamp_min(-100)
            value = int(before) if place == CONTINUES else 0
            where = torch.tensor([drawn]), logits[:, drawn], torch.tensor([1])
            given = logits, *where, torch.tensor([value]), torch.tensor([0, place])
            on_device = [x.to(on.device) for x in given]
            found = flat(expected_score)(*on_device, *device_edges, low, high).item()
            if not math.isnan(found):
                return found
        raise AssertionError

    if on.name == "triton":  # every call takes 15 ms
        numbers = numbers[:: max(1, len(numbers) // 12)]
        assert all(low <= expected_of(str(number)) <= high for number in numbers)
        return
    found = {text: expected_of(text) for text in weights}
    mean = sum(float(w / whole) * found[text] for text, w in weights.items())
    assert mean == pytest.approx(float(sum(int(t) * w for t, w in weights.items()) / whole), 1e-5)
    assert len({round(x, 4) for x in found.values()}) < len(found)
    if high < 10 and low >= 0:
        assert len({round(x, 4) for x in found.values()}) == 1


def test_bad_arguments(on: Implementation) -> None:
    good = inputs(on, 3, digits(1, 10), torch.float32, None)

    def refuse(message: str, place: int, value: Tensor) -> None:
        with pytest.raises(ValueError, match=message):
            flat(expected_score)(*good[:place], value, *good[place + 1 :])

    refuse(r"logits must be .* got \(3, 300\) torch.float64", 0, good[0].double())
    refuse(r"contiguous, got \(3, 300\) .* \(1, 3\)", 0, good[0].T.contiguous().T)
    refuse(r"token must be \(3,\) torch.int64, got \(3,\) torch.int32", 1, good[1].int())
    refuse(r"logprob must be \(3,\) torch.float32, got \(2,\)", 2, good[2][:2])
    refuse(r"control must be", 3, good[3][:2])
    refuse(r"value must be", 4, good[4].int())
    refuse(r"place must be \(C,\)", 5, good[5][None])
    for i, name in enumerate(NumberEdges._fields):
        refuse(rf"edges.{name} must be", 6 + i, good[6 + i][:, None])
    gaps = torch.stack([good[1], good[1]], 1)[:, 0]
    refuse("all must be contiguous", 1, gaps)
