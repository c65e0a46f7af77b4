"""The logits of some rows at a time in Triton; the package's docstring has the mathematics.

A program computes one tile of logits and splits its columns into four parts. Of each row of a part
it stores the maximum m, the sum of exp(z - m) and the sum of exp(z - m) (z - m); the program whose
columns hold a row's target stores its z. A second kernel joins the parts, always in their order.

When a gradient is needed, the tile stores exp(z - m), not z, in the hidden states' dtype, and later
overwrites it with the logit gradients. Rounding exp(z - m) costs half an ulp; rounding z would cost
several percent of exp(z). It is exactly 1 for a likely token, whose gradient is 1 - p. (float16
would underflow when the loss is a mean over many tokens, so each chunk stores gradients divided by
a power of two.)

There are no atomics and no locks. Products and sums run in one order that does not depend on N or
on the chunk, except the weight's gradient, which is a sum over all rows. No kernel is specialised
on numbers that change from step to step.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.checks import check_triton
from kernels.device_math import LN2, LOG2E, tanh
from kernels.launch import launch
from kernels.logprob.head import LogitHead, LogProbGradients, LogProbs
from kernels.target import Target, target_of

_CHUNK_SIZE = 4096  # rows by default; of 256,000 bfloat16 logits 2.1 GB
_JOIN_LAUNCH = {"ROWS": 32, "PARTS": 32, "num_warps": 4}  # rows and parts of a joining program
_GRADIENT_ROWS = 16
_PARTS = 4  # of a tile of logits: work on a whole one takes too many registers


@triton.jit
def _swizzled_tile(
    program, num_rows, num_columns,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The tile of a program, (row, column): GROUP tiles of rows take each tile of columns in turn,
    so that what they read stays in the cache."""
    row_tiles = (num_rows + BLOCK_M - 1) // BLOCK_M
    column_tiles = (num_columns + BLOCK_N - 1) // BLOCK_N
    first = program // (column_tiles * GROUP) * GROUP
    tiles = tl.minimum(row_tiles - first, GROUP)
    inside = program % (column_tiles * GROUP)
    return first + inside % tiles, inside // tiles


