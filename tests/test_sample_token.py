"""Sampling as a distribution, the Philox streams, and the independence of a row from its batch."""

import hashlib
import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import kernels.sample_token as module
from kernels import cpp
from kernels.sample_token import (
    TILE,
    SamplingOptions,
    philox4x32,
    sample_token,
    sample_token_ref,
    stream_key,
    uniforms,
)
from tests.sampling_oracle import python_distribution

LARGEST, SMALLEST = 1 - 2**-24, 2**-24  # of the uniforms


@pytest.fixture(autouse=True)
def restore_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


# -- uniforms


def python_philox(key: tuple[int, int], counter: tuple[int, int, int, int]) -> tuple[int, ...]:
    """Philox4x32-10 with Python's integers."""
    (k0, k1), (c0, c1, c2, c3) = key, counter
    for number in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        r0, r1 = (k0 + number * 0x9E3779B9) % 2**32, (k1 + number * 0xBB67AE85) % 2**32
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ r0, b % 2**32, (a >> 32) ^ c3 ^ r1, a % 2**32
    return c0, c1, c2, c3


# Random123, tests/kat_vectors, philox4x32 10: counter, key, output.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN_ANSWERS)
def test_philox_known_answers(counter: str, key: str, output: str) -> None:
    words = [torch.tensor(int(word, 16)) for word in (key + " " + counter).split()]
    assert " ".join(f"{word.item():08x}" for word in philox4x32(*words)) == output
    integers = [int(word) for word in words]
    expected = python_philox((integers[0], integers[1]), tuple(integers[2:]))  # type: ignore[arg-type]
    assert [word.item() for word in philox4x32(*words)] == list(expected)


word32 = st.integers(0, 2**32 - 1)


@settings(max_examples=30, deadline=None)
@given(st.tuples(word32, word32), st.integers(0, 2**63 - 1), st.integers(0, 2**63 - 1))
def test_uniform_is_the_first_philox_word(key: tuple[int, int], index: int, place: int) -> None:
    counter = (index % 2**32, index >> 32, place % 2**32, place >> 32)
    expected = ((python_philox(key, counter)[0] >> 9) + 0.5) / 2**23
    drawn = uniforms(torch.tensor([key]), torch.tensor([index]), torch.tensor([place]))
    assert drawn.dtype == torch.float32
    assert drawn.item() == expected  # exact: the value has 24 significant bits


@pytest.mark.usefixtures("in_torch")
def test_uniforms_are_in_the_open_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    words = torch.tensor([0, 2**32 - 1])
    monkeypatch.setattr(module, "philox4x32", lambda *arguments: (words,) * 4)
    zeros = torch.zeros(2, dtype=torch.int64)
    drawn = uniforms(torch.zeros(2, 2, dtype=torch.int64), zeros, zeros)
    assert drawn.tolist() == [SMALLEST, LARGEST]


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
def test_stream_key_refuses(seed: int, stream: str) -> None:
    with pytest.raises(ValueError, match=r"seed must be|stream must be"):
        stream_key(seed, "row", stream)


def token_keys(*rows: str) -> Tensor:
    return torch.tensor([stream_key(7, row, "token") for row in rows])


def test_streams_do_not_depend_on_k_slot_or_compaction() -> None:
    """The uniforms of (row, sample, position) are the same wherever and whenever drawn."""
    keys = token_keys("a", "b", "c").repeat_interleave(32, 0)
    index = torch.arange(32).repeat(3)
    positions = torch.arange(40).expand(96, 40)
    full = uniforms(keys, index, positions)
    few = (index < 4).nonzero()[:, 0]  # k = 4 of k = 32
    slots = few[torch.randperm(len(few), generator=torch.Generator().manual_seed(0))]
    assert torch.equal(uniforms(keys[slots], index[slots], positions[slots]), full[slots])
    late = torch.arange(13, 96)  # samples that joined at other positions, one position a call
    now = (index[late] * 5) % 40
    assert torch.equal(uniforms(keys[late], index[late], now), full[late, now])


def chi_squared_bound(freedom: int) -> float:
    """Wilson and Hilferty's approximation of the quantile at 1 - 1e-5."""
    scale = 2 / (9 * freedom)
    return freedom * (1 - scale + 4.265 * math.sqrt(scale)) ** 3


