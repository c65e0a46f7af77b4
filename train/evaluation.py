"""Votes on labelled rows while a judge is trained: on rows that are held out of its data, on those
of another file or, where it learns from the synthetic world, on that world's dev split.

Every evaluation draws with the same seed on the same rows, so that what changes is the model. Watch
the vote, not the single judgement alone: training can raise the one and lower the other.
"""

import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.judge import Judge
from engine.labels import is_right
from engine.request import Row
from engine.verdict import RowFailure, Sample
from train import parallel
from train.rollout import JudgementArgs
from train.settings import check_at_least
from train.sources import hold_out, labelled_rows
from train.world.rows import dev_rows


@dataclass(frozen=True, kw_only=True)
class EvalArgs:
    """Evaluation by votes; the best model of all evaluations is kept as OUT/best."""

    eval_every: int = 0  # steps between votes on dev rows, from step 0 on; 0: never
    eval_data: Path | None = None  # a JSONL file of labelled rows; else some of --data's, held out
    eval_rows: int = 200  # rows of an evaluation, at most
    eval_k: int = 8  # judgements of each, which vote
    eval_temperature: float = 1.0  # of those judgements
    patience: int = 0  # evaluations without a better vote after which training ends; 0: never

    def __post_init__(self) -> None:
        check_at_least(0, self, "eval_every", "patience")
        check_at_least(1, self, "eval_rows", "eval_k")

    def is_due(self, step: int, steps: int) -> bool:
        """Whether to vote after so many of all steps."""
        return self.eval_every > 0 and (step % self.eval_every == 0 or step == steps)


def divide(
    data: Path | None, args: EvalArgs, name: str, *, evaluates: bool
) -> tuple[list[Row] | None, list[Row], Counter[str]]:
    """The labelled rows of a file to train on, or None for those of the synthetic world; the rows
    of a run's evaluations; and how many lines were left out, by reason.

    evaluates: whether there are any evaluations. They are on the rows of `eval_data`, or else on
    rows of the file that are then not trained on, or on the dev rows NAME of the world. Raises
    ValueError where a file has no labelled row, or too few to hold some out.
    """
    if data is None:
        return None, evaluation_rows(args, name) if evaluates else [], Counter()
    found, left_out = labelled_rows(data)
    if not evaluates:
        return found, [], left_out
    if args.eval_data is not None:
        return found, evaluation_rows(args, name), left_out
    return *hold_out_of(data, found, args), left_out


def hold_out_of(path: Path, rows: Sequence[Row], args: EvalArgs) -> tuple[list[Row], list[Row]]:
    """The rows of a file to train on, and those to evaluate on, as `hold_out` divides them; says
    how many these are."""
    kept, dev = hold_out(rows, args.eval_rows)
    if parallel.is_first():
        print(f"held out for evaluation: {len(dev)} rows of {path}", file=sys.stderr)
    return kept, dev


def evaluation_rows(args: EvalArgs, name: str) -> list[Row]:
    """The first `eval_rows` labelled rows of `eval_data`, or dev rows NAME of the world."""
    if args.eval_data is None:
        return dev_rows(name, args.eval_rows)
    return labelled_rows(args.eval_data)[0][: args.eval_rows]


def dev_votes(
    judge: Judge, rows: list[Row], args: EvalArgs, sampling: JudgementArgs
) -> dict[str, float]:
    """Share of rows that a vote of `eval_k` gets right, and that one judgement does; what cannot be
    judged is wrong. Beside them how far judgements err together, and how much their criteria
    differ."""
    own = parallel.share(rows)
    outcomes = judge.rows(
        own, k=args.eval_k, temperature=args.eval_temperature,
        max_new_tokens=sampling.max_new_tokens, deterministic=sampling.deterministic,
    )  # fmt: skip
    votes, rights, entropies = [], [], []
    for row, outcome in zip(own, outcomes, strict=True):
        assert row.label is not None
        if isinstance(outcome, RowFailure):
            votes.append(False)
            rights.append([False] * args.eval_k)
            continue
        votes.append(bool(outcome.correct))
        threshold = judge.settings.threshold
        rights.append([is_right(s.scores, row.label, threshold) for s in outcome.samples])
        entropies.append(criteria_entropy(outcome.samples))
    judge.close()  # what is trained on needs the room of its cache
    rights, entropies = parallel.gather(rights), parallel.gather(entropies)
    return {
        "dev_vote": sum(parallel.gather(votes)) / len(rows),
        "dev_single": sum(sum(own) / len(own) for own in rights) / len(rows),
        "dev_error_correlation": error_correlation(rights),
        "dev_criteria_entropy": sum(entropies) / max(1, len(entropies)),
    }


def error_correlation(rights: Sequence[Sequence[bool]]) -> float:
    """The correlation of being right between two judgements of a row, over rows: 0 where they err
    independently, 1 where all of a row err together and votes gain nothing. 0 where none or all are
    right, or a row has one judgement."""
    counts = [(sum(own), len(own)) for own in rights]
    if min(k for _, k in counts) < 2:
        return 0.0
    single = sum(m / k for m, k in counts) / len(counts)
    both = sum(m * (m - 1) / (k * (k - 1)) for m, k in counts) / len(counts)
    variance = single * (1 - single)
    return (both - single**2) / variance if variance else 0.0


def criteria_entropy(samples: Sequence[Sample]) -> float:
    """The entropy, in nats, of the first lines of a row's judgements, which list the criteria. 0
    where all begin alike: reinforcement learning may end there."""
    counts = Counter(sample.text.split("\n", 1)[0] for sample in samples)
    shares = [count / len(samples) for count in counts.values()]
    return -sum(share * math.log(share) for share in shares)
