"""Draw one token per row from its logits, with one uniform per token.

Dimension letters: B rows (live samples), V vocabulary, P positions.

Uniforms. `stream_key` gives a row of the data its own Philox4x32-10 key for each purpose; the
counter is (sample index, position). A draw therefore depends on the seed, the row, the index of
the sample and the position, and on nothing else: not on the slot, not on k, not on the batch.

Distribution. Logits of a half type are widened to float32; with a soft-cap c they become
c tanh(logits / c) before anything else. With x = logits - max(logits), in this order:
  1. temperature  w_i = exp(x_i / T); T = 0 takes the first maximal index and draws nothing
  2. top-k        the k largest logits stay
  3. top-p        of those, most probable first, the smallest set whose mass reaches
                  top_p x (their total) stays; the most probable token always stays
  4. min-p        w_i < min_p has its weight removed; w_max = 1, so this is relative to the maximum
Among equal logits at a boundary of 2 or 3 the lower index stays. Removed tokens have w_i = 0.

Inverse transform, in the order of the vocabulary, over tiles of TILE tokens:
  s_j = sum of w over tile j;  S_j = s_0 + .. + s_j;  t = u S_last
  tile  = first j with S_j > t;  r = t - S_{tile-1}
  token = first i of that tile with (w summed from the tile's start to i) > r
Where rounding leaves no such tile or token, the last one that moves the running sum is taken, so
that a token of weight 0 is never returned. float32 throughout; torch's CPU cumsum adds in order,
in float64, and rounds each partial sum. The mapping from (u, logits) to a token is fixed: another
TILE or order of summation would change published samples.

A row's results on CPU are bitwise the same for any B and any number of threads. That excludes
`logsumexp` and sums over a whole row, whose order of summation depends on both.

Triton. The vocabulary is not sorted. One program a tile reduces it to its maximum and its sums; one
program a row then chooses the tile, reads its logits again and chooses the token. No program sees
two rows, so a row does not depend on the batch. The order of summation within a tile, and over the
tile sums, is the device's own (`tl.sum`, `tl.cumsum`): the mapping from (u, logits) to a token is
fixed for each type of device, and differs from the CPU's where u is within rounding of a boundary.

With top-k or top-p, one program a row first finds the smallest logit that stays, by bisection over
integers in whose order float32 numbers lie, and of the tokens equal to it the last that stays. A
pass over the row tries three thresholds (two bits): they share its loads and exponentials, while
seven would cost as much arithmetic as the passes saved. A search takes at most 16 passes, 8 in
bfloat16 without a soft-cap, and most take fewer: it starts from a bound (top-k: the smallest tile
maximum; top-p: the logit below which V tokens weigh less than it leaves out) and ends when one
token is left between. Top-k and top-p together are two searches.

Log-probs are natural logarithms: `logprob` of softmax(logits), `sampling_logprob` of the
distribution drawn from (tempered, filtered, renormalised; 0 when greedy).

A row whose maximum is NaN or infinite gets some token in [0, V) and NaN log-probs (when greedy,
only `logprob` is NaN).
This file does not apply repetition penalties or logit biases, and does not choose stop tokens.
"""

import hashlib
import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import cpp
from kernels.checks import check
from kernels.cpp import runs_cpp
from kernels.device_math import tanh
from kernels.launch import launch, runs_triton
from kernels.target import Target, power_of_two, target_of

TILE = 1024
STREAMS = ("token", "order", "tie")