def assert_counts(counts: Tensor, expected: Tensor) -> None:
    """Pearson's test, the rarest cells pooled so that none expects fewer than 10."""
    assert not counts[expected == 0].any()
    by_expected = expected.argsort()
    cell = ((expected[by_expected].cumsum(0) / 10).floor()).long()
    cell = torch.unique_consecutive(cell, return_inverse=True)[1]
    size = int(cell.max()) + 1
    seen = torch.zeros(size, dtype=torch.float64).index_add_(0, cell, counts[by_expected].double())
    mean = torch.zeros(size, dtype=torch.float64).index_add_(0, cell, expected[by_expected])
    seen, mean = seen[mean > 0], mean[mean > 0]
    statistic = ((seen - mean) ** 2 / mean).sum().item()
    assert statistic < chi_squared_bound(max(len(mean) - 1, 1)), (statistic, len(mean))


@pytest.mark.parametrize("pair", ["position", "sample index", "row", "stream"])
def test_neighbouring_uniforms_are_independent(pair: str) -> None:
    """Joint counts over a 16 x 16 grid of each uniform and its neighbour."""
    samples, places = 256, 257
    index = torch.arange(samples)
    positions = torch.arange(places).expand(samples, places)
    first = uniforms(token_keys("a").expand(samples, 2), index, positions)
    if pair == "position":
        first, second = first[:, :-1], first[:, 1:]
    elif pair == "sample index":
        first, second = first[:-1], first[1:]
    elif pair == "row":
        second = uniforms(token_keys("b").expand(samples, 2), index, positions)
    else:
        other = torch.tensor([stream_key(7, "a", "tie")])
        second = uniforms(other.expand(samples, 2), index, positions)
    cell = (first * 16).long() * 16 + (second * 16).long()
    counts = cell.flatten().bincount(minlength=256)
    assert_counts(counts, torch.full((256,), cell.numel() / 256, dtype=torch.float64))


# -- tokens


def random_logits(batch: int, vocab_size: int, seed: int, scale: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, vocab_size, generator=generator) * scale


def random_uniform(batch: int, seed: int = 0) -> Tensor:
    index = torch.arange(batch)
    return uniforms(token_keys(str(seed)).expand(batch, 2), index, torch.zeros_like(index))


OPTIONS = [
    SamplingOptions(temperature=0.5),
    SamplingOptions(temperature=1.0),
    SamplingOptions(temperature=2.0),
    SamplingOptions(temperature=1.0, top_p=0.9),
    SamplingOptions(temperature=2.0, top_p=0.5),
    SamplingOptions(temperature=1.0, top_k=4),
    SamplingOptions(temperature=0.5, top_k=50, top_p=0.95),
    SamplingOptions(temperature=1.0, min_p=0.1),
    SamplingOptions(temperature=2.0, top_k=700, top_p=0.8, min_p=0.02),
]


def tensor_distribution(logits: Tensor, options: SamplingOptions) -> Tensor:
    return torch.tensor(python_distribution(logits.double().tolist(), options)[0]).double()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("vocab_size", [1, 5, 1023, 1024, 1025, 3000])
def test_counts_follow_the_exact_softmax(vocab_size: int, options: SamplingOptions) -> None:
    logits = random_logits(1, vocab_size, seed=vocab_size)
    chunk, draws = 500, 3000
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    uniform = random_uniform(draws, seed=vocab_size)
    for start in range(0, draws, chunk):
        rows = logits.expand(chunk, -1).contiguous()
        token, _, _ = sample_token(rows, uniform[start : start + chunk], options)
        counts += token.bincount(minlength=vocab_size)
    expected = tensor_distribution(logits[0], options)
    assert_counts(counts, expected * draws)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(-4, 4), min_size=1, max_size=12),
    st.builds(
        SamplingOptions,
        temperature=st.sampled_from([0.5, 1.0, 1.7]),
        top_k=st.sampled_from([0, 0, 1, 2, 3, 5, 20]),
        top_p=st.sampled_from([1.0, 1.0, 0.05, 0.4, 0.77, 0.99]),
        min_p=st.sampled_from([0.0, 0.0, 0.03, 0.3, 1.0]),
    ),
)
def test_every_token_gets_its_interval(values: list[int], options: SamplingOptions) -> None:
    """On a fine grid of uniforms, tokens come in order, each as often as it is probable.

    Integer logits make ties at the boundaries of top-k and top-p common.
    """
    expected, margin = python_distribution([float(v) for v in values], options)
    assume(margin > 1e-5)  # else float32 may put the boundary on the other side
    size = 256
    uniform = torch.cat([torch.tensor([SMALLEST]), (torch.arange(size) + 0.5) / size])
    uniform = torch.cat([uniform, torch.tensor([LARGEST])])
    logits = torch.tensor([values], dtype=torch.float32).repeat(len(uniform), 1)
    for op in (sample_token, sample_token_ref):
        token, _, sampling_logprob = op(logits, uniform, options)
        assert torch.equal(token, token.sort().values)
        counts = token[1:-1].bincount(minlength=len(values))
        possible = torch.tensor([p > 0 for p in expected])
        assert not counts[~possible].any()
        assert possible[token].all()
        assert token[0] == possible.nonzero().min()
        assert (counts - torch.tensor(expected) * size).abs().max() <= 1 + 1e-3
        chosen = torch.tensor(expected)[token].log()
        torch.testing.assert_close(sampling_logprob, chosen, atol=2e-6, rtol=0)


