"""Sum what a row's valid samples say of its responses into a verdict.

Dimension letters: R rows, K samples per row, N responses (largest of the batch), n of one row.

  scores_r[k, order_r[k, j]] = shown_r[k, j]        un-permuted: order[j] is the response shown in
                                                    position j, -1 for padding
  total_r[i] = sum over voted k of weight_r[k] points(scores_r[k])[i]
  best_r     = argmax of total_r over i < n_r; of c tied responses the floor(u c)-th, by index

points: "sum" takes scores as they are (the paper's vote); "standardised" what they are above their
judgement's mean, in its standard deviations, 0 where it scores all alike; "borda" how many others
score lower, and half of those that score the same. A row of one response keeps its score.

voted: the valid samples; with meta scores and k_meta the k_meta largest of them (the paper's
filter), each with weight 1; with meta scores alone all, weighed by exp(meta - the row's largest).
An invalid sample never counts as 0: it has no vote, and nor has one whose meta score is NaN. Of
equal meta scores the lower sample index goes first. Without any vote best is -1 and the means NaN.

Plain torch on any device. Every result has the same bits everywhere: "sum" adds integers; all else
is float64, rounded by IEEE's rules and added in the order of the samples, with weights rounded to
multiples of 2^-30, since the last bit of exp is a library's own.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from kernels.checks import check

Rule = Literal["sum", "standardised", "borda"]

_WEIGHT_UNIT = 2.0**-30


@dataclass(frozen=True)
class VoteResult:
    """Verdicts of R rows; entries of responses i >= n are 0 in total and NaN in mean."""

    total: Tensor  # (R, N) int64 where the rule is "sum" and nothing is weighed, else float64
    mean: Tensor  # (R, N) float64, total / the sum of weights; NaN without votes
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


def points_of(scores: Sequence[float], rule: Rule) -> Sequence[float]:
    """The points of one judgement's scores, which are in the order of the responses."""
    n = len(scores)
    if rule == "sum":
        return list(scores)
    if n == 1:
        return [float(scores[0])]
    if rule == "borda":
        lower = [sum(other < score for other in scores) for score in scores]
        alike = [sum(other == score for other in scores) - 1 for score in scores]
        return [a + b / 2 for a, b in zip(lower, alike, strict=True)]
    above = [
        float(n * score - sum(scores)) for score in scores
    ]  # n times what it is above the mean
    squares = 0.0
    for each in above:
        squares += each * each
    return [each / math.sqrt(squares / n) if squares else 0.0 for each in above]


def vote_ref(
    scores: Tensor,
    order: Tensor,
    valid: Tensor,
    n: Tensor,
    tie_uniform: Tensor,
    meta: Tensor | None = None,
    k_meta: int | None = None,
    rule: Rule = "sum",
) -> VoteResult:
    """The specification of `vote`, one row at a time in plain Python."""
    num_rows, num_samples, width = scores.shape
    weighs = meta is not None and k_meta is None
    whole = rule == "sum" and not weighs
    total = torch.zeros(num_rows, width, dtype=torch.int64 if whole else torch.float64)
    mean = torch.full((num_rows, width), math.nan, dtype=torch.float64)
    voted = torch.zeros(num_rows, num_samples, dtype=torch.bool)
    best = torch.full((num_rows,), -1, dtype=torch.int64)
    tie = torch.zeros(num_rows, dtype=torch.bool)
    for r in range(num_rows):
        voters = [k for k in range(num_samples) if valid[r, k]]
        weight: dict[int, int | float] = dict.fromkeys(voters, 1)
        if meta is not None:
            quality = meta[r].double().tolist()
            voters = [k for k in voters if not math.isnan(quality[k])]
            if weighs:
                top = max((quality[k] for k in voters), default=0.0)
                for k in voters:
                    power = 0.0 if quality[k] == top else quality[k] - top
                    weight[k] = round(math.exp(power) / _WEIGHT_UNIT) * _WEIGHT_UNIT
            else:
                voters = sorted(sorted(voters, key=lambda k: (-quality[k], k))[:k_meta])
        count = int(n[r])
        sums: list[int | float] = [0] * count if whole else [0.0] * count
        for k in voters:
            voted[r, k] = True
            shown = {int(order[r, k, j]): int(scores[r, k, j]) for j in range(count)}
            points = points_of([shown[i] for i in range(count)], rule)
            sums = [a + weight[k] * b for a, b in zip(sums, points, strict=True)]
        if voters:
            total[r, :count] = torch.tensor(sums, dtype=total.dtype)
            tied = [i for i in range(count) if sums[i] == max(sums)]
            mean[r, :count] = total[r, :count].double() / sum(weight[k] for k in voters)
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
    rule: Rule = "sum",
) -> VoteResult:
    """Verdicts of R rows.

    scores (R, K, N) int64 in shown order, read only where valid; order (R, K, N) int64 (see
    `unpermute`; rows of padding samples may be all -1); valid (R, K) bool; n (R,) int64, 1 to N;
    tie_uniform (R,) float32 in [0, 1); meta (R, K) float32: with k_meta >= 1, which may exceed the
    number of eligible samples, the scores that choose who votes; without, logits that weigh the
    votes. Raises ValueError for other shapes, dtypes, rules or k_meta.
    """
    _check(scores, order, valid, n, tie_uniform, meta, k_meta, rule)
    voted = valid if meta is None else valid & ~meta.isnan()
    if meta is not None and k_meta is not None:
        voted = _keep_best(voted, meta, k_meta)
    weight = _weights(voted, meta) if meta is not None and k_meta is None else None
    response = torch.arange(scores.shape[2], device=scores.device)
    shown = response < n[:, None]  # (R, N)
    counted = torch.where(voted[..., None], unpermute(scores, order), 0)
    if rule == "sum" and weight is None:
        total = torch.where(shown, counted.sum(1), 0)
    else:
        points = _points(counted, shown, n, rule)
        points = points if weight is None else points * weight[..., None]
        points = torch.where(shown[:, None] & voted[..., None], points, 0.0)
        total = torch.zeros(shown.shape, dtype=torch.float64, device=scores.device)
        for each in points.unbind(1):
            total += each
    votes = voted.sum(1)
    of = votes if weight is None else _sum_in_order(weight)
    decided = votes > 0
    mean = torch.where(shown, total.double() / of[:, None], math.nan)

    lowest = -math.inf if total.is_floating_point() else torch.iinfo(torch.int64).min
    highest = torch.where(shown, total, lowest).amax(1, keepdim=True)
    tied = shown & (total == highest)
    num_tied = tied.sum(1)
    drawn = (tie_uniform.double() * num_tied).floor().long()
    is_drawn = tied & (tied.cumsum(1) - 1 == drawn[:, None])
    best = torch.where(decided, is_drawn.to(torch.int8).argmax(1), -1)
    return VoteResult(total, mean, votes, voted, best, decided & (num_tied > 1))


