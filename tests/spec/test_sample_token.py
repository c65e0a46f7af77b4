"""Philox uniforms, and the token that each draws from a row of logits."""

import hashlib
import math
import random
from collections import Counter
from collections.abc import Callable
from itertools import accumulate, product
from typing import Any

import pytest
import torch
from torch import Tensor

import kernels.sample_token as module
from kernels.launch import INTERPRETED
from kernels.sample_token import (
    TILE,
    SamplingOptions,
    philox4x32,
    sample_token,
    sample_token_ref,
    stream_key,
    uniforms,
)
from kernels.target import TARGETS
from tests.implementations import Implementation, assert_exact
from tests.oracles import sampling
from tests.rows import num_threads

LARGEST, SMALLEST = 1 - 2**-24, 2**-24  # of the uniforms
SLOW = INTERPRETED  # a row takes some ten milliseconds, and some hundred with top-k or top-p


# -- uniforms --------------------------------------------------------------------------------------

# Random123, tests/kat_vectors, philox4x32 10: counter, key, output.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip
# Words and 64-bit numbers on both sides of 2^31, 2^32 and 2^63.
WORDS = [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 0x299F31D0, 0xA4093822, 12345]
NUMBERS = [0, 1, 2**31, 2**32 - 1, 2**32, 2**32 + 5, 2**63 - 1, 0x0370734413198A2E]


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN_ANSWERS)
def test_philox_gives_the_known_answers(counter: str, key: str, output: str) -> None:
    k0, k1, c0, c1, c2, c3 = (int(word, 16) for word in (key + " " + counter).split())
    expected = tuple(int(word, 16) for word in output.split())
    assert sampling.philox((k0, k1), (c0, c1, c2, c3)) == expected
    words = philox4x32(*map(torch.tensor, (k0, k1, c0, c1, c2, c3)))
    assert tuple(int(word) for word in words) == expected


def check_uniforms(on: Implementation, keys: Tensor, index: Tensor, positions: Tensor) -> None:
    """Each is that of plain Python, to the bit."""
    drawn = on.run(uniforms, *(x.to(on.device) for x in (keys, index, positions)))
    assert drawn.dtype == torch.float32
    columns = positions if positions.dim() > 1 else positions[:, None]
    rows = zip(keys.tolist(), index.tolist(), columns.tolist(), strict=True)
    expected = [[sampling.uniform((a, b), i, at) for at in places] for (a, b), i, places in rows]
    assert drawn.reshape(columns.shape).tolist() == expected


def test_uniforms_are_the_first_philox_word(on: Implementation) -> None:
    """Also of the zero key at two positions where the word's leading bits are all 0, and all 1."""
    keys = torch.tensor([[a, b] for a, b in zip(WORDS, reversed(WORDS), strict=True)])
    positions = torch.tensor([NUMBERS[i:] + NUMBERS[:i] for i in range(8)])
    check_uniforms(on, keys, torch.tensor(NUMBERS), positions)
    zeros, ends = torch.zeros(1, 2, dtype=torch.int64), torch.tensor([[296_355, 567_928]])
    assert [sampling.uniform((0, 0), 0, at) for at in ends[0].tolist()] == [SMALLEST, LARGEST]
    check_uniforms(on, zeros, zeros[0, :1], ends)