def test_top_k_and_top_p_ties_go_to_the_lower_index() -> None:
    uniform = random_uniform(400)
    logits = torch.zeros(400, 8)
    logits[:, 6] = 1
    token = sample_token(logits, uniform, SamplingOptions(1.0, top_k=3))[0]
    assert token.unique().tolist() == [0, 1, 6]
    # Eight equal tokens: the mass reaches 0.5 exactly with the fourth.
    token = sample_token(torch.zeros(400, 8), uniform, SamplingOptions(1.0, top_p=0.5))[0]
    assert token.unique().tolist() == [0, 1, 2, 3]
    token = sample_token(torch.zeros(400, 8), uniform, SamplingOptions(1.0, top_p=0.51))[0]
    assert token.unique().tolist() == [0, 1, 2, 3, 4]


def test_filters_apply_in_the_documented_order() -> None:
    probabilities = torch.tensor([0.4, 0.3, 0.2, 0.1])
    logits, uniform = probabilities.log().repeat(2000, 1), random_uniform(2000)
    # Top-p on what top-k left: .4 / .7 < .6, so two tokens stay; on all, .4 + .3 also reaches .6.
    kept = sample_token(logits, uniform, SamplingOptions(1.0, top_k=2, top_p=0.56))[0].unique()
    assert kept.tolist() == [0]
    kept = sample_token(logits, uniform, SamplingOptions(1.0, top_p=0.56))[0].unique()
    assert kept.tolist() == [0, 1]
    # Temperature first: at T = 0.5 the first token has .16 / .30 of the mass.
    kept = sample_token(logits, uniform, SamplingOptions(0.5, top_p=0.5))[0].unique()
    assert kept.tolist() == [0]
    # Min-p is relative to the largest probability at that temperature: .2 / .4 squared is .25.
    kept = sample_token(logits, uniform, SamplingOptions(0.5, min_p=0.26))[0].unique()
    assert kept.tolist() == [0, 1]


@pytest.mark.parametrize("vocab_size", [1, 5, 500, 1023, 1024, 1025, 2048, 3001])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_tokens_lie_at_their_uniform_in_float64(vocab_size: int, options: SamplingOptions) -> None:
    """The float64 interval of each sampled token contains u, up to float32's own error."""
    batch = 10
    logits = random_logits(batch, vocab_size, seed=vocab_size + 1)
    uniform = random_uniform(batch, seed=vocab_size)
    uniform[:2] = torch.tensor([SMALLEST, LARGEST])
    for op in (sample_token, sample_token_ref):
        token, logprob, sampling_logprob = op(logits, uniform, options)
        for row in range(batch):
            exact = tensor_distribution(logits[row], options)
            cumulative = exact.cumsum(0)
            error = (exact.float().cumsum(0) - cumulative).abs().max().item()
            tolerance = 4 * error + 2**-22
            i = int(token[row])
            assert exact[i] > 0
            assert cumulative[i] - exact[i] - tolerance <= uniform[row] <= cumulative[i] + tolerance
        wide = sample_token_ref(logits.double(), uniform.double(), options)
        full = logits.double().log_softmax(-1).gather(1, token[:, None])[:, 0]
        bound = 4 * (logits.log_softmax(-1).double() - logits.double().log_softmax(-1)).abs().max()
        assert (logprob - full).abs().max() <= bound + 2**-22
        same = token == wide[0]
        assert same.float().mean() > 0.9
        difference = (sampling_logprob - wide[2])[same].abs().max()
        assert difference <= bound / options.temperature + 2**-21


