"""Verdict lines -> all figures of a run: results.json, items.jsonl, results.md and curve.png.

The figures are a pure function of OUT/verdicts.jsonl and the items: a run that was stopped and
continued has the same. Times are those of OUT/times.jsonl, a line for each process that judged, and
are in no JSON file. What an entry of results.json means is said where it is computed: figures in
`totals.py`, facts in `facts.py`.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bench.evaluate import plot, tables
from bench.evaluate.benchmark import Benchmark, Item, Rule, Total
from bench.evaluate.curves import Values, Votes, Way, values_of, votes_up_to, ways_of
from bench.evaluate.facts import facts_of, num_tied, tokens_of
from bench.evaluate.totals import Interval, intervals
from bench.evaluate.votes import RowVotes, read_votes
from train.directory import replace_text

DECIMALS = 6  # of what is written


def write(
    out: Path,
    benchmark: Benchmark,
    items: Sequence[Item],
    threshold: float,
    meta_scale: float | None,
    about: Mapping[str, Any],
) -> None:
    """Write the figures of a run into its directory, which holds verdicts.jsonl, in the order of
    the items' rows; also unread.jsonl and times.jsonl, where there are any.

    threshold: the judge's, for a single response. meta_scale: the meta model's; None without one.
    about: what is said of the run (`model`, `meta_model`, options), as JSON. curve.png is written
    where matplotlib is installed. Raises ValueError where there is no item, and where the verdicts
    are not those of the items.
    """
    if not items:
        raise ValueError(f"{out}: there is no item")
    rows = list(read_votes(out / "verdicts.jsonl", threshold))
    _check_rows(items, rows, out)
    votes = votes_up_to(max(1, *(len(row.tokens) for row in rows)))
    ways = ways_of(
        votes.sizes[-1],
        most=max(len(row.responses) for item in items for row in item.rows),
        expected=any(row.expected is not None for row in rows),
        meta=meta_scale is not None,
        own=_own_way(about, meta_scale is not None),
    )
    scale = 1.0 if meta_scale is None else meta_scale
    values = values_of(items, rows, benchmark.rules, ways, votes, scale)
    unread = _lines(out / "unread.jsonl")
    found = _rounded({
        "about": dict(about) | {"benchmark": benchmark.name, "title": benchmark.title},
        "items": len(items),
        "unread": {
            "entries": len(unread),
            "reasons": dict(sorted(Counter(line["error"] for line in unread).items())),
        },
        "votes": list(votes.sizes),
        "rules": {
            rule.name: {"says": rule.says, **_figures(each, votes, ways, items, rule.total)}
            for rule, each in zip(benchmark.rules, values, strict=True)
            if len(each.places)
        },
        "tokens_per_item": _tokens(rows, len(items), votes, meta_scale is not None),
        "facts": facts_of(items, rows),
        "facts_of_items": {} if benchmark.facts is None else dict(benchmark.facts(items)),
    })  # fmt: skip
    replace_text(out / "results.json", _text(found, indent=1))
    lines = _item_lines(items, rows, benchmark.rules, ways, values)
    replace_text(out / "items.jsonl", "".join(_text(_rounded(line)) for line in lines))
    seconds = _seconds_per_row(out / "times.jsonl")
    replace_text(out / "results.md", tables.markdown(found, seconds))
    if find_spec("matplotlib") is not None:
        plot.curve(found, seconds, out / "curve.png")


def _own_way(about: Mapping[str, Any], meta: bool) -> Way:
    """How the verdicts of a run were voted, by its options."""
    kind: Literal["weights", "filter"] = (
        "weights" if about.get("meta_vote") == "weight" else "filter"
    )
    return Way(
        about.get("vote", "sum"), about.get("score") == "expected", kind if meta else None,
        about.get("k_meta"),
    )  # fmt: skip


def _check_rows(items: Sequence[Item], rows: Sequence[RowVotes], out: Path) -> None:
    asked = [row.id for item in items for row in item.rows]
    judged = [row.id for row in rows]
    if asked != judged:
        place = next(
            (i for i, (a, b) in enumerate(zip(asked, judged, strict=False)) if a != b),
            min(len(asked), len(judged)),
        )
        raise ValueError(
            f"{out / 'verdicts.jsonl'} has {len(judged)} rows of {len(asked)}, and is not of the "
            f"items' rows from line {place + 1} on"
        )


def _lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file; none where it is not there."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _seconds_per_row(path: Path) -> float | None:
    """Of all processes that judged; None where that is not known."""
    lines = _lines(path)
    rows = sum(line["rows"] for line in lines)
    return sum(line["seconds"] for line in lines) / rows if rows else None


def _figures(
    values: Values, votes: Votes, ways: Sequence[Way], items: Sequence[Item], total: Total
) -> dict[str, Any]:
    """A rule's figures by way and votes; a filter's from as many votes as it keeps."""
    counted = [items[place] for place in values.places]
    facts, subsets = [item.facts for item in counted], [item.subset for item in counted]
    found = intervals(values, votes, facts, subsets, total)
    ways_found: dict[str, Any] = {}
    for number, way in enumerate(ways):
        ways_found[way.name] = {
            str(size): _figure(found, number * len(votes.sizes) + column)
            for column, size in enumerate(votes.sizes)
            if way.k_meta is None or way.k_meta <= size
        }
    return {
        "over": total.over,
        "items": dict(sorted(Counter(subsets).items())),
        "ways": ways_found,
    }


def _figure(found: Interval, column: int) -> dict[str, Any]:
    def of(name: str, group: str | None) -> dict[str, float]:
        parts = [
            getattr(figures, name) if group is None else getattr(figures, name)[group]
            for figures in found
        ]
        return dict(zip(("value", "low", "high"), (each[column] for each in parts), strict=True))

    return {
        "total": of("total", None),
        "sections": {name: of("sections", name) for name in found.values.sections},
        "subsets": {name: of("subsets", name) for name in found.values.subsets},
    }


def _tokens(
    rows: Sequence[RowVotes], items: int, votes: Votes, meta: bool
) -> dict[str, dict[str, float]]:
    """Tokens per item by votes: the judge's, and, with a meta model, those that it reads too."""
    judge = tokens_of(rows, items, votes)
    kinds = {"judge": judge} | ({"judge and meta model": 2 * judge} if meta else {})
    return {
        kind: dict(zip(map(str, votes.sizes), tokens.tolist(), strict=True))
        for kind, tokens in kinds.items()
    }


