"""Drawing a step's tokens from raw logits, and with it all that follows from them: scores, records,
stopping (`accept_token`)."""

import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from bench.figures import Figure, NotLikeReference, Peer, Work, assert_close, calls_on
from bench.shapes import SHAPES, Shape
from bench.timing import DEVICE, ON_GPU, num_sets, rand, randn
from kernels.accept_token import LiveSamples, Records, accept_token
from kernels.extract_scores import ScoreAutomaton
from kernels.sample_token import TILE, SamplingOptions, sample_token, sample_token_ref

OPTIONS = {
    "greedy": SamplingOptions(temperature=0),
    "plain": SamplingOptions(temperature=0.5),
    "filters": SamplingOptions(temperature=0.5, top_k=50, top_p=0.95, min_p=0.02),
    "top-p": SamplingOptions(temperature=1, top_p=0.95),
}
# Shape, rows, options.
CASES = (
    [("qwen3-8b", 64, name) for name in OPTIONS]
    + [("qwen3-8b", 128, "plain"), ("gemma2-27b", 64, "plain"), ("gemma2-27b", 64, "filters")]
    if ON_GPU
    else [("qwen3-107m", 32, name) for name in ("greedy", "plain", "filters")]
)
STEPS = [("qwen3-8b", 32), ("qwen3-8b", 128)] if ON_GPU else [("pocket", 32), ("qwen3-107m", 32)]
MAX_TOKENS = 1024 if ON_GPU else 256  # of a step's samples, so that none is finished while timed
CHECKED = 8  # rows


