"""How accuracy grows with the number of votes: Voting@j on labelled rows.

    python -m bench.voting [--model DIR] [--data FILE] [--rows 1000] [--k 32]
                           [--temperatures 0 0.5 1] [--plot FILE.png]

Every row is sampled k times. Voting@j is the accuracy of a vote over j of the k samples, averaged
over random subsets (bench/evaluate/curves.py); a tie counts as the chance that a fair draw gets it
right, a row without any valid vote as wrong. Intervals are 95 %, by a bootstrap over rows. Without
--data the rows are the judging world's final split. Ends in one JSON line; --plot writes the curves
as PNG.
"""

import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from tqdm import tqdm

from bench.evaluate.curves import Way, chances, votes_up_to
from bench.evaluate.votes import votes_of
from bench.provenance import print_json
from bench.statistics import interval
from engine import command
from engine.judge import Judge
from engine.labels import Label
from engine.reading import open_rows, read_rows
from engine.request import BadRow, Row
from engine.verdict import Verdict
from train.world.cases import Split
from train.world.rows import split_rows


@dataclass(frozen=True)
class Args:
    """Measure Voting@j on labelled rows."""

    model: Path = Path("models/pocket")
    data: Path | None = None
    split: Split = "final"  # of the judging world, when there is no --data
    rows: int = 1000
    k: int = 32
    temperatures: tuple[float, ...] = (0.0, 0.5, 1.0)  # 0: greedy, one sample a row
    max_new_tokens: int = 400
    seed: int = 0
    plot: Path | None = None


def read_labelled(data: Path | None, split: Split, count: int, seed: int) -> list[Row]:
    """The first `count` rows of a file or, without one, of the world's split.

    Raises ValueError for a bad line or a row without a label.
    """
    if data is None:
        return split_rows(seed, split, count, split)
    rows = []
    with open_rows(data) as file:
        for row in islice(read_rows(file), count):
            if isinstance(row, BadRow) or row.label is None:
                reason = row.error if isinstance(row, BadRow) else "no label"
                raise ValueError(f"{data}, line {row.line}: {reason}")
            rows.append(row)
    return rows


def voting_curve(verdicts: Sequence[Verdict], k: int, threshold: float) -> dict[int, np.ndarray]:
    """j -> (rows,) float64: each row's chance to be right with j votes, over subsets of its k."""
    votes = votes_up_to(k)
    rows = [votes_of(verdict, threshold) for verdict in verdicts]
    found = chances(rows, map(label_of, verdicts), [Way()], votes)[:, 0]
    return dict(zip(votes.sizes, found.T, strict=True))


def label_of(verdict: Verdict) -> Label:
    """The label that a verdict must have."""
    assert verdict.label is not None
    return verdict.label


def measure(judge: Judge, rows: Sequence[Row], args: Args, temperature: float) -> dict[str, Any]:
    """Judge the rows at one temperature and return its figures."""
    k = 1 if temperature == 0 else args.k
    started = time.perf_counter()
    outcomes = judge.rows(
        rows, k=k, temperature=temperature, max_new_tokens=args.max_new_tokens, seed=args.seed
    )
    verdicts = []
    for outcome in tqdm(outcomes, total=len(rows), unit="row", desc=f"T = {temperature}"):
        if not isinstance(outcome, Verdict):
            raise ValueError(f"row {outcome.id}: {outcome.error}")
        verdicts.append(outcome)
    seconds = time.perf_counter() - started
    curve = voting_curve(verdicts, k, judge.settings.threshold)
    samples = [sample for verdict in verdicts for sample in verdict.samples]
    return {
        "temperature": temperature,
        "k": k,
        "accuracy": {
            size: {"mean": float(right.mean()), "ci95": interval(right)}
            for size, right in curve.items()
        },
        "invalid": dict(Counter(s.invalid for s in samples if s.invalid is not None)),
        "valid_share": sum(s.invalid is None for s in samples) / len(samples),
        "tokens_per_sample": sum(s.tokens for s in samples) / len(samples),
        "seconds": seconds,
        "tokens_per_s": sum(s.tokens for s in samples) / seconds,
    }


def plot(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """Accuracy against votes, a curve with intervals for each run (greedy: a line), as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    votes: set[int] = {1}
    for run in runs:
        sizes = [int(size) for size in run["accuracy"]]
        means = np.array([entry["mean"] for entry in run["accuracy"].values()])
        if run["temperature"] == 0:
            axes.axhline(means[0], color="gray", linestyle="--", label="greedy, 1 sample")
            continue
        bounds = np.array([entry["ci95"] for entry in run["accuracy"].values()]).T
        label = f"T = {run['temperature']:g}"
        axes.errorbar(sizes, means, abs(bounds - means), marker="o", capsize=3, label=label)
        votes.update(sizes)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(votes), [str(size) for size in sorted(votes)])
    axes.set_xlabel("votes")
    axes.set_ylabel("accuracy")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """The command line."""
    args = tyro.cli(Args, description=Args.__doc__)
    rows = read_labelled(args.data, args.split, args.rows, args.seed)
    judge = Judge.load(args.model)
    runs = []
    for temperature in args.temperatures:
        runs.append(measure(judge, rows, args, temperature))
        print(f"T = {temperature:g}", file=sys.stderr)
        for size, entry in runs[-1]["accuracy"].items():
            low, high = entry["ci95"]
            print(f"  @{size:<3} {entry['mean']:.3f}  [{low:.3f}, {high:.3f}]", file=sys.stderr)
    if args.plot:
        plot(runs, args.plot)
    print_json({"model": str(args.model), "rows": len(rows), "runs": runs})


if __name__ == "__main__":
    sys.exit(command.run(main))
