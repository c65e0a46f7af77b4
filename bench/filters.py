"""Which votes to count, and how: all votes beside a meta model's best half and other halves, beside
votes that it weighs, and beside other rules than the sum of scores.

    python -m bench.filters --meta-model DIR [--model DIR] [--data FILE] [--split dev]
                            [--rows 1000] [--k 32] [--temperature 1]

Every row is sampled k times, and its judgements are scored by the meta model. For j = 1, 2, 4 ... k
a vote of j samples is taken over subsets (bench/evaluate/curves.py), by

    all        every valid one of the j
    meta       the j / 2, rounded up, that the meta model trusts most, as `engine.sample` has it
    random     some j / 2: what a filter without knowledge comes to
    shortest   the j / 2 of the fewest tokens
    likeliest  the j / 2 with the highest mean log-prob of their tokens
    clearest   the j / 2 whose best response leads by most (one response: farthest from the
               threshold), which needs no model
    oracle     the j / 2 that are right, as far as there are so many: what a perfect one comes to

and by every valid one of the j with --vote standardised or borda, with --meta-vote weight, or both,
and with --score expected.
Differences are to all j votes, on the same subsets; intervals are 95 %, by a bootstrap over rows.
The AUC of the meta model, and that of the lead, is within rows which have right and wrong
judgements. A tie is a wrong judgement, and a filter that drops ties tells right from wrong without
knowing any better who deserves to win: compare the two. Ends in one JSON line.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from tqdm import tqdm

from bench.evaluate.curves import Way, chances, votes_up_to
from bench.evaluate.votes import votes_of
from bench.provenance import print_json
from bench.statistics import interval, roc_auc
from bench.voting import read_labelled
from engine import command
from engine.judge import Judge
from engine.labels import is_right
from engine.verdict import Sample, Verdict
from train.world.cases import Split

HALF = Way(meta="filter")
WAYS = {
    "all": Way(),
    "meta": HALF,
    "weighed": Way(meta="weights"),
    "standardised": Way("standardised"),
    "standardised, weighed": Way("standardised", meta="weights"),
    "borda": Way("borda"),
    "borda, weighed": Way("borda", meta="weights"),
    "expected": Way(expected=True),
}
OTHER_HALVES = ("random", "shortest", "likeliest", "clearest", "oracle")
NAMES = (*WAYS, *OTHER_HALVES)


@dataclass(frozen=True)
class Args:
    """Measure what filtering votes gains on labelled rows."""

    meta_model: Path
    model: Path = Path("models/pocket")
    data: Path | None = None
    split: Split = "dev"  # of the judging world, when there is no --data
    rows: int = 1000
    k: int = 32
    temperature: float = 1.0
    max_new_tokens: int = 400
    seed: int = 0


def row_curves(
    verdict: Verdict, threshold: float, rng: np.random.Generator, meta_scale: float = 1.0
) -> dict[str, dict[int, float]]:
    """way to vote -> j -> the row's chance to be right."""
    label = verdict.label
    assert label is not None
    values: dict[str, Callable[[Sample], float]] = {
        "random": lambda _: rng.random(),
        "shortest": lambda sample: -sample.tokens,
        "likeliest": lambda sample: float(np.mean(sample.logprobs)),
        "clearest": lambda sample: lead(sample, threshold),
        "oracle": lambda sample: is_right(sample.scores, label, threshold),
    }
    row, votes = votes_of(verdict, threshold), votes_up_to(len(verdict.samples))
    found = chances([row], [label], list(WAYS.values()), votes, meta_scale)[0].tolist()
    for name in OTHER_HALVES:
        own = [np.nan if s.scores is None else values[name](s) for s in verdict.samples]
        ranked = row._replace(meta=np.array(own, dtype=np.float64))
        found.append(chances([ranked], [label], [HALF], votes)[0, 0].tolist())
    return {
        name: dict(zip(votes.sizes, of_sizes, strict=True))
        for name, of_sizes in zip(NAMES, found, strict=True)
    }


def lead(sample: Sample, threshold: float) -> float:
    """By how much a valid judgement's best response is ahead of the next."""
    assert sample.scores is not None
    if len(sample.scores) == 1:
        return abs(sample.scores[0] - threshold)
    second, first = sorted(sample.scores)[-2:]
    return first - second


def _meta(sample: Sample) -> float:
    return -np.inf if sample.meta is None or np.isnan(sample.meta) else sample.meta


def auc_within(
    verdict: Verdict, threshold: float, value: Callable[[Sample], float] = _meta
) -> float | None:
    """The chance that a right valid judgement of a row has a higher value than a wrong one, a tie
    being half; None where there are not both."""
    valid = [sample for sample in verdict.samples if sample.scores is not None]
    assert verdict.label is not None
    right = np.array([is_right(s.scores, verdict.label, threshold) for s in valid], dtype=bool)
    if right.all() or not right.any():
        return None
    return roc_auc(np.array([value(sample) for sample in valid]), right)


def table(curves: Sequence[dict[str, dict[int, float]]]) -> dict[str, dict[int, Any]]:
    """way to vote -> j -> accuracy and, beside all votes, the difference, with intervals."""
    found: dict[str, dict[int, Any]] = {}
    for name in NAMES:
        found[name] = {}
        for size in curves[0][name]:
            right = np.array([each[name][size] for each in curves])
            gain = right - [each["all"][size] for each in curves]
            entry: dict[str, Any] = {"mean": float(right.mean()), "ci95": interval(right)}
            if name != "all":
                entry |= {"gain": float(gain.mean()), "gain_ci95": interval(gain)}
            found[name][size] = entry
    return found


def main() -> None:
    """The command line."""
    args = tyro.cli(Args, description=Args.__doc__)
    rows = read_labelled(args.data, args.split, args.rows, args.seed)
    judge = Judge.load(args.model, meta=args.meta_model)
    assert judge.meta is not None
    threshold, rng = judge.settings.threshold, np.random.default_rng(args.seed)
    outcomes = judge.rows(
        rows, k=args.k, temperature=args.temperature, max_new_tokens=args.max_new_tokens,
        seed=args.seed, score="expected",
    )  # fmt: skip
    curves: list[dict[str, dict[int, float]]] = []
    aucs: dict[str, list[float]] = {"meta": [], "clearest": []}
    for outcome in tqdm(outcomes, total=len(rows), unit="row"):
        if not isinstance(outcome, Verdict):
            raise ValueError(f"row {outcome.id}: {outcome.error}")
        curves.append(row_curves(outcome, threshold, rng, judge.meta.settings.meta_scale))
        for name, value in (("meta", _meta), ("clearest", partial(lead, threshold=threshold))):
            if (auc := auc_within(outcome, threshold, value)) is not None:
                aucs[name].append(auc)
    tables = table(curves)
    for name, sizes in tables.items():
        figures = "".join(f"  @{size} {entry['mean']:.3f}" for size, entry in sizes.items())
        print(f"{name:<22}{figures}", file=sys.stderr)
    summary = {
        "model": str(args.model),
        "meta_model": str(args.meta_model),
        "rows": len(rows),
        "temperature": args.temperature,
        "auc_within_rows": {
            name: float(np.mean(found)) if found else None for name, found in aucs.items()
        },
        "rows_with_both": len(aucs["meta"]),
        "ways": tables,
    }
    print_json(summary)


if __name__ == "__main__":
    sys.exit(command.run(main))