def test_reference_and_op_agree_on_flat_and_tied_logits() -> None:
    """Flat rows need many candidates for top-p, which takes the widening path."""
    widths: list[int] = []
    topk = Tensor.topk

    def counting(self: Tensor, k: int) -> torch.return_types.topk:
        widths.append(k)
        return topk(self, k)

    logits = torch.cat([random_logits(6, 2500, 3, scale=0.1), random_logits(6, 2500, 4, scale=4.0)])
    logits[3:5] = logits[3:5].mul(8).round() / 8  # many ties
    uniform = random_uniform(12)
    options = SamplingOptions(1.0, top_p=0.9)
    with pytest.MonkeyPatch.context() as patch, cpp.torch_only():
        patch.setattr(Tensor, "topk", counting)
        token = sample_token(logits, uniform, options)[0]
    assert widths == [64, 512, 2500]
    assert torch.equal(token, sample_token(logits, uniform, options)[0])
    assert torch.equal(token, sample_token_ref(logits.double(), uniform.double(), options)[0])
    for row in range(12):
        assert tensor_distribution(logits[row], options)[token[row]] > 0


@pytest.mark.parametrize("options", [SamplingOptions(0), *OPTIONS], ids=str)
def test_softcap_and_half_types_are_applied_first(options: SamplingOptions) -> None:
    """The tokens and log-probs of logits that were widened and capped before: bit for bit where one
    implementation has done both."""
    uniform = random_uniform(5)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        logits = random_logits(5, 1100, seed=3, scale=4.0).to(dtype)
        capped = torch.tanh(logits.float() / 5.0) * 5.0
        for op in (sample_token, sample_token_ref):
            for softcap, plain in ((None, logits.float()), (5.0, capped)):
                results = op(logits, uniform, options, softcap)
                expected = op(plain, uniform, options)
                assert torch.equal(results[0], expected[0])
                # Float16 runs in torch, float32 in C++, whose tanh and exp are its own.
                mixed = op is sample_token and (softcap or dtype == torch.float16)
                close = {"rtol": 2e-6, "atol": 2e-6} if mixed else {"rtol": 0, "atol": 0}
                for result, exactly in zip(results[1:], expected[1:], strict=True):
                    torch.testing.assert_close(result, exactly, **close)
        wide = sample_token_ref(logits.double(), uniform, options, 5.0)
        assert wide[1].dtype == torch.float64
        assert torch.equal(wide[0], sample_token(logits, uniform, options, 5.0)[0])


def test_greedy_takes_the_first_maximum() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0], [5.0, 5.0, 5.0, 5.0], [-9.0, -8.0, -9.0, -8.0]])
    for op in (sample_token, sample_token_ref):
        token, logprob, sampling_logprob = op(logits, torch.zeros(3), SamplingOptions(0))
        assert token.tolist() == [1, 0, 1]
        expected = logits.log_softmax(-1)[torch.arange(3), token]
        torch.testing.assert_close(logprob, expected)
        assert sampling_logprob.tolist() == [0, 0, 0]


@pytest.mark.parametrize("temperature", [1e-5, 0.01, 1.0, 1e6])
@pytest.mark.parametrize("vocab_size", [7, TILE, 2 * TILE + 3])
def test_masked_and_underflowed_tokens_are_never_drawn(vocab_size: int, temperature: float) -> None:
    """Extreme uniforms with the first and last tokens, and whole tiles, at weight 0."""
    logits = torch.full((5, vocab_size), -math.inf)
    logits[0, 3] = 2.0
    logits[1, 2:5] = torch.tensor([1.0, -1e4, 1.0])
    logits[2, vocab_size - 2] = -3.0
    logits[3, 1 : vocab_size - 1] = 0.0
    logits[4, 4] = -1e30
    for value in (SMALLEST, 0.5, LARGEST):
        uniform = torch.full((5,), value)
        options = SamplingOptions(temperature)
        for op in (sample_token, sample_token_ref):
            token, logprob, sampling_logprob = op(logits, uniform, options)
            chosen = logits.gather(1, token[:, None])[:, 0]
            assert (chosen > -math.inf).all()
            assert sampling_logprob.isfinite().all()
            assert logprob.isfinite()[[0, 2, 3, 4]].all()
            if temperature <= 1:
                assert token[1] in (2, 4)


def test_rounding_of_the_total_falls_to_the_last_positive_token() -> None:
    """A uniform of 1, which Philox never gives, still stays inside."""
    logits = random_logits(64, 2 * TILE + 5, seed=9)
    logits[:, 1500:] = -math.inf
    token = sample_token(logits, torch.ones(64), SamplingOptions(1.0))[0]
    assert (token < 1500).all()
    assert (token >= TILE).all()
    small = sample_token(logits[:, :20].contiguous(), torch.ones(64), SamplingOptions(1.0, 3))[0]
    kept = logits[:, :20].topk(3).indices
    assert torch.equal(small, kept.max(1).values)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("vocab_size", [6, 2100])
