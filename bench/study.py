"""What the runs of a study come to: verdict lines to accuracies, differences, a table, a figure.

A judge's accuracy is an array over seeds and rows: the chance that a row's verdict is right, ties
being drawn, a mean over subsets of its samples (bench/evaluate/curves.py). A difference of two
judges or two ways to vote is taken row by row and seed by seed; its interval is a bootstrap over
both. Arrays are kept in small files: what has been trained and judged once, on whatever machine,
is tabulated with the rest.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from bench.evaluate.curves import chances, votes_up_to
from bench.evaluate.votes import votes_of
from bench.filters import WAYS
from bench.provenance import provenance
from bench.statistics import seed_interval
from bench.voting import label_of
from engine.labels import is_right
from engine.verdict import Sample, Verdict
from models.weights import replace_file
from train.evaluation import criteria_entropy, error_correlation

PLAIN = ("all", "standardised", "borda")  # what votes count, without a meta model
GUIDED = ("meta", "weighed", "standardised, weighed", "borda, weighed")
FORMAT = 2  # of the files that judges are kept in
Accuracies = dict[str, dict[int, np.ndarray]]  # way to vote -> votes -> (rows,) float64


def read_verdicts(path: Path) -> list[Verdict]:
    """The verdicts of lines that `engine.sample` has written, with what votes need of samples.
    Raises ValueError for a row that failed."""
    found = []
    with path.open(encoding="utf-8") as file:
        for line in map(json.loads, file):
            if "error" in line:
                raise ValueError(f"{path}: row {line.get('id')}: {line['error']}")
            samples = [
                Sample(
                    tuple(each["order"]), each["text"],
                    None if each["scores"] is None else tuple(each["scores"]), each["invalid"],
                    each["meta"], each["tokens"], each["finish"], [], [], [],
                    expected=each.get("expected"),
                )
                for each in line["samples"]
            ]  # fmt: skip
            usage = line["usage"]
            found.append(
                Verdict(
                    line["id"], line["key"], line["best"], line["scores"], line["mean_scores"],
                    line["tie"], line["k"], line["valid"], line["votes"], samples,
                    usage["prompt_tokens"], usage["tree_tokens"], usage["decode_tokens"],
                    label=line["label"],
                )
            )  # fmt: skip
    return found


def accuracies(
    verdicts: Sequence[Verdict],
    threshold: float,
    meta_scale: float | None = None,
    expects: bool = False,
) -> Accuracies:
    """Each row's chance to be right, by way to vote and votes. meta_scale: None where no meta model
    has scored the samples. expects: they have expected scores."""
    names = PLAIN if meta_scale is None else PLAIN + GUIDED
    names = (*names, "expected") if expects else names
    votes = votes_up_to(max(verdict.k for verdict in verdicts))
    rows = (votes_of(verdict, threshold) for verdict in verdicts)
    ways = [WAYS[name] for name in names]
    found = chances(rows, map(label_of, verdicts), ways, votes, meta_scale or 1.0)
    return {
        name: dict(zip(votes.sizes, found[:, number].T, strict=True))
        for number, name in enumerate(names)
    }


@dataclass(frozen=True)
class Judged:
    """A judge's accuracy on the same rows, seed by seed: (seeds, rows) arrays, by way and votes;
    `greedy` is a way of one vote. facts: of its size and its judgements; none if it writes none."""

    arrays: Mapping[str, Mapping[int, np.ndarray]]
    facts: Mapping[str, float] = field(default_factory=dict)


def judged(
    votes: Path,
    greedy: Path,
    threshold: float,
    parameters: int,
    meta_scale: float | None = None,
    expects: bool = False,
) -> Judged:
    """Of one seed, from the files of its verdicts and its greedy ones. meta_scale: that of the meta
    model, if one has scored the judgements. expects: they have expected scores."""
    verdicts = read_verdicts(votes)
    found = accuracies(verdicts, threshold, meta_scale, expects)
    greedily = read_verdicts(greedy)
    found["greedy"] = {1: accuracies(greedily, threshold)["all"][1]}
    samples = sum(len(each.samples) for each in verdicts)
    return Judged(
        {
            way: {size: values[None] for size, values in sizes.items()}
            for way, sizes in found.items()
        },
        {
            "tokens_per_judgement": sum(each.decode_tokens for each in verdicts) / samples,
            # Those that a row's prompts share are counted once.
            "prompt_tokens_per_row": mean(each.tree_tokens for each in verdicts),
            "greedy_tokens_per_row": mean(
                each.tree_tokens + each.decode_tokens for each in greedily
            ),
            "parameters": parameters,
            **facts_of(verdicts, threshold),
        },
    )


def joined(seeds: Sequence[Judged]) -> Judged:
    """The seeds of a judge as one: arrays one after another, and the means of all else."""
    first = seeds[0]
    return Judged(
        {
            way: {
                size: np.concatenate([each.arrays[way][size] for each in seeds]) for size in sizes
            }
            for way, sizes in first.arrays.items()
        },
        {name: mean(each.facts[name] for each in seeds) for name in first.facts},
    )


def save(path: Path, judges: Mapping[str, Judged], key: str) -> None:
    """Write judges to a .npz, of float32; key: what made them. It also says where and when."""
    arrays: dict[str, Any] = {
        f"{name}/{way}/{size}": values.astype(np.float32)
        for name, judge in judges.items()
        for way, sizes in judge.arrays.items()
        for size, values in sizes.items()
    }
    facts = {name: judge.facts for name, judge in judges.items()}
    about = {"format": FORMAT, "key": key, "facts": facts, "run": provenance()}
    content = BytesIO()
    np.savez_compressed(content, about=json.dumps(about), **arrays)
    replace_file(path, lambda file: file.write_bytes(content.getbuffer()))


def load(path: Path, key: str) -> dict[str, Judged]:
    """The judges of a file that `save` has written. Raises ValueError for another key or format."""
    with np.load(path) as stored:
        about = json.loads(str(stored["about"]))
        if about.get("format") != FORMAT:
            raise ValueError(
                f"{path} is of another version: without it, it is made again from the verdicts"
            )
        if about["key"] != key:
            raise ValueError(
                f"{path} is of other settings, rows or models: begin in another directory"
            )
        arrays: dict[str, dict[str, dict[int, np.ndarray]]] = {}
        for name in stored.files:
            if name != "about":
                judge, way, size = name.split("/")
                values = stored[name].astype(np.float64)
                arrays.setdefault(judge, {}).setdefault(way, {})[int(size)] = values
    return {name: Judged(arrays[name], facts) for name, facts in about["facts"].items()}


def facts_of(verdicts: Sequence[Verdict], threshold: float) -> dict[str, float]:
    """Over samples: the shares that are invalid, and strictly right; over rows: the correlation of
    the samples' errors, and the entropy of their criteria."""
    rights, entropies, invalid, total = [], [], 0, 0
    for verdict in verdicts:
        assert verdict.label is not None
        own = [is_right(sample.scores, verdict.label, threshold) for sample in verdict.samples]
        rights.append(own)
        total += len(own)
        invalid += sum(sample.scores is None for sample in verdict.samples)
        entropies.append(criteria_entropy(verdict.samples))
    return {
        "invalid": invalid / total,
        "right": sum(map(sum, rights)) / total,
        "error_correlation": error_correlation(rights),
        "criteria_entropy": float(np.mean(entropies)),
    }


