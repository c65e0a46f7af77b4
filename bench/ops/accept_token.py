"""All that follows from the tokens that a step has drawn: scores, records, stopping. It is timed
together with the drawing."""

import random
from collections.abc import Iterator
from functools import cache
from itertools import product

import torch
from torch import Tensor

from bench.case import Arguments, NotLikeReference, OpCase, same_inputs
from bench.ops import sample_token
from bench.shapes import SHAPES, Shape
from bench.timing import DEVICE, ON_GPU, Fill
from kernels.accept_token import Cursor, LiveSamples, Records, accept_token
from kernels.extract_scores import ScoreAutomaton
from kernels.forest_attention.plan import MAX_SPLIT, splits_of
from kernels.score_grammar import ScoreRules

MAX_TOKENS = 1024 if ON_GPU else 256  # of a step's samples, so that none is finished while timed
_MAX_SCORES = 8


@cache
def make_automaton(vocab_size: int) -> ScoreAutomaton:
    """A vocabulary of random text, with all that boxes are made of."""
    draw = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz \n\\{},0123456789"
    texts = ["".join(draw.choices(letters, k=draw.randint(1, 6))) for _ in range(vocab_size)]
    return ScoreAutomaton([text.encode() for text in texts], [0], ScoreRules(first=True), DEVICE)


def _int64(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64, device=DEVICE)


def _start(rows: int, vocab_size: int) -> tuple[LiveSamples, Records, ScoreAutomaton]:
    """Samples of which nothing is generated, and room for what will be."""
    automaton = make_automaton(vocab_size)
    limit, slot = _int64(rows) + MAX_TOKENS, torch.arange(rows, device=DEVICE)
    live = LiveSamples.start(limit, slot, automaton.start(_int64(rows) + 4, _MAX_SCORES))
    return live, Records.empty(rows, MAX_TOKENS, DEVICE), automaton


def _cursor(rows: int) -> Cursor:
    """Of samples without a token, one block after the other."""
    most = splits_of(MAX_TOKENS)
    blocks = torch.arange(rows * most, device=DEVICE).view(rows, most) * MAX_SPLIT
    return Cursor(_int64(rows), _int64(rows), _int64(rows), blocks)


def _check_taken(live: LiveSamples, records: Records, token: Tensor) -> None:
    if not records.tokens[:, 0].equal(token) or not live.count.eq(1).all():
        raise NotLikeReference("accept_token: the tokens drawn are not those recorded")


def take(rows: int, num_ends: int, stop_at_box: bool, moves: bool) -> OpCase:
    """The tokens of `rows` samples: in decode, where positions move, or after prefill."""

    def make_inputs(tensor: Fill, count: int) -> list[Arguments]:
        padded = -(-rows // 16) * 16
        inputs = []
        for _ in range(count):
            live, records, automaton = _start(rows, 256)
            token = torch.arange(rows, device=DEVICE) + num_ends
            cursor = _cursor(padded) if moves else None
            logprobs = [tensor(rows) for _ in range(2)]
            ends = torch.arange(num_ends, device=DEVICE)
            inputs.append((live, records, token, *logprobs, automaton, ends, stop_at_box, cursor))
        return inputs

    def check(arguments: Arguments, out: None, factor: float) -> None:
        live, records, token, *_, cursor = arguments
        _check_taken(live, records, token)
        if any((place[:rows] != 1).any() for place in (cursor or ())[:2]):
            raise NotLikeReference("accept_token: positions have not moved by one")

    kind = "box" if stop_at_box else "eos"
    return OpCase(
        "accept_token",
        f"{rows} rows, {num_ends} ends, {kind}, {moves=}",
        make_inputs,
        accept_token,
        check,
    )


def step(shape: Shape, rows: int) -> OpCase:
    """The end of a decode step: tokens drawn and taken."""
    drawing = sample_token.draw(shape, rows, "plain")

    def make_inputs(tensor: Fill, count: int) -> list[Arguments]:
        end_ids = _int64(1)
        inputs = []
        for drawn in drawing.make_inputs(tensor, count):
            cursor = _cursor(rows)
            inputs.append((drawn, *_start(rows, shape.vocab_size), end_ids, cursor))
        return inputs

    def ours(
        drawn: Arguments,
        live: LiveSamples,
        records: Records,
        automaton: ScoreAutomaton,
        end_ids: Tensor,
        cursor: Cursor,
    ) -> Tensor:
        token, logprob, sampling_logprob = drawing.call(*drawn)
        accept_token(
            live, records, token, logprob, sampling_logprob, automaton, end_ids, True, cursor
        )
        return token

    def check(arguments: Arguments, token: Tensor, factor: float) -> None:
        drawn, live, records, *_ = arguments
        sample_token.check_drawn(drawn, token, records.logprobs[0, :, 0])
        _check_taken(live, records, token)

    def eager(drawn: Arguments, live: LiveSamples, records: Records, *rest: object) -> Tensor:
        token, *logprobs = sample_token.eager(*drawn)
        at = live.slot, live.count.clamp_max(MAX_TOKENS - 1)
        records.tokens[at] = token
        records.logprobs[0][at], records.logprobs[1][at] = logprobs
        return token

    return OpCase(
        "sample_token + accept_token",
        f"{shape.name} {rows} rows",
        make_inputs,
        ours,
        check,
        drawing.num_bytes + 150 * rows,
        drawing.flops,
        same_inputs(compare=False, **{"eager, no scores": eager}),
    )


def variants(shape: Shape, rows: int) -> Iterator[OpCase]:
    """In decode and after prefill; with no, one and more end tokens."""
    for num_ends, stop_at_box, moves in product((0, 1, 2), (False, True), (False, True)):
        yield take(rows, num_ends, stop_at_box, moves)


CASES = [
    step(SHAPES[name], rows)
    for name, rows in (
        [("qwen3-8b", 32), ("qwen3-8b", 128)] if ON_GPU else [("pocket", 32), ("qwen3-107m", 32)]
    )
]
