"""Votes on labelled rows while a judge is trained: of the synthetic world's dev split, or a file's.

Every evaluation draws with the same seed on the same rows, so that what changes is the model. Watch
the vote, not the single judgement alone: training can raise the one and lower the other.
"""

from dataclasses import dataclass
from pathlib import Path

from engine.judge import Judge
from engine.labels import is_right
from engine.request import Row
from engine.verdict import RowFailure
from train import parallel
from train.rollout import JudgementArgs
from train.settings import check_at_least
from train.sources import labelled_rows
from train.world.rows import dev_rows


@dataclass(frozen=True, kw_only=True)
class EvalArgs:
    """Evaluation by votes; the best model of all evaluations is kept as OUT/best."""

    eval_every: int = 0  # steps between votes on dev rows, from step 0 on; 0: never
    eval_data: Path | None = None  # a JSONL file of labelled rows; the synthetic world's, left out
    eval_rows: int = 200  # rows of an evaluation
    eval_k: int = 8  # judgements of each, which vote
    eval_temperature: float = 1.0  # of those judgements
    patience: int = 0  # evaluations without a better vote after which training ends; 0: never

    def __post_init__(self) -> None:
        check_at_least(0, self, "eval_every", "patience")
        check_at_least(1, self, "eval_rows", "eval_k")

    def is_due(self, step: int, steps: int) -> bool:
        """Whether to vote after so many of all steps."""
        return self.eval_every > 0 and (step % self.eval_every == 0 or step == steps)


def evaluation_rows(args: EvalArgs, name: str) -> list[Row]:
    """The rows of a run's evaluations: none where there are no evaluations. Raises ValueError for a
    file with fewer labelled rows than are asked for, saying what the other lines are."""
    if not args.eval_every:
        return []
    if args.eval_data is None:
        return dev_rows(name, args.eval_rows)
    rows, left_out = labelled_rows(args.eval_data)
    if len(rows) < args.eval_rows:
        raise ValueError(
            f"{args.eval_data} holds {len(rows)} labelled rows, fewer than eval_rows = "
            f"{args.eval_rows}; left out: {dict(left_out)}"
        )
    return rows[: args.eval_rows]


def dev_votes(
    judge: Judge, rows: list[Row], args: EvalArgs, sampling: JudgementArgs
) -> dict[str, float]:
    """Share of rows that a vote of `eval_k` gets right, and that one judgement does; what cannot be
    judged is wrong."""
    own = parallel.share(rows)
    outcomes = judge.rows(
        own, k=args.eval_k, temperature=args.eval_temperature,
        max_new_tokens=sampling.max_new_tokens, deterministic=sampling.deterministic,
    )  # fmt: skip
    votes, singles = [], []
    for row, outcome in zip(own, outcomes, strict=True):
        assert row.label is not None
        if isinstance(outcome, RowFailure):
            votes.append(False)
            singles.append(0.0)
            continue
        votes.append(bool(outcome.correct))
        right = [is_right(s.scores, row.label, judge.settings.threshold) for s in outcome.samples]
        singles.append(sum(right) / len(right))
    return {
        "dev_vote": sum(parallel.gather(votes)) / len(rows),
        "dev_single": sum(parallel.gather(singles)) / len(rows),
    }