@dataclass(frozen=True)
class Draw:
    """How tokens are drawn."""

    options: SamplingOptions
    softcap: float | None

    def ours(self, logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The operation."""
        return sample_token(logits, uniform, self.options, self.softcap)

    def eager(self, logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same distribution in torch, as samplers spell it; torch's own random numbers."""
        options = self.options
        logits = logits.float()
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        logprobs = logits.log_softmax(-1)
        if options.temperature == 0:
            token = logits.argmax(-1, keepdim=True)
            logprob = logprobs.gather(1, token)[:, 0]
            return token[:, 0], logprob, torch.zeros_like(logprob)
        tempered = logits / options.temperature
        if options.top_k:
            least = tempered.topk(options.top_k).values[:, -1:]
            tempered = tempered.masked_fill(tempered < least, -torch.inf)
        if options.top_p < 1:
            ranked, ranking = tempered.sort(-1, descending=True)
            mass = ranked.softmax(-1)
            ranked = ranked.masked_fill(mass.cumsum(-1) - mass >= options.top_p, -torch.inf)
            tempered = torch.empty_like(tempered).scatter_(1, ranking, ranked)
        probs = tempered.softmax(-1)
        if options.min_p:
            probs = probs.masked_fill(probs < options.min_p * probs.amax(-1, keepdim=True), 0)
        # What multinomial(1) does, which waits for the device besides.
        token = (probs / torch.empty_like(probs).exponential_()).argmax(-1, keepdim=True)
        sampled = probs.gather(1, token) / probs.sum(-1, keepdim=True)
        return token[:, 0], logprobs.gather(1, token)[:, 0], sampled[:, 0].log()

    def check(self, logits: Tensor, uniform: Tensor, token: Tensor, logprob: Tensor) -> None:
        """Tokens lie where the float64 reference puts uniforms that differ by what float32 sums
        over a tile and over the tiles may be off by; log-probs are those of the tokens drawn."""
        token, logprob = token[:CHECKED], logprob[:CHECKED]
        wide, at = logits[:CHECKED].double(), uniform[:CHECKED].double()
        terms = TILE + -(-logits.shape[1] // TILE)
        slack = 2 * terms * torch.finfo(torch.float32).eps
        low, high = (
            sample_token_ref(wide, (at + by).clamp(0, 1), self.options, self.softcap)[0]
            for by in (-slack, slack)
        )
        if not ((low <= token) & (token <= high)).all():
            raise NotLikeReference(f"sample_token: {token.tolist()}, not {low.tolist()}")
        exact, plain = (
            (x if self.softcap is None else torch.tanh(x / self.softcap) * self.softcap)
            .log_softmax(-1)
            .gather(1, token[:, None])[:, 0]
            for x in (wide, logits[:CHECKED].float())
        )
        assert_close("sample_token: logprob", logprob, exact, plain, factor=4)


def make_sets(shape: Shape, rows: int) -> list[tuple[Tensor, Tensor]]:
    """Logits and uniforms."""
    count = num_sets(rows * shape.vocab_size * shape.dtype.itemsize)
    return [
        (
            3 * randn(rows, shape.vocab_size, dtype=shape.dtype),
            rand(rows),
        )
        for _ in range(count)
    ]


def cost(shape: Shape, rows: int) -> tuple[int, int]:
    """Bytes: the logits once, and what is drawn. Operations: two exponentials and sums of each."""
    size = rows * shape.vocab_size
    capped = 0 if shape.final_softcap is None else 3
    return size * shape.dtype.itemsize + 20 * rows, (6 + capped) * size


def make_work(shape: Shape, rows: int, name: str) -> Work:
    """Tokens of `rows` samples."""
    draw = Draw(OPTIONS[name], shape.final_softcap)
    sets = make_sets(shape, rows)
    return Work(
        "sample_token",
        f"{shape.name} {rows} rows {name}",
        *cost(shape, rows),
        calls_on(draw.ours, sets),
        lambda out, factor: draw.check(*sets[0], *out[:2]),
        {"eager": Peer(lambda: calls_on(draw.eager, sets), compare=False)},
    )


def make_automaton(vocab_size: int) -> ScoreAutomaton:
    """A vocabulary of random text, with all that boxes are made of."""
    draw = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz \n\\{},0123456789"
    texts = ["".join(draw.choices(letters, k=draw.randint(1, 6))) for _ in range(vocab_size)]
    return ScoreAutomaton([text.encode() for text in texts], [0], "Scores:", 1, 10, DEVICE)


def make_step(shape: Shape, rows: int) -> Work:
    """The end of a decode step: tokens drawn and taken."""
    draw = Draw(OPTIONS["plain"], shape.final_softcap)
    automaton = make_automaton(shape.vocab_size)
    end_ids = torch.tensor([0], device=DEVICE)
    sets = []
    for logits, uniform in make_sets(shape, rows):
        live = LiveSamples.start(
            torch.full((rows,), MAX_TOKENS, device=DEVICE),
            torch.arange(rows, device=DEVICE),
            automaton.start(torch.full((rows,), 4), 4),
        )
        cursor = tuple(torch.zeros(rows, dtype=torch.int64, device=DEVICE) for _ in range(3))
        records = Records.empty(rows, MAX_TOKENS, DEVICE)
        sets.append((logits, uniform, live, records, cursor))

    def ours(logits: Tensor, uniform: Tensor, live: LiveSamples, *rest: object) -> Tensor:
        drawn = draw.ours(logits, uniform)
        records, cursor = rest
        accept_token(live, records, *drawn, automaton, end_ids, True, cursor)  # type: ignore[arg-type]
        return drawn[0]

    def check(token: Tensor, factor: float) -> None:
        logits, uniform, live, records, _ = sets[0]
        draw.check(logits, uniform, token, records.logprobs[0, :, 0])
        if not records.tokens[:, 0].equal(token) or not live.count.eq(1).all():
            raise NotLikeReference("accept_token: the tokens drawn are not those recorded")

    def eager(logits: Tensor, uniform: Tensor, live: LiveSamples, *rest: object) -> Tensor:
        token, logprob, sampling_logprob = draw.eager(logits, uniform)
        records = rest[0]
        assert isinstance(records, Records)
        at = live.slot, live.count.clamp_max(MAX_TOKENS - 1)
        records.tokens[at] = token
        records.logprobs[0][at] = logprob
        records.logprobs[1][at] = sampling_logprob
        return token

    num_bytes, flops = cost(shape, rows)
    return Work(
        "sample_token + accept_token",
        f"{shape.name} {rows} rows",
        num_bytes + 150 * rows,
        flops,
        calls_on(ours, sets),
        check,
        {"eager, no scores": Peer(lambda: calls_on(eager, sets), compare=False)},
    )


@pytest.mark.parametrize(("name", "rows", "options"), CASES)
def test_sample_token(
    name: str, rows: int, options: str, measured: Callable[[Work], Figure]
) -> None:
    measured(make_work(SHAPES[name], rows, options))


@pytest.mark.parametrize(("name", "rows"), STEPS)
def test_target_step(name: str, rows: int, measured: Callable[[Work], Figure]) -> None:
    measured(make_step(SHAPES[name], rows))