_PHILOX_M = (0xD2511F53, 0xCD9E8D57)
_PHILOX_W = (0x9E3779B9, 0xBB67AE85)
_MASK32 = 0xFFFFFFFF
_MIN_TEMPERATURE = 1e-5  # smaller ones, in float32, are not told apart from 0
_FIRST_CANDIDATES = 64
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_FLOAT32 = torch.finfo(torch.float32)
# Low bits of a float32 that are 0 in every number of a half type.
_EMPTY_BITS = {torch.bfloat16: 16, torch.float16: 13}


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are drawn: temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 are off."""

    temperature: float = 0.5
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if self.temperature != 0 and not _MIN_TEMPERATURE <= self.temperature < math.inf:
            raise ValueError(
                f"temperature must be 0 or at least {_MIN_TEMPERATURE}, got {self.temperature}"
            )
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or self.top_k < 0:
            raise ValueError(f"top_k must be a non-negative integer, got {self.top_k!r}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be in [0, 1], got {self.min_p}")


def stream_key(seed: int, row_id: str, stream: str) -> tuple[int, int]:
    """The two 32-bit Philox key words of one stream ("token", "order" or "tie") of one row.

    They are the first 8 bytes, little-endian, of SHA-256(seed as 8 bytes little-endian,
    SHA-256 of the row id in UTF-8, stream name in ASCII): the first two fields have a fixed
    length, so no two triples share an encoding. ValueError for a seed outside [0, 2**64).
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise ValueError(f"seed must be an integer in [0, 2**64), got {seed!r}")
    if stream not in STREAMS:
        raise ValueError(f"stream must be one of {STREAMS}, got {stream!r}")
    # JSON can spell a lone surrogate; surrogatepass keeps the encoding one to one.
    row_digest = hashlib.sha256(row_id.encode("utf-8", "surrogatepass")).digest()
    digest = hashlib.sha256(seed.to_bytes(8, "little") + row_digest + stream.encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def philox4x32(
    key0: Tensor, key1: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 (Salmon et al., SC 2011): four 32-bit words for each key and counter.

    All arguments are int64 tensors that broadcast together, with values in [0, 2**32).
    """
    for _ in range(10):
        high0, low0 = _multiply_32(c0, _PHILOX_M[0])
        high1, low1 = _multiply_32(c2, _PHILOX_M[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + _PHILOX_W[0]) & _MASK32, (key1 + _PHILOX_W[1]) & _MASK32
    return c0, c1, c2, c3


def _multiply_32(x: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of x * constant; a 64-bit product would overflow int64."""
    upper, lower = x * (constant >> 16), x * (constant & 0xFFFF)
    return (upper + (lower >> 16)) >> 16, (((upper & 0xFFFF) << 16) + lower) & _MASK32


@triton.jit
def _uniforms_kernel(
    keys_ptr,  # (B, 2), strides k_b, k_w
    index_ptr,  # (B,), stride i_b
    positions_ptr,  # (B, P), strides p_b, p_p
    uniform_ptr,  # (B, P), contiguous
    num_uniforms,
    num_positions,  # P
    k_b,
    k_w,
    i_b,
    p_b,
    p_p,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    there = at < num_uniforms
    row, column = at // num_positions, at % num_positions
    key0 = tl.load(keys_ptr + row * k_b, mask=there, other=0)
    key1 = tl.load(keys_ptr + row * k_b + k_w, mask=there, other=0)
    index = tl.load(index_ptr + row * i_b, mask=there, other=0)
    position = tl.load(positions_ptr + row * p_b + column * p_p, mask=there, other=0)
    word, _, _, _ = tl.philox(
        key0 | (key1 << 32),
        index.to(tl.uint32),
        (index >> 32).to(tl.uint32),
        position.to(tl.uint32),
        (position >> 32).to(tl.uint32),
    )
    uniform = ((word >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2**-23
    tl.store(uniform_ptr + at, uniform, mask=there)


def _run_triton_uniforms(keys: Tensor, sample_index: Tensor, positions: Tensor) -> Tensor:
    uniform = torch.empty(positions.shape, dtype=torch.float32, device=positions.device)
    at = positions if positions.dim() == 2 else positions[:, None]
    block = min(256, power_of_two(uniform.numel(), 16))
    launch(
        _uniforms_kernel,
        (triton.cdiv(uniform.numel(), block),),
        keys, sample_index, at, uniform, uniform.numel(), at.shape[1],
        *keys.stride(), *sample_index.stride(), *at.stride(), BLOCK=block, num_warps=4,
    )  # fmt: skip
    return uniform


def _torch_uniforms(keys: Tensor, sample_index: Tensor, positions: Tensor) -> Tensor:
    rows = (len(keys),) + (1,) * (positions.dim() - 1)
    key0, key1 = keys[:, 0].reshape(rows), keys[:, 1].reshape(rows)
    index = sample_index.reshape(rows)
    word, _, _, _ = philox4x32(
        key0, key1, index & _MASK32, index >> 32, positions & _MASK32, positions >> 32
    )
    return ((word >> 9).to(torch.float32) + 0.5) * 2.0**-23


def uniforms(keys: Tensor, sample_index: Tensor, positions: Tensor) -> Tensor:
    """One float32 uniform in the open interval (0, 1) for each row and position.

    keys (B, 2) int64 from `stream_key`; sample_index (B,) int64; positions (B,) or (B, P) int64,
    all non-negative. Returns the shape of positions. The counter is (low and high word of the
    sample index, low and high word of the position); the uniform is ((x >> 9) + 1/2) / 2**23 of
    the first output word x: 23 bits, because with 24 the half could not be represented and the
    largest uniform would round to 1. Bit for bit the same on every device. On CPU a call is some
    300 small operations whatever P is, so a decode loop should draw a block of positions at a time.
    """
    batch = keys.shape[0]
    check("uniforms: keys", keys, ("B", 2), torch.int64)
    check("uniforms: sample_index", sample_index, (batch,), torch.int64)
    shape = (batch,) if positions.ndim == 1 else (batch, "P")
    check("uniforms: positions", positions, shape, torch.int64)
    if runs_triton(keys):
        return _run_triton_uniforms(keys, sample_index, positions)
    uniform = torch.empty(positions.shape)
    if keys.is_cpu and runs_cpp(uniform):
        rows, columns = batch, positions.numel() // max(batch, 1)
        contiguous = (x.contiguous() for x in (keys, sample_index, positions))
        cpp.call("uniforms", torch.float32, *contiguous, rows, columns, uniform)
        return uniform
    return _torch_uniforms(keys, sample_index, positions)


def _widened(logits: Tensor, softcap: float | None) -> Tensor:
    """Logits in float32 at least and soft-capped: the bits that a transformer's head gives."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def sample_token_ref(
    logits: Tensor, uniform: Tensor, options: SamplingOptions, softcap: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The specification of `sample_token`, in the dtype of the logits (also float64; half types are
    widened to float32)."""
    logits = _widened(logits, softcap)
    vocab_size = logits.shape[1]
    x = logits - logits.amax(-1, keepdim=True)
    log_softmax = x - x.exp().sum(-1, keepdim=True).log()
    if options.temperature == 0:
        token = logits.argmax(-1)
        logprob = log_softmax.gather(1, token[:, None])[:, 0]
        return token, logprob, torch.zeros_like(logprob)

    weights = (x / options.temperature).exp()
    ranking = logits.sort(dim=-1, descending=True, stable=True).indices
    ranked = weights.gather(1, ranking)
    if options.top_k:
        ranked[:, options.top_k :] = 0
    mass_before = ranked.cumsum(-1).roll(1, -1)
    mass_before[:, 0] = 0
    if options.top_p < 1:
        ranked[mass_before >= options.top_p * ranked.sum(-1, keepdim=True)] = 0
    ranked[ranked < options.min_p] = 0
    weights = torch.zeros_like(weights).scatter(1, ranking, ranked)

    tiles = torch.nn.functional.pad(weights, (0, -vocab_size % TILE)).unflatten(1, (-1, TILE))
    tile_sums = tiles.sum(-1)
    running = tile_sums.cumsum(-1)
    threshold = uniform.to(x.dtype)[:, None] * running[:, -1:]
    tile = _first_above(running, tile_sums, threshold)
    before = torch.where(tile > 0, running.gather(1, (tile - 1).clamp(min=0)), 0)
    inside = tiles.gather(1, tile[..., None].expand(-1, 1, TILE))[:, 0]
    token = tile * TILE + _first_above(inside.cumsum(-1), inside, threshold - before)
    token = token.clamp(max=vocab_size - 1)  # only a row of NaN can exceed it
    sampling_logprob = (x.gather(1, token) / options.temperature) - running[:, -1:].log()
    return token[:, 0], log_softmax.gather(1, token)[:, 0], sampling_logprob[:, 0]


def _first_above(running: Tensor, parts: Tensor, threshold: Tensor) -> Tensor:
    """(B, 1): first index of a positive part whose running sum exceeds the threshold, or last."""
    positive = parts > 0
    above = positive & (running > threshold)
    size = parts.shape[1]
    last = size - 1 - positive.flip(-1).to(torch.int8).argmax(-1, keepdim=True)
    first = above.to(torch.int8).argmax(-1, keepdim=True)
    return torch.where(above.any(-1, keepdim=True), first, last)


@triton.jit
def _read(row_ptr, token, vocab_size, softcap):
    """float32 logits of the tokens, soft-capped; -inf outside the vocabulary."""
    x = tl.load(row_ptr + token, mask=token < vocab_size, other=0.0).to(tl.float32)
    if softcap is not None:
        x = tanh(x / softcap) * softcap
    return tl.where(token < vocab_size, x, float("-inf"))


@triton.jit
def _tiles_kernel(
    logits_ptr,  # (B, V)
    maximum_ptr,  # (B, tiles)
    normalizer_ptr,  # (B, tiles): sum of exp(x - maximum)
    mass_ptr,  # (B, tiles): sum of exp((x - maximum) / T), or None when greedy
    vocab_size,
    num_tiles,
    inverse_temperature,
    softcap,
    TILE: tl.constexpr,
):
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = tile * TILE + tl.arange(0, TILE)
    x = _read(logits_ptr + row * vocab_size, token, vocab_size, softcap)  # (TILE,)
    maximum = tl.max(x, 0)
    # A tile of -inf has sums of 0, not NaN: the row may go on elsewhere.
    x -= tl.where(maximum == float("-inf"), 0.0, maximum)
    at = row * num_tiles + tile
    tl.store(maximum_ptr + at, maximum)
    tl.store(normalizer_ptr + at, tl.sum(tl.exp(x), 0))
    if mass_ptr is not None:
        tl.store(mass_ptr + at, tl.sum(tl.exp(x * inverse_temperature), 0))


@triton.jit
def _image(x, EMPTY: tl.constexpr):
    """An integer in whose order floats lie, without the low bits that are empty."""
    bits = x.to(tl.int32, bitcast=True)
    return (tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits) >> EMPTY).to(tl.int64)


@triton.jit
def _number_of(image, EMPTY: tl.constexpr):
    """The number of an image: its empty bits are 0, and so ones in the image of a negative one."""
    bits = (image << EMPTY).to(tl.int32)
    bits = tl.where(bits < 0, (bits | ((1 << EMPTY) - 1)) ^ 0x7FFFFFFF, bits)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _from_thresholds(
    row_ptr, softcap, maximum, inverse_temperature, a, b, c,
    MASS: tl.constexpr, VOCAB_SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Numbers of logits from a, b and c upwards; then their masses, or (not MASS) the numbers."""
    num_a = tl.full([BLOCK], 0, tl.int32)
    num_b, num_c = num_a, num_a
    sum_a = tl.full([BLOCK], 0.0, tl.float32)
    sum_b, sum_c = sum_a, sum_a
    for start in range(0, VOCAB_SIZE, BLOCK):
        x = _read(row_ptr, start + tl.arange(0, BLOCK), VOCAB_SIZE, softcap)  # (BLOCK,)
        num_a += (x >= a).to(tl.int32)
        num_b += (x >= b).to(tl.int32)
        num_c += (x >= c).to(tl.int32)
        if MASS:
            w = tl.exp((x - maximum) * inverse_temperature)
            sum_a += tl.where(x >= a, w, 0.0)
            sum_b += tl.where(x >= b, w, 0.0)
            sum_c += tl.where(x >= c, w, 0.0)
    n_a, n_b, n_c = tl.sum(num_a, 0), tl.sum(num_b, 0), tl.sum(num_c, 0)
    if MASS:
        return n_a, n_b, n_c, tl.sum(sum_a, 0), tl.sum(sum_b, 0), tl.sum(sum_c, 0)
    else:
        return n_a, n_b, n_c, n_a.to(tl.float32), n_b.to(tl.float32), n_c.to(tl.float32)


@triton.jit
def _bisect(
    row_ptr, softcap, maximum, inverse_temperature, low, goal,
    MASS: tl.constexpr, EMPTY: tl.constexpr, VOCAB_SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Images `low` and `high`: the mass (not MASS: the number) of the logits from `low` upwards
    reaches the goal, from `high` upwards it does not, and between them lies one logit or ties of
    one value. With them the mass from `high` upwards and a bound on the number between.

    low: an image from which upwards the goal is certainly reached.
    """
    high = _image(maximum, EMPTY) + 1
    num_low, num_high, above = VOCAB_SIZE, 0, 0.0
    while (high - low > 1) & (num_low - num_high > 1):
        width = high - low
        a = low + tl.maximum(width // 4, 1)
        b = low + tl.maximum(width // 2, 1)
        c = low + tl.maximum(3 * width // 4, 1)
        n_a, n_b, n_c, s_a, s_b, s_c = _from_thresholds(
            row_ptr, softcap, maximum, inverse_temperature,
            _number_of(a, EMPTY), _number_of(b, EMPTY), _number_of(c, EMPTY),
            MASS, VOCAB_SIZE, BLOCK,
        )  # fmt: skip
        if s_c >= goal:
            low, num_low = c, n_c
        elif s_b >= goal:
            low, num_low, high, num_high, above = b, n_b, c, n_c, s_c
        elif s_a >= goal:
            low, num_low, high, num_high, above = a, n_a, b, n_b, s_b
        else:
            high, num_high, above = a, n_a, s_a
    return low, high, above, num_low - num_high


@triton.jit
def _cutoff_kernel(
    logits_ptr,  # (B, V)
    maximum_ptr,  # (B, tiles)
    mass_ptr,  # (B, tiles)
    cutoff_ptr,  # (B,) smallest logit that stays, or less where it has no equal
    last_ptr,  # (B,) last token that stays of those at the cutoff
    num_tiles,
    inverse_temperature,
    softcap,
    top_k,
    top_p,
    reach,  # tokens that lie further below the maximum weigh less than top-p leaves out
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    TILES: tl.constexpr,
    EMPTY: tl.constexpr,
    VOCAB_SIZE: tl.constexpr,  # the interpreter of Triton 3.6 takes no argument for a loop's bound
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * VOCAB_SIZE
    tile = tl.arange(0, TILES)
    there = tile < num_tiles
    at = row * num_tiles + tile
    tile_maximum = tl.load(maximum_ptr + at, mask=there, other=float("-inf"))  # (TILES,)
    maximum = tl.max(tile_maximum, 0)
    if TOP_K:
        # Each tile has a logit from the smallest maximum upwards.
        floor = tl.min(tl.where(there, tile_maximum, float("inf")), 0)
        low = _image(tl.where(num_tiles >= top_k, floor, float("-inf")), EMPTY)
        low, high, above, num_tied = _bisect(
            row_ptr, softcap, maximum, inverse_temperature, low, top_k,
            False, EMPTY, VOCAB_SIZE, BLOCK,
        )  # fmt: skip
        stay = top_k - above
    if TOP_P:
        low_p = _image(maximum - reach, EMPTY)
        if TOP_K:
            from_low, from_high = _number_of(low, EMPTY), _number_of(high, EMPTY)
            _, _, _, total, mass_above, _ = _from_thresholds(
                row_ptr, softcap, maximum, inverse_temperature,
                from_low, from_high, from_high, True, VOCAB_SIZE, BLOCK,
            )  # fmt: skip
            if stay < num_tied:
                total = mass_above + stay * tl.exp((from_low - maximum) * inverse_temperature)
            low_p = tl.maximum(low, low_p)
        else:
            mass = tl.load(mass_ptr + at, mask=there, other=0.0)
            total = tl.sum(mass * tl.exp((tile_maximum - maximum) * inverse_temperature), 0)
        goal = top_p * total
        low_p, _, above, num_tied = _bisect(
            row_ptr, softcap, maximum, inverse_temperature, low_p, goal,
            True, EMPTY, VOCAB_SIZE, BLOCK,
        )  # fmt: skip
        weight = tl.exp((_number_of(low_p, EMPTY) - maximum) * inverse_temperature)
        stay_p = tl.maximum(tl.ceil((goal - above) / weight), 1.0)
        if TOP_K:
            stay_p = tl.where(low_p == low, tl.minimum(stay, stay_p), stay_p)
        low, stay = low_p, stay_p

    cutoff = _number_of(low, EMPTY)
    last = VOCAB_SIZE
    if stay < num_tied:
        start, seen, num_stay = 0, 0, stay.to(tl.int32)
        while (seen < num_stay) & (start < VOCAB_SIZE):
            token = start + tl.arange(0, BLOCK)
            tied = (_read(row_ptr, token, VOCAB_SIZE, softcap) == cutoff).to(tl.int32)
            rank = seen + tl.cumsum(tied, 0)  # (BLOCK,), from 1
            last = tl.min(tl.where((tied == 1) & (rank == num_stay), token, VOCAB_SIZE), 0)
            seen += tl.sum(tied, 0)
            start += BLOCK
    tl.store(cutoff_ptr + row, cutoff)
    tl.store(last_ptr + row, last)


@triton.jit
def _weights(x, token, row, maximum, inverse_temperature, min_p, cutoff_ptr, last_ptr):
    """exp((x - maximum) / T), 0 where a filter removes it. NaN stays, and the maximum does."""
    w = tl.exp((x - maximum) * inverse_temperature)
    if cutoff_ptr is not None:
        cutoff = tl.load(cutoff_ptr + row)
        beyond = token > tl.load(last_ptr + row)
        w = tl.where((x < cutoff) | ((x == cutoff) & beyond), 0.0, w)
    return tl.where((w < min_p) & (x < maximum), 0.0, w)


@triton.jit
def _kept_kernel(
    logits_ptr,  # (B, V)
    maximum_ptr,  # (B, tiles)
    mass_ptr,  # (B, tiles): sum of the weights that filters leave, relative to the row's maximum
    cutoff_ptr,  # (B,), or None
    last_ptr,  # (B,), or None
    vocab_size,
    num_tiles,
    inverse_temperature,
    softcap,
    min_p,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
):
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    tiles = tl.arange(0, TILES)
    maximum_ptr += row * num_tiles
    maximum = tl.max(tl.load(maximum_ptr + tiles, mask=tiles < num_tiles, other=float("-inf")), 0)
    token = tile * TILE + tl.arange(0, TILE)
    x = _read(logits_ptr + row * vocab_size, token, vocab_size, softcap)  # (TILE,)
    w = _weights(x, token, row, maximum, inverse_temperature, min_p, cutoff_ptr, last_ptr)
    tl.store(mass_ptr + row * num_tiles + tile, tl.sum(w, 0))


@triton.jit
def _choose(running, parts, threshold, SIZE: tl.constexpr):
    """First index of a positive part whose running sum exceeds the threshold, else the last of a
    positive part, else -1."""
    index = tl.arange(0, SIZE)
    first = tl.min(tl.where((parts > 0) & (running > threshold), index, SIZE), 0)
    last = tl.max(tl.where(parts > 0, index, -1), 0)
    return tl.where(first < SIZE, first, last)


@triton.jit
def _choose_kernel(
    logits_ptr,  # (B, V)
    uniform_ptr,  # (B,), stride u_b
    maximum_ptr,  # (B, tiles)
    normalizer_ptr,  # (B, tiles)
    mass_ptr,  # (B, tiles), or None when greedy
    cutoff_ptr,  # (B,), or None
    last_ptr,  # (B,), or None
    token_ptr,  # (B,)
    logprob_ptr,  # (B,)
    sampling_logprob_ptr,  # (B,)
    vocab_size,
    num_tiles,
    u_b,
    inverse_temperature,
    softcap,
    min_p,
    FILTERED: tl.constexpr,  # masses are those that filters leave
    TILE: tl.constexpr,
    TILES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, TILES)
    there = tile < num_tiles
    at = row * num_tiles + tile
    tile_maximum = tl.load(maximum_ptr + at, mask=there, other=float("-inf"))  # (TILES,)
    maximum = tl.max(tile_maximum, 0)
    normalizer = tl.load(normalizer_ptr + at, mask=there, other=0.0)
    normalizer = tl.sum(normalizer * tl.exp(tile_maximum - maximum), 0)
    if mass_ptr is None:
        chosen_tile = tl.min(tl.where(tile_maximum == maximum, tile, num_tiles - 1), 0)
    else:
        mass = tl.load(mass_ptr + at, mask=there, other=0.0)
        if not FILTERED:
            mass *= tl.exp((tile_maximum - maximum) * inverse_temperature)
        running = tl.cumsum(mass, 0)  # (TILES,)
        total = tl.sum(tl.where(tile == num_tiles - 1, running, 0.0), 0)
        threshold = tl.load(uniform_ptr + row * u_b) * total
        chosen_tile = tl.maximum(_choose(running, mass, threshold, TILES), 0)
        threshold -= tl.sum(tl.where(tile == chosen_tile - 1, running, 0.0), 0)

    inside = tl.arange(0, TILE)
    token = chosen_tile * TILE + inside
    x = _read(logits_ptr + row * vocab_size, token, vocab_size, softcap)  # (TILE,)
    chosen = tl.min(tl.where(x == tl.max(x, 0), inside, TILE - 1), 0)
    if mass_ptr is not None:
        w = _weights(x, token, row, maximum, inverse_temperature, min_p, cutoff_ptr, last_ptr)
        drawn = _choose(tl.cumsum(w, 0), w, threshold, TILE)
        chosen = tl.where(drawn >= 0, drawn, chosen)
    # Only a row of NaN can lead outside the vocabulary.
    chosen = tl.minimum(chosen, vocab_size - 1 - chosen_tile * TILE)
    x = tl.sum(tl.where(inside == chosen, x, 0.0), 0) - maximum
    tl.store(token_ptr + row, (chosen_tile * TILE + chosen).to(tl.int64))
    tl.store(logprob_ptr + row, x - tl.log(normalizer))
    if mass_ptr is None:
        tl.store(sampling_logprob_ptr + row, 0.0)
    else:
        tl.store(sampling_logprob_ptr + row, x * inverse_temperature - tl.log(total))


def _launch(vocab_size: int, target: Target) -> dict[str, int]:
    """Tokens that a row's program reads at a time in search of the cutoff, and its warps: many,
    since it is alone on its processor and nothing else hides its loads."""
    block = min(4096, power_of_two(vocab_size, TILE))
    return {"BLOCK": block, "num_warps": max(4, block // (512 if target.is_hip else 256))}


def _run_triton(
    logits: Tensor, uniform: Tensor, options: SamplingOptions, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    batch, vocab_size = logits.shape
    num_tiles = triton.cdiv(vocab_size, TILE)
    greedy = options.temperature == 0
    # A factor that float32 rounds to 0 would make NaN of -inf.
    scale = 1.0 if greedy else max(1 / options.temperature, _FLOAT32.tiny)
    tiles = {"TILE": TILE, "TILES": power_of_two(num_tiles, 16), "num_warps": 4}

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=logits.device)

    maximum, normalizer = empty(batch, num_tiles), empty(batch, num_tiles)
    mass = None if greedy else empty(batch, num_tiles)
    launch(
        _tiles_kernel,
        (batch, num_tiles),
        logits, maximum, normalizer, mass, vocab_size, num_tiles, scale, softcap,
        TILE=TILE, num_warps=4,
    )  # fmt: skip

    top_k, top_p = 0 < options.top_k < vocab_size, options.top_p < 1 < vocab_size
    filtered = not greedy and (top_k or top_p or options.min_p > 0)
    cutoff = last = None
    if filtered and (top_k or top_p):
        cutoff = empty(batch)
        last = torch.empty(batch, dtype=torch.int32, device=logits.device)
        # V tokens at exp(-reach / T) weigh (1 - top_p) / e in all, and the row 1 at least.
        reach = (math.log(vocab_size / (1 - options.top_p)) + 1) / scale if top_p else 0.0
        reach = min(reach, _FLOAT32.max)
        launch(
            _cutoff_kernel,
            (batch,),
            logits, maximum, mass, cutoff, last, num_tiles, scale, softcap,
            float(options.top_k), options.top_p, reach,
            TOP_K=top_k, TOP_P=top_p, TILES=tiles["TILES"],
            EMPTY=_EMPTY_BITS.get(logits.dtype, 0) if softcap is None else 0,
            VOCAB_SIZE=vocab_size,
            **_launch(vocab_size, target_of(logits)),
        )  # fmt: skip
    if filtered:
        launch(
            _kept_kernel,
            (batch, num_tiles),
            logits, maximum, mass, cutoff, last, vocab_size, num_tiles, scale, softcap,
            options.min_p, **tiles,
        )  # fmt: skip

    token = torch.empty(batch, dtype=torch.int64, device=logits.device)
    logprob, sampling_logprob = empty(batch), empty(batch)
    launch(
        _choose_kernel,
        (batch,),
        logits, uniform, maximum, normalizer, mass, cutoff, last, token, logprob, sampling_logprob,
        vocab_size, num_tiles, uniform.stride(0), scale, softcap, options.min_p,
        FILTERED=filtered, **tiles,
    )  # fmt: skip
    return token, logprob, sampling_logprob


def samples_cpp(options: SamplingOptions, vocab_size: int) -> bool:
    """Whether these options are there in C++, where that runs at all: no top-k and no top-p."""
    return options.top_p == 1 and not 0 < options.top_k < vocab_size


def _run_cpp(
    logits: Tensor, uniform: Tensor, options: SamplingOptions, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    batch, vocab_size = logits.shape
    token = torch.empty(batch, dtype=torch.int64)
    logprob, sampling_logprob = torch.empty(batch), torch.empty(batch)
    cpp.call(
        "sample_token", logits.dtype, logits, batch, vocab_size, uniform, uniform.stride(0),
        float(options.temperature), float(options.min_p), float(softcap or 0), TILE, token,
        logprob, sampling_logprob,
    )  # fmt: skip
    return token, logprob, sampling_logprob


def sample_token(
    logits: Tensor, uniform: Tensor, options: SamplingOptions, softcap: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Sample one token per row.

    logits (B, V) float32, bfloat16 or float16, contiguous; uniform (B,) float32 in (0, 1), not read
    when greedy; softcap: positive, of the logits (they are read as they are), or None.
    Returns token (B,) int64, logprob (B,) float32 and sampling_logprob (B,) float32. ValueError
    for another shape, dtype, layout or soft-cap. No host synchronisation. On CPU a vectorised form
    that sorts only when top-k or top-p is on, and then only candidates.
    """
    if logits.dim() != 2 or logits.shape[1] == 0 or logits.dtype not in _DTYPES:
        raise ValueError(
            "sample_token: logits must be (B, V) float32, bfloat16 or float16, got "
            f"{tuple(logits.shape)} {logits.dtype}"
        )
    if not logits.is_contiguous():
        raise ValueError(f"sample_token: logits must be contiguous, got strides {logits.stride()}")
    check("sample_token: uniform", uniform, logits.shape[:1], torch.float32)
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"sample_token: softcap must be positive and finite, got {softcap}")
    if runs_triton(logits):
        return _run_triton(logits, uniform, options, softcap)
    if runs_cpp(logits) and samples_cpp(options, logits.shape[1]):
        return _run_cpp(logits, uniform, options, softcap)

    logits = _widened(logits, softcap)
    temperature = options.temperature
    if temperature == 0:
        maximum, token = logits.max(-1)
        x = logits - maximum[:, None]
        normalizer = _running_tile_sums(x.exp_())[:, -1]
        return token, -normalizer.log(), torch.zeros_like(maximum)
    maximum = logits.amax(-1, keepdim=True)
    x = logits - maximum
    if temperature == 1:
        weights = x.exp()
        normalizer = _running_tile_sums(weights)[:, -1:]
    else:
        weights = (x / temperature).exp_()
        normalizer = _running_tile_sums(x.exp())[:, -1:]
    _filter_(weights, logits, maximum, options)

    running = _running_tile_sums(weights)
    total = running[:, -1:]
    tile, rest = _search(running, uniform[:, None] * total)
    if running.shape[1] == 1:
        token, _ = _search(weights.cumsum(-1), rest)
    else:
        index = tile * TILE + torch.arange(TILE)
        outside = index >= weights.shape[1]
        inside = weights.gather(1, index.masked_fill(outside, 0)).masked_fill_(outside, 0)
        token = tile * TILE + _search(inside.cumsum(-1), rest)[0]
        token.clamp_(max=weights.shape[1] - 1)
    chosen = x.gather(1, token)
    logprob = chosen - normalizer.log()
    sampling_logprob = chosen / temperature - total.log()
    return token[:, 0], logprob[:, 0], sampling_logprob[:, 0]


def _running_tile_sums(weights: Tensor) -> Tensor:
    """(B, number of tiles) float32: sums of the tiles, accumulated from the first tile on."""
    vocab_size = weights.shape[1]
    full = vocab_size // TILE * TILE
    sums = []
    if full:
        sums.append(weights[:, :full].unflatten(1, (-1, TILE)).sum(-1))
    if full < vocab_size:
        sums.append(weights[:, full:].sum(-1, keepdim=True))
    return torch.cat(sums, 1).cumsum(-1)


def _search(running: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """First index whose running sum exceeds the threshold, and the threshold's rest inside it.

    A threshold that rounding put at the total is lowered to just under it, so that the index is
    one at which the running sum grows.
    """
    threshold = torch.minimum(threshold, torch.nextafter(running[:, -1:], torch.zeros(())))
    index = torch.searchsorted(running, threshold, right=True)
    index.clamp_(max=running.shape[1] - 1)  # only a row of NaN can exceed it
    before = running.gather(1, (index - 1).clamp_(min=0)).masked_fill_(index == 0, 0)
    return index, threshold - before


def _filter_(weights: Tensor, logits: Tensor, maximum: Tensor, options: SamplingOptions) -> None:
    """Set to 0, in place, the weights that top-k, top-p and min-p remove."""
    vocab_size = logits.shape[1]
    if 0 < options.top_k < vocab_size or options.top_p < 1:
        cutoff, num_kept = _cutoff(weights, logits, maximum, options)
        below = logits < cutoff
        weights.masked_fill_(below, 0)
        if (vocab_size - below.sum(-1, keepdim=True) > num_kept).any():
            tied = logits == cutoff
            num_above = (logits > cutoff).sum(-1, keepdim=True)
            weights.masked_fill_(tied & (tied.cumsum(-1) > num_kept - num_above), 0)
    if options.min_p > 0:
        weights.masked_fill_(weights < options.min_p, 0)


def _cutoff(
    weights: Tensor, logits: Tensor, maximum: Tensor, options: SamplingOptions
) -> tuple[Tensor, Tensor]:
    """(B, 1) smallest logit that top-k and top-p keep, and (B, 1) how many tokens they keep."""
    batch, vocab_size = logits.shape
    limit = min(options.top_k or vocab_size, vocab_size)
    if options.top_p == 1:
        cutoff = logits.topk(limit).values[:, -1:]
        return cutoff, torch.full_like(cutoff, limit, dtype=torch.int64)
    # Few candidates reach top_p in most rows; the rows in which they do not try again with more.
    # The mass of the first candidates does not depend on how many were asked for.
    top_k_on = limit < vocab_size
    width = limit if top_k_on else min(limit, _FIRST_CANDIDATES)
    total = _running_tile_sums(weights)[:, -1:]
    cutoff = torch.empty(batch, 1)
    num_kept = torch.empty(batch, 1, dtype=torch.int64)
    rows = torch.arange(batch)
    while len(rows):
        values = (logits if len(rows) == batch else logits[rows]).topk(width).values
        mass = ((values - maximum[rows]) / options.temperature).exp_().cumsum(-1)
        goal = options.top_p * (mass[:, -1:] if top_k_on else total[rows])
        count = (torch.searchsorted(mass, goal) + 1).clamp_(max=width)
        cutoff[rows], num_kept[rows] = values.gather(1, count - 1), count
        if width == limit:
            break
        rows = rows[(mass[:, -1:] < goal)[:, 0]]
        width = min(8 * width, limit)
    return cutoff, num_kept
