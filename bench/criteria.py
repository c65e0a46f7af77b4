"""What a judge of the synthetic world gets wrong: its criteria, its checks, or its sums.

    python -m bench.criteria [--model DIR] [--rows 200] [--k 4] [--temperature 0.5] [--split dev]

Parses the judgements by the teacher's format and compares them with the truth of each case:
*weighted* is the share of listed criteria that carry hidden weight (three random ones: `chance`),
*mass* the share of the hidden weight that they cover, *listed* the share of judgements that list a
criterion, *checks* the share of right yes/no verdicts, in all and by criterion, *sums* the share of
response lines whose total follows from their own verdicts. Ends in one JSON line.
"""

import re
import sys
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import tyro

from bench.provenance import print_json
from engine import command
from engine.judge import Judge
from engine.request import make_row
from engine.verdict import Verdict
from train.world.cases import CRITERIA, LISTED, Case, Split, cases

_LISTED = re.compile(r"Specific Criteria: (.*)")
_LINE = re.compile(r"Response (\d+): (.*), ([0-9+]+)=(\d+)")


@dataclass(frozen=True)
class Args:
    """Measure what a judge of the synthetic world gets wrong."""

    model: Path = Path("models/pocket")
    rows: int = 200
    k: int = 4
    temperature: float = 0.5
    split: Split = "dev"
    seed: int = 1


def count(case: Case, order: tuple[int, ...], text: str, counts: Counter[str]) -> None:
    """Add one judgement to the counts; what does not parse is counted as such."""
    counts["judgements"] += 1
    listed = _LISTED.search(text)
    entries = re.findall(r"(\w+) (\d+)", listed[1]) if listed else []
    weights = {name: int(weight) for name, weight in entries if name in CRITERIA}
    if len(weights) != LISTED:
        counts["unparsed"] += 1
        return
    hidden = dict(zip(CRITERIA, case.weights, strict=True))
    counts["listed"] += LISTED
    counts.update(f"listed {name}" for name in weights)
    counts["weighted"] += sum(hidden[name] > 0 for name in weights)
    counts["mass"] += sum(hidden[name] for name in weights)
    counts["all_mass"] += sum(case.weights)
    counts["chance"] += LISTED * sum(weight > 0 for weight in case.weights)
    for number, checks, points, total in _LINE.findall(text):
        if not 1 <= int(number) <= len(order):
            continue
        met = dict(zip(CRITERIA, case.responses[order[int(number) - 1]].met, strict=True))
        passed = 1
        for check in checks.split(", "):
            name, verdict = check.split(" ", 1)[0], check.rsplit(" ", 1)[-1]
            if name not in weights or verdict not in ("yes", "no"):
                continue
            passed += weights[name] * (verdict == "yes")
            counts["checks"] += 1
            counts[f"checks {name}"] += 1
            right = (verdict == "yes") == met[name]
            counts["right"] += right
            counts[f"right {name}"] += right
        counts["sums"] += 1
        terms = sum(int(term) for term in points.split("+") if term)
        counts["right sums"] += passed == terms == int(total)


def measure(args: Args) -> dict[str, Any]:
    """Judge rows of the world and return the shares of the JSON line."""
    judge = Judge.load(args.model)
    drawn = list(islice(cases(args.seed, args.split), args.rows))
    rows = [
        make_row(row["prompt"], row["responses"], id=f"{args.split}-{i}")
        for i, row in enumerate(case.row() for case in drawn)
    ]
    counts: Counter[str] = Counter()
    outcomes = judge.rows(rows, k=args.k, temperature=args.temperature, max_new_tokens=400)
    for case, outcome in zip(drawn, outcomes, strict=True):
        if not isinstance(outcome, Verdict):
            raise ValueError(f"row {outcome.id}: {outcome.error}")
        for sample in outcome.samples:
            count(case, sample.order, sample.text, counts)
    listed, checks = max(1, counts["listed"]), max(1, counts["checks"])
    return {
        "model": str(args.model),
        "rows": args.rows,
        "k": args.k,
        "temperature": args.temperature,
        "unparsed": counts["unparsed"] / counts["judgements"],
        "weighted": counts["weighted"] / listed,
        "chance": counts["chance"] / listed / len(CRITERIA),
        "mass": counts["mass"] / max(1, counts["all_mass"]),
        "listed": {name: counts[f"listed {name}"] * LISTED / listed for name in CRITERIA},
        "checks": counts["right"] / checks,
        "checks_by_criterion": {
            name: counts[f"right {name}"] / max(1, counts[f"checks {name}"]) for name in CRITERIA
        },
        "sums": counts["right sums"] / max(1, counts["sums"]),
    }


def main() -> None:
    """The command line."""
    print_json(measure(tyro.cli(Args, description=Args.__doc__)))


if __name__ == "__main__":
    sys.exit(command.run(main))
