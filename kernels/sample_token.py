"""Draw one token per row from its logits, with one uniform per token.

Dimension letters: B rows (live samples), V vocabulary, P positions.

With x = logits - max(logits), after the soft-cap c tanh(logits / c) if there is one, in this order:
  1. temperature  w_i = exp(x_i / T); T = 0 takes the first maximal index and ignores the uniform
  2. top-k        the k largest logits stay
  3. top-p        of those, the smallest set of the most probable that reaches top_p of their mass
  4. min-p        w_i < min_p is removed; w_max = 1, so min_p is relative to the maximum
The most probable token always stays; among equal logits at a boundary, lower indices stay.

Inverse transform in the order of the vocabulary, over tiles of TILE tokens, w = 0 where removed:
  s_j = sum of w over tile j;  S_j = s_0 + .. + s_j;  t = u S_last
  tile  = first j with S_j > t;  r = t - S_{tile-1}
  token = first i of that tile with (w summed from the tile's start to i) > r
If rounding leaves no such tile or token, the last one with w > 0 is taken. All is float32. The
mapping from (u, logits) to a token is fixed: another TILE or order would change published samples.

Repetition penalties, logit biases and stop tokens are not here.
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
    SHA-256 of the row id in UTF-8, stream name in ASCII). The first two fields have a fixed length,
    so no two triples share an encoding. Raises ValueError for a seed outside [0, 2**64).
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
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    mask = offset < num_uniforms
    row, column = offset // num_positions, offset % num_positions
    key0 = tl.load(keys_ptr + row * k_b, mask=mask, other=0)
    key1 = tl.load(keys_ptr + row * k_b + k_w, mask=mask, other=0)
    index = tl.load(index_ptr + row * i_b, mask=mask, other=0)
    position = tl.load(positions_ptr + row * p_b + column * p_p, mask=mask, other=0)
    word, _, _, _ = tl.philox(
        key0 | (key1 << 32),
        index.to(tl.uint32),
        (index >> 32).to(tl.uint32),
        position.to(tl.uint32),
        (position >> 32).to(tl.uint32),
    )
    uniform = ((word >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2**-23
    tl.store(uniform_ptr + offset, uniform, mask=mask)


def _run_triton_uniforms(keys: Tensor, sample_index: Tensor, positions: Tensor) -> Tensor:
    uniform = torch.empty(positions.shape, dtype=torch.float32, device=positions.device)
    columns = positions if positions.dim() == 2 else positions[:, None]
    block = min(256, power_of_two(uniform.numel(), 16))
    launch(
        _uniforms_kernel,
        (triton.cdiv(uniform.numel(), block),),
        keys, sample_index, columns, uniform, uniform.numel(), columns.shape[1],
        *keys.stride(), *sample_index.stride(), *columns.stride(), BLOCK=block, num_warps=4,
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

    keys: (B, 2) int64 from `stream_key`. sample_index: (B,) int64. positions: (B,) or (B, P) int64.
    All are non-negative. Returns float32 of the shape of positions, the same bits on every device.
    A uniform depends on the seed, the row, the sample's index and the position alone: the Philox
    counter is (sample index, position), two words each, and the uniform ((x >> 9) + 1/2) / 2**23 of
    the first output word x. (With 24 bits the largest uniform would round to 1.) In torch a call is
    some 300 small operations for any P, so draw a block of positions at a time. Raises ValueError
    for other shapes and dtypes.
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


def _to_float(logits: Tensor, softcap: float | None) -> Tensor:
    """Logits in float32 or wider, soft-capped."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def sample_token_ref(
    logits: Tensor, uniform: Tensor, options: SamplingOptions, softcap: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The specification of `sample_token`, in the dtype of the logits (also float64; half types in
    float32)."""
    logits = _to_float(logits, softcap)
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
    target = uniform.to(x.dtype)[:, None] * running[:, -1:]
    tile = _first_above(running, tile_sums, target)
    before = torch.where(tile > 0, running.gather(1, (tile - 1).clamp(min=0)), 0)
    inside = tiles.gather(1, tile[..., None].expand(-1, 1, TILE))[:, 0]
    token = tile * TILE + _first_above(inside.cumsum(-1), inside, target - before)
    token = token.clamp(max=vocab_size - 1)  # only a row of NaN can exceed it
    sampling_logprob = (x.gather(1, token) / options.temperature) - running[:, -1:].log()
    return token[:, 0], log_softmax.gather(1, token)[:, 0], sampling_logprob[:, 0]


def _first_above(running: Tensor, parts: Tensor, target: Tensor) -> Tensor:
    """(B, 1): the first index whose part is positive and whose running sum exceeds the target; else
    the last with a positive part."""
    positive = parts > 0
    above = positive & (running > target)
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
def _tile_stats_kernel(
    logits_ptr,  # (B, V)
    tile_max_ptr,  # (B, tiles)
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
    tile_max = tl.max(x, 0)
    # A tile of -inf has sums of 0, not NaN: the row may go on elsewhere.
    x -= tl.where(tile_max == float("-inf"), 0.0, tile_max)
    offset = row * num_tiles + tile
    tl.store(tile_max_ptr + offset, tile_max)
    tl.store(normalizer_ptr + offset, tl.sum(tl.exp(x), 0))
    if mass_ptr is not None:
        tl.store(mass_ptr + offset, tl.sum(tl.exp(x * inverse_temperature), 0))


@triton.jit
def _to_ordered_int(x, EMPTY: tl.constexpr):
    """An integer that sorts like the float x. EMPTY low bits, 0 in every number of x's original
    dtype, are dropped."""
    bits = x.to(tl.int32, bitcast=True)
    return (tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits) >> EMPTY).to(tl.int64)


@triton.jit
def _from_ordered_int(ordered, EMPTY: tl.constexpr):
    """Inverse of `_to_ordered_int`. The low EMPTY bits are filled so that the original bits are 0:
    for negative numbers the encoding inverts them, so they are filled with ones."""
    bits = (ordered << EMPTY).to(tl.int32)
    bits = tl.where(bits < 0, (bits | ((1 << EMPTY) - 1)) ^ 0x7FFFFFFF, bits)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _sums_above(
    row_ptr, softcap, row_max, inverse_temperature, a, b, c,
    MASS: tl.constexpr, VOCAB_SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The numbers of logits >= a, >= b and >= c; then their masses or, if not MASS, the numbers."""
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
            w = tl.exp((x - row_max) * inverse_temperature)
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
    row_ptr, softcap, row_max, inverse_temperature, low, goal,
    MASS: tl.constexpr, EMPTY: tl.constexpr, VOCAB_SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Bisect the ordered integers for a threshold: the mass (if not MASS, the number) of the logits
    >= `low` reaches the goal, of those >= `high` it does not, and between them lies one logit or
    ties of one value. Returns low, high, the mass >= high, and a bound on the number between.

    low: a lower bound, at which the goal is certainly reached. Each pass over the row tests three
    thresholds, i.e. resolves two bits: they share loads and exponentials, while seven would cost as
    much arithmetic as the passes saved. At most 16 passes (8 in bfloat16 without a soft-cap).
    """
    high = _to_ordered_int(row_max, EMPTY) + 1
    num_low, num_high, above = VOCAB_SIZE, 0, 0.0
    while (high - low > 1) & (num_low - num_high > 1):
        width = high - low
        a = low + tl.maximum(width // 4, 1)
        b = low + tl.maximum(width // 2, 1)
        c = low + tl.maximum(3 * width // 4, 1)
        n_a, n_b, n_c, s_a, s_b, s_c = _sums_above(
            row_ptr, softcap, row_max, inverse_temperature,
            _from_ordered_int(a, EMPTY), _from_ordered_int(b, EMPTY), _from_ordered_int(c, EMPTY),
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
def _threshold_kernel(
    logits_ptr,  # (B, V)
    tile_max_ptr,  # (B, tiles)
    mass_ptr,  # (B, tiles)
    threshold_ptr,  # (B,) the smallest logit kept, or less if it has no tie
    last_kept_ptr,  # (B,) the last token kept of those tied at the threshold
    num_tiles,
    inverse_temperature,
    softcap,
    top_k,
    top_p,
    depth,  # all logits further below the maximum together weigh less than top-p removes
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    TILES: tl.constexpr,
    EMPTY: tl.constexpr,
    VOCAB_SIZE: tl.constexpr,  # the interpreter of Triton 3.6 takes no argument for a loop's bound
    BLOCK: tl.constexpr,
):
    """Top-k and top-p, each a search for the smallest logit kept; a program has a whole row.

    Lower bounds to start from: for top-k the smallest tile maximum; for top-p a logit so low that
    even V tokens below it weigh less than 1 - top_p."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * VOCAB_SIZE
    tile = tl.arange(0, TILES)
    mask = tile < num_tiles
    offset = row * num_tiles + tile
    tile_max = tl.load(tile_max_ptr + offset, mask=mask, other=float("-inf"))  # (TILES,)
    row_max = tl.max(tile_max, 0)
    if TOP_K:
        # Every tile has a logit that reaches the smallest maximum.
        floor = tl.min(tl.where(mask, tile_max, float("inf")), 0)
        low = _to_ordered_int(tl.where(num_tiles >= top_k, floor, float("-inf")), EMPTY)
        low, high, above, num_tied = _bisect(
            row_ptr, softcap, row_max, inverse_temperature, low, top_k,
            False, EMPTY, VOCAB_SIZE, BLOCK,
        )  # fmt: skip
        num_kept = top_k - above
    if TOP_P:
        low_p = _to_ordered_int(row_max - depth, EMPTY)
        if TOP_K:
            from_low, from_high = _from_ordered_int(low, EMPTY), _from_ordered_int(high, EMPTY)
            _, _, _, row_sum, mass_above, _ = _sums_above(
                row_ptr, softcap, row_max, inverse_temperature,
                from_low, from_high, from_high, True, VOCAB_SIZE, BLOCK,
            )  # fmt: skip
            if num_kept < num_tied:
                row_sum = mass_above + num_kept * tl.exp((from_low - row_max) * inverse_temperature)
            low_p = tl.maximum(low, low_p)
        else:
            mass = tl.load(mass_ptr + offset, mask=mask, other=0.0)
            row_sum = tl.sum(mass * tl.exp((tile_max - row_max) * inverse_temperature), 0)
        goal = top_p * row_sum
        low_p, _, above, num_tied = _bisect(
            row_ptr, softcap, row_max, inverse_temperature, low_p, goal,
            True, EMPTY, VOCAB_SIZE, BLOCK,
        )  # fmt: skip
        weight = tl.exp((_from_ordered_int(low_p, EMPTY) - row_max) * inverse_temperature)
        num_kept_p = tl.maximum(tl.ceil((goal - above) / weight), 1.0)
        if TOP_K:
            num_kept_p = tl.where(low_p == low, tl.minimum(num_kept, num_kept_p), num_kept_p)
        low, num_kept = low_p, num_kept_p

    threshold = _from_ordered_int(low, EMPTY)
    last_kept = VOCAB_SIZE
    if num_kept < num_tied:
        start, seen, last_rank = 0, 0, num_kept.to(tl.int32)
        while (seen < last_rank) & (start < VOCAB_SIZE):
            token = start + tl.arange(0, BLOCK)
            tied = (_read(row_ptr, token, VOCAB_SIZE, softcap) == threshold).to(tl.int32)
            rank = seen + tl.cumsum(tied, 0)  # (BLOCK,), from 1
            last_kept = tl.min(tl.where((tied == 1) & (rank == last_rank), token, VOCAB_SIZE), 0)
            seen += tl.sum(tied, 0)
            start += BLOCK
    tl.store(threshold_ptr + row, threshold)
    tl.store(last_kept_ptr + row, last_kept)


