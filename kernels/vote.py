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

Plain torch on any device. Sums are of integers, and means are float64: no result depends on an
order of summation.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.checks import check


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
            f"vote: scores and order differ in shape: {tuple(scores.shape)}, {tuple(order.shape)}"
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
    may exceed the number of eligible samples. Raises ValueError for other shapes, dtypes or k_meta.
    """
    _check(scores, order, valid, n, tie_uniform, meta, k_meta)
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
        raise ValueError(f"vote: scores must be (R, K, N), got {tuple(scores.shape)}")
    num_rows, num_samples, _ = scores.shape
    check("vote: scores", scores, scores.shape, torch.int64)
    check("vote: order", order, scores.shape, torch.int64)
    check("vote: valid", valid, (num_rows, num_samples), torch.bool)
    check("vote: n", n, (num_rows,), torch.int64)
    check("vote: tie_uniform", tie_uniform, (num_rows,), torch.float32)
    if meta is not None:
        check("vote: meta", meta, (num_rows, num_samples), torch.float32)
    if (meta is None) != (k_meta is None):
        raise ValueError(f"vote: meta and k_meta go together, got k_meta {k_meta}")
    if k_meta is not None and k_meta < 1:
        raise ValueError(f"vote: k_meta must be at least 1, got {k_meta}")