def _points(scores: Tensor, shown: Tensor, n: Tensor, rule: Rule) -> Tensor:
    """`points_of` for (R, K, N) scores in the responses' order, float64."""
    if rule == "sum":
        return scores.double()
    there = shown[:, None]  # (R, 1, N)
    if rule == "borda":
        points = torch.zeros(scores.shape, dtype=torch.float64, device=scores.device)
        for other, is_there in zip(scores.unbind(2), there.unbind(2), strict=True):
            points += is_there[..., None] * (other[..., None] < scores).double()
            points += is_there[..., None] * (other[..., None] == scores).double() / 2
        points -= 0.5  # of itself
    else:
        scores = torch.where(there, scores, 0)
        above = n[:, None, None] * scores - scores.sum(2, keepdim=True)
        above = torch.where(there, above, 0).double()
        squares = _sum_in_order((above * above).flatten(0, 1)).view(scores.shape[:2])
        deviation = _rounded_sqrt(squares / n[:, None])[..., None]
        points = torch.where(deviation > 0, above / deviation, 0.0)
    return torch.where((n == 1)[:, None, None], scores.double(), points)


def _rounded_sqrt(x: Tensor) -> Tensor:
    """Square roots as IEEE rounds them: torch's are a library's, and may be off in the last bit."""
    return torch.from_numpy(np.sqrt(x.cpu().numpy())).to(x.device)


def _sum_in_order(x: Tensor) -> Tensor:
    """(R, K) -> (R,), one column after another."""
    total = torch.zeros(len(x), dtype=x.dtype, device=x.device)
    for column in x.unbind(1):
        total += column
    return total


def _weights(eligible: Tensor, meta: Tensor) -> Tensor:
    """(R, K) float64: 1 for the largest meta score of a row, 0 where a sample is not eligible."""
    quality = torch.where(eligible, meta, -math.inf).double()
    top = quality.amax(1, keepdim=True)
    power = torch.where(quality == top, 0.0, quality - top)
    return torch.where(eligible, (power.exp() / _WEIGHT_UNIT).round() * _WEIGHT_UNIT, 0.0)


def _keep_best(eligible: Tensor, meta: Tensor, k_meta: int) -> Tensor:
    key = torch.where(eligible, meta, -math.inf)
    ranking = key.argsort(dim=1, descending=True, stable=True)
    # An eligible sample may itself score -inf, so places are counted among the eligible only.
    ranked = eligible.gather(1, ranking)
    kept = ranked & (ranked.cumsum(1) <= k_meta)
    return torch.zeros_like(eligible).scatter(1, ranking, kept)


def _check(
    scores: Tensor,
    order: Tensor,
    valid: Tensor,
    n: Tensor,
    tie_uniform: Tensor,
    meta: Tensor | None,
    k_meta: int | None,
    rule: Rule,
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
    if meta is None and k_meta is not None:
        raise ValueError(f"vote: k_meta = {k_meta} needs meta scores")
    if k_meta is not None and k_meta < 1:
        raise ValueError(f"vote: k_meta must be at least 1, got {k_meta}")
    if rule not in ("sum", "standardised", "borda"):
        raise ValueError(f"vote: rule {rule!r} is not sum, standardised or borda")
