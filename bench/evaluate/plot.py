"""A run's curve as PNG: the total of the first rule that has one, against votes, tokens and, where
known, seconds."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.evaluate.tables import FILTER

STYLES = {"": "-", "meta filter": "--", "meta weights": ":"}


def curve(found: Mapping[str, Any], seconds_per_row: float | None, path: Path) -> None:
    """Draw results.json; nothing where no total has a value. seconds_per_row: of judging with all
    votes; those of fewer, and of ways that need no meta model, are taken to be in proportion to
    tokens."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rules = [
        (name, rule)
        for name, rule in found["rules"].items()
        if any(figure["total"]["value"] is not None
               for sizes in rule["ways"].values() for figure in sizes.values())
    ]  # fmt: skip
    if not rules:
        return
    name, rule = rules[0]
    costs = list(found["tokens_per_item"].values())  # without and with a meta model
    axes_titles = ["votes", "tokens of an item"]
    seconds_per_token = None
    if seconds_per_row is not None and found["facts"]["samples"]:
        seconds = seconds_per_row * found["facts"]["rows"] / found["items"]
        seconds_per_token = seconds / costs[-1][str(found["votes"][-1])]
        axes_titles.append("seconds of an item, in proportion to its tokens")
    figure, panels = pyplot.subplots(
        1, len(axes_titles), figsize=(5 * len(axes_titles), 4.8), sharey=True, layout="constrained"
    )
    colors: dict[str, str] = {}
    for way, sizes in rule["ways"].items():
        if FILTER in way:
            continue
        totals = {int(size): figure["total"] for size, figure in sizes.items()}
        totals = {size: total for size, total in totals.items() if total["value"] is not None}
        means = [100 * total["value"] for total in totals.values()]
        ends = [
            [
                0.0 if total[end] is None else abs(100 * total[end] - mean)
                for total, mean in zip(totals.values(), means, strict=True)
            ]
            for end in ("low", "high")
        ]
        points, _, meta = way.partition(", ")
        tokens = [costs[-1 if meta else 0][str(size)] for size in totals]
        places = [list(totals), tokens]
        if seconds_per_token is not None:
            places.append([seconds_per_token * each for each in tokens])
        color = colors.setdefault(points, f"C{len(colors)}")
        for panel, place in zip(panels, places, strict=True):
            panel.errorbar(
                place, means, ends, color=color, linestyle=STYLES[meta], marker="o", markersize=3,
                capsize=2, label=way,
            )  # fmt: skip
    for panel, title in zip(panels, axes_titles, strict=True):
        panel.set_xscale("log", base=2 if title == "votes" else 10)
        panel.set_xlabel(title)
        panel.grid(alpha=0.3)
        if title != "votes":
            panel.xaxis.set_minor_formatter("")
    panels[0].set_xticks(found["votes"], list(map(str, found["votes"])))
    panels[0].set_ylabel(f"{found['about']['title']}, rule: {name}, %")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
