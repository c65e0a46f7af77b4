"""The expected score where a step's samples write a number: timed with all of them there, though
most steps have none."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from bench.case import Arguments, OpCase, assert_close
from bench.shapes import SHAPES, Shape
from bench.timing import DEVICE, ON_GPU, Fill
from kernels.expected_score import FIRST, NumberEdges, expected_score, expected_score_ref
from kernels.score_grammar import BEGINS

SCORES = 10


def read(shape: Shape, rows: int) -> OpCase:
    """Of `rows` samples, each of which has drawn a score from 1 to 10. Bytes: what is read of their
    logits, and of the edges."""

    def make_inputs(tensor: Fill, count: int) -> list[Arguments]:
        score = torch.arange(1, SCORES + 1, device=DEVICE)
        closed = torch.zeros_like(score, dtype=torch.bool)
        edges = NumberEdges(torch.full_like(score, FIRST), score + 15, score, closed)
        control = torch.zeros(rows, dtype=torch.int64, device=DEVICE)
        place = torch.tensor([BEGINS], device=DEVICE)
        token = torch.arange(rows, device=DEVICE) % SCORES + 16
        return [
            (
                tensor(rows, shape.vocab_size, dtype=shape.dtype, scale=3.0),
                token,
                tensor(rows, dtype=torch.float32),
                control,
                torch.zeros_like(control),
                place,
                edges,
                1,
                SCORES,
                shape.final_softcap,
            )
            for _ in range(count)
        ]

    def check(arguments: Arguments, out: Tensor, factor: float) -> None:
        logits, token, logprob, *rest = arguments
        exact = expected_score_ref(logits.double(), token, logprob.double(), *rest)
        plain = expected_score_ref(logits.float(), token, logprob, *rest)
        assert_close("expected_score", out, exact, plain, factor)

    num_bytes = rows * (SCORES + 1) * shape.dtype.itemsize + 25 * SCORES
    return OpCase(
        "expected_score",
        f"{shape.name} {rows} rows",
        make_inputs,
        expected_score,
        check,
        num_bytes,
        rows * SCORES * 4,
    )


def variants(shape: Shape, rows: int) -> Iterator[OpCase]:
    """Of the model's dtype and of float32."""
    for dtype in dict.fromkeys((shape.dtype, torch.float32)):
        yield read(replace(shape, dtype=dtype), rows)


CASES = [read(SHAPES["qwen3-8b" if ON_GPU else "qwen3-107m"], 64)]
