"""Which votes to count, and how: all votes beside a meta model's best half and other halves, beside
votes that it weighs, and beside other rules than the sum of scores.

    python -m bench.filters --meta-model DIR [--model DIR] [--data FILE] [--split dev]
                            [--rows 1000] [--k 32] [--temperature 1]

Every row is sampled k times, and its judgements are scored by the meta model. For j = 1, 2, 4 ... k
a vote of j samples is taken over subsets as in `bench.voting`, by

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
from typing import Any, NamedTuple

import numpy as np
import torch
import tyro
from tqdm import tqdm

from bench.provenance import print_json
from bench.voting import SUBSETS, interval, read_labelled
from engine import command
from engine.judge import Judge
from engine.labels import chance_correct, chance_right, is_right
from engine.verdict import Sample, Verdict
from kernels.vote import Rule, points_of
from train.auc import chance_above
from train.world.cases import Split

FILTERS = ("all", "meta", "random", "shortest", "likeliest", "clearest", "oracle")


class Way(NamedTuple):
    """What all votes count for, whether the meta model weighs them, and whether it is their
    expected scores that count."""

    rule: Rule = "sum"
    weighs: bool = False
    expects: bool = False


RULES = {
    "weighed": Way(weighs=True),
    "standardised": Way("standardised"),
    "standardised, weighed": Way("standardised", weighs=True),
    "borda": Way("borda"),
    "borda, weighed": Way("borda", weighs=True),
    "expected": Way(expects=True),
}
NAMES = (*FILTERS, *RULES)


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
    verdict: Verdict,
    k: int,
    threshold: float,
    rng: np.random.Generator,
    meta_scale: float = 1.0,
    names: Sequence[str] = NAMES,
) -> dict[str, dict[int, float]]:
    """way to vote -> j -> the row's chance to be right, of the ways with these names."""
    label = verdict.label
    assert label is not None
    samples = [sample for sample in verdict.samples if sample.scores is not None]

    values: dict[str, Callable[[Sample], float]] = {
        "meta": _meta,
        "random": lambda _: rng.random(),
        "shortest": lambda sample: -sample.tokens,
        "likeliest": lambda sample: float(np.mean(sample.logprobs)),
        "clearest": lambda sample: lead(sample, threshold),
        "oracle": lambda sample: is_right(sample.scores, label, threshold),
    }
    valid = {id(sample) for sample in samples}
    found: dict[str, dict[int, float]] = {name: {} for name in names}
    for size in [1 << i for i in range(k.bit_length()) if 1 << i < k] + [k]:
        subsets = 1 if size == k else SUBSETS
        chances = dict.fromkeys(names, 0.0)
        for _ in range(subsets):
            chosen = [verdict.samples[i] for i in rng.choice(k, size, replace=False)]
            voting = [sample for sample in chosen if id(sample) in valid]
            for name in [name for name in FILTERS if name in chances]:
                kept = voting
                if name != "all":
                    kept = sorted(voting, key=values[name], reverse=True)[: (size + 1) // 2]
                scores = [sample.scores for sample in kept if sample.scores is not None]
                chances[name] += chance_correct(scores, label, threshold) / subsets
            for name, way in RULES.items():
                if name not in chances:
                    continue
                means = mean_points(voting, way, meta_scale)
                chances[name] += chance_right(means, label, threshold) / subsets if means else 0.0
        for name in names:
            found[name][size] = chances[name]
    return found


def mean_points(samples: Sequence[Sample], way: Way, meta_scale: float) -> list[float]:
    """The mean points of valid samples, weighed, if at all, by the exponential of their meta scores
    times `meta_scale`; samples without a meta score count as 0 there. Empty where there are none.
    """
    scores = [sample.expected if way.expects else sample.scores for sample in samples]
    points = [points_of(each, way.rule) for each in scores if each is not None]
    metas = np.array([_meta(sample) for sample in samples])
    if way.weighs and not np.isfinite(metas).any():
        return []
    powers = meta_scale * (metas - metas.max()) if way.weighs else np.zeros(len(samples))
    return np.average(points, axis=0, weights=np.exp(powers)).tolist() if points else []


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
    right = torch.tensor([is_right(s.scores, verdict.label, threshold) for s in valid]).bool()
    if not len(right) or right.all() or not right.any():
        return None
    values = torch.tensor([value(sample) for sample in valid], dtype=torch.float64)
    return chance_above(values[right], values[~right])


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
        curves.append(row_curves(outcome, args.k, threshold, rng, judge.meta.settings.meta_scale))
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