@triton.jit
def _split_halves(tile, M: tl.constexpr, N: tl.constexpr):
    """The left and right half of a tile (M, N): work on a whole tile takes twice the registers."""
    return tl.split(tl.permute(tl.reshape(tile, (M, 2, N // 2)), (0, 2, 1)))


@triton.jit
def _store_part(
    z, row, part, target, saved_ptrs, max_ptr, sum_ptr, moment_ptr, z_target_ptr,
    num_rows, vocab, softcap, temperature, N: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Store what later kernels need of a part of N tokens, from its raw logits (BLOCK_M, N). An
    element costs one multiply-add before its exponential: the temperature and log2(e) are factors
    of powers of two, and the maximum is that of logits at temperature 1."""
    first = part * N
    column = first + tl.arange(0, N)  # (N,)
    mask, inside = row < num_rows, (column < vocab)[None, :]
    if SOFTCAP:
        z = tanh(z * (1 / softcap)) * softcap
    factor = 1 / temperature
    z_target = tl.sum(tl.where(column[None, :] == target[:, None], z, 0.0), 1)
    here = (target >= first) & (target < tl.minimum(first + N, vocab))
    tl.store(z_target_ptr + row, z_target * factor, mask=mask & here)
    row_max = tl.max(tl.where(inside, z, float("-inf")), 1)  # (BLOCK_M,)
    finite_max = tl.where(row_max == float("-inf"), 0.0, row_max)
    power = z * (factor * LOG2E) - (finite_max * (factor * LOG2E))[:, None]
    weights = tl.where(inside, tl.exp2(power), 0.0)
    at = part.to(tl.int64) * num_rows + row
    tl.store(max_ptr + at, row_max * factor, mask=mask)
    tl.store(sum_ptr + at, tl.sum(weights, 1), mask=mask)
    tl.store(moment_ptr + at, tl.sum(weights * power, 1) * LN2, mask=mask)
    if saved_ptrs is not None:
        weights = weights.to(saved_ptrs.dtype.element_ty)
        tl.store(saved_ptrs[:, None] + column[None, :], weights, mask=mask[:, None] & inside)


@triton.jit(do_not_specialize=["num_rows"])
def _logits_kernel(
    hidden_ptr,  # (n, H), strides x_n, 1
    weight_ptr,  # (V, H), strides w_v, 1
    target_ptr,  # (n,) int64
    saved_ptr,  # (n, V), strides saved_n, 1, or None: exp(z - m)
    max_ptr,  # (parts, n) float32: m
    sum_ptr,  # (parts, n) float32
    moment_ptr,  # (parts, n) float32
    z_target_ptr,  # (n,) float32
    num_valid_ptr,  # (), or None: the number of valid rows, which come first
    num_rows,  # n
    vocab,  # V
    size,  # H
    x_n,
    w_v,
    saved_n,
    softcap,
    temperature,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,  # BLOCK_K divides H
    SOFTCAP: tl.constexpr,
    GROUP: tl.constexpr,
):
    row_tile, tile = _swizzled_tile(tl.program_id(0), num_rows, vocab, BLOCK_M, BLOCK_N, GROUP)
    row = row_tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # (BLOCK_M,)
    column = tile.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    num_valid = num_rows
    if num_valid_ptr is not None:
        num_valid = tl.load(num_valid_ptr).to(tl.int32)
    if row_tile * BLOCK_M >= num_valid:
        return
    mask = row < num_rows
    x_ptrs = hidden_ptr + (tl.minimum(row, num_rows - 1) * x_n)[:, None]
    w_ptrs = weight_ptr + (tl.minimum(column, vocab - 1) * w_v)[:, None]
    z = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, size, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)[None, :]
        if EVEN:
            x, w = tl.load(x_ptrs + k), tl.load(w_ptrs + k)
        else:
            x = tl.load(x_ptrs + k, mask=k < size, other=0.0)
            w = tl.load(w_ptrs + k, mask=k < size, other=0.0)
        z = tl.dot(x, tl.trans(w), z, input_precision="ieee")
    # A target past 32 bits is past the vocabulary, too.
    target = tl.load(target_ptr + row, mask=mask, other=-1)
    target = tl.where(target < vocab, target, -1).to(tl.int32)  # (BLOCK_M,)
    saved_ptrs = None
    if saved_ptr is not None:
        saved_ptrs = saved_ptr + row * saved_n
    left, right = _split_halves(z, BLOCK_M, BLOCK_N)
    N: tl.constexpr = BLOCK_N // 4
    for half in tl.static_range(2):
        parts = _split_halves(left if half == 0 else right, BLOCK_M, 2 * N)
        for i in tl.static_range(2):
            _store_part(
                parts[i], row, 4 * tile + 2 * half + i, target, saved_ptrs, max_ptr, sum_ptr,
                moment_ptr, z_target_ptr, num_rows, vocab, softcap, temperature, N, SOFTCAP,
            )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows"])
def _join_kernel(
    max_ptr,  # (parts, n) float32
    sum_ptr,  # (parts, n) float32
    moment_ptr,  # (parts, n) float32
    z_target_ptr,  # (n,) float32
    logp_ptr,  # (n,) float32
    entropy_ptr,  # (n,) float32
    lse_ptr,  # (n,) float32
    num_valid_ptr,  # (), or None; past these rows all results are 0
    num_rows,  # n
    num_parts,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # (ROWS,)
    valid = row < num_rows
    if num_valid_ptr is not None:
        valid = valid & (row < tl.load(num_valid_ptr))
    maxima = tl.full((PARTS, ROWS), float("-inf"), tl.float32)
    for first in range(0, num_parts, PARTS):
        part = first + tl.arange(0, PARTS)
        mask = (part < num_parts)[:, None] & valid[None, :]
        at = part.to(tl.int64)[:, None] * num_rows + row[None, :]
        maxima = tl.maximum(maxima, tl.load(max_ptr + at, mask=mask, other=float("-inf")))
    row_max = tl.where(valid, tl.max(maxima, 0), 0.0)  # (ROWS,)
    sums = tl.zeros((PARTS, ROWS), tl.float32)
    moments = tl.zeros((PARTS, ROWS), tl.float32)
    for first in range(0, num_parts, PARTS):
        part = first + tl.arange(0, PARTS)
        mask = (part < num_parts)[:, None] & valid[None, :]
        at = part.to(tl.int64)[:, None] * num_rows + row[None, :]
        part_max = tl.load(max_ptr + at, mask=mask, other=float("-inf"))
        shift = tl.where(part_max == float("-inf"), 0.0, part_max - row_max[None, :])
        part_sum = tl.load(sum_ptr + at, mask=mask, other=0.0)
        moment = tl.load(moment_ptr + at, mask=mask, other=0.0)
        sums += tl.exp(shift) * part_sum
        moments += tl.exp(shift) * (moment + shift * part_sum)
    row_sum = tl.where(valid, tl.sum(sums, 0), 1.0)
    log_sum = tl.log(row_sum)
    z_target = tl.load(z_target_ptr + row, mask=valid, other=0.0)
    mask = row < num_rows
    logp = tl.where(valid, z_target - row_max - log_sum, 0.0)
    entropy = tl.where(valid, log_sum - tl.sum(moments, 0) / row_sum, 0.0)
    tl.store(logp_ptr + row, logp, mask=mask)
    tl.store(entropy_ptr + row, entropy, mask=mask)
    tl.store(lse_ptr + row, tl.where(valid, log_sum + row_max, 0.0), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _logit_gradients_kernel(
    saved_ptr,  # (n, V), strides saved_n, 1: exp(z - m), then gradients of raw logits / grad_scale
    max_ptr,  # (parts, n) float32: m
    target_ptr,  # (n,) int64
    logp_ptr,  # (n,) float32
    entropy_ptr,  # (n,) float32
    lse_ptr,  # (n,) float32
    d_logp_ptr,  # (n,) float32
    d_entropy_ptr,  # (n,) float32, or None: 0
    d_lse_ptr,  # (n,) float32, or None: 0
    grad_scale_ptr,  # () float32, or None: 1
    num_valid_ptr,  # (), or None: the number of valid rows, which come first
    num_rows,  # n
    vocab,  # V
    saved_n,
    softcap,
    temperature,
    ROWS: tl.constexpr,
    N: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # (ROWS,)
    part = tl.program_id(1)
    column = part.to(tl.int64) * N + tl.arange(0, N)  # (N,)
    num_valid = num_rows
    if num_valid_ptr is not None:
        num_valid = tl.load(num_valid_ptr).to(tl.int32)
    if tl.program_id(0) * ROWS >= num_valid:
        return
    valid = (row < num_rows) & (row < num_valid)
    mask = valid[:, None] & (column < vocab)[None, :]  # (ROWS, N)
    saved_ptrs = saved_ptr + (row * saved_n)[:, None] + column[None, :]
    saved = tl.load(saved_ptrs, mask=mask, other=0.0).to(tl.float32)
    row_max = tl.load(max_ptr + part.to(tl.int64) * num_rows + row, mask=valid, other=0.0)
    lse = tl.load(lse_ptr + row, mask=valid, other=0.0)
    target = tl.load(target_ptr + row, mask=valid, other=-1)
    logp = tl.load(logp_ptr + row, mask=valid, other=0.0)
    d_logp = tl.load(d_logp_ptr + row, mask=valid, other=0.0)
    hit = column[None, :] == target[:, None]
    # Where exp(z - m) is 0, so is every term that it multiplies; the target's log-prob is known.
    log_saved = tl.log(tl.where(saved > 0, saved, 1.0))
    log_p = tl.where(hit, logp[:, None], log_saved + (row_max - lse)[:, None])
    # The gradient of a likely target is 1 - p: its log-prob is more exact than a rounded lse.
    p = tl.where(hit, tl.exp(logp)[:, None], saved * tl.exp(row_max - lse)[:, None])
    common = -d_logp
    if d_lse_ptr is not None:
        common += tl.load(d_lse_ptr + row, mask=valid, other=0.0)
    dz = common[:, None]
    if d_entropy_ptr is not None:
        d_entropy = tl.load(d_entropy_ptr + row, mask=valid, other=0.0)
        entropy = tl.load(entropy_ptr + row, mask=valid, other=0.0)
        # log_p + entropy, without the rounding of a number as large as log_p.
        above = log_saved + (row_max - lse + entropy)[:, None]
        above = tl.where(hit, (logp + entropy)[:, None], above)
        dz = dz - d_entropy[:, None] * above
    dz = p * dz + tl.where(hit, d_logp[:, None], 0.0)
    if SOFTCAP:
        capped = (log_p + lse[:, None]) * (temperature / softcap)
        dz = dz * (1 - capped * capped)
    dz = dz / temperature
    if grad_scale_ptr is not None:
        dz = dz / tl.load(grad_scale_ptr)
    tl.store(saved_ptrs, dz.to(saved_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _store_tile(
    acc, out_ptr, row, first_column, num_rows, num_columns, N: tl.constexpr, ADD: tl.constexpr
):
    """Write a tile (BLOCK_M, 2 N) to rows and columns of a matrix, or add it; half by half."""
    left, right = _split_halves(acc, acc.shape[0], 2 * N)
    for half in tl.static_range(2):
        part = left if half == 0 else right
        column = first_column + half * N + tl.arange(0, N)
        out_ptrs = out_ptr + (row * num_columns)[:, None] + column[None, :]
        mask = (row < num_rows)[:, None] & (column < num_columns)[None, :]
        if ADD:
            part += tl.load(out_ptrs, mask=mask, other=0.0)
        tl.store(out_ptrs, part.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _hidden_gradient_kernel(
    dz_ptr,  # (n, V), strides dz_n, 1
    weight_ptr,  # (V, H), strides w_v, 1
    out_ptr,  # (n, H), contiguous
    grad_scale_ptr,  # () float32, or None: 1
    num_valid_ptr,  # (), or None; past these rows gradients are 0
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
    row_tile, tile = _swizzled_tile(tl.program_id(0), num_rows, size, BLOCK_M, BLOCK_N, GROUP)
    row = row_tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # (BLOCK_M,)
    column = tile * BLOCK_N + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    num_valid, end = num_rows, vocab
    if num_valid_ptr is not None:
        num_valid = tl.minimum(num_rows, tl.load(num_valid_ptr).to(tl.int32))
        if row_tile * BLOCK_M >= num_valid:
            end = 0
    dz_ptrs = dz_ptr + (row * dz_n)[:, None]
    w_ptrs = weight_ptr + column[None, :]
    dz_mask, w_mask = (row < num_valid)[:, None], (column < size)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, end, BLOCK_K):
        token = start + tl.arange(0, BLOCK_K)
        w_row = (token.to(tl.int64) * w_v)[:, None]
        if EVEN:
            dz = tl.load(dz_ptrs + token[None, :], mask=dz_mask, other=0.0)
            w = tl.load(w_ptrs + w_row, mask=w_mask, other=0.0)
        else:
            inside = token < vocab
            dz = tl.load(dz_ptrs + token[None, :], mask=dz_mask & inside[None, :], other=0.0)
            w = tl.load(w_ptrs + w_row, mask=w_mask & inside[:, None], other=0.0)
        acc = tl.dot(dz, w, acc, input_precision="ieee")
    if grad_scale_ptr is not None:
        acc = acc * tl.load(grad_scale_ptr)
    _store_tile(acc, out_ptr, row, tile * BLOCK_N, num_rows, size, BLOCK_N // 2, False)


@triton.jit(do_not_specialize=["num_rows"])
def _weight_gradient_kernel(
    dz_ptr,  # (n, V), strides dz_n, 1
    hidden_ptr,  # (n, H), strides x_n, 1
    out_ptr,  # (V, H) float32, contiguous: the sum is added to it
    grad_scale_ptr,  # () float32, or None: 1
    num_valid_ptr,  # (), or None: the number of valid rows, which come first
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
    num_valid = num_rows
    if num_valid_ptr is not None:
        num_valid = tl.minimum(num_rows, tl.load(num_valid_ptr).to(tl.int32))
        if num_valid <= 0:
            return
    token_tile, tile = _swizzled_tile(tl.program_id(0), vocab, size, BLOCK_M, BLOCK_N, GROUP)
    token = token_tile * BLOCK_M + tl.arange(0, BLOCK_M)  # (BLOCK_M,)
    column = tile * BLOCK_N + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    dz_ptrs = dz_ptr + token[:, None]
    x_ptrs = hidden_ptr + column[None, :]
    dz_mask, x_mask = (token < vocab)[:, None], (column < size)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, num_valid, BLOCK_K):
        row = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
        valid = row < num_valid
        dz_row, x_row = (row * dz_n)[None, :], (row * x_n)[:, None]
        dz = tl.load(dz_ptrs + dz_row, mask=dz_mask & valid[None, :], other=0.0)
        x = tl.load(x_ptrs + x_row, mask=x_mask & valid[:, None], other=0.0)
        acc = tl.dot(dz, x, acc, input_precision="ieee")
    if grad_scale_ptr is not None:
        acc = acc * tl.load(grad_scale_ptr)
    token = token.to(tl.int64)
    _store_tile(acc, out_ptr, token, tile * BLOCK_N, vocab, size, BLOCK_N // 2, True)


def _launch(dtype: torch.dtype, target: Target) -> dict[str, int]:
    """Tiles, warps and stages of the products: one choice for all sizes, so that no sum depends on
    them."""
    if dtype == torch.float32:  # products in float32 are unrolled into registers
        tile = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16}
        return tile | {"num_warps": 4, "num_stages": 2}
    wide = target.shared_bytes >= 128 << 10
    tile = {"BLOCK_M": 128, "BLOCK_N": 256 if wide else 128, "BLOCK_K": 64 if wide else 32}
    return tile | {"num_warps": 8, "num_stages": 3 if wide else 2}


class TritonLogitHead(LogitHead):
    """`LogitHead` on a GPU. Counts of rows stay on the device: `partition_rows` gives all rows, and
    kernels skip those past `num_valid`."""

    def __init__(
        self, weight: Tensor, softcap: float | None, temperature: float, chunk_size: int | None
    ) -> None:
        check_triton("linear_logprob", weight)
        self.dtype = torch.float32
        self._weight = weight
        self._softcap = softcap
        self._temperature = temperature
        self.chunk_size = _CHUNK_SIZE if chunk_size is None else chunk_size
        self._options = _launch(weight.dtype, target_of(weight))
        self._buffer: Tensor | None = None
        self._saved: tuple[Tensor, Tensor, Tensor, LogProbs] | None = None

    def partition_rows(self, *masks: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        stacked = torch.stack(masks)
        return torch.argsort(-stacked.sum(0), stable=True), list(stacked.sum(1).unbind())

    def log_probs(
        self, hidden: Tensor, target: Tensor, num_valid: Tensor | None = None, save: bool = False
    ) -> LogProbs:
        check_triton("linear_logprob", hidden)
        (rows, size), vocab = hidden.shape, len(self._weight)
        options = self._options
        tiles = triton.cdiv(vocab, options["BLOCK_N"])
        partials = hidden.new_empty(3, _PARTS * tiles, rows, dtype=torch.float32)
        z_target = hidden.new_full((rows,), math.nan, dtype=torch.float32)
        out = LogProbs(*hidden.new_empty(3, rows, dtype=torch.float32).unbind())
        saved = self._logits_buffer(hidden) if save else None
        launch(
            _logits_kernel,
            (triton.cdiv(rows, options["BLOCK_M"]) * tiles,),
            hidden, self._weight, target, saved, *partials.unbind(), z_target, num_valid,
            rows, vocab, size, hidden.stride(0), self._weight.stride(0),
            0 if saved is None else saved.stride(0), self._softcap or 0.0, self._temperature,
            EVEN=size % options["BLOCK_K"] == 0, SOFTCAP=self._softcap is not None, GROUP=64,
            **options,
        )  # fmt: skip
        launch(
            _join_kernel,
            (triton.cdiv(rows, _JOIN_LAUNCH["ROWS"]),),
            *partials.unbind(), z_target, *out, num_valid, rows, _PARTS * tiles, **_JOIN_LAUNCH,
        )  # fmt: skip
        self._saved = (hidden, target, partials[0], out) if save else None
        return out

    def gradients(
        self,
        d_out: LogProbGradients,
        num_valid: Tensor | None,
        needs_hidden: bool,
        d_weight: Tensor | None,
    ) -> Tensor | None:
        assert self._saved is not None and self._buffer is not None
        (hidden, target, row_max, out), self._saved = self._saved, None
        saved = self._buffer
        (rows, size), vocab = hidden.shape, len(self._weight)
        options = self._options
        part = options["BLOCK_N"] // _PARTS
        grad_scale = None
        if saved.dtype == torch.float16:
            largest = torch.stack([x.abs() for x in d_out if x is not None]).sum(0).amax()
            grad_scale = torch.where(largest > 0, largest.log2().ceil().exp2(), 1)
        launch(
            _logit_gradients_kernel,
            (triton.cdiv(rows, _GRADIENT_ROWS), triton.cdiv(vocab, part)),
            saved, row_max, target, *out, *d_out, grad_scale, num_valid, rows, vocab,
            saved.stride(0), self._softcap or 0.0, self._temperature,
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
                saved, self._weight, d_hidden, grad_scale, num_valid, rows, vocab, size,
                saved.stride(0), self._weight.stride(0),
                EVEN=vocab % options["BLOCK_K"] == 0, GROUP=8, **options,
            )  # fmt: skip
        if d_weight is not None:
            launch(
                _weight_gradient_kernel,
                (triton.cdiv(vocab, options["BLOCK_M"]) * columns,),
                saved, hidden, d_weight, grad_scale, num_valid, rows, vocab, size,
                saved.stride(0), hidden.stride(0), GROUP=8, **options,
            )  # fmt: skip
        return d_hidden

    def _logits_buffer(self, hidden: Tensor) -> Tensor:
        """(chunk, V) in rows that are a multiple of 16 apart; the same memory for every chunk."""
        if self._buffer is None:
            shape = len(hidden), triton.cdiv(len(self._weight), 16) * 16
            self._buffer = torch.empty(shape, dtype=hidden.dtype, device=hidden.device)
        assert len(hidden) <= len(self._buffer)
        return self._buffer
