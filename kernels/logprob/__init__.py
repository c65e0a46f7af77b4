"""Log-probs of chosen tokens from hidden states and the head's weight, without their logits.

    z    = cap(hidden W^T) / temperature,   cap(x) = softcap tanh(x / softcap), or x
    lse  = log sum_v exp(z_v),   p = exp(z - lse)
    logp = z_target - lse
    entropy = lse - sum_v p_v z_v

and with gradients g of logp, e of the entropy and l of lse, for each v

    dz_v = p_v (l - g - e (z_v - lse + entropy)) + g [v = target]
    d(hidden W^T)_v = dz_v (1 - (z_v temperature / softcap)^2) / temperature

N tokens, H the hidden size, V the vocabulary. All this is float32 (float64 for float64 input); the
gradient of the weight is added up in it.

The logits of some rows are there at a time (`chunk_size`), never all of them. Without gradients
that is one matrix product; the backward makes the logits again, and two products with their
gradients: four. `grpo_loss.py` shares all of this.

Triton. A program makes one tile of logits, and of each row of each quarter of it leaves the maximum
m, the sum of exp(z - m) and that of exp(z - m) (z - m); the program with a row's target leaves its
z. A second kernel puts these parts together, in their order. Where gradients follow, exp(z - m) is
kept in the dtype of the hidden states and becomes the gradients of logits in place: right to half a
unit in its last place, where logits in half precision would be off by whole percents. It is exactly
1 for a likely token, whose gradient is 1 - p. There are no atomics and no locks. Products and sums
run in one order that does not depend on N or on the chunk, but for the weight's gradient, a sum
over all rows. (float16, whose range a mean over many tokens leaves, holds gradients in units of a
power of two that is the chunk's.) Numbers that change from step to step are no part of what a
kernel is compiled for.

Tokens that nothing asks for are put behind the others (`front`) and not computed. A target that is
out of range gives NaN on a GPU, where a check would wait for the device, and is refused on CPU.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.checks import check, check_triton
from kernels.device_math import tanh
from kernels.launch import launch, runs_triton
from kernels.logprob.torch_impl import HeadCPU, LogProbGradients, LogProbs
from kernels.target import Target, target_of

_CHUNK_SIZE = 4096  # rows on a GPU, unless told otherwise; of 256,000 bfloat16 logits 2.1 GB
# Rows and parts of the kernel that puts parts together.
_JOIN_LAUNCH = {"ROWS": 32, "PARTS": 32, "num_warps": 4}
_GRADIENT_ROWS = 16
_PARTS = 4  # of a tile of logits: what is done to a whole one takes too many registers


def linear_logprob_ref(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> LogProbs:
    """Specification of `linear_logprob`, with all logits at once."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    logits = hidden.to(wide) @ weight.to(wide).T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    z = logits / temperature
    lse = torch.logsumexp(z, -1)
    entropy = lse - (torch.softmax(z, -1) * z).sum(-1)
    return LogProbs(z.gather(1, target[:, None])[:, 0] - lse, entropy, lse)


@triton.jit
def _tile(program, num_rows, num_columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
          GROUP: tl.constexpr):  # fmt: skip
    """The tile of a program, (row, column): GROUP tiles of rows take each tile of columns in turn,
    so that what they read stays in the cache."""
    row_tiles = (num_rows + BLOCK_M - 1) // BLOCK_M
    column_tiles = (num_columns + BLOCK_N - 1) // BLOCK_N
    first = program // (column_tiles * GROUP) * GROUP
    tiles = tl.minimum(row_tiles - first, GROUP)
    inside = program % (column_tiles * GROUP)
    return first + inside % tiles, inside // tiles