@pytest.mark.parametrize("options", [SamplingOptions(0), *OPTIONS], ids=str)
def test_a_row_without_a_finite_maximum_harms_no_other(
    options: SamplingOptions, vocab_size: int, bad: float
) -> None:
    logits = random_logits(3, vocab_size, seed=1)
    uniform = random_uniform(3)
    good = sample_token(logits, uniform, options)
    logits[1] = bad if bad < 0 else logits[1].index_fill(0, torch.tensor([2]), bad)
    for op in (sample_token, sample_token_ref):
        token, logprob, sampling_logprob = op(logits, uniform, options)
        assert 0 <= token[1] < vocab_size
        assert logprob[1].isnan()
        assert sampling_logprob[1].isnan() or options.temperature == 0
        for new, old in zip((token, logprob, sampling_logprob), good, strict=True):
            torch.testing.assert_close(new[[0, 2]], old[[0, 2]], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("vocab_size", "size"),
    [(1, 70), (5, 70), (17, 70), (500, 70), (1025, 30), (3001, 20), (40000, 9)],
)
def test_a_row_does_not_depend_on_its_batch_or_on_threads(vocab_size: int, size: int) -> None:
    """Bit for bit, in any batch size, at any place, with 1 to 4 threads."""
    logits, uniform = random_logits(size, vocab_size, seed=2), random_uniform(size)
    logits[::2, 0] = 16  # near-certain tokens: their log-probs show every bit of the normalizer
    for options in (SamplingOptions(0), OPTIONS[0], OPTIONS[1], OPTIONS[3], OPTIONS[-1]):
        torch.set_num_threads(1)
        alone = [sample_token(logits[i : i + 1], uniform[i : i + 1], options) for i in range(size)]
        expected = [torch.cat(parts) for parts in zip(*alone, strict=True)]
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            for start, stop in ((0, size), (3, 4), (1, 8)):
                batch = sample_token(logits[start:stop], uniform[start:stop], options)
                for result, row_results in zip(batch, expected, strict=True):
                    assert torch.equal(result, row_results[start:stop])


def test_empty_batch() -> None:
    for options in [SamplingOptions(0), *OPTIONS]:
        token, logprob, _ = sample_token(torch.empty(0, 9), torch.empty(0), options)
        assert token.shape == logprob.shape == (0,)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1}, {"temperature": 1e-6}, {"temperature": math.inf},
        {"temperature": math.nan}, {"top_k": -1}, {"top_k": 1.5}, {"top_k": True}, {"top_p": 0.0},
        {"top_p": 1.01}, {"top_p": math.nan}, {"min_p": -0.1}, {"min_p": 1.1}, {"min_p": math.nan},
    ],
    ids=str,
)  # fmt: skip
def test_options_are_checked(wrong: dict) -> None:
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name} must be .*{value}"):
        SamplingOptions(**wrong)


def test_wrong_arguments_are_named() -> None:
    options, uniform, logits = SamplingOptions(), torch.zeros(2), torch.zeros(2, 4)
    with pytest.raises(ValueError, match=r"got .*float64"):
        sample_token(logits.double(), uniform, options)
    for softcap in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"softcap must be positive and finite, got {softcap}"):
            sample_token(logits, uniform, options, softcap)
    with pytest.raises(ValueError, match=r"got \(2, 0\)"):
        sample_token(torch.zeros(2, 0), uniform, options)
    with pytest.raises(ValueError, match=r"strides \(1, 2\)"):
        sample_token(torch.zeros(4, 2).T, uniform, options)
    with pytest.raises(ValueError, match=r"uniform must be \(2,\) torch.float32, got \(3,\)"):
        sample_token(logits, torch.zeros(3), options)
    keys, index = torch.zeros(2, 2, dtype=torch.int64), torch.arange(2)
    with pytest.raises(ValueError, match=r"sample_index must be \(2,\)"):
        uniforms(keys, torch.arange(3), index)
    with pytest.raises(ValueError, match=r"positions must be \(2,\)"):
        uniforms(keys, index, torch.arange(3))
    with pytest.raises(ValueError, match=r"positions must be .*int64, got .*int32"):
        uniforms(keys, index, index.int())