@triton.jit
def _weights(x, token, row, row_max, inverse_temperature, min_p, threshold_ptr, last_kept_ptr):
    """exp((x - row_max) / T), 0 where a filter removes it. NaN stays, and so does the maximum."""
    w = tl.exp((x - row_max) * inverse_temperature)
    if threshold_ptr is not None:
        threshold = tl.load(threshold_ptr + row)
        beyond = token > tl.load(last_kept_ptr + row)
        w = tl.where((x < threshold) | ((x == threshold) & beyond), 0.0, w)
    return tl.where((w < min_p) & (x < row_max), 0.0, w)


@triton.jit
def _filtered_tile_sums_kernel(
    logits_ptr,  # (B, V)
    tile_max_ptr,  # (B, tiles)
    mass_ptr,  # (B, tiles): sum of the filtered weights, relative to the row's maximum
    threshold_ptr,  # (B,), or None
    last_kept_ptr,  # (B,), or None
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
    tile_max_ptr += row * num_tiles
    row_max = tl.max(tl.load(tile_max_ptr + tiles, mask=tiles < num_tiles, other=float("-inf")), 0)
    token = tile * TILE + tl.arange(0, TILE)
    x = _read(logits_ptr + row * vocab_size, token, vocab_size, softcap)  # (TILE,)
    w = _weights(x, token, row, row_max, inverse_temperature, min_p, threshold_ptr, last_kept_ptr)
    tl.store(mass_ptr + row * num_tiles + tile, tl.sum(w, 0))


@triton.jit
def _first_exceeding(running, parts, target, SIZE: tl.constexpr):
    """The first index whose part is positive and whose running sum exceeds the target; else the
    last with a positive part; else -1."""
    index = tl.arange(0, SIZE)
    first = tl.min(tl.where((parts > 0) & (running > target), index, SIZE), 0)
    last = tl.max(tl.where(parts > 0, index, -1), 0)
    return tl.where(first < SIZE, first, last)


@triton.jit
def _sample_from_tiles_kernel(
    logits_ptr,  # (B, V)
    uniform_ptr,  # (B,), stride u_b
    tile_max_ptr,  # (B, tiles)
    normalizer_ptr,  # (B, tiles)
    mass_ptr,  # (B, tiles), or None when greedy
    threshold_ptr,  # (B,), or None
    last_kept_ptr,  # (B,), or None
    token_ptr,  # (B,)
    logprob_ptr,  # (B,)
    sampling_logprob_ptr,  # (B,)
    vocab_size,
    num_tiles,
    u_b,
    inverse_temperature,
    softcap,
    min_p,
    FILTERED: tl.constexpr,  # masses are those of filtered weights
    TILE: tl.constexpr,
    TILES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, TILES)
    mask = tile < num_tiles
    offset = row * num_tiles + tile
    tile_max = tl.load(tile_max_ptr + offset, mask=mask, other=float("-inf"))  # (TILES,)
    row_max = tl.max(tile_max, 0)
    normalizer = tl.load(normalizer_ptr + offset, mask=mask, other=0.0)
    normalizer = tl.sum(normalizer * tl.exp(tile_max - row_max), 0)
    if mass_ptr is None:
        chosen_tile = tl.min(tl.where(tile_max == row_max, tile, num_tiles - 1), 0)
    else:
        mass = tl.load(mass_ptr + offset, mask=mask, other=0.0)
        if not FILTERED:
            mass *= tl.exp((tile_max - row_max) * inverse_temperature)
        running = tl.cumsum(mass, 0)  # (TILES,)
        row_sum = tl.sum(tl.where(tile == num_tiles - 1, running, 0.0), 0)
        target = tl.load(uniform_ptr + row * u_b) * row_sum
        chosen_tile = tl.maximum(_first_exceeding(running, mass, target, TILES), 0)
        target -= tl.sum(tl.where(tile == chosen_tile - 1, running, 0.0), 0)

    inside = tl.arange(0, TILE)
    token = chosen_tile * TILE + inside
    x = _read(logits_ptr + row * vocab_size, token, vocab_size, softcap)  # (TILE,)
    chosen = tl.min(tl.where(x == tl.max(x, 0), inside, TILE - 1), 0)
    if mass_ptr is not None:
        w = _weights(
            x, token, row, row_max, inverse_temperature, min_p, threshold_ptr, last_kept_ptr
        )
        drawn = _first_exceeding(tl.cumsum(w, 0), w, target, TILE)
        chosen = tl.where(drawn >= 0, drawn, chosen)
    # Only a row of NaN can lead outside the vocabulary.
    chosen = tl.minimum(chosen, vocab_size - 1 - chosen_tile * TILE)
    x = tl.sum(tl.where(inside == chosen, x, 0.0), 0) - row_max
    tl.store(token_ptr + row, (chosen_tile * TILE + chosen).to(tl.int64))
    tl.store(logprob_ptr + row, x - tl.log(normalizer))
    if mass_ptr is None:
        tl.store(sampling_logprob_ptr + row, 0.0)
    else:
        tl.store(sampling_logprob_ptr + row, x * inverse_temperature - tl.log(row_sum))


def _launch(vocab_size: int, target: Target) -> dict[str, int]:
    """Tokens that a program reads at a time in search of a threshold, and its warps: many, since it
    is alone on its multiprocessor and nothing else hides its loads."""
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

    tile_max, normalizer = empty(batch, num_tiles), empty(batch, num_tiles)
    mass = None if greedy else empty(batch, num_tiles)
    launch(
        _tile_stats_kernel,
        (batch, num_tiles),
        logits, tile_max, normalizer, mass, vocab_size, num_tiles, scale, softcap,
        TILE=TILE, num_warps=4,
    )  # fmt: skip

    top_k, top_p = 0 < options.top_k < vocab_size, options.top_p < 1 < vocab_size
    filtered = not greedy and (top_k or top_p or options.min_p > 0)
    threshold = last_kept = None
    if filtered and (top_k or top_p):
        threshold = empty(batch)
        last_kept = torch.empty(batch, dtype=torch.int32, device=logits.device)
        # V tokens at exp(-depth / T) weigh (1 - top_p) / e in all, and the row 1 at least.
        depth = (math.log(vocab_size / (1 - options.top_p)) + 1) / scale if top_p else 0.0
        depth = min(depth, _FLOAT32.max)
        launch(
            _threshold_kernel,
            (batch,),
            logits, tile_max, mass, threshold, last_kept, num_tiles, scale, softcap,
            float(options.top_k), options.top_p, depth,
            TOP_K=top_k, TOP_P=top_p, TILES=tiles["TILES"],
            EMPTY=_EMPTY_BITS.get(logits.dtype, 0) if softcap is None else 0,
            VOCAB_SIZE=vocab_size,
            **_launch(vocab_size, target_of(logits)),
        )  # fmt: skip
    if filtered:
        launch(
            _filtered_tile_sums_kernel,
            (batch, num_tiles),
            logits, tile_max, mass, threshold, last_kept, vocab_size, num_tiles, scale, softcap,
            options.min_p, **tiles,
        )  # fmt: skip

    token = torch.empty(batch, dtype=torch.int64, device=logits.device)
    logprob, sampling_logprob = empty(batch), empty(batch)
    launch(
        _sample_from_tiles_kernel,
        (batch,),
        logits, uniform, tile_max, normalizer, mass, threshold, last_kept,
        token, logprob, sampling_logprob, vocab_size, num_tiles, uniform.stride(0), scale, softcap,
        options.min_p,
        FILTERED=filtered, **tiles,
    )  # fmt: skip
    return token, logprob, sampling_logprob


def _run_cpp(
    logits: Tensor, uniform: Tensor, options: SamplingOptions, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    batch, vocab_size = logits.shape
    token = torch.empty(batch, dtype=torch.int64)
    logprob, sampling_logprob = torch.empty(batch), torch.empty(batch)
    cpp.call(
        "sample_token", logits.dtype, logits, batch, vocab_size, uniform, uniform.stride(0),
        float(options.temperature), options.top_k, float(options.top_p), float(options.min_p),
        float(softcap or 0), TILE, token, logprob, sampling_logprob,
    )  # fmt: skip
    return token, logprob, sampling_logprob


def sample_token(
    logits: Tensor, uniform: Tensor, options: SamplingOptions, softcap: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Sample one token per row; no host synchronisation on a GPU.

    logits: (B, V) float32, bfloat16 or float16, contiguous, before the soft-cap. uniform: (B,)
    float32 in (0, 1), not read when greedy. softcap: positive, or None.
    Returns token (B,) int64 and two natural log-probs, (B,) float32: `logprob` of softmax(logits),
    and `sampling_logprob` of the distribution drawn from (tempered, filtered, renormalised; 0 when
    greedy). A row whose maximum is NaN or infinite gets some token in [0, V) and NaN log-probs
    (when greedy, only `logprob` is NaN). Raises ValueError for other shapes, dtypes, layouts or
    soft-caps.

    A row's token does not depend on the other rows. Each type of device sums in an order of its
    own, so tokens may differ between devices where a uniform is within rounding of a boundary.
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
    if runs_cpp(logits):
        return _run_cpp(logits, uniform, options, softcap)
    return _run_torch(logits, uniform, options, softcap)


def _run_torch(
    logits: Tensor, uniform: Tensor, options: SamplingOptions, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Sorts only if top-k or top-p is on, and then only candidates."""
    logits = _to_float(logits, softcap)
    temperature = options.temperature
    if temperature == 0:
        row_max, token = logits.max(-1)
        x = logits - row_max[:, None]
        normalizer = _running_tile_sums(x.exp_())[:, -1]
        return token, -normalizer.log(), torch.zeros_like(row_max)
    row_max = logits.amax(-1, keepdim=True)
    x = logits - row_max
    if temperature == 1:
        weights = x.exp()
        normalizer = _running_tile_sums(weights)[:, -1:]
    else:
        weights = (x / temperature).exp_()
        normalizer = _running_tile_sums(x.exp())[:, -1:]
    _filter_(weights, logits, row_max, options)

    running = _running_tile_sums(weights)
    row_sum = running[:, -1:]
    tile, rest = _search(running, uniform[:, None] * row_sum)
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
    sampling_logprob = chosen / temperature - row_sum.log()
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


def _search(running: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The first index whose running sum exceeds the target, and what is left of the target there.

    A target that rounding put at the total is lowered to just under it, so that the running sum
    grows at the index.
    """
    target = torch.minimum(target, torch.nextafter(running[:, -1:], torch.zeros(())))
    index = torch.searchsorted(running, target, right=True)
    index.clamp_(max=running.shape[1] - 1)  # only a row of NaN can exceed it
    before = running.gather(1, (index - 1).clamp_(min=0)).masked_fill_(index == 0, 0)
    return index, target - before


def _filter_(weights: Tensor, logits: Tensor, row_max: Tensor, options: SamplingOptions) -> None:
    """Set to 0, in place, the weights that top-k, top-p and min-p remove."""
    vocab_size = logits.shape[1]
    if 0 < options.top_k < vocab_size or options.top_p < 1:
        threshold, num_kept = _threshold(weights, logits, row_max, options)
        below = logits < threshold
        weights.masked_fill_(below, 0)
        if (vocab_size - below.sum(-1, keepdim=True) > num_kept).any():
            tied = logits == threshold
            num_above = (logits > threshold).sum(-1, keepdim=True)
            weights.masked_fill_(tied & (tied.cumsum(-1) > num_kept - num_above), 0)
    if options.min_p > 0:
        weights.masked_fill_(weights < options.min_p, 0)


def _threshold(
    weights: Tensor, logits: Tensor, row_max: Tensor, options: SamplingOptions
) -> tuple[Tensor, Tensor]:
    """The smallest logit and the number of tokens that top-k and top-p keep, (B, 1) each."""
    batch, vocab_size = logits.shape
    max_kept = min(options.top_k or vocab_size, vocab_size)
    if options.top_p == 1:
        threshold = logits.topk(max_kept).values[:, -1:]
        return threshold, torch.full_like(threshold, max_kept, dtype=torch.int64)
    # In most rows few candidates reach top_p; the other rows try again with more.
    # The mass of the first candidates does not depend on how many there are.
    top_k_on = max_kept < vocab_size
    num_candidates = max_kept if top_k_on else min(max_kept, _FIRST_CANDIDATES)
    row_sum = _running_tile_sums(weights)[:, -1:]
    threshold = torch.empty(batch, 1)
    num_kept = torch.empty(batch, 1, dtype=torch.int64)
    rows = torch.arange(batch)
    while len(rows):
        values = (logits if len(rows) == batch else logits[rows]).topk(num_candidates).values
        mass = ((values - row_max[rows]) / options.temperature).exp_().cumsum(-1)
        goal = options.top_p * (mass[:, -1:] if top_k_on else row_sum[rows])
        count = (torch.searchsorted(mass, goal) + 1).clamp_(max=num_candidates)
        threshold[rows], num_kept[rows] = values.gather(1, count - 1), count
        if num_candidates == max_kept:
            break
        rows = rows[(mass[:, -1:] < goal)[:, 0]]
        num_candidates = min(8 * num_candidates, max_kept)
    return threshold, num_kept
