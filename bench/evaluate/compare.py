"""Two runs of a benchmark beside each other, paired over the items that both have.

    python -m bench.evaluate compare DIR DIR [--way WAY] [--other-way WAY]

A difference is the second run's total less the first one's, all votes counted. Its interval of 95 %
is a bootstrap over items within subsets; p is that of a permutation test, in which each item's
values are exchanged between the runs or not. Items that only one run has count in neither.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from bench.evaluate.benchmark import Benchmark, Rule, Total
from bench.evaluate.benchmarks import BENCHMARKS
from bench.evaluate.curves import Votes
from bench.evaluate.tables import table
from bench.evaluate.totals import item_weights, of_means, of_statistic, statistic_total
from bench.statistics import sign_flip

SWAPS = 1000  # of a statistic's permutation test
NAMED = 10  # items that only one run has


@dataclass(frozen=True)
class Args:
    """Compare two runs of a benchmark, item by item."""

    first: tyro.conf.Positional[Path]
    """Directory of an evaluation."""
    second: tyro.conf.Positional[Path]
    """Directory of another evaluation of the same benchmark."""
    way: str | None = None
    """How the first run votes, as its results name it; none: all ways that both runs have."""
    other_way: str | None = None
    """How the second run votes; none: as the first."""


@dataclass(frozen=True)
class Run:
    """An evaluation: results.json, and the lines of items.jsonl by id."""

    out: Path
    results: Mapping[str, Any]
    items: Mapping[str, Mapping[str, Any]]

    @staticmethod
    def read(out: Path) -> "Run":
        """From its directory; raises OSError where it has no results."""
        results = json.loads((out / "results.json").read_text(encoding="utf-8"))
        with (out / "items.jsonl").open(encoding="utf-8") as file:
            return Run(out, results, {line["id"]: line for line in map(json.loads, file)})

    @property
    def title(self) -> str:
        """What was run."""
        about = self.results["about"]
        words = [str(about.get("model", self.out)), f"{self.results['votes'][-1]} votes"]
        if about.get("meta_model") is not None:
            words.insert(1, f"meta model {about['meta_model']}")
        return ", ".join(words)

    def ways(self, rule: str) -> list[str]:
        """The ways to vote that items have values of."""
        return [way for way in self.results["rules"][rule]["ways"] if way in self._of_any(rule)]

    def _of_any(self, rule: str) -> Mapping[str, float]:
        for line in self.items.values():
            if rule in line["by_way"]:
                found: Mapping[str, float] = line["by_way"][rule]
                return found
        return {}


@dataclass(frozen=True)
class Difference:
    """Of the totals of two runs over `items` items."""

    items: int
    first: float
    second: float
    low: float
    high: float
    p: float


def difference(
    first: np.ndarray,
    second: np.ndarray,
    subsets: Sequence[str],
    facts: Sequence[Mapping[str, Any]],
    total: Total,
) -> Difference:
    """Of two runs' (items,) values by a rule."""
    if total.statistic is None:
        weights = item_weights(subsets, total)
        found = of_means((second - first)[:, None], subsets, total)
        p = sign_flip(weights * (second - first))
        totals = float(weights @ first), float(weights @ second)
        return Difference(len(first), *totals, float(found.low.total[0]),
                          float(found.high.total[0]), p)  # fmt: skip
    statistic = total.statistic

    def gain(places: np.ndarray, facts: Sequence[Mapping[str, Any]]) -> float:
        """Of items by their places, which are resampled in place of values."""
        chosen = places.astype(int)
        return statistic(second[chosen], facts) - statistic(first[chosen], facts)

    def total_of(values: np.ndarray) -> float:
        return statistic_total(values, facts, subsets, total)

    totals = total_of(first), total_of(second)
    if np.isnan(totals).any():
        return Difference(len(first), *totals, np.nan, np.nan, np.nan)
    places = np.arange(len(first), dtype=np.float64)
    resampled = of_statistic(
        places[:, None, None], Votes((1,)), facts, subsets, total._replace(statistic=gain)
    )
    rng, reached = np.random.default_rng(0), 1
    least = abs(totals[1] - totals[0]) - 1e-12
    for _ in range(SWAPS):
        swap = rng.random(len(first)) < 0.5
        one, other = np.where(swap, second, first), np.where(swap, first, second)
        reached += abs(total_of(other) - total_of(one)) >= least
    low, high = float(resampled.low.total[0]), float(resampled.high.total[0])
    return Difference(len(first), *totals, low, high, reached / (SWAPS + 1))


