"""Scores of judgements beside which of them are right: losses, AUC, and the scale of votes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from engine.labels import chance_right, gold_index
from engine.request import Row
from kernels.vote import vote
from train.auc import chance_above
from train.judgements import Judgement
from train.trajectories import Trajectory


@dataclass(frozen=True)
class ReadRow:
    """A row, those of its judgements that are read, and the trajectories that they are read as, at
    the last token but one."""

    row: Row
    trajectories: list[Trajectory]
    judgements: list[Judgement]


@dataclass(frozen=True)
class Labelled:
    """The judgements of rows, one after another, and the number of each one's row."""

    trajectories: list[Trajectory]
    right: Tensor  # (S,) bool
    target: Tensor  # (S,) float32, from 0 to 1
    row: Tensor  # (S,) int64


def labelled(rows: Sequence[ReadRow]) -> Labelled:
    """The judgements of rows, side by side."""
    judgements = [own for each in rows for own in each.judgements]
    return Labelled(
        [own for each in rows for own in each.trajectories],
        torch.tensor([own.right for own in judgements], dtype=torch.bool),
        torch.tensor([own.target for own in judgements]),
        torch.tensor([number for number, each in enumerate(rows) for _ in each.judgements]),
    )


def losses_of(logits: Tensor, judgements: Labelled, kind: str) -> Tensor:
    """The losses: one for each judgement, or one for each pair, of which there may be none."""
    if kind == "pointwise":
        target = judgements.target.to(logits)
        return binary_cross_entropy_with_logits(logits, target, reduction="none")
    better, worse = pairs(judgements)
    return -logsigmoid(logits[better] - logits[worse])


def pairs(judgements: Labelled) -> tuple[Tensor, Tensor]:
    """Every judgement with every one of its row that has a lower target, as places: (P,) int64
    each."""
    target, row = judgements.target, judgements.row
    found = (target[:, None] > target) & (row[:, None] == row)
    better, worse = found.nonzero(as_tuple=True)
    return better, worse


def auc(scores: Tensor, judgements: Labelled) -> dict[str, float]:
    """Chance that a right judgement is scored above a wrong one, a tie being half: of all pairs,
    and the mean over rows that have both of the pairs within. NaN where there is no pair."""
    right = judgements.right
    within = []
    for number in judgements.row.unique():
        mine = judgements.row == number
        if (mine & right).any() and (mine & ~right).any():
            within.append(chance_above(scores[mine & right], scores[mine & ~right]))
    return {
        "auc": chance_above(scores[right], scores[~right]),
        "auc_within_rows": sum(within) / len(within) if within else math.nan,
        "rows_with_both": len(within),
    }


def num_pairs(row: ReadRow) -> int:
    """How many pairs a row has."""
    targets = [own.target for own in row.judgements]
    return sum(better > worse for better in targets for worse in targets)


def vote_accuracies(
    rows: Sequence[ReadRow], logits: Tensor, scale: float, threshold: float
) -> dict[str, float]:
    """The chance that a vote of each row's judgements is right, a mean over rows, ties being drawn:
    of all alike, of the half that the logits (S,) are highest for, as the paper filters, and of all
    weighed by exp(scale x logit). Every judgement must have its scores."""
    found: dict[str, list[float]] = {"vote": [], "filtered_vote": [], "weighed_vote": []}
    first = 0
    for each in rows:
        count = len(each.judgements)
        own = logits[None, first : first + count]
        first += count
        scores = torch.tensor([[judgement.scores for judgement in each.judgements]])
        counted = partial(
            vote, scores, torch.arange(scores.shape[2]).expand(scores.shape),
            torch.ones(1, count, dtype=torch.bool), torch.tensor([scores.shape[2]]), torch.zeros(1),
        )  # fmt: skip
        votes = {
            "vote": counted(),
            "filtered_vote": counted(own, (count + 1) // 2),
            "weighed_vote": counted(own * scale),
        }
        assert each.row.label is not None
        for name, result in votes.items():
            found[name].append(chance_right(result.mean[0].tolist(), each.row.label, threshold))
    return {name: sum(values) / max(1, len(values)) for name, values in found.items()}


def vote_scale(rows: Sequence[ReadRow], logits: Tensor) -> float:
    """The a for which votes weighed by exp(a x logit) tell best which response is best.

    With m the means of the scores so weighed it is the most likely a of softmax(T m), T fitted
    beside it. Judgements of a row err together, so log-odds of being right would trust the best of
    them too much. A normal prior on log a and log T, as wide as a factor of e, keeps both finite.
    logits: (S,), of the rows' judgements, all of which have scores. 1 where no row has two
    responses and two judgements.
    """
    votes = []
    first = 0
    for each in rows:
        count = len(each.judgements)
        own = logits[first : first + count].double()
        first += count
        if count > 1 and len(each.row.responses) > 1:
            assert each.row.label is not None
            scores = torch.tensor([judgement.scores for judgement in each.judgements]).double()
            votes.append((scores, own, gold_index(each.row.label)))
    if not votes:
        return 1.0
    logs = torch.zeros(2, dtype=torch.float64, requires_grad=True)  # of a and T
    solver = torch.optim.LBFGS([logs], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        a, sharpness = logs.exp()
        total = logs.square().sum() / 2
        for scores, own, best in votes:
            means = torch.softmax(a * own, 0) @ scores
            total = total - torch.log_softmax(sharpness * means, 0)[best]
        total.backward()
        return total

    with torch.enable_grad():
        solver.step(loss)
    return float(logs[0].detach().exp())
