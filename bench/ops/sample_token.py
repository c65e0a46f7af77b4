"""Drawing a step's tokens from raw logits, and the uniforms that they are drawn with."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from bench.case import Arguments, NotLikeReference, OpCase, assert_close, assert_equal, same_inputs
from bench.shapes import SHAPES, Shape
from bench.timing import DEVICE, ON_GPU, Fill, rand
from kernels.sample_token import TILE, SamplingOptions, sample_token, sample_token_ref, uniforms

OPTIONS = {
    "greedy": SamplingOptions(temperature=0),
    "plain": SamplingOptions(temperature=0.5),
    "temperature 1": SamplingOptions(temperature=1),
    "top-k": SamplingOptions(temperature=0.5, top_k=50),
    "top-p": SamplingOptions(temperature=1, top_p=0.95),
    "min-p": SamplingOptions(temperature=0.5, min_p=0.05),
    "filters": SamplingOptions(temperature=0.5, top_k=50, top_p=0.95, min_p=0.02),
}
CHECKED = 8  # rows

Drawn = tuple[Tensor, Tensor, Tensor]  # tokens, log-probs, log-probs of the sampling distribution


def eager(
    logits: Tensor, uniform: Tensor, options: SamplingOptions, softcap: float | None
) -> Drawn:
    """The same distribution in torch, as samplers spell it; torch's own random numbers."""
    logits = logits.float()
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
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


def check_drawn(arguments: Arguments, token: Tensor, logprob: Tensor) -> None:
    """Hold tokens to where the float64 reference puts uniforms that differ by what float32 sums
    over a tile and over the tiles may be off by, and log-probs to those of the tokens drawn."""
    logits, uniform, options, softcap = arguments
    token, logprob = token[:CHECKED], logprob[:CHECKED]
    wide, at = logits[:CHECKED].double(), uniform[:CHECKED].double()
    terms = TILE + -(-logits.shape[1] // TILE)
    slack = 2 * terms * torch.finfo(torch.float32).eps
    low, high = (
        sample_token_ref(wide, (at + by).clamp(0, 1), options, softcap)[0] for by in (-slack, slack)
    )
    if not ((low <= token) & (token <= high)).all():
        raise NotLikeReference(f"sample_token: {token.tolist()}, not {low.tolist()}")
    exact, plain = (
        (x if softcap is None else torch.tanh(x / softcap) * softcap)
        .log_softmax(-1)
        .gather(1, token[:, None])[:, 0]
        for x in (wide, logits[:CHECKED].float())
    )
    assert_close("sample_token: logprob", logprob, exact, plain, factor=4)


def draw(shape: Shape, rows: int, name: str) -> OpCase:
    """Tokens of `rows` samples. Bytes: the logits once, and what is drawn. Operations: two
    exponentials and sums of each."""
    size, softcap = rows * shape.vocab_size, shape.final_softcap

    def make_inputs(tensor: Fill, count: int) -> list[Arguments]:
        return [
            (
                tensor(rows, shape.vocab_size, dtype=shape.dtype, scale=3.0),
                rand(rows),
                OPTIONS[name],
                softcap,
            )
            for _ in range(count)
        ]

    return OpCase(
        "sample_token",
        f"{shape.name} {rows} rows {name}",
        make_inputs,
        sample_token,
        lambda arguments, out, factor: check_drawn(arguments, *out[:2]),
        size * shape.dtype.itemsize + 20 * rows,
        (6 if softcap is None else 9) * size,
        same_inputs(compare=False, eager=eager),
    )


def draw_uniforms(rows: int, positions: tuple[int, ...]) -> OpCase:
    """The uniforms of `rows` samples at one position, or at several."""

    def make_inputs(tensor: Fill, count: int) -> list[Arguments]:
        keys, index = torch.arange(2 * rows).view(rows, 2), torch.arange(rows)
        at = torch.arange(index.new_empty(rows, *positions).numel()).view(rows, *positions)
        return [tuple(x.to(DEVICE) for x in (keys, index, at))] * count

    def check(arguments: Arguments, out: Tensor, factor: float) -> None:
        assert_equal("uniforms", out, uniforms(*(x.cpu() for x in arguments)))

    return OpCase("uniforms", f"{rows} rows {positions}", make_inputs, uniforms, check)


def variants(shape: Shape, rows: int) -> Iterator[OpCase]:
    """Greedy, plain and with every filter, in float32 too; uniforms of a step and of a block of
    steps."""
    for dtype in dict.fromkeys((shape.dtype, torch.float32)):
        for name in OPTIONS:
            yield draw(replace(shape, dtype=dtype), rows, name)
    yield draw_uniforms(rows, ())
    yield draw_uniforms(rows, (8,))


CASES = [
    draw(SHAPES[name], rows, options)
    for name, rows, options in (
        [("qwen3-8b", 64, options) for options in ("greedy", "plain", "filters", "top-p")]
        + [("qwen3-8b", 128, "plain"), ("gemma2-27b", 64, "plain"), ("gemma2-27b", 64, "filters")]
        if ON_GPU
        else [("qwen3-107m", 32, options) for options in ("greedy", "plain", "filters")]
    )
]