def _item_lines(
    items: Sequence[Item],
    rows: Sequence[RowVotes],
    rules: Sequence[Rule],
    ways: Sequence[Way],
    values: Sequence[Values],
) -> Iterable[dict[str, Any]]:
    """A line for each item, of all its rows' samples: `values` by each rule that counts it and the
    first way to vote; `by_way` by all ways; how many samples there are, valid ones, and ties among
    these."""
    given = iter(rows)
    where = [{place: i for i, place in enumerate(each.places.tolist())} for each in values]
    for place, item in enumerate(items):
        own = [next(given) for _ in item.rows]
        judged = [each.scores for each in own if each.error is None]
        by_way = {
            rule.name: {
                way.name: float(each.means[of_place[place], number, -1])
                for number, way in enumerate(ways)
                if way.k_meta is None
            }
            for rule, each, of_place in zip(rules, values, where, strict=True)
            if place in of_place
        }
        yield {
            "id": item.id,
            "subset": item.subset,
            "values": {name: of_ways[ways[0].name] for name, of_ways in by_way.items()},
            "by_way": by_way,
            "votes": sum(map(len, judged)),
            "valid": sum(int((~np.isnan(scores[:, 0])).sum()) for scores in judged),
            "ties": sum(num_tied(scores) for scores in judged),
            "errors": [each.error for each in own if each.error is not None],
            "digest": _digest(item),
            "facts": dict(item.facts),
        }


def _digest(item: Item) -> str:
    """The start of a hash of all that an item's rows say."""
    whole = hashlib.sha256("".join(row.digest for row in item.rows).encode())
    return whole.hexdigest()[:16]


def _text(value: Any, indent: int | None = None) -> str:
    """A line of JSON or more."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, indent=indent) + "\n"


def _rounded(value: Any) -> Any:
    """For JSON: with few decimals, and null for what is not a number."""
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(each) for each in value]
    if isinstance(value, float):
        return round(value, DECIMALS) if math.isfinite(value) else None
    return value
