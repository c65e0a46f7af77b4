"""The Triton kernels of uniforms and sampling against plain Python and the float64 reference."""

import math
import random
from collections import Counter

import pytest
import torch
from torch import Tensor

import kernels.sample_token as module
from kernels.launch import INTERPRETED
from kernels.sample_token import TILE, SamplingOptions, sample_token, sample_token_ref, uniforms
from kernels.target import TARGETS
from tests.sampling_oracle import python_distribution
from tests.triton_device import DEVICE, ON_GPU, assert_like_reference, counted, on_triton

pytestmark = on_triton

LARGEST, SMALLEST = 1 - 2**-24, 2**-24  # of the uniforms
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


# -- uniforms


def python_philox(key: tuple[int, int], counter: tuple[int, int, int, int]) -> int:
    """The first word of Philox4x32-10 with Python's integers."""
    (k0, k1), (c0, c1, c2, c3) = key, counter
    for number in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        r0, r1 = (k0 + number * 0x9E3779B9) % 2**32, (k1 + number * 0xBB67AE85) % 2**32
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ r0, b % 2**32, (a >> 32) ^ c3 ^ r1, a % 2**32
    return c0


# Words and 64-bit numbers on both sides of 2^31, 2^32 and 2^63.
WORDS = [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 0x299F31D0, 0xA4093822, 12345]
NUMBERS = [0, 1, 2**31, 2**32 - 1, 2**32, 2**32 + 5, 2**63 - 1, 0x0370734413198A2E]


def test_uniforms_are_philox_bit_for_bit() -> None:
    keys = torch.tensor([[a, b] for a, b in zip(WORDS, reversed(WORDS), strict=True)])
    index = torch.tensor(NUMBERS)
    positions = torch.tensor([NUMBERS[i:] + NUMBERS[:i] for i in range(8)])
    with counted() as counts:
        drawn = uniforms(keys.to(DEVICE), index.to(DEVICE), positions.to(DEVICE)).cpu()
    assert counts == {"_uniforms_kernel": 1}
    assert drawn.equal(module._torch_uniforms(keys, index, positions))
    for b in range(8):
        for p in range(8):
            i, place = NUMBERS[b], int(positions[b, p])
            counter = (i % 2**32, i >> 32, place % 2**32, place >> 32)
            word = python_philox((WORDS[b], WORDS[7 - b]), counter)
            assert drawn[b, p].item() == ((word >> 9) + 0.5) / 2**23