def entry(values: np.ndarray) -> dict[str, Any]:
    """The mean of (seeds, rows) values, its interval, and the mean of each seed."""
    return {
        "mean": float(values.mean()),
        "ci95": seed_interval(values),
        "seeds": [float(each) for each in values.mean(1)],
    }


def results(judges: Mapping[str, Judged]) -> dict[str, Any]:
    """All accuracies, and what else is known of each judge."""
    return {
        name: {
            **each.facts,
            "accuracy": {
                way: {size: entry(values) for size, values in sizes.items()}
                for way, sizes in each.arrays.items()
            },
        }
        for name, each in judges.items()
    }


Point = tuple[str, str, int]  # a judge, a way to vote, votes


def orderings(judges: Mapping[str, Judged], pairs: Mapping[str, tuple[Point, Point]]) -> Any:
    """By name: the first of two points less the second. A judge of one seed stands beside each seed
    of another. A pair is left out where one of its points is not there."""

    def values(point: Point) -> np.ndarray:
        judge, way, size = point
        return judges[judge].arrays[way][size]

    return {
        name: entry(values(first) - values(second))
        for name, (first, second) in pairs.items()
        if all(
            judge in judges and size in judges[judge].arrays.get(way, {})
            for judge, way, size in (first, second)
        )
    }


