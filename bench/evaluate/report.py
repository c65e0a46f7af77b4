"""Evaluations as one table, in the layout of the main results of arXiv 2504.02495, whose figures
stand beside them as quoted.

    python -m bench.evaluate report DIR ...

A line is a judge and a way to vote; figures are per cent, by the first rule of each benchmark. The
mean over the paper's four benchmarks stands where a line has all four; others are further columns.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from bench.evaluate.tables import FILTER, table

PAPER = {
    "rewardbench": "Reward Bench",
    "ppe_preference": "PPE Preference",
    "ppe_correctness": "PPE Correctness",
    "rmb": "RMB",
}
SIZES = (1, 8, 32)  # votes that the paper shows
# Per cent: Reward Bench, PPE Preference, PPE Correctness, RMB, and their mean as the paper has it.
PER_SET = ("benchmark", "title", "layout", "limit", "columns")  # what may differ between sets
QUOTED = {
    "Nemotron-4-340B-Reward": (92.0, 59.3, 60.8, 69.9, 70.5),
    "GPT-4o": (86.7, 67.1, 57.6, 73.8, 71.3),
    "LLM-as-a-Judge-27B": (83.4, 64.2, 58.8, 64.8, 67.8),
    "BTRM-27B": (81.7, 68.3, 66.7, 57.9, 68.6),
    "CLoud-Gemma-2-27B": (82.0, 67.1, 62.4, 63.4, 68.7),
    "PairRM-27B": (87.1, 65.8, 64.8, 58.2, 69.0),
    "GRM-27B RFT, greedy": (84.5, 64.1, 59.6, 67.0, 68.8),
    "GRM-27B, greedy": (86.0, 64.7, 59.8, 69.0, 69.9),
    "GRM-27B, Voting@1": (85.2, 62.4, 59.5, 64.4, 67.9),
    "GRM-27B, Voting@8": (87.7, 64.9, 60.3, 69.5, 70.6),
    "GRM-27B, Voting@32": (88.5, 65.3, 60.4, 69.7, 71.0),
    "GRM-27B, MetaRM@8": (89.8, 66.4, 63.0, 68.8, 72.0),
    "GRM-27B, MetaRM@32": (90.4, 67.2, 63.2, 70.3, 72.8),
}


@dataclass(frozen=True)
class Args:
    """Show evaluations beside the paper's results."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Directories of evaluations."""


Line = tuple[str, str, int]  # a judge, a way to vote, votes


def report(runs: Sequence[Mapping[str, Any]]) -> str:
    """The table as Markdown; runs: results.json of each.

    Raises ValueError where two runs are of the same judge and benchmark.
    """
    found: dict[Line, dict[str, float]] = {}
    titles = dict(PAPER)
    seen: set[tuple[str, str]] = set()
    for run in runs:
        about = run["about"]
        judge, benchmark = _judge(about, runs), about["benchmark"]
        if (judge, benchmark) in seen:
            raise ValueError(f"two runs are of {about['title']} by {judge}")
        seen.add((judge, benchmark))
        titles.setdefault(benchmark, about["title"])
        for (way, size), value in _totals(run).items():
            found.setdefault((judge, way, size), {})[benchmark] = value
    further = [name for name in titles if name not in PAPER]
    rows = [_row(f"{name} (quoted)", dict(zip(PAPER, figures, strict=False)), figures[-1], further)
            for name, figures in QUOTED.items()]  # fmt: skip
    for (judge, way, size), figures in found.items():
        overall = None
        if all(name in figures for name in PAPER):
            overall = sum(figures[name] for name in PAPER) / len(PAPER)
        rows.append(_row(f"{judge}, {way} @{size}", figures, overall, further))
    head = ["judge", *PAPER.values(), "Overall", *(titles[name] for name in further)]
    return "\n".join(table(head, rows)) + "\n"


def _judge(about: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> str:
    """The models' names, or their whole paths where those of two runs end alike, and what is not as
    it is in all runs of them."""

    def models(of: Mapping[str, Any]) -> list[str]:
        return [each for each in (of["model"], of.get("meta_model")) if each is not None]

    def short(of: Mapping[str, Any]) -> list[str]:
        return [Path(each).name for each in models(of)]

    alike = [run["about"] for run in runs if short(run["about"]) == short(about)]
    is_one = all(models(other) == models(about) for other in alike)
    own = [other for other in alike if models(other) == models(about)]
    differs = [
        f"{name} {value}"
        for name, value in about.items()
        if name not in PER_SET and any(other.get(name) != value for other in own)
    ]
    return ", ".join([" + ".join(short(about) if is_one else models(about)), *differs])


def _totals(run: Mapping[str, Any]) -> dict[tuple[str, int], float]:
    """Per cent by way and votes: of the run's own way and of sums those that the paper shows, and
    all votes; of others all votes."""
    most = run["votes"][-1]
    rule: Mapping[str, Any] = next(iter(run["rules"].values()), {"ways": {}})
    found = {}
    for number, (way, sizes) in enumerate(rule["ways"].items()):
        if FILTER in way:
            continue
        for size in sorted({most, *SIZES}) if number == 0 or way == "sum" else (most,):
            value = sizes.get(str(size), {"total": {"value": None}})["total"]["value"]
            if value is not None:
                found[way, size] = 100 * value
    return found


def _row(
    name: str, figures: Mapping[str, float], overall: float | None, further: Sequence[str]
) -> list[str]:
    def cell(value: float | None) -> str:
        return "" if value is None else f"{value:.1f}"

    return [name, *(cell(figures.get(each)) for each in PAPER), cell(overall),
            *(cell(figures.get(each)) for each in further)]  # fmt: skip


def main(arguments: Sequence[str]) -> None:
    """The command line: prints the table."""
    args = tyro.cli(Args, args=list(arguments), prog="python -m bench.evaluate report",
                    description=Args.__doc__)  # fmt: skip
    if not args.runs:
        raise ValueError("report needs the directory of an evaluation")
    texts = [(run / "results.json").read_text(encoding="utf-8") for run in args.runs]
    print(report([json.loads(text) for text in texts]), end="")