@pytest.mark.parametrize("shape", [(0,), (1,), (63,), (300,), (0, 4), (3, 0), (129, 3), (64, 5)])
def test_uniforms_of_any_shape_and_strides(on: Implementation, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    table = torch.randint(0, 2**32, (shape[0], 3), generator=generator)
    table[:, 2] <<= 20
    steps = torch.arange(7, 7 + 2 * math.prod(shape[1:]), 2)
    positions = table[:, 1] if len(shape) == 1 else steps.expand(shape[0], -1)
    assert positions.shape == shape
    check_uniforms(on, table[:, :2], table[:, 2], positions)


def test_stream_keys_are_fixed_and_distinct() -> None:
    # Changing these changes every published sample.
    row = hashlib.sha256("row é".encode()).digest()
    expected = hashlib.sha256(b"\x2a" + bytes(7) + row + b"tie").digest()
    words = (int.from_bytes(expected[:4], "little"), int.from_bytes(expected[4:8], "little"))
    assert stream_key(42, "row é", "tie") == words
    keys = [
        stream_key(seed, row_id, stream)
        for seed in (0, 1, 2**32, 2**64 - 1)
        for row_id in ("", "1", "token", "\ud800", "\ud801", "\U0001f600")
        for stream in ("token", "order", "tie")
    ]
    assert len(set(keys)) == len(keys)
    assert all(0 <= word < 2**32 for key in keys for word in key)


@pytest.mark.parametrize(
    ("seed", "stream"), [(-1, "token"), (2**64, "token"), (1.0, "token"), (True, "token"), (0, "x")]
)
def test_bad_streams(seed: int, stream: str) -> None:
    with pytest.raises(ValueError, match=r"seed must be|stream must be"):
        stream_key(seed, "row", stream)


# -- tokens ----------------------------------------------------------------------------------------


def random_logits(batch: int, vocab_size: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, vocab_size, generator=generator) * scale


def halves(on: Implementation) -> tuple[torch.dtype, ...]:
    """Half types of logits; the C++ takes one of them."""
    return (torch.bfloat16,) if on.name == "cpp" else (torch.bfloat16, torch.float16)


def random_uniform(batch: int, seed: int = 0) -> Tensor:
    uniform = torch.rand(batch, generator=torch.Generator().manual_seed(seed))
    return uniform.clamp(SMALLEST, LARGEST)


def draws_at_ends(
    logits: Tensor, options: SamplingOptions, softcap: float | None = None, most: int = 8
) -> tuple[Tensor, ...]:
    """Rows of logits, uniforms, the tokens drawn and their log-probs: at most so many draws from
    each row, just inside both ends of the exact intervals of its last token, others, and the first.

    float32 moves the ends by the rounding of weights (an exponent is off by units of what it is,
    and 3 of the soft-cap's tanh) and of at most TILE + tiles additions.
    """
    draws: list[tuple[int, float, int, float, float]] = []
    tiles = -(-logits.shape[1] // TILE)
    for row, values in enumerate(logits.double().tolist()):
        if softcap is not None:
            values = [softcap * math.tanh(x / softcap) for x in values]
        exact, margin = sampling.distribution(values, options)
        assert margin == 0 or margin > 1e-5, "another seed: float32 may decide otherwise"
        running = [0.0, *accumulate(exact)]
        kept = [i for i, p in enumerate(exact) if p > 0]
        highest = max(values)
        normalizer = math.log(math.fsum(math.exp(x - highest) for x in values))
        exponent = sum(exact[i] * (highest - values[i]) for i in kept)
        units = 4 + (2 * exponent + 3 * (softcap or 0)) / options.temperature
        error = 2**-23 * units + 2**-24 * (min(TILE, len(values)) + tiles)
        wide = [i for i in kept if exact[i] > 2 * error]
        assert wide
        others = wide[1:-1]
        random.Random(row).shuffle(others)
        tokens = list(dict.fromkeys([wide[-1], *others[: most // 2 - 2], wide[0]]))
        for i, at_the_end in list(product(tokens, (True, False)))[:most]:
            low = SMALLEST if i == kept[0] else running[i] + error
            high = LARGEST if i == kept[-1] else running[i + 1] - error
            logprob = values[i] - highest - normalizer
            draws.append((row, high if at_the_end else low, i, logprob, math.log(exact[i])))
    rows, uniform, token, *logprobs = zip(*draws, strict=True)
    exactly = (torch.tensor(x, dtype=torch.float64) for x in logprobs)
    return logits[list(rows)], torch.tensor(uniform), torch.tensor(token), *exactly


def check(
    on: Implementation,
    logits: Tensor,
    options: SamplingOptions,
    softcap: float | None = None,
    most: int = 8,
) -> None:
    """At both ends of an interval its token is drawn, with the log-probs of the reference: numbers
    less the logarithm of a sum, which is rounded like 1 or more. Those in float64 are of the exact
    distribution. Every second uniform is read."""
    if SLOW:
        most = 1 if options.top_k or options.top_p < 1 else 3
    rows, uniform, token, *exact = draws_at_ends(logits, options, softcap, most)
    every_second = torch.stack((uniform, torch.full_like(uniform, math.nan)), 1)[:, 0]
    arguments = rows.to(on.device), every_second.to(on.device)
    found, *logprobs = on.run(lambda x, u: sample_token(x, u, options, softcap), *arguments)
    assert found.cpu().equal(token)

    def with_one(values: list[Tensor]) -> tuple[Tensor, ...]:
        return tuple(torch.cat((x, x.new_ones(1))) for x in values)

    def reference(x: Tensor, u: Tensor) -> tuple[Tensor, ...]:
        drawn, *expected = sample_token_ref(x, u, options, softcap)
        assert drawn.equal(token)
        if x.dtype == torch.float64:
            torch.testing.assert_close(expected, exact, rtol=1e-12, atol=1e-12)
        return with_one(expected)

    assert_exact(with_one(logprobs), reference, rows, uniform)


OPTIONS = [
    *(SamplingOptions(temperature) for temperature in (0.3, 1.0, 1.7)),
    *(SamplingOptions(1.0, min_p=0.1), SamplingOptions(1.0, top_p=0.9)),
    *(SamplingOptions(1.0, top_k=1), SamplingOptions(1.7, top_k=5)),
    *(SamplingOptions(0.3, top_p=0.05), SamplingOptions(0.5, top_k=50, top_p=0.95)),
    SamplingOptions(1.7, top_k=40, top_p=0.9),
    SamplingOptions(1.0, top_k=300, top_p=0.6, min_p=0.02),
    SamplingOptions(2.0, top_k=700, top_p=0.8, min_p=0.02),
]
# In part one tile, one, and several; a filter meets some of one tile and some of several.
SIZES = [1, 1024, 5, 1025, 63, 2048, 1023, 3001]
PAIRS = [(x, SIZES[(i + j) % 8]) for i, x in enumerate(OPTIONS) for j in (0, 3, 5)]


@pytest.mark.parametrize(("options", "vocab_size"), PAIRS, ids=str)
def test_each_token_has_its_interval(
    on: Implementation, options: SamplingOptions, vocab_size: int
) -> None:
    check(on, random_logits(1 if SLOW else 3, vocab_size, vocab_size), options)


def test_odd_rows(on: Implementation) -> None:
    """All equal, half of it impossible, one token certain, a tie for the first."""
    logits = random_logits(4, 1500)
    logits[0] = 0.25
    logits[1, :750] = -math.inf
    logits[2, 750] = 60
    logits[3, -1] = logits[3].max()
    for options in (SamplingOptions(0.7), SamplingOptions(1.0, top_p=0.9)):
        check(on, logits, options)


LOG = [math.log(p) for p in (0.4, 0.3, 0.2, 0.1)]
STEP, EQUAL, ZEROS = [0.0] * 6 + [1.0, 0.0], [0.0] * 8, [0.0, -0.0, 0.0, -0.0, -1.0]
FEW, TINY = [-math.inf, 1, -math.inf, 2, -math.inf], [3e-45, 1e-45, -1e-45, 2e-38, 0.0, -3e-45]
HUGE = [-3e38, 3e38, 3.2e38, -1e30]


# Logits, options, and the tokens that stay, written by hand.
@pytest.mark.parametrize(
    ("logits", "options", "kept"),
    [
        # Of ties at the boundary the lowest indices.
        (STEP, SamplingOptions(1.0, top_k=3), [0, 1, 6]),
        ([-3 - x for x in STEP], SamplingOptions(1.0, top_k=3), [0, 1, 2]),
        (STEP, SamplingOptions(1.0, top_k=7, top_p=0.77), [0, 1, 2, 3, 6]),
        # Top-p ends among other ties than top-k.
        ([2, 2, 1, 2, 1], SamplingOptions(1.0, top_k=4, top_p=0.5), [0, 1]),
        # The mass reaches 0.5 exactly with the fourth.
        (EQUAL, SamplingOptions(1.0, top_p=0.5), [0, 1, 2, 3]),
        (EQUAL, SamplingOptions(1.0, top_p=0.51), [0, 1, 2, 3, 4]),
        # Top-p of what top-k left: .4 / .7 reaches .56.
        (LOG, SamplingOptions(1.0, top_k=2, top_p=0.56), [0]),
        (LOG, SamplingOptions(1.0, top_p=0.56), [0, 1]),
        # Temperature first: at T = 0.5 the first has .16 / .30 of the mass.
        (LOG, SamplingOptions(0.5, top_p=0.5), [0]),
        # Min-p is relative to the largest at that temperature: .2 / .4 squared is .25.
        (LOG, SamplingOptions(0.5, min_p=0.26), [0, 1]),
        # Both zeros are equal.
        (ZEROS, SamplingOptions(1.0, top_k=2), [0, 1]),
        (ZEROS, SamplingOptions(1.0, top_k=3), [0, 1, 2]),
        # Infinite, denormal and huge logits keep their order.
        (FEW, SamplingOptions(1.0, top_k=4), [1, 3]),
        (FEW, SamplingOptions(1.0, top_k=3, top_p=0.9), [1, 3]),
        (TINY, SamplingOptions(1.0, top_k=2), [0, 3]),
        (HUGE, SamplingOptions(8e37, top_k=3, top_p=0.995), [1, 2, 3]),
        (HUGE, SamplingOptions(1.0, top_p=0.5), [2]),
    ],
    ids=str,
)
def test_filters_keep(
    on: Implementation, logits: list[float], options: SamplingOptions, kept: list[int]
) -> None:
    exact, _ = sampling.distribution(logits, options)
    assert [i for i, p in enumerate(exact) if p > 0] == kept
    row = torch.tensor([logits])
    for dtype in (torch.float32, *halves(on))[: 2 if SLOW else 3]:
        if row.to(dtype).float().equal(row):
            check(on, row.to(dtype), options)


def test_filters_of_neighbouring_numbers(on: Implementation) -> None:
    """Between which there is no other: the bisection ends at each of them."""
    steps = torch.tensor([[3, 0, 2, 1, 0, 1, 3, 2]])
    for top_k in range(1, 8):
        check(on, (1 + steps / 128).bfloat16(), SamplingOptions(1.0, top_k=top_k))
        check(on, (-1 - steps / 128).bfloat16(), SamplingOptions(1.0, top_p=top_k / 8))


def test_filters_of_random_ties(on: Implementation) -> None:
    """Small integers: boundaries of top-k and top-p fall among equal logits."""
    generator = random.Random(0)
    done = 0
    while done < (9 if SLOW else 100):
        values = [generator.randint(-4, 4) for _ in range(generator.randint(1, 12))]
        options = SamplingOptions(
            temperature=generator.choice([0.5, 1.0, 1.7]),
            top_k=generator.choice([0, 1, 2, 3, 5, 20]),
            top_p=generator.choice([1.0, 0.05, 0.4, 0.77, 0.99]),
            min_p=generator.choice([0.0, 0.0, 0.03, 0.3, 1.0]),
        )
        if sampling.distribution([float(v) for v in values], options)[1] > 1e-5:
            dtype = generator.choice((torch.float32, *halves(on)))
            check(on, torch.tensor([values]).to(dtype), options, most=24)
            done += 1


def test_ties_of_more_than_a_block(on: Implementation) -> None:
    assert module._launch(5000, TARGETS["sm_90"])["BLOCK"] == 4096
    equal = torch.full((1, 5000), -2.0, dtype=torch.bfloat16)
    check(on, equal, SamplingOptions(1.0, top_k=4500, top_p=0.9501))
    check(on, equal, SamplingOptions(1.0, top_k=4700))


def test_flat_rows(on: Implementation, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows where top-p keeps many tokens: on CPU they are ranked 64 at first, then ever more."""
    widths: list[int] = []
    topk = Tensor.topk

    def recorded(self: Tensor, k: int) -> Any:
        widths.append(k)
        return topk(self, k)

    logits = torch.cat([random_logits(2, 2500, 3, scale=0.1), random_logits(2, 2500, 4, scale=4.0)])
    logits[1:3] = logits[1:3].mul(8).round() / 8  # many ties
    monkeypatch.setattr(Tensor, "topk", recorded)
    check(on, logits[:1] if SLOW else logits, SamplingOptions(1.0, top_p=0.9))
    assert widths == ([64, 512, 2500] if on.name == "torch" else [])


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_half_types_and_the_soft_cap_come_first(on: Implementation, softcap: float | None) -> None:
    """Half types have ties everywhere."""
    logits = random_logits(1 if SLOW else 3, 1100, 5, scale=3.0)
    for dtype in (torch.float32, *halves(on)):
        half = logits.to(dtype)
        check(on, half, SamplingOptions(0.3), softcap)
        check(on, half, SamplingOptions(1.0, top_k=30, top_p=0.8), softcap)
        arguments = half.to(on.device), random_uniform(len(half)).to(on.device)
        for options in (SamplingOptions(0), SamplingOptions(0.3)):
            found = on.run(sample_token, *arguments, options, softcap)
            widened = sample_token(arguments[0].float(), arguments[1], options, softcap)
            assert all(x.equal(y) for x, y in zip(found, widened, strict=True))


@pytest.mark.parametrize("vocab_size", [1, 63, 1024, 1025, 3000])
def test_greedy_takes_the_first_maximum(on: Implementation, vocab_size: int) -> None:
    """And reads neither the uniform nor the filters."""
    logits = random_logits(4, vocab_size, 3)
    logits[1, vocab_size // 3 :: 5] = 20  # ties in several tiles
    logits[2] = -7
    logits[3, vocab_size - 1] = 30
    nan, options = torch.full((4,), math.nan), SamplingOptions(0, 2, 0.5, 0.1)
    arguments = logits.to(on.device), nan.to(on.device), options
    token, *logprobs = on.run(sample_token, *arguments)
    assert token.tolist() == [row.index(max(row)) for row in logits.tolist()]

    def reference(x: Tensor) -> tuple[Tensor, Tensor]:
        logprob = x.log_softmax(-1).gather(1, token.cpu()[:, None])[:, 0]
        return logprob, torch.zeros_like(logprob)

    assert_exact(tuple(logprobs), reference, logits)
    assert sample_token_ref(*arguments)[0].equal(token)


def test_greedy_ties_are_those_of_the_capped_logits(on: Implementation) -> None:
    logits = torch.tensor([[1.0, 400.0, 500.0], [-math.inf, -400.0, -500.0]], device=on.device)
    uniform = torch.zeros(2, device=on.device)
    token, logprob, _ = on.run(sample_token, logits, uniform, SamplingOptions(0), 30.0)
    assert token.tolist() == [1, 0]
    torch.testing.assert_close(logprob.cpu(), -torch.tensor([2.0, 3.0]).log())


@pytest.mark.parametrize("temperature", [1e-5, 1.0, 1e6])
@pytest.mark.parametrize("vocab_size", [7, 2 * TILE + 3])
def test_tokens_of_weight_0_are_never_drawn(
    on: Implementation, vocab_size: int, temperature: float
) -> None:
    """Nor by a uniform of 1, which Philox never gives; whole tiles are -inf."""
    logits, options = torch.full((4, vocab_size), -math.inf), SamplingOptions(temperature)
    logits[0, 3] = 2.0
    logits[1, 2:5] = torch.tensor([1.0, -1e4, 1.0])
    logits[2, -2] = -3.0
    logits[3, 1:4] = torch.tensor([0.0, -1e30, -1e30])
    for value in (SMALLEST, 0.5, 1.0):
        uniform = torch.full((4,), value).to(on.device)
        results = on.run(sample_token, logits.to(on.device), uniform, options)
        for found in (results, sample_token_ref(logits, uniform.cpu(), options)):
            token, *logprobs = (x.cpu() for x in found)
            assert (logits.gather(1, token[:, None]) > -math.inf).all()
            assert all(x.isfinite().all() for x in logprobs)
            if temperature <= 1:
                assert token.tolist() == [3, 2 if value < 0.5 else token[1], vocab_size - 2, 1]
                assert token[1] == 4 if value == 1 else token[1] in (2, 4)


def test_rounding_of_the_total_falls_to_the_last_token(on: Implementation) -> None:
    logits = random_logits(2 if SLOW else 64, 2 * TILE + 5, seed=9)
    logits[:, 1500:] = -math.inf
    ones = torch.ones(len(logits), device=on.device)
    token = on.run(sample_token, logits.to(on.device), ones, SamplingOptions(1.0))[0]
    assert (token < 1500).all() and (token >= TILE).all()
    small = logits[:, :20].contiguous()
    token = on.run(sample_token, small.to(on.device), ones, SamplingOptions(1.0, 3))[0]
    assert token.cpu().equal(small.topk(3).indices.max(1).values)


KINDS = [SamplingOptions(0), SamplingOptions(0.7), SamplingOptions(1.0, 3, 0.8, 0.01)]


@pytest.mark.parametrize(
    ("options", "vocab_size"), list(zip(KINDS, (1100, 1100, 6), strict=True)), ids=str
)
def test_a_row_without_a_finite_maximum_harms_no_other(
    on: Implementation, options: SamplingOptions, vocab_size: int
) -> None:
    """It gets some token, and log-probs of NaN."""
    logits, uniform = random_logits(5, vocab_size, 1).to(on.device), random_uniform(5).to(on.device)
    logits[0, 2] = logits[1] = math.nan
    logits[3, 2] = math.inf
    logits[4] = -math.inf
    results = on.run(sample_token, logits, uniform, options)
    for found in (results, sample_token_ref(logits, uniform, options)):
        token, logprob, sampling_logprob = found
        assert ((token >= 0) & (token < vocab_size)).all()
        assert logprob.isnan().tolist() == [True, True, False, True, True]
        assert options.temperature == 0 or sampling_logprob.isnan().equal(logprob.isnan())
    alone = sample_token(logits[2:3], uniform[2:3], options)
    assert all(x[2:3].equal(y) for x, y in zip(results, alone, strict=True))


@pytest.mark.parametrize(
    ("vocab_size", "size"),
    [(1500, 2)] if SLOW else [(1, 70), (5, 70), (500, 70), (1025, 30), (3001, 20), (40000, 9)],
)
def test_a_row_depends_on_neither_its_batch_nor_threads(
    on: Implementation, vocab_size: int, size: int
) -> None:
    """Bit for bit, in any batch size, at any place, with 1 to 4 threads."""
    logits, uniform = random_logits(size, vocab_size, 2), random_uniform(size).to(on.device)
    logits[::2, 0] = 16  # near-certain tokens: their log-probs show every bit of the normalizer
    logits = logits.to(on.device)
    for options in KINDS if SLOW else (*KINDS, OPTIONS[1], OPTIONS[-1]):
        with num_threads(1):
            alone = [sample_token(logits[i:][:1], uniform[i:][:1], options) for i in range(size)]
        expected = [torch.cat(parts) for parts in zip(*alone, strict=True)]
        for threads in (1, 2, 3, 4) if on.device.type == "cpu" and not SLOW else (1,):
            for rows in (slice(size), slice(1, 8))[: 1 if SLOW else 2]:
                with num_threads(threads):
                    batch = sample_token(logits[rows], uniform[rows], options)
                assert all(x.equal(y[rows]) for x, y in zip(batch, expected, strict=True))


PLAIN = {"_tile_stats_kernel": 1, "_sample_from_tiles_kernel": 1}
MASKED = PLAIN | {"_filtered_tile_sums_kernel": 1}
SEARCHED = MASKED | {"_threshold_kernel": 1}


@pytest.mark.parametrize(
    ("options", "launches"),
    [
        (SamplingOptions(0, 2, 0.5, 0.1), PLAIN),
        (SamplingOptions(1.0), PLAIN),
        (SamplingOptions(1.0, top_k=9), PLAIN),
        (SamplingOptions(1.0, top_k=10), PLAIN),
        (SamplingOptions(1.0, min_p=0.1), MASKED),
        (SamplingOptions(1.0, top_k=8), SEARCHED),
        (SamplingOptions(1.0, top_p=0.9), SEARCHED),
    ],
    ids=str,
)
def test_what_runs(on: Implementation, options: SamplingOptions, launches: dict[str, int]) -> None:
    """One C++ function, or the kernels that the options need; for no rows nothing."""
    logits, uniform = random_logits(1, 9).to(on.device), random_uniform(1).to(on.device)
    with on.counted() as counts:
        sample_token(logits, uniform, options)
        expected = {"torch": {}, "cpp": {"sample_token": 1}, "triton": launches}[on.name]
        assert counts == Counter(expected)
        results = sample_token(logits[:0], uniform[:0], options)
        assert counts == Counter(expected)
    assert [x.shape for x in results] == [(0,)] * 3 and results[0].dtype == torch.int64


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1}, {"temperature": 1e-6}, {"temperature": math.inf},
        {"temperature": math.nan}, {"top_k": -1}, {"top_k": 1.5}, {"top_k": True}, {"top_p": 0.0},
        {"top_p": 1.01}, {"top_p": math.nan}, {"min_p": -0.1}, {"min_p": 1.1}, {"min_p": math.nan},
    ],
    ids=str,
)  # fmt: skip
def test_bad_options(wrong: dict[str, Any]) -> None:
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name} must be .*{value}"):
        SamplingOptions(**wrong)


def test_bad_arguments(on: Implementation) -> None:
    def refuse(message: str, op: Callable[..., Any], *arguments: Any) -> None:
        given = [x.to(on.device) if isinstance(x, Tensor) else x for x in arguments]
        with pytest.raises(ValueError, match=message):
            op(*given)

    options, uniform, logits = SamplingOptions(), torch.zeros(2), torch.zeros(2, 4)
    refuse(r"got .*float64", sample_token, logits.double(), uniform, options)
    refuse(r"got \(2, 0\)", sample_token, logits[:, :0], uniform, options)
    refuse(r"strides \(1, 4\)", sample_token, logits.T, torch.zeros(4), options)
    refuse(r"uniform must be \(2,\) .*, got \(3,\)", sample_token, logits, torch.zeros(3), options)
    for cap in (0.0, -1.0, math.inf, math.nan):
        refuse(f"positive and finite, got {cap}", sample_token, logits, uniform, options, cap)
    keys, index = torch.zeros(2, 2, dtype=torch.int64), torch.arange(2)
    refuse(r"sample_index must be \(2,\)", uniforms, keys, torch.arange(3), index)
    refuse(r"positions must be \(2,\)", uniforms, keys, index, torch.arange(3))
    refuse(r"positions must be .*int64, got .*int32", uniforms, keys, index, index.int())


# -- Triton alone ----------------------------------------------------------------------------------


@pytest.mark.implementations("triton")
@pytest.mark.skipif(not INTERPRETED, reason="counts calls that a compiled kernel does not make")
def test_passes_of_the_bisection(on: Implementation, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most 16, 8 for bfloat16; few where a bound lies near or one token is soon left between."""
    passes, one_pass = 0, module._sums_above

    def counting(*arguments: object) -> object:
        nonlocal passes
        passes += 1
        return one_pass(*arguments)

    monkeypatch.setattr(module, "_sums_above", counting)

    def count(logits: Tensor, options: SamplingOptions) -> int:
        nonlocal passes
        passes = 0
        sample_token(logits[None], torch.full((1,), 0.5), options)
        return passes

    # Two tokens of one float32, the bounds of no help: every bit is looked for.
    worst = torch.tensor([1e30, -1.1, -1.1, -1e30])
    assert count(worst, SamplingOptions(1e30, top_k=2)) == 16
    assert count(worst.bfloat16(), SamplingOptions(1e30, top_k=2)) == 8
    # The same without the tie: one token is left between.
    assert count(torch.tensor([1e30, -1.1, -1.2, -1e30]), SamplingOptions(1.0, top_k=2)) < 10
    # The tail that top-p leaves out begins just under the maximum; two equal tokens.
    near = torch.tensor([9.0, 9.0, 8.9, -9.0])
    assert count(near, SamplingOptions(1e-5, top_p=0.9)) <= 3
    # As many tiles as tokens stay: none lies below the smallest tile maximum.
    tiles = torch.full((3 * TILE,), -5.0)
    tiles[::TILE] = 7
    assert count(tiles, SamplingOptions(1.0, top_k=3)) == 0
    assert count(tiles, SamplingOptions(1.0, top_k=4)) > 4


# On a GPU: real sizes.
LARGE = [
    *(SamplingOptions(0), SamplingOptions(1.0), SamplingOptions(0.7, min_p=0.05)),
    *(SamplingOptions(1.0, top_k=50), SamplingOptions(1.0, top_p=0.9)),
    SamplingOptions(0.8, top_k=1000, top_p=0.95, min_p=0.001),
]


@pytest.mark.gpu
@pytest.mark.implementations("triton")
@pytest.mark.parametrize("dtype_of_logits", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("vocab_size", "softcap"), [(151_936, None), (256_000, 30.0)])
@pytest.mark.parametrize("options", LARGE, ids=str)
def test_large_vocabularies(
    on: Implementation,
    options: SamplingOptions,
    vocab_size: int,
    softcap: float | None,
    dtype_of_logits: torch.dtype,
) -> None:
    """Tokens lie at their uniforms in the reference's own distribution in float64, log-probs are
    its own, and a second run gives the same bits."""
    logits = random_logits(64, vocab_size, vocab_size, scale=3.0).to(dtype_of_logits).to(on.device)
    uniform = random_uniform(64).to(on.device)
    first = sample_token(logits, uniform, options, softcap)
    for result, again in zip(first, sample_token(logits, uniform, options, softcap), strict=True):
        assert result.equal(again)
    token, logprob, sampling_logprob = first
    exact, full, sampled = sample_token_ref(logits.double(), uniform.double(), options, softcap)
    same = token == exact
    if options.temperature == 0:
        assert same.all() or softcap is not None  # float32 ties what float64 tells apart
    # An end of an interval moves by units of the largest logit and of the additions: some hundred
    # units in the last place of 1, while a token of a flat row is some thousand wide.
    assert same.float().mean() >= 0.9
    units = 2**-23 * (8 + 2 * logits.abs().max().item() + 3 * (softcap or 0))
    assert (logprob - full)[same].abs().max() <= units + 2**-24 * (vocab_size // TILE)
    if options.temperature:
        bound = units / options.temperature + 2**-24 * (TILE + vocab_size // TILE)
        difference = (sampling_logprob - sampled)[same].abs()
        # A row's total moves by the weight of a token that rounding puts beyond the filter's end.
        assert (difference > bound).sum() <= 1
        assert difference.max() <= bound + 2e-3


@pytest.mark.gpu
@pytest.mark.implementations("triton")
@pytest.mark.parametrize("options", LARGE, ids=str)
def test_a_cuda_graph_replays_sampling(on: Implementation, options: SamplingOptions) -> None:
    logits = random_logits(8, 151_936, scale=3.0).bfloat16().to(on.device)
    uniform = random_uniform(8).to(on.device)
    sample_token(logits, uniform, options)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = sample_token(logits, uniform, options)
    logits.copy_(random_logits(8, 151_936, 1, scale=3.0))
    uniform.copy_(random_uniform(8, 1))
    graph.replay()
    for result, expected in zip(results, sample_token(logits, uniform, options), strict=True):
        assert result.equal(expected)
