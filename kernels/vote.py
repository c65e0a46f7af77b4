"""Sum the scores of a row's valid samples into a verdict.

Dimension letters: R rows, K samples per row, N responses (largest of the batch).

  scores_r[k, order_r[k, j]] = shown_r[k, j]        un-permuted: order[j] is the response shown in
                                                    position j, -1 for padding
  voted_r[k] = valid_r[k], with meta scores only the k_meta largest of the valid samples
  total_r[i] = sum over voted k of scores_r[k, i]   int64, exact
  best_r     = argmax of total_r over i < n_r; of c tied responses the floor(u c)-th, by index

An invalid sample never counts as 0: it has no vote. A sample whose meta score is NaN is not
eligible; of equal meta scores the lower sample index goes first. Without any vote best is -1 and
the means are NaN. This file does not decide correctness, nor draw the tie uniforms.

A Triton program decides one row, in integers and float64: no result depends on an order of sums.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import Target, check_triton, launch, power_of_two, runs_triton, target_of

_LOWEST = tl.constexpr(-(1 << 63))


@dataclass(frozen=True)
class VoteResult:
    """Verdicts of R rows; entries of responses i >= n are 0 in total and NaN in mean."""

    total: Tensor  # (R, N) int64
    mean: Tensor  # (R, N) float64, total / votes; NaN without votes
    votes: Tensor  # (R,) int64, samples that voted
    voted: Tensor  # (R, K) bool
    best: Tensor  # (R,) int64, -1 without votes
    tie: Tensor  # (R,) bool, best was drawn among several


def unpermute(scores: Tensor, order: Tensor) -> Tensor:
    """Scores (..., N) in shown order -> in the order of the responses; 0 where none was shown.

    order (..., N) int64: order[j] is the response shown in position j, a permutation of range(n)
    followed by -1.
    """
    if scores.shape != order.shape:
        raise ValueError(
            f"scores and order differ in shape: {tuple(scores.shape)}, {tuple(order.shape)}"
        )
    size = scores.shape[-1]
    target = torch.where(order < 0, size, order)
    padded = scores.new_zeros(*scores.shape[:-1], size + 1)
    return padded.scatter(-1, target, scores)[..., :size]


def vote_ref(
    scores: Tensor,
    order: Tensor,
    valid: Tensor,
    n: Tensor,
    tie_uniform: Tensor,
    meta: Tensor | None = None,
    k_meta: int | None = None,
) -> VoteResult:
    """The specification of `vote`, one row at a time in plain Python."""
    num_rows, num_samples, width = scores.shape
    total = torch.zeros(num_rows, width, dtype=torch.int64)
    mean = torch.full((num_rows, width), math.nan, dtype=torch.float64)
    voted = torch.zeros(num_rows, num_samples, dtype=torch.bool)
    best = torch.full((num_rows,), -1, dtype=torch.int64)
    tie = torch.zeros(num_rows, dtype=torch.bool)
    for r in range(num_rows):
        voters = [k for k in range(num_samples) if valid[r, k]]
        if meta is not None:
            quality = meta[r].tolist()
            eligible = [k for k in voters if not math.isnan(quality[k])]
            voters = sorted(eligible, key=lambda k: (-quality[k], k))[:k_meta]
        count = int(n[r])
        for k in voters:
            voted[r, k] = True
            for j in range(count):
                total[r, order[r, k, j]] += scores[r, k, j]
        if voters:
            sums = total[r, :count].tolist()
            tied = [i for i in range(count) if sums[i] == max(sums)]
            mean[r, :count] = total[r, :count].double() / len(voters)
            best[r] = tied[math.floor(float(tie_uniform[r]) * len(tied))]
            tie[r] = len(tied) > 1
    result = VoteResult(total, mean, voted.sum(1), voted, best, tie)
    return VoteResult(**{k: v.to(scores.device) for k, v in vars(result).items()})


@triton.jit
def _vote_kernel(
    scores_ptr,  # (R, K, N) int64, strides scores_r, scores_k, 1
    order_ptr,  # (R, K, N) int64, strides order_r, order_k, 1
    valid_ptr,  # (R, K) bool, strides valid_r, 1
    n_ptr,  # (R,) int64
    uniform_ptr,  # (R,) float32
    meta_ptr,  # (R, K) float32, strides meta_r, 1; None without meta scores
    total_ptr,  # (R, N) int64, contiguous
    mean_ptr,  # (R, N) float64, contiguous
    votes_ptr,  # (R,) int64
    voted_ptr,  # (R, K) bool, contiguous
    best_ptr,  # (R,) int64
    tie_ptr,  # (R,) bool
    num_samples,  # K
    width,  # N
    k_meta,
    scores_r,
    scores_k,
    order_r,
    order_k,
    valid_r,
    meta_r,
    SAMPLES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    response = tl.arange(0, WIDTH)
    n = tl.load(n_ptr + row).to(tl.int32)
    sums = tl.zeros((SAMPLES, WIDTH), tl.int64)
    voters = tl.zeros((SAMPLES,), tl.int32)
    for start in range(0, num_samples, SAMPLES):
        k = start + tl.arange(0, SAMPLES)
        there = k < num_samples
        voted = tl.load(valid_ptr + row * valid_r + k, mask=there, other=0) != 0  # (SAMPLES,)
        if meta_ptr is not None:
            meta = tl.load(meta_ptr + row * meta_r + k, mask=there, other=0.0)
            voted &= meta == meta
            # The place of a sample is the number of those ahead of it; no NaN is ahead.
            place = tl.zeros((SAMPLES,), tl.int32)
            for other_start in range(0, num_samples, SAMPLES):
                other = other_start + tl.arange(0, SAMPLES)
                there_other = other < num_samples
                rival = tl.load(valid_ptr + row * valid_r + other, mask=there_other, other=0) != 0
                rival_meta = tl.load(meta_ptr + row * meta_r + other, mask=there_other, other=0.0)
                ahead = (rival_meta[None, :] > meta[:, None]) | (
                    (rival_meta[None, :] == meta[:, None]) & (other[None, :] < k[:, None])
                )  # (SAMPLES, SAMPLES)
                place += tl.sum((ahead & rival[None, :]).to(tl.int32), 1)
            voted &= place < k_meta
        tl.store(voted_ptr + row * num_samples + k, voted, mask=there)
        voters += voted.to(tl.int32)
        scores_at = scores_ptr + row * scores_r + k.to(tl.int64) * scores_k
        order_at = order_ptr + row * order_r + k.to(tl.int64) * order_k
        for j in range(0, n):
            score = tl.load(scores_at + j, mask=voted, other=0)
            shown = tl.load(order_at + j, mask=voted, other=-1)  # (SAMPLES,)
            sums += tl.where(shown[:, None] == response[None, :], score[:, None], 0)

    total, votes = tl.sum(sums, 0), tl.sum(voters, 0)  # (WIDTH,), ()
    is_response = response < n
    mean = total.to(tl.float64) / tl.maximum(votes, 1).to(tl.float64)
    mean = tl.where(is_response & (votes > 0), mean, float("nan"))
    out = row * width + response
    tl.store(total_ptr + out, total, mask=response < width)
    tl.store(mean_ptr + out, mean, mask=response < width)
    tl.store(votes_ptr + row, votes.to(tl.int64))

    highest = tl.max(tl.where(is_response, total, _LOWEST), 0)
    tied = (is_response & (total == highest)).to(tl.int32)
    num_tied = tl.sum(tied, 0)
    # In float64, where the product is exact: in float32 it may round up to the next response.
    uniform = tl.load(uniform_ptr + row).to(tl.float64)
    drawn = tl.floor(uniform * num_tied.to(tl.float64)).to(tl.int32)
    is_drawn = (tied != 0) & (tl.cumsum(tied, 0) - 1 == drawn)
    best = tl.sum(tl.where(is_drawn, response, 0), 0)
    tl.store(best_ptr + row, tl.where(votes > 0, best, -1).to(tl.int64))
    tl.store(tie_ptr + row, (votes > 0) & (num_tied > 1))


def _launch(num_samples: int, width: int, target: Target) -> dict[str, int]:
    """Samples that a program reads at once, the width of its rows, and its warps: at most 4,096
    pairs of a sample and a response, or of two samples. Not yet tuned on a device;
    bench/bench_vote.py is the bench to tune with."""
    columns = power_of_two(width)
    samples = min(power_of_two(num_samples), 64, max(1, 4096 // columns))
    return {"SAMPLES": samples, "WIDTH": columns, "num_warps": 4}


def _run_triton(
    scores: Tensor,
    order: Tensor,
    valid: Tensor,
    n: Tensor,
    tie_uniform: Tensor,
    meta: Tensor | None,
    k_meta: int | None,
) -> VoteResult:
    check_triton("vote", scores, order, valid, n, tie_uniform, *([] if meta is None else [meta]))
    num_rows, num_samples, width = scores.shape
    result = VoteResult(
        total=scores.new_empty(num_rows, width),
        mean=scores.new_empty(num_rows, width, dtype=torch.float64),
        votes=scores.new_empty(num_rows),
        voted=valid.new_empty(num_rows, num_samples),
        best=scores.new_empty(num_rows),
        tie=valid.new_empty(num_rows),
    )
    launch(
        _vote_kernel,
        (num_rows,),
        scores, order, valid, n, tie_uniform, meta,
        result.total, result.mean, result.votes, result.voted, result.best, result.tie,
        num_samples, width, num_samples if k_meta is None else min(k_meta, num_samples),
        *scores.stride()[:2], *order.stride()[:2], valid.stride(0),
        0 if meta is None else meta.stride(0), **_launch(num_samples, width, target_of(scores)),
    )  # fmt: skip
    return result


def vote(
    scores: Tensor,
    order: Tensor,
    valid: Tensor,
    n: Tensor,
    tie_uniform: Tensor,
    meta: Tensor | None = None,
    k_meta: int | None = None,
) -> VoteResult:
    """Verdicts of R rows.

    scores (R, K, N) int64 in shown order, read only where valid; order (R, K, N) int64 (see
    `unpermute`; rows of padding samples may be all -1); valid (R, K) bool; n (R,) int64, 1 to N;
    tie_uniform (R,) float32 in [0, 1); meta (R, K) float32 and k_meta >= 1, or neither. k_meta
    may exceed the number of eligible samples. In Triton the last dimensions are contiguous. Raises
    ValueError for other shapes, dtypes or k_meta.
    """
    _check(scores, order, valid, n, tie_uniform, meta, k_meta)
    if runs_triton(scores):
        return _run_triton(scores, order, valid, n, tie_uniform, meta, k_meta)
    voted = valid if meta is None or k_meta is None else _keep_best(valid, meta, k_meta)
    response = torch.arange(scores.shape[2], device=scores.device)
    shown = response < n[:, None]  # (R, N)
    counted = torch.where(voted[..., None], unpermute(scores, order), 0)
    total = torch.where(shown, counted.sum(1), 0)
    votes = voted.sum(1)
    decided = votes > 0
    mean = torch.where(shown, total.double() / votes[:, None], math.nan)

    highest = torch.where(shown, total, torch.iinfo(torch.int64).min).amax(1, keepdim=True)
    tied = shown & (total == highest)
    num_tied = tied.sum(1)
    drawn = (tie_uniform.double() * num_tied).floor().long()
    is_drawn = tied & (tied.cumsum(1) - 1 == drawn[:, None])
    best = torch.where(decided, is_drawn.to(torch.int8).argmax(1), -1)
    return VoteResult(total, mean, votes, voted, best, decided & (num_tied > 1))


def _keep_best(valid: Tensor, meta: Tensor, k_meta: int) -> Tensor:
    eligible = valid & ~meta.isnan()
    key = torch.where(eligible, meta, -math.inf)
    ranking = key.argsort(dim=1, descending=True, stable=True)
    # An eligible sample may itself score -inf, so places are counted among the eligible only.
    ranked = eligible.gather(1, ranking)
    kept = ranked & (ranked.cumsum(1) <= k_meta)
    return torch.zeros_like(valid).scatter(1, ranking, kept)


def _check(
    scores: Tensor,
    order: Tensor,
    valid: Tensor,
    n: Tensor,
    tie_uniform: Tensor,
    meta: Tensor | None,
    k_meta: int | None,
) -> None:
    if scores.dim() != 3 or 0 in scores.shape[1:]:
        raise ValueError(f"scores must be (R, K, N), got {tuple(scores.shape)}")
    num_rows, num_samples, width = scores.shape
    expected = {
        "scores": (scores, (num_rows, num_samples, width), torch.int64),
        "order": (order, (num_rows, num_samples, width), torch.int64),
        "valid": (valid, (num_rows, num_samples), torch.bool),
        "n": (n, (num_rows,), torch.int64),
        "tie_uniform": (tie_uniform, (num_rows,), torch.float32),
    }
    if meta is not None:
        expected["meta"] = (meta, (num_rows, num_samples), torch.float32)
    for name, (tensor, shape, dtype) in expected.items():
        if tensor.shape != shape or tensor.dtype != dtype:
            raise ValueError(
                f"{name} must be {shape} {dtype}, got {tuple(tensor.shape)} {tensor.dtype}"
            )
    if (meta is None) != (k_meta is None):
        raise ValueError(f"meta and k_meta go together, got k_meta {k_meta}")
    if k_meta is not None and k_meta < 1:
        raise ValueError(f"k_meta must be at least 1, got {k_meta}")