def of_rule(first: Run, second: Run, rule: Rule, way: str, other_way: str) -> Difference | None:
    """Over the items that both runs have a value of; None where there is none."""
    pairs = []
    for name, line in first.items.items():
        one = line["by_way"].get(rule.name, {}).get(way)
        other = second.items.get(name, {}).get("by_way", {}).get(rule.name, {}).get(other_way)
        if one is not None and other is not None and _same(line, second.items[name]):
            pairs.append((one, other, line["subset"], line["facts"]))
    if not pairs:
        return None
    ones, others, subsets, facts = zip(*pairs, strict=True)
    return difference(np.array(ones), np.array(others), subsets, facts, rule.total)


def comparison(
    first: Run,
    second: Run,
    benchmark: Benchmark,
    way: str | None = None,
    other_way: str | None = None,
) -> str:
    """Two runs as Markdown: a line for each rule and way to vote that both have, or for those ways.

    Raises ValueError where the runs are of different benchmarks, or have not these ways.
    """
    for run in (first, second):
        if run.results["about"]["benchmark"] != benchmark.name:
            raise ValueError(f"{run.out} is no run of {benchmark.name}")
    rows = []
    for rule in benchmark.rules:
        if not all(rule.name in run.results["rules"] for run in (first, second)):
            continue
        ours, theirs = first.ways(rule.name), second.ways(rule.name)
        pairs = [(each, each) for each in ours if each in theirs]
        if way is not None or other_way is not None:
            chosen = way or other_way or "", other_way or way or ""
            for run, name, ways in zip((first, second), chosen, (ours, theirs), strict=True):
                if name not in ways:
                    raise ValueError(f"{run.out} has no way {name!r} to vote: {'; '.join(ways)}")
            pairs = [chosen]
        for one, other in pairs:
            found = of_rule(first, second, rule, one, other)
            if found is not None:
                ways_name = one if one == other else f"{one} / {other}"
                rows.append([rule.name, ways_name, *_cells(found)])
    head = ["rule", "vote", "items", "first", "second", "difference", "95 %", "p"]
    lines = [
        f"# {benchmark.title}",
        "",
        f"First: {first.title}.",
        "",
        f"Second: {second.title}.",
        "",
    ]
    lines += table(head, rows)
    for own, run, name in ((first, second, "first"), (second, first, "second")):
        alone = sorted(set(own.items) - set(run.items))
        if alone:
            more = f" and {len(alone) - NAMED} more" if len(alone) > NAMED else ""
            named = ", ".join(alone[:NAMED])
            lines += ["", f"{len(alone)} items are in the {name} run alone: {named}{more}."]
    both = [each for each in first.items if each in second.items]
    if other_rows := [each for each in both if not _same(first.items[each], second.items[each])]:
        named = ", ".join(other_rows[:NAMED])
        lines += ["", f"{len(other_rows)} items have other rows in the second run: {named}."]
    return "\n".join(lines) + "\n"


def _same(line: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether an item of two runs is of the same rows."""
    return bool(line["digest"] == other["digest"])


def _cells(found: Difference) -> list[str]:
    gain = 100 * (found.second - found.first)
    return [
        str(found.items), f"{100 * found.first:.1f}", f"{100 * found.second:.1f}", f"{gain:+.1f}",
        f"{100 * found.low:+.1f} to {100 * found.high:+.1f}", f"{found.p:.4f}",
    ]  # fmt: skip


def main(arguments: Sequence[str]) -> None:
    """The command line: prints the comparison."""
    args = tyro.cli(Args, args=list(arguments), prog="python -m bench.evaluate compare",
                    description=Args.__doc__)  # fmt: skip
    first, second = Run.read(args.first), Run.read(args.second)
    name = first.results["about"]["benchmark"]
    if name not in BENCHMARKS:
        raise ValueError(f"{args.first} is a run of {name!r}, which is no benchmark")
    print(comparison(first, second, BENCHMARKS[name], args.way, args.other_way), end="")