def markdown(found: Mapping[str, Any], differences: Mapping[str, Any]) -> str:
    """The accuracies, a line for each judge and way to vote, with the interval at the most votes;
    then the differences."""
    sizes = sorted({size for each in found.values() for size in each["accuracy"].get("all", ())})
    lines = [
        "| judge | vote | greedy | " + " | ".join(f"@{size}" for size in sizes) + " | 95 % |",
        "|---" * (len(sizes) + 4) + "|",
    ]
    for judge, each in found.items():
        greedy = each["accuracy"]["greedy"][1]["mean"]
        if len(each["accuracy"]) == 1:
            lines.append(f"| {judge} |  | {greedy:.3f} |{' |' * (len(sizes) + 1)}")
        for way, entries in each["accuracy"].items():
            if way == "greedy":
                continue
            means = " | ".join(f"{entries[size]['mean']:.3f}" for size in sizes)
            low, high = entries[sizes[-1]]["ci95"]
            lines.append(f"| {judge} | {way} | {greedy:.3f} | {means} | {low:.3f} to {high:.3f} |")
    lines += ["", "| difference | mean | 95 % | seeds |", "|---|---|---|---|"]
    for name, each in differences.items():
        low, high = each["ci95"]
        seeds = ", ".join(f"{mean:+.3f}" for mean in each["seeds"])
        lines.append(f"| {name} | {each['mean']:+.3f} | {low:+.3f} to {high:+.3f} | {seeds} |")
    return "\n".join(lines) + "\n"


def plot(found: Mapping[str, Any], path: Path) -> None:
    """Accuracy as PNG, against votes and against the FLOPs of a row: of votes by the sum of scores
    and, where there is a meta model, of ranks, with equal weights and with its own. FLOPs are 2 x
    parameters x tokens; a meta model of the judge's size reads prompts and judgements once more.
    Votes read all orders of the responses, one or two votes too, which is more than they need. A
    star is a greedy judgement, of one order."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.5), sharey=True)
    ticks: set[int] = set()
    for judge, each in found.items():
        lines = [("all", "", "-", 1)]
        if "borda, weighed" in each["accuracy"]:
            lines.append(("borda", ", ranks", ":", 1))
            lines.append(("borda, weighed", ", ranks by meta weights", "--", 2))
        for way, described, style, reads in lines:
            entries = each["accuracy"].get(way)
            if entries is None:
                continue
            votes = [int(size) for size in entries]
            ticks.update(votes)
            per_row, per_vote = each["prompt_tokens_per_row"], each["tokens_per_judgement"]
            flops = 2 * reads * each["parameters"]
            cost = [flops * (per_row + size * per_vote) for size in votes]
            means = np.array([point["mean"] for point in entries.values()])
            bounds = np.array([point["ci95"] for point in entries.values()]).T
            greedily = (1, flops * each["greedy_tokens_per_row"])
            for panel, places, place in zip(panels, (votes, cost), greedily, strict=True):
                line = panel.errorbar(
                    places, means, abs(bounds - means), linestyle=style, marker="o", markersize=3,
                    capsize=2, label=judge + described,
                )[0]  # fmt: skip
                if way == "all":
                    greedy = each["accuracy"]["greedy"][1]["mean"]
                    panel.plot(place, greedy, "*", markersize=9, color=line.get_color())
        if len(each["accuracy"]) == 1:  # of one answer, which is not drawn
            for panel in panels:
                panel.axhline(
                    each["accuracy"]["greedy"][1]["mean"], color="gray", linestyle=":", label=judge
                )
    panels[0].set_xscale("log", base=2)
    panels[0].set_xticks(sorted(ticks), [str(size) for size in sorted(ticks)])
    panels[0].set_xlabel("votes")
    panels[0].set_ylabel("accuracy")
    panels[1].set_xscale("log")
    panels[1].set_xlabel("FLOPs of a row")
    panels[1].plot([], [], "k*", markersize=9, label="greedy")
    panels[1].legend(fontsize=8)
    for panel in panels:
        panel.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