@pytest.mark.parametrize("shape", [(0,), (1,), (63,), (300,), (0, 4), (3, 0), (129, 3), (64, 5)])
def test_uniforms_of_any_shape_and_strides(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    table = torch.randint(0, 2**32, (shape[0], 3), generator=generator)
    table[:, 2] <<= 20
    steps = torch.arange(7, 7 + 2 * math.prod(shape[1:]), 2)
    positions = table[:, 1] if len(shape) == 1 else steps.expand(shape[0], -1)
    assert positions.shape == shape
    expected = module._torch_uniforms(table[:, :2], table[:, 2], positions)
    table, positions = table.to(DEVICE), positions.to(DEVICE)
    drawn = uniforms(table[:, :2], table[:, 2], positions)
    assert drawn.dtype == torch.float32
    assert drawn.cpu().equal(expected)


# -- tokens


def draw_logits(batch: int, vocab_size: int, seed: int, scale: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, vocab_size, generator=generator) * scale


def draw_uniform(batch: int, seed: int = 0) -> Tensor:
    return torch.rand(batch, generator=torch.Generator().manual_seed(seed)).clamp(SMALLEST, LARGEST)


def on_device(
    logits: Tensor, uniform: Tensor, options: SamplingOptions, softcap: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`sample_token` on the device of these tests, its results on CPU."""
    token, *logprobs = sample_token(logits.to(DEVICE), uniform.to(DEVICE), options, softcap)
    assert token.dtype == torch.int64
    return token.cpu(), logprobs[0].cpu(), logprobs[1].cpu()


def check(
    logits: Tensor, uniform: Tensor, options: SamplingOptions, softcap: float | None = None
) -> None:
    """The exact interval of each token contains its uniform, and log-probs are the reference's.

    float32 moves the ends of an interval by the rounding of weights (an exponent is off by units of
    the largest logit, and 3 of the soft-cap's tanh) and of at most TILE + tiles additions.
    """
    token, logprob, sampling_logprob = on_device(logits, uniform, options, softcap)
    wide = logits.double().tolist()
    if softcap is not None:
        wide = [[softcap * math.tanh(x / softcap) for x in row] for row in wide]
    middle = torch.empty(len(logits), dtype=torch.float64)
    wide_enough = torch.empty(len(logits), dtype=torch.bool)
    for row, values in enumerate(wide):
        exact, margin = python_distribution(values, options)
        assert margin > 1e-5, "another seed: float32 may decide otherwise"
        i = int(token[row])
        before = math.fsum(exact[:i])
        finite = [abs(x) for x in values if math.isfinite(x)]
        units = 4 + (2 * max(finite) + 3 * (softcap or 0)) / options.temperature
        error = 2**-23 * units + 2**-24 * (TILE + -(-len(values) // TILE))
        assert exact[i] > 0
        assert before - error <= uniform[row].item() <= before + exact[i] + error
        middle[row] = before + exact[i] / 2
        wide_enough[row] = exact[i] > 4 * error
    # At the middle of its interval the reference draws the same token in any dtype.
    logits, middle, token = logits[wide_enough], middle[wide_enough].float(), token[wide_enough]
    assert len(token)
    assert sample_token_ref(logits.double(), middle, options, softcap)[0].equal(token)
    for number, out in ((1, logprob), (2, sampling_logprob)):
        assert_like_reference(
            out[wide_enough],
            lambda x, u, n=number: sample_token_ref(x, u, options, softcap)[n],
            logits,
            middle,
        )


UNFILTERED = [
    SamplingOptions(0.3),
    SamplingOptions(1.0),
    SamplingOptions(1.7),
    SamplingOptions(1.0, min_p=0.1),
]


@pytest.mark.parametrize("vocab_size", [1, 63, 1024, 1025, 3000])
@pytest.mark.parametrize("options", UNFILTERED, ids=str)
def test_tokens_lie_at_their_uniform(vocab_size: int, options: SamplingOptions) -> None:
    uniform = draw_uniform(3, vocab_size)
    uniform[:2] = torch.tensor([SMALLEST, LARGEST])
    check(draw_logits(3, vocab_size, vocab_size), uniform, options)


FILTERS = [
    SamplingOptions(1.0, top_k=1),
    SamplingOptions(1.7, top_k=5),
    SamplingOptions(0.3, top_p=0.05),
    SamplingOptions(1.0, top_p=0.9),
    SamplingOptions(1.7, top_k=40, top_p=0.9),
    SamplingOptions(1.0, top_k=300, top_p=0.6, min_p=0.02),
]


@pytest.mark.parametrize("vocab_size", [1, 63, 1025, 3000])
@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_filtered_tokens_lie_at_their_uniform(vocab_size: int, options: SamplingOptions) -> None:
    check(draw_logits(1, vocab_size, vocab_size + 1), draw_uniform(1, vocab_size), options)


@pytest.mark.parametrize(
    ("dtype", "softcap"),
    [
        (torch.bfloat16, None),
        (torch.float16, None),
        (torch.float32, 3.0),
        (torch.bfloat16, 3.0),
    ],
)
def test_half_types_and_the_soft_cap(dtype: torch.dtype, softcap: float | None) -> None:
    """Half types have ties everywhere, and their own steps of bisection."""
    logits = draw_logits(2, 1100, 5, scale=3.0).to(dtype)
    check(logits, draw_uniform(2, 3), SamplingOptions(0.3), softcap)
    check(logits[1:], draw_uniform(1, 3), SamplingOptions(1.0, top_k=30, top_p=0.8), softcap)
    token, logprob, zero = on_device(logits, draw_uniform(2), SamplingOptions(0), softcap)
    expected = sample_token_ref(logits.double(), draw_uniform(2), SamplingOptions(0), softcap)
    assert token.equal(expected[0])
    assert_like_reference(
        logprob,
        lambda x: sample_token_ref(x, draw_uniform(2), SamplingOptions(0), softcap)[1],
        logits,
    )
    assert not zero.any()


@pytest.mark.parametrize("vocab_size", [1, 63, 1024, 1025, 3000])
def test_greedy_takes_the_first_maximum(vocab_size: int) -> None:
    logits = draw_logits(4, vocab_size, 3)
    logits[1, vocab_size // 3 :: 5] = 20  # ties in several tiles
    logits[2] = -7
    logits[3, vocab_size - 1] = 30
    with counted() as counts:
        token, logprob, zero = on_device(logits, torch.full((4,), math.nan), SamplingOptions(0))
    assert counts == {"_tile_stats_kernel": 1, "_sample_from_tiles_kernel": 1}
    assert token.tolist() == [row.index(max(row)) for row in logits.tolist()]
    assert_like_reference(
        logprob, lambda x: x.log_softmax(-1).gather(1, token[:, None])[:, 0], logits
    )
    assert not zero.any()


def test_greedy_ties_are_those_of_the_capped_logits() -> None:
    logits = torch.tensor([[1.0, 400.0, 500.0], [-math.inf, -400.0, -500.0]])
    token, logprob, _ = on_device(logits, torch.zeros(2), SamplingOptions(0), 30.0)
    assert token.tolist() == [1, 0]
    torch.testing.assert_close(logprob, torch.tensor([-math.log(2), -math.log(3)]))


@pytest.mark.parametrize("min_p", [0.0, 0.2])
def test_every_token_gets_its_interval(min_p: float) -> None:
    """On a grid of uniforms tokens come in order, each as often as it is probable."""
    options = SamplingOptions(0.6, min_p=min_p)
    size = 4096 if ON_GPU else 24
    logits = torch.full((1, 1500), -math.inf)
    logits[0, [2, 700, 1023, 1024, 1400]] = torch.tensor([0.3, -1.0, 1.1, 0.9, 0.0])
    exact, margin = python_distribution(logits[0].double().tolist(), options)
    assert margin > 1e-5
    grid = (torch.arange(size) + 0.5) / size
    token = on_device(logits.repeat(size, 1), grid, options)[0]
    assert token.equal(token.sort().values)
    counts = token.bincount(minlength=1500)
    expected = torch.tensor(exact, dtype=torch.float64) * size
    assert (counts - expected).abs().max() <= 1 + 1e-3
    assert not counts[expected == 0].any()


def check_kept(logits: Tensor, options: SamplingOptions) -> None:
    """The tokens of the plain filters stay: the last of them is drawn, and the log-prob tells their
    total weight."""
    token, _, sampling_logprob = on_device(logits[None], torch.tensor([LARGEST]), options)
    exact, margin = python_distribution(logits.double().tolist(), options)
    assert margin > 1e-5
    last = max(i for i, p in enumerate(exact) if p > 2**-20)  # float32 reaches no other
    assert token.item() == last
    expected = torch.tensor([math.log(exact[last])])
    torch.testing.assert_close(sampling_logprob, expected, atol=4e-6, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_at_the_boundary_stay_from_the_lowest_index(dtype: torch.dtype) -> None:
    step = torch.zeros(8)
    step[6] = 1
    check_kept(step.to(dtype), SamplingOptions(1.0, top_k=3))
    check_kept(-3 - step.to(dtype), SamplingOptions(1.0, top_k=3))
    check_kept(step.to(dtype), SamplingOptions(1.0, top_k=7, top_p=0.77))
    # Top-p ends among other ties than top-k.
    check_kept(torch.tensor([2, 2, 1, 2, 1]).to(dtype), SamplingOptions(1.0, top_k=4, top_p=0.5))
    # Eight equal tokens: a mass of 0.5 is reached exactly with the fourth.
    equal, end = torch.zeros(1, 8, dtype=dtype), torch.tensor([LARGEST])
    assert on_device(equal, end, SamplingOptions(1.0, top_p=0.5))[0] == 3
    assert on_device(equal, end, SamplingOptions(1.0, top_p=0.51))[0] == 4


def test_ties_beyond_the_first_block_of_a_search() -> None:
    equal = torch.full((5000,), -2.0, dtype=torch.bfloat16)
    assert module._launch(5000, TARGETS["sm_90"])["BLOCK"] == 4096
    check_kept(equal, SamplingOptions(1.0, top_k=4500, top_p=0.9501))
    check_kept(equal, SamplingOptions(1.0, top_k=4700))


def test_ties_of_neighbouring_numbers() -> None:
    """The bisection ends at each of four numbers between which there is no other."""
    steps = torch.tensor([3, 0, 2, 1, 0, 1, 3, 2])
    for top_k in range(1, 8):
        check_kept((1 + steps / 128).bfloat16(), SamplingOptions(1.0, top_k=top_k))
        check_kept((-1 - steps / 128).bfloat16(), SamplingOptions(1.0, top_p=top_k / 8))


def test_filters_of_unusual_logits() -> None:
    """Both zeros are equal; denormal, huge and infinite logits keep their order."""
    zeros = torch.tensor([0.0, -0.0, 0.0, -0.0, -1.0])
    check_kept(zeros, SamplingOptions(1.0, top_k=2))
    check_kept(zeros.bfloat16(), SamplingOptions(1.0, top_k=3))
    few = torch.tensor([-math.inf, 1.0, -math.inf, 2.0, -math.inf])
    check_kept(few, SamplingOptions(1.0, top_k=4))
    check_kept(few.half(), SamplingOptions(1.0, top_k=3, top_p=0.9))
    tiny = torch.tensor([3e-45, 1e-45, -1e-45, 2e-38, 0.0, -3e-45])
    check_kept(tiny, SamplingOptions(1.0, top_k=2))
    huge = torch.tensor([-3e38, 3e38, 3.2e38, -1e30])
    check_kept(huge, SamplingOptions(8e37, top_k=3, top_p=0.995))
    check_kept(huge, SamplingOptions(1.0, top_p=0.5))


def test_filters_of_random_ties() -> None:
    """Small integers: boundaries of top-k and top-p fall among equal logits."""
    generator = random.Random(0)
    done = 0
    while done < 12:
        values = [generator.randint(-4, 4) for _ in range(generator.randint(1, 12))]
        options = SamplingOptions(
            temperature=generator.choice([0.5, 1.0, 1.7]),
            top_k=generator.choice([0, 1, 2, 3, 5, 20]),
            top_p=generator.choice([1.0, 0.05, 0.4, 0.77, 0.99]),
            min_p=generator.choice([0.0, 0.0, 0.03, 0.3, 1.0]),
        )
        if python_distribution([float(v) for v in values], options)[1] > 1e-5:
            check_kept(torch.tensor(values).to(generator.choice(DTYPES)), options)
            done += 1


@pytest.mark.parametrize("temperature", [1e-5, 1.0, 1e6])
def test_tokens_of_weight_0_are_never_drawn(temperature: float) -> None:
    """Nor a uniform of 1, which Philox never gives; whole tiles are -inf."""
    logits = torch.full((4, 2 * TILE + 3), -math.inf)
    logits[0, 3] = 2.0
    logits[1, 2:5] = torch.tensor([1.0, -1e4, 1.0])
    logits[2, 2 * TILE + 1] = -3.0
    logits[3, TILE + 1 : TILE + 4] = torch.tensor([0.0, -1e30, -1e30])
    for value in (SMALLEST, 1.0):
        uniform = torch.full((4,), value)
        token, logprob, sampling_logprob = on_device(logits, uniform, SamplingOptions(temperature))
        assert (logits.gather(1, token[:, None]) > -math.inf).all()
        assert sampling_logprob.isfinite().all() and logprob.isfinite().all()
        if temperature <= 1:
            assert token.tolist() == [3, 2 if value < 1 else 4, 2 * TILE + 1, TILE + 1]


ALL = [SamplingOptions(0), SamplingOptions(0.7), SamplingOptions(1.0, 3, 0.8, 0.01)]


@pytest.mark.parametrize("bad", ["nan", "all nan", "inf", "all -inf"])
@pytest.mark.parametrize(("options", "vocab_size"), list(zip(ALL, (1100, 1100, 6), strict=True)))
def test_a_row_without_a_finite_maximum_harms_no_other(
    options: SamplingOptions, vocab_size: int, bad: str
) -> None:
    logits, uniform = draw_logits(2, vocab_size, 1), draw_uniform(2)
    good = on_device(logits[:1], uniform[:1], options)
    logits[1, slice(None) if bad.startswith("all") else 2] = float(bad.removeprefix("all "))
    token, logprob, sampling_logprob = on_device(logits, uniform, options)
    assert 0 <= token[1] < vocab_size
    assert logprob[1].isnan()
    assert sampling_logprob[1].isnan() or options.temperature == 0
    for new, old in zip((token, logprob, sampling_logprob), good, strict=True):
        assert new[:1].equal(old)


@pytest.mark.parametrize("options", ALL, ids=str)
def test_a_row_does_not_depend_on_its_batch(options: SamplingOptions) -> None:
    logits, uniform = draw_logits(3, 1500, 2), draw_uniform(3)
    together = on_device(logits, uniform, options)
    for row in (0, 2):
        alone = on_device(logits[row : row + 1], uniform[row : row + 1], options)
        for result, row_result in zip(together, alone, strict=True):
            assert result[row : row + 1].equal(row_result)


PLAIN = {"_tile_stats_kernel": 1, "_sample_from_tiles_kernel": 1}


@pytest.mark.parametrize(
    ("options", "launches"),
    [
        (SamplingOptions(0, 2, 0.5, 0.1), PLAIN),
        (SamplingOptions(1.0), PLAIN),
        (SamplingOptions(1.0, top_k=9), PLAIN),
        (SamplingOptions(1.0, top_k=10), PLAIN),
        (SamplingOptions(1.0, min_p=0.1), PLAIN | {"_filtered_tile_sums_kernel": 1}),
        (
            SamplingOptions(1.0, top_k=8),
            PLAIN | {"_filtered_tile_sums_kernel": 1, "_threshold_kernel": 1},
        ),
        (
            SamplingOptions(1.0, top_p=0.9),
            PLAIN | {"_filtered_tile_sums_kernel": 1, "_threshold_kernel": 1},
        ),
    ],
    ids=str,
)
def test_launches(options: SamplingOptions, launches: dict[str, int]) -> None:
    with counted() as counts:
        on_device(draw_logits(1, 9, 0), draw_uniform(1), options)
        assert counts == Counter(launches)
        token, logprob, sampling_logprob = on_device(torch.empty(0, 9), torch.empty(0), options)
    assert counts == Counter(launches)
    assert token.shape == logprob.shape == sampling_logprob.shape == (0,)


@pytest.mark.skipif(not INTERPRETED, reason="counts calls that a compiled kernel does not make")
def test_passes_of_the_bisection(monkeypatch: pytest.MonkeyPatch) -> None:
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
        on_device(logits[None], torch.full((1,), 0.5), options)
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


def test_wrong_arguments_are_refused() -> None:
    logits, uniform = torch.zeros(4, 2, device=DEVICE), torch.zeros(2, device=DEVICE)
    with pytest.raises(ValueError, match=r"strides \(1, 2\)"):
        sample_token(logits.T, uniform, SamplingOptions())
    with pytest.raises(ValueError, match=r"got .*float64"):
        sample_token(logits[:2].double(), uniform, SamplingOptions())
    with pytest.raises(ValueError, match=r"softcap must be positive and finite, got 0"):
        sample_token(logits[:2], uniform, SamplingOptions(), 0.0)


# -- on a GPU: real sizes

LARGE = [
    SamplingOptions(0),
    SamplingOptions(1.0),
    SamplingOptions(0.7, min_p=0.05),
    SamplingOptions(1.0, top_k=50),
    SamplingOptions(1.0, top_p=0.9),
    SamplingOptions(0.8, top_k=1000, top_p=0.95, min_p=0.001),
]


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("vocab_size", "softcap"), [(151_936, None), (256_000, 30.0)])
@pytest.mark.parametrize("options", LARGE, ids=str)
def test_large_vocabularies(
    options: SamplingOptions, vocab_size: int, softcap: float | None, dtype: torch.dtype
) -> None:
    """Tokens lie at their uniforms in the reference's own distribution in float64, log-probs are
    its own, and a second run gives the same bits."""
    batch = 64
    logits = draw_logits(batch, vocab_size, vocab_size, scale=3.0).to(dtype).to(DEVICE)
    uniform = draw_uniform(batch).to(DEVICE)
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
@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.parametrize("options", LARGE, ids=str)
def test_a_cuda_graph_replays_sampling(options: SamplingOptions) -> None:
    logits = draw_logits(8, 151_936, 0, scale=3.0).bfloat16().to(DEVICE)
    uniform = draw_uniform(8).to(DEVICE)
    sample_token(logits, uniform, options)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = sample_token(logits, uniform, options)
    logits.copy_(draw_logits(8, 151_936, 1, scale=3.0))
    uniform.copy_(draw_uniform(8, 1))
    graph.replay()
    for result, expected in zip(results, sample_token(logits, uniform, options), strict=True):
        assert result.equal(expected)