@triton.jit
def _halves(tile, M: tl.constexpr, N: tl.constexpr):
    """The left and the right half of a tile (M, N): what is done to a whole one takes twice the
    registers."""
    return tl.split(tl.permute(tl.reshape(tile, (M, 2, N // 2)), (0, 2, 1)))


@triton.jit
def _store_part(
    z, row, part, target, held_at, top_ptr, total_ptr, moment_ptr, z_target_ptr,
    num_rows, vocab, softcap, temperature, N: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """What is kept of a part of N tokens, given its raw logits (BLOCK_M, N)."""
    first = part * N
    column = first + tl.arange(0, N)  # (N,)
    there, inside = row < num_rows, (column < vocab)[None, :]
    if SOFTCAP:
        z = tanh(z / softcap) * softcap
    z = z / temperature
    z_target = tl.sum(tl.where(column[None, :] == target[:, None], z, 0.0), 1)
    here = (target >= first) & (target < tl.minimum(first + N, vocab))
    tl.store(z_target_ptr + row, z_target, mask=there & here)
    top = tl.max(tl.where(inside, z, float("-inf")), 1)  # (BLOCK_M,)
    z = z - tl.where(top == float("-inf"), 0.0, top)[:, None]
    weights = tl.where(inside, tl.exp(z), 0.0)
    at = part.to(tl.int64) * num_rows + row
    tl.store(top_ptr + at, top, mask=there)
    tl.store(total_ptr + at, tl.sum(weights, 1), mask=there)
    tl.store(moment_ptr + at, tl.sum(weights * z, 1), mask=there)
    if held_at is not None:
        weights = weights.to(held_at.dtype.element_ty)
        tl.store(held_at[:, None] + column[None, :], weights, mask=there[:, None] & inside)


@triton.jit(do_not_specialize=["num_rows"])
def _logits_kernel(
    hidden_ptr,  # (n, H), strides x_n, 1
    weight_ptr,  # (V, H), strides w_v, 1
    target_ptr,  # (n,) int64
    held_ptr,  # (n, V), strides held_n, 1, or None: exp(z - m)
    top_ptr,  # (parts, n) float32: m
    total_ptr,  # (parts, n) float32
    moment_ptr,  # (parts, n) float32
    z_target_ptr,  # (n,) float32
    limit_ptr,  # (), or None: how many rows are wanted
    num_rows,  # n
    vocab,  # V
    size,  # H
    x_n,
    w_v,
    held_n,
    softcap,
    temperature,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,  # BLOCK_K divides H
    SOFTCAP: tl.constexpr,
    GROUP: tl.constexpr,
):
    row_tile, tile = _tile(tl.program_id(0), num_rows, vocab, BLOCK_M, BLOCK_N, GROUP)
    row = row_tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # (BLOCK_M,)
    column = tile.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    limit = num_rows
    if limit_ptr is not None:
        limit = tl.load(limit_ptr).to(tl.int32)
    if row_tile * BLOCK_M >= limit:
        return
    there = row < num_rows
    x_at = hidden_ptr + (tl.minimum(row, num_rows - 1) * x_n)[:, None]
    w_at = weight_ptr + (tl.minimum(column, vocab - 1) * w_v)[:, None]
    z = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, size, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)[None, :]
        if EVEN:
            x, w = tl.load(x_at + k), tl.load(w_at + k)
        else:
            x = tl.load(x_at + k, mask=k < size, other=0.0)
            w = tl.load(w_at + k, mask=k < size, other=0.0)
        z = tl.dot(x, tl.trans(w), z, input_precision="ieee")
    # A target beyond 32 bits is beyond the vocabulary, too.
    target = tl.load(target_ptr + row, mask=there, other=-1)
    target = tl.where(target < vocab, target, -1).to(tl.int32)  # (BLOCK_M,)
    held_at = None
    if held_ptr is not None:
        held_at = held_ptr + row * held_n
    left, right = _halves(z, BLOCK_M, BLOCK_N)
    N: tl.constexpr = BLOCK_N // 4
    for half in tl.static_range(2):
        parts = _halves(left if half == 0 else right, BLOCK_M, 2 * N)
        for i in tl.static_range(2):
            _store_part(
                parts[i], row, 4 * tile + 2 * half + i, target, held_at, top_ptr, total_ptr,
                moment_ptr, z_target_ptr, num_rows, vocab, softcap, temperature, N, SOFTCAP,
            )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows"])
def _join_kernel(
    top_ptr,  # (parts, n) float32
    total_ptr,  # (parts, n) float32
    moment_ptr,  # (parts, n) float32
    z_target_ptr,  # (n,) float32
    logp_ptr,  # (n,) float32
    entropy_ptr,  # (n,) float32
    lse_ptr,  # (n,) float32
    limit_ptr,  # (), or None: of the rows behind, all results are 0
    num_rows,  # n
    num_parts,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # (ROWS,)
    wanted = row < num_rows
    if limit_ptr is not None:
        wanted = wanted & (row < tl.load(limit_ptr))
    tops = tl.full((PARTS, ROWS), float("-inf"), tl.float32)
    for first in range(0, num_parts, PARTS):
        part = first + tl.arange(0, PARTS)
        there = (part < num_parts)[:, None] & wanted[None, :]
        at = part.to(tl.int64)[:, None] * num_rows + row[None, :]
        tops = tl.maximum(tops, tl.load(top_ptr + at, mask=there, other=float("-inf")))
    top = tl.where(wanted, tl.max(tops, 0), 0.0)  # (ROWS,)
    totals = tl.zeros((PARTS, ROWS), tl.float32)
    moments = tl.zeros((PARTS, ROWS), tl.float32)
    for first in range(0, num_parts, PARTS):
        part = first + tl.arange(0, PARTS)
        there = (part < num_parts)[:, None] & wanted[None, :]
        at = part.to(tl.int64)[:, None] * num_rows + row[None, :]
        own_top = tl.load(top_ptr + at, mask=there, other=float("-inf"))
        shift = tl.where(own_top == float("-inf"), 0.0, own_top - top[None, :])
        total = tl.load(total_ptr + at, mask=there, other=0.0)
        moment = tl.load(moment_ptr + at, mask=there, other=0.0)
        totals += tl.exp(shift) * total
        moments += tl.exp(shift) * (moment + shift * total)
    total = tl.where(wanted, tl.sum(totals, 0), 1.0)
    log_total = tl.log(total)
    z_target = tl.load(z_target_ptr + row, mask=wanted, other=0.0)
    there = row < num_rows
    logp = tl.where(wanted, z_target - top - log_total, 0.0)
    entropy = tl.where(wanted, log_total - tl.sum(moments, 0) / total, 0.0)
    tl.store(logp_ptr + row, logp, mask=there)
    tl.store(entropy_ptr + row, entropy, mask=there)
    tl.store(lse_ptr + row, tl.where(wanted, log_total + top, 0.0), mask=there)


@triton.jit(do_not_specialize=["num_rows"])
def _logit_gradients_kernel(
    held_ptr,  # (n, V), strides held_n, 1: exp(z - m), then the gradients of the raw logits / unit
    top_ptr,  # (parts, n) float32: m
    target_ptr,  # (n,) int64
    logp_ptr,  # (n,) float32
    entropy_ptr,  # (n,) float32
    lse_ptr,  # (n,) float32
    d_logp_ptr,  # (n,) float32
    d_entropy_ptr,  # (n,) float32, or None: 0
    d_lse_ptr,  # (n,) float32, or None: 0
    unit_ptr,  # () float32, or None: 1
    limit_ptr,  # (), or None: how many rows are wanted
    num_rows,  # n
    vocab,  # V
    held_n,
    softcap,
    temperature,
    ROWS: tl.constexpr,
    N: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # (ROWS,)
    part = tl.program_id(1)
    column = part.to(tl.int64) * N + tl.arange(0, N)  # (N,)
    limit = num_rows
    if limit_ptr is not None:
        limit = tl.load(limit_ptr).to(tl.int32)
    if tl.program_id(0) * ROWS >= limit:
        return
    wanted = (row < num_rows) & (row < limit)
    there = wanted[:, None] & (column < vocab)[None, :]  # (ROWS, N)
    held_at = held_ptr + (row * held_n)[:, None] + column[None, :]
    held = tl.load(held_at, mask=there, other=0.0).to(tl.float32)
    top = tl.load(top_ptr + part.to(tl.int64) * num_rows + row, mask=wanted, other=0.0)
    lse = tl.load(lse_ptr + row, mask=wanted, other=0.0)
    target = tl.load(target_ptr + row, mask=wanted, other=-1)
    logp = tl.load(logp_ptr + row, mask=wanted, other=0.0)
    d_logp = tl.load(d_logp_ptr + row, mask=wanted, other=0.0)
    hit = column[None, :] == target[:, None]
    # Where exp(z - m) has vanished, so has all that is multiplied with it, but for the target's.
    log_p = tl.log(tl.where(held > 0, held, 1.0)) + (top - lse)[:, None]
    log_p = tl.where(hit, logp[:, None], log_p)
    p = held * tl.exp(top - lse)[:, None]
    along = -d_logp
    if d_lse_ptr is not None:
        along += tl.load(d_lse_ptr + row, mask=wanted, other=0.0)
    dz = along[:, None]
    if d_entropy_ptr is not None:
        d_entropy = tl.load(d_entropy_ptr + row, mask=wanted, other=0.0)
        entropy = tl.load(entropy_ptr + row, mask=wanted, other=0.0)
        dz = dz - d_entropy[:, None] * (log_p + entropy[:, None])
    dz = p * dz + tl.where(hit, d_logp[:, None], 0.0)
    if SOFTCAP:
        capped = (log_p + lse[:, None]) * (temperature / softcap)
        dz = dz * (1 - capped * capped)
    dz = dz / temperature
    if unit_ptr is not None:
        dz = dz / tl.load(unit_ptr)
    tl.store(held_at, dz.to(held_ptr.dtype.element_ty), mask=there)


@triton.jit
def _put(acc, out_ptr, row, column, num_rows, num_columns, N: tl.constexpr, ADD: tl.constexpr):
    """Write a tile (BLOCK_M, 2 N) to rows and columns of a matrix, or add it; half by half."""
    left, right = _halves(acc, acc.shape[0], 2 * N)
    for half in tl.static_range(2):
        part = left if half == 0 else right
        at_column = column + half * N + tl.arange(0, N)
        at = out_ptr + (row * num_columns)[:, None] + at_column[None, :]
        there = (row < num_rows)[:, None] & (at_column < num_columns)[None, :]
        if ADD:
            part += tl.load(at, mask=there, other=0.0)
        tl.store(at, part.to(out_ptr.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["num_rows"])
def _hidden_gradient_kernel(
    dz_ptr,  # (n, V), strides dz_n, 1
    weight_ptr,  # (V, H), strides w_v, 1
    out_ptr,  # (n, H), contiguous
    unit_ptr,  # () float32, or None: 1
    limit_ptr,  # (), or None: of the rows behind, gradients are 0
    num_rows,  # n
    vocab,  # V
    size,  # H
    dz_n,
    w_v,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,  # BLOCK_K divides V
    GROUP: tl.constexpr,
):
    row_tile, tile = _tile(tl.program_id(0), num_rows, size, BLOCK_M, BLOCK_N, GROUP)
    row = row_tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # (BLOCK_M,)
    column = tile * BLOCK_N + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    wanted, last = num_rows, vocab
    if limit_ptr is not None:
        wanted = tl.minimum(num_rows, tl.load(limit_ptr).to(tl.int32))
        if row_tile * BLOCK_M >= wanted:
            last = 0
    dz_at = dz_ptr + (row * dz_n)[:, None]
    w_at = weight_ptr + column[None, :]
    dz_there, w_there = (row < wanted)[:, None], (column < size)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, last, BLOCK_K):
        token = start + tl.arange(0, BLOCK_K)
        w_row = (token.to(tl.int64) * w_v)[:, None]
        if EVEN:
            dz = tl.load(dz_at + token[None, :], mask=dz_there, other=0.0)
            w = tl.load(w_at + w_row, mask=w_there, other=0.0)
        else:
            inside = token < vocab
            dz = tl.load(dz_at + token[None, :], mask=dz_there & inside[None, :], other=0.0)
            w = tl.load(w_at + w_row, mask=w_there & inside[:, None], other=0.0)
        acc = tl.dot(dz, w, acc, input_precision="ieee")
    if unit_ptr is not None:
        acc = acc * tl.load(unit_ptr)
    _put(acc, out_ptr, row, tile * BLOCK_N, num_rows, size, BLOCK_N // 2, False)


@triton.jit(do_not_specialize=["num_rows"])
def _weight_gradient_kernel(
    dz_ptr,  # (n, V), strides dz_n, 1
    hidden_ptr,  # (n, H), strides x_n, 1
    out_ptr,  # (V, H) float32, contiguous: gets the sum added
    unit_ptr,  # () float32, or None: 1
    limit_ptr,  # (), or None: how many rows are wanted
    num_rows,  # n
    vocab,  # V
    size,  # H
    dz_n,
    x_n,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    last = num_rows
    if limit_ptr is not None:
        last = tl.minimum(num_rows, tl.load(limit_ptr).to(tl.int32))
        if last <= 0:
            return
    token_tile, tile = _tile(tl.program_id(0), vocab, size, BLOCK_M, BLOCK_N, GROUP)
    token = token_tile * BLOCK_M + tl.arange(0, BLOCK_M)  # (BLOCK_M,)
    column = tile * BLOCK_N + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    dz_at = dz_ptr + token[:, None]
    x_at = hidden_ptr + column[None, :]
    dz_there, x_there = (token < vocab)[:, None], (column < size)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, last, BLOCK_K):
        row = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
        wanted = row < last
        dz_row, x_row = (row * dz_n)[None, :], (row * x_n)[:, None]
        dz = tl.load(dz_at + dz_row, mask=dz_there & wanted[None, :], other=0.0)
        x = tl.load(x_at + x_row, mask=x_there & wanted[:, None], other=0.0)
        acc = tl.dot(dz, x, acc, input_precision="ieee")
    if unit_ptr is not None:
        acc = acc * tl.load(unit_ptr)
    token = token.to(tl.int64)
    _put(acc, out_ptr, token, tile * BLOCK_N, vocab, size, BLOCK_N // 2, True)


def _launch(dtype: torch.dtype, target: Target) -> dict[str, int]:
    """Tiles, warps and stages of the products: one choice for all sizes, so that no sum depends on
    them."""
    if dtype == torch.float32:  # products in float32 are unrolled into registers
        tile = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16}
        return tile | {"num_warps": 4, "num_stages": 2}
    wide = target.shared_bytes >= 128 << 10
    tile = {"BLOCK_M": 128, "BLOCK_N": 256 if wide else 128, "BLOCK_K": 64 if wide else 32}
    return tile | {"num_warps": 8, "num_stages": 3 if wide else 2}


class HeadTriton:
    """What `HeadCPU` is, on a GPU: `limit`, () int64, is how many rows, which come first, are
    wanted; of the others log-probs and gradients are 0."""

    def __init__(
        self, weight: Tensor, softcap: float | None, temperature: float, chunk_size: int | None
    ) -> None:
        check_triton("linear_logprob", weight)
        self.dtype = torch.float32
        self._weight = weight
        self._softcap = softcap
        self._temperature = temperature
        self._chunk_size = _CHUNK_SIZE if chunk_size is None else chunk_size
        self._options = _launch(weight.dtype, target_of(weight))
        self._buffer: Tensor | None = None
        self._held: tuple[Tensor, Tensor, Tensor, LogProbs] | None = None

    def chunks(self, num_rows: int) -> Iterator[slice]:
        """Rows whose logits are held together."""
        for first in range(0, num_rows, self._chunk_size):
            yield slice(first, min(first + self._chunk_size, num_rows))

    def front(self, *wanted: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        """All rows, those of each of `wanted`, (N,) bool, before the others, and how many they are.
        Each of `wanted` is a part of the next."""
        sets = torch.stack(wanted)
        return torch.argsort(-sets.sum(0), stable=True), list(sets.sum(1).unbind())

    def log_probs(
        self, hidden: Tensor, target: Tensor, limit: Tensor | None = None, hold: bool = False
    ) -> LogProbs:
        """Of rows (n, H) and their targets (n,). hold: `gradients` comes next."""
        check_triton("linear_logprob", hidden)
        (rows, size), vocab = hidden.shape, len(self._weight)
        options = self._options
        tiles = triton.cdiv(vocab, options["BLOCK_N"])
        partials = hidden.new_empty(3, _PARTS * tiles, rows, dtype=torch.float32)
        z_target = hidden.new_full((rows,), math.nan, dtype=torch.float32)
        found = LogProbs(*hidden.new_empty(3, rows, dtype=torch.float32).unbind())
        held = self._room(hidden) if hold else None
        launch(
            _logits_kernel,
            (triton.cdiv(rows, options["BLOCK_M"]) * tiles,),
            hidden, self._weight, target, held, *partials.unbind(), z_target, limit,
            rows, vocab, size, hidden.stride(0), self._weight.stride(0),
            0 if held is None else held.stride(0), self._softcap or 0.0, self._temperature,
            EVEN=size % options["BLOCK_K"] == 0, SOFTCAP=self._softcap is not None, GROUP=64,
            **options,
        )  # fmt: skip
        launch(
            _join_kernel,
            (triton.cdiv(rows, _JOIN_LAUNCH["ROWS"]),),
            *partials.unbind(), z_target, *found, limit, rows, _PARTS * tiles, **_JOIN_LAUNCH,
        )  # fmt: skip
        self._held = (hidden, target, partials[0], found) if hold else None
        return found

    def gradients(
        self,
        given: LogProbGradients,
        limit: Tensor | None,
        needs_hidden: bool,
        d_weight: Tensor | None,
    ) -> Tensor | None:
        """The gradient of the rows held, (n, H), from those of their log-probs; the weight's is
        added to `d_weight`. The rows are not held any more."""
        assert self._held is not None and self._buffer is not None
        (hidden, target, top, found), self._held = self._held, None
        held = self._buffer
        (rows, size), vocab = hidden.shape, len(self._weight)
        options = self._options
        part = options["BLOCK_N"] // _PARTS
        unit = None
        if held.dtype == torch.float16:
            largest = torch.stack([x.abs() for x in given if x is not None]).sum(0).amax()
            unit = torch.where(largest > 0, largest.log2().ceil().exp2(), 1)
        launch(
            _logit_gradients_kernel,
            (triton.cdiv(rows, _GRADIENT_ROWS), triton.cdiv(vocab, part)),
            held, top, target, *found, *given, unit, limit, rows, vocab, held.stride(0),
            self._softcap or 0.0, self._temperature,
            ROWS=_GRADIENT_ROWS, N=part, SOFTCAP=self._softcap is not None,
            num_warps=4,
        )  # fmt: skip

        columns = triton.cdiv(size, options["BLOCK_N"])
        d_hidden = None
        if needs_hidden:
            d_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format)
            launch(
                _hidden_gradient_kernel,
                (triton.cdiv(rows, options["BLOCK_M"]) * columns,),
                held, self._weight, d_hidden, unit, limit, rows, vocab, size,
                held.stride(0), self._weight.stride(0),
                EVEN=vocab % options["BLOCK_K"] == 0, GROUP=8, **options,
            )  # fmt: skip
        if d_weight is not None:
            launch(
                _weight_gradient_kernel,
                (triton.cdiv(vocab, options["BLOCK_M"]) * columns,),
                held, hidden, d_weight, unit, limit, rows, vocab, size,
                held.stride(0), hidden.stride(0), GROUP=8, **options,
            )  # fmt: skip
        return d_hidden

    def _room(self, hidden: Tensor) -> Tensor:
        """(chunk, V) with rows apart by a multiple of 16; the same memory for every chunk."""
        if self._buffer is None:
            shape = len(hidden), -(-len(self._weight) // 16) * 16
            self._buffer = torch.empty(shape, dtype=hidden.dtype, device=hidden.device)
        assert len(hidden) <= len(self._buffer)
        return self._buffer


Head = HeadCPU | HeadTriton


def head_of(
    weight: Tensor, softcap: float | None, temperature: float, chunk_size: int | None
) -> Head:
    """The head of a weight, where it runs."""
    kind = HeadTriton if runs_triton(weight) else HeadCPU
    return kind(weight, softcap, temperature, chunk_size)


class _LinearLogProb(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        softcap: float | None,
        temperature: float,
        chunk_size: int | None,
    ) -> LogProbs:
        head = head_of(weight, softcap, temperature, chunk_size)
        found = LogProbs(*(hidden.new_empty(len(hidden), dtype=head.dtype) for _ in range(3)))
        for rows in head.chunks(len(hidden)):
            own = head.log_probs(hidden[rows], target[rows])
            for all_rows, here in zip(found, own, strict=True):
                all_rows[rows] = here
        ctx.save_for_backward(hidden, weight, target)
        ctx.options = softcap, temperature, chunk_size
        ctx.set_materialize_grads(False)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, target = ctx.saved_tensors
        head = head_of(weight, *ctx.options)
        zero = hidden.new_zeros(len(hidden), dtype=head.dtype)
        logp, entropy, lse = gradients
        given = LogProbGradients(zero if logp is None else logp, entropy, lse)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        d_hidden = torch.zeros_like(hidden) if needs_hidden else None
        d_weight = torch.zeros_like(weight, dtype=head.dtype) if needs_weight else None
        add_gradients(head, hidden, target, given, d_hidden, d_weight)
        if d_weight is not None:
            d_weight = d_weight.to(weight.dtype)
        return d_hidden, d_weight, None, None, None, None


def add_gradients(
    head: Head,
    hidden: Tensor,
    target: Tensor,
    given: LogProbGradients,
    d_hidden: Tensor | None,
    d_weight: Tensor | None,
) -> None:
    """Make the logits again of rows whose log-probs have a gradient other than 0; write those rows'
    gradients to `d_hidden` (N, H), and add the weight's to `d_weight` (V, H)."""
    asked = torch.stack([x != 0 for x in given if x is not None]).any(0)
    order, (count,) = head.front(asked)
    for rows in head.chunks(len(order)):
        at = order[rows]
        limit = None if count is None else count - rows.start
        head.log_probs(hidden[at], target[at], limit, hold=True)
        here = LogProbGradients(*(None if x is None else x[at] for x in given))  # type: ignore[arg-type]
        own = head.gradients(here, limit, d_hidden is not None, d_weight)
        if d_hidden is not None:
            assert own is not None
            d_hidden[at] = own.to(d_hidden.dtype)


def check_linear(
    name: str,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    softcap: float | None,
    temperature: float,
    chunk_size: int | None,
) -> None:
    """Raises ValueError for what `linear_logprob` does not take."""
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{name}: hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} must be (N, H) "
            "and (V, H)"
        )
    if hidden.dtype != weight.dtype or not hidden.is_floating_point():
        raise ValueError(
            f"{name}: hidden and weight must be floating and of one dtype, got {hidden.dtype} and "
            f"{weight.dtype}"
        )
    check(f"{name}: target", target, hidden.shape[:1], torch.int64)
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"{name}: softcap must be positive and finite, got {softcap}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"{name}: temperature must be positive, got {temperature}")
    if chunk_size is not None and chunk_size < 16:
        raise ValueError(f"{name}: chunk_size must be 16 or more, got {chunk_size}")
    if target.is_cpu and len(target) and not (target.min() >= 0 and target.max() < len(weight)):
        raise ValueError(f"{name}: targets must be in [0, {len(weight)})")


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    softcap: float | None = None,
    temperature: float = 1.0,
    *,
    chunk_size: int | None = None,
) -> LogProbs:
    """Log-probs, entropy and log-sum-exp of the tokens `target` after hidden states.

    hidden: (N, H), weight: (V, H), floating, of one dtype (not float64 in Triton); target: (N,)
    int64 in [0, V). softcap, of the logits before the temperature: positive, or None. chunk_size:
    how many rows' logits are there at a time, by default 128 MiB on CPU and 4,096 on a GPU.
    Everything is computed in float32 (float64 for float64 input); the gradient of the weight is
    added up in it and rounded once. Differentiable once in hidden and weight. Raises ValueError for
    other shapes, dtypes or numbers, and on CPU for a target out of range.
    """
    check_linear("linear_logprob", hidden, weight, target, softcap, temperature, chunk_size)
    found: LogProbs = _LinearLogProb.apply(hidden, weight, target, softcap, temperature, chunk_size)
    return LogProbs(*found)
