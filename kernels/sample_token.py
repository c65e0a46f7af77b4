"""Draw one token per row from its logits, with one uniform per token.

Dimension letters: B rows (live samples), V vocabulary, P positions.

Uniforms. `stream_key` gives a row of the data its own Philox4x32-10 key for each purpose; the
counter is (sample index, position). A draw therefore depends on the seed, the row, the index of
the sample and the position, and on nothing else: not on the slot, not on k, not on the batch.

Distribution. With x = logits - max(logits), in this order:
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

Log-probs are natural logarithms: `logprob` of softmax(logits), `sampling_logprob` of the
distribution drawn from (tempered, filtered, renormalised; 0 when greedy).

A row whose maximum is NaN or infinite gets some token in [0, V) and NaN log-probs (when greedy,
only `logprob` is NaN); `check_logits` is the explicit, synchronising test for such rows.
This file does not apply repetition penalties or logit biases, and does not choose stop tokens.
"""

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

TILE = 1024
STREAMS = ("token", "order", "tie")

_PHILOX_M = (0xD2511F53, 0xCD9E8D57)
_PHILOX_W = (0x9E3779B9, 0xBB67AE85)
_MASK32 = 0xFFFFFFFF
_MIN_TEMPERATURE = 1e-5  # smaller ones, in float32, are not told apart from 0
_FIRST_CANDIDATES = 64


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


def uniforms(keys: Tensor, sample_index: Tensor, positions: Tensor) -> Tensor:
    """One float32 uniform in the open interval (0, 1) for each row and position.

    keys (B, 2) int64 from `stream_key`; sample_index (B,) int64; positions (B,) or (B, P) int64,
    all non-negative. Returns the shape of positions. The counter is (low and high word of the
    sample index, low and high word of the position); the uniform is ((x >> 9) + 1/2) / 2**23 of
    the first output word x: 23 bits, because with 24 the half could not be represented and the
    largest uniform would round to 1. A call is some 300 small operations whatever P is, so a
    decode loop should draw a block of positions at a time.
    """
    batch = keys.shape[0]
    if keys.shape != (batch, 2) or sample_index.shape != (batch,):
        raise ValueError(
            f"keys must be (B, 2) and sample_index (B,), got {tuple(keys.shape)} "
            f"and {tuple(sample_index.shape)}"
        )
    if positions.dim() not in (1, 2) or positions.shape[0] != batch:
        raise ValueError(f"positions must be ({batch},) or ({batch}, P), got {positions.shape}")
    for name, tensor in (("keys", keys), ("sample_index", sample_index), ("positions", positions)):
        if tensor.dtype != torch.int64:
            raise ValueError(f"{name} must be int64, got {tensor.dtype}")
    rows = (batch,) + (1,) * (positions.dim() - 1)
    key0, key1 = keys[:, 0].reshape(rows), keys[:, 1].reshape(rows)
    index = sample_index.reshape(rows)
    word, _, _, _ = philox4x32(
        key0, key1, index & _MASK32, index >> 32, positions & _MASK32, positions >> 32
    )
    return ((word >> 9).to(torch.float32) + 0.5) * 2.0**-23


def check_logits(logits: Tensor) -> None:
    """Raise ValueError naming the first row whose maximum is NaN or infinite (synchronises)."""
    maximum = logits.amax(-1)
    bad = (~maximum.isfinite()).nonzero()
    if len(bad):
        row = int(bad[0, 0])
        raise ValueError(f"the largest logit of row {row} is {maximum[row].item()}, not finite")


def sample_token_ref(
    logits: Tensor, uniform: Tensor, options: SamplingOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """The specification of `sample_token`, in the dtype of the logits (also float64)."""
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


def sample_token(
    logits: Tensor, uniform: Tensor, options: SamplingOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """Sample one token per row.

    logits (B, V) float32, contiguous; uniform (B,) float32 in (0, 1), not read when greedy.
    Returns token (B,) int64, logprob (B,) float32 and sampling_logprob (B,) float32. ValueError
    for another shape, dtype or layout. No host synchronisation: on a GPU the reference runs; on
    CPU a vectorised form that sorts only when top-k or top-p is on, and then only candidates.
    """
    if logits.dim() != 2 or logits.shape[1] == 0 or logits.dtype != torch.float32:
        raise ValueError(f"logits must be (B, V) float32, got {tuple(logits.shape)} {logits.dtype}")
    if not logits.is_contiguous():
        raise ValueError(f"logits must be contiguous, got strides {logits.stride()}")
    if uniform.shape != logits.shape[:1] or uniform.dtype != torch.float32:
        raise ValueError(
            f"uniform must be ({logits.shape[0]},) float32, "
            f"got {tuple(uniform.shape)} {uniform.dtype}"
        )
    if logits.device.type != "cpu":
        return sample_token_ref(logits, uniform, options)

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
