"""One HTML file of a run, to read its rows in: `write_page`.

The file needs no server, no network and no other file. Texts of rows and models are hostile: they
stand in it compressed and in base64 alone, and `page.html`, which is the rest of it, puts them on
the screen as text and never as markup. One block holds the list of rows and how it is sorted;
blocks of about a megabyte hold what an opened row shows, and are read when it is opened.

A large run is not all in it: the list has every row, texts are those of the rows whose judgements
disagree most, up to MOST_BYTES. n responses, k judgements.
"""

import base64
import json
import math
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from engine.labels import best_of
from engine.request import Row, parse_row
from train.directory import replace_file

TEMPLATE = Path(__file__).with_name("page.html")
BLOCK_BYTES = 1 << 20  # of lines, in a block of rows
MOST_BYTES = 1 << 27  # of lines, in a page; a tenth to a third of them in the file
SNIPPET = 160  # characters of a prompt in the list

Outcome = Literal["wrong", "no verdict", "tie", "right", "no label"]
_WRONG_FIRST: tuple[Outcome, ...] = ("wrong", "no verdict", "tie", "right", "no label")
Scores = Sequence[float]


class Entry(NamedTuple):
    """A row in the list.

    disagreement: as `disagreement` says. spread: the standard deviation of the meta scores, None
    of fewer than two. preferred: the responses that judgements prefer to all others, and how many
    do, the most first; `tied` counts judgements that prefer several. size: bytes of its lines. at:
    the block and the place there of what is shown when it is opened, None where that is left out.
    """

    id: str
    subset: str
    text: str
    outcome: Outcome
    disagreement: float | None
    spread: float | None
    preferred: list[tuple[int, int]]
    tied: int
    valid: int
    k: int
    n: int
    size: int
    at: tuple[int, int] | None = None


def write_page(out: Path, meta_scale: float = 1.0) -> None:
    """Write OUT/page.html from OUT/rows.jsonl and OUT/verdicts.jsonl, and from OUT/items.jsonl and
    OUT/results.json where they are. Rows that have no verdict yet are left out.

    meta_scale: the meta model's, which its scores are multiplied by where they weigh votes. The
    same files give the same bytes. Raises OSError, and ValueError for verdicts of other rows.
    """
    entries = placed([_entry(*each) for each in _judged(out)])
    index = {
        "about": _about(out / "results.json"),
        "rows": [entry._asdict() for entry in entries],
        "sorts": sorts(entries),
    }
    values = _values(out / "items.jsonl")

    def write(path: Path) -> None:
        start, between, end = re.split(
            "<!-- (?:index|rows) -->", TEMPLATE.read_text(encoding="utf-8")
        )
        with path.open("w", encoding="utf-8") as page:
            page.write(start + _block("index", index) + between)
            shown = (
                (entry.at[0], _details(row, verdict, values, meta_scale))
                for entry, (row, verdict, _) in zip(entries, _judged(out), strict=True)
                if entry.at is not None
            )
            for number, block in groupby(shown, key=lambda each: each[0]):
                page.write(_block(f"rows-{number}", [details for _, details in block]))
            page.write(end)

    replace_file(out / "page.html", write)


def prefers(scores: Scores) -> tuple[int, ...]:
    """The responses that a judgement scores highest: one, or several that are tied."""
    return best_of(tuple(scores))


def disagreement(judgements: Sequence[Scores]) -> float | None:
    """How far valid judgements, of n scores each, are apart; None of fewer than two.

    n >= 2: the chance that two of them do not prefer the same responses. n = 1: the mean difference
    of two of their scores, in tens of points.
    """
    k = len(judgements)
    if k < 2:
        return None
    pairs = k * (k - 1) / 2
    if len(judgements[0]) > 1:
        same = sum(math.comb(count, 2) for count in Counter(map(prefers, judgements)).values())
        return 1 - same / pairs
    scores = sorted(score for (score,) in judgements)
    apart = sum((2 * place - k + 1) * score for place, score in enumerate(scores))
    return apart / pairs / 10


def vote_weights(verdict: dict[str, Any], meta_scale: float) -> list[float]:
    """What each judgement of a verdict line weighs in its vote: 1, at most 1 where it is weighed by
    its meta score, 0 without a vote."""
    samples = verdict["samples"]
    voters = [i for i, each in enumerate(samples) if each["scores"] is not None]
    if all(each["meta"] is None for each in samples):
        weights = dict.fromkeys(voters[: verdict["votes"]], 1.0)
    else:
        meta = {i: samples[i]["meta"] for i in voters if samples[i]["meta"] is not None}
        best = sorted(meta, key=lambda i: (-meta[i], i))[: verdict["votes"]]
        weights = dict.fromkeys(best, 1.0)
        if verdict.get("meta_vote") == "weight":
            weights = {i: math.exp((meta[i] - meta[best[0]]) * meta_scale) for i in best}
    return [weights.get(i, 0.0) for i in range(len(samples))]


def placed(entries: Sequence[Entry]) -> list[Entry]:
    """The entries with the places of their details, in blocks of BLOCK_BYTES or little more; those
    that disagree least have none where all take more than MOST_BYTES."""
    kept, total = set(), 0
    for i in sorts(entries)["disagreement"]:
        total += entries[i].size
        if total > MOST_BYTES:
            break
        kept.add(i)
    found, block, place, filled = list(entries), 0, 0, 0
    for i in sorted(kept):
        if filled >= BLOCK_BYTES:
            block, place, filled = block + 1, 0, 0
        found[i] = entries[i]._replace(at=(block, place))
        place, filled = place + 1, filled + entries[i].size
    return found


def sorts(entries: Sequence[Entry]) -> dict[str, list[int]]:
    """By the name of each sort, the numbers of the entries: those that disagree most first; those
    whose meta scores are spread most; wrong ones first, and of these those that agree most; by id,
    where numbers count as such. What has no value goes last."""

    def by(key: Callable[[Entry], Any]) -> list[int]:
        return sorted(range(len(entries)), key=lambda i: key(entries[i]))

    def most(value: float | None) -> tuple[bool, float]:
        return value is None, -(value or 0.0)

    def least(value: float | None) -> tuple[bool, float]:
        return value is None, value or 0.0

    return {
        "disagreement": by(lambda e: most(e.disagreement)),
        "spread": by(lambda e: most(e.spread)),
        "wrong": by(lambda e: (_WRONG_FIRST.index(e.outcome), least(e.disagreement))),
        "id": by(lambda e: _natural(e.id)),
    }


def _natural(text: str) -> list[tuple[int, str]]:
    """A key by which row-9 comes before row-10."""
    parts = re.split("([0-9]+)", text)
    return [(len(part.lstrip("0")) if odd % 2 else 0, part) for odd, part in enumerate(parts)]


def _judged(out: Path) -> Iterator[tuple[Row, dict[str, Any], int]]:
    """The rows, their verdict lines, and how many bytes both have."""
    with (out / "rows.jsonl").open("rb") as rows, (out / "verdicts.jsonl").open("rb") as verdicts:
        for number, (line, verdict_line) in enumerate(zip(rows, verdicts, strict=False), 1):
            row, verdict = parse_row(line), json.loads(verdict_line)
            if verdict.get("id") != row.id:
                other = verdict.get("id")
                raise ValueError(f"line {number} of verdicts.jsonl is of {other!r}, not {row.id!r}")
            yield row, verdict, len(line) + len(verdict_line)


def _counted(verdict: dict[str, Any]) -> list[Scores | None]:
    """The scores of each judgement that count; None for an invalid one."""
    name = "expected" if verdict.get("score") == "expected" else "scores"
    return [each.get(name) for each in verdict.get("samples", ())]


def _outcome(verdict: dict[str, Any]) -> Outcome:
    if verdict.get("best") is None:
        return "no verdict"
    if verdict["tie"]:
        return "tie"
    if "label" not in verdict:
        return "no label"
    return "right" if verdict.get("correct", verdict.get("agrees")) else "wrong"


def _entry(row: Row, verdict: dict[str, Any], size: int) -> Entry:
    judgements = [scores for scores in _counted(verdict) if scores is not None]
    samples = verdict.get("samples", ())
    metas = [each["meta"] for each in samples if each["meta"] is not None]
    said = Counter(map(prefers, judgements)) if len(row.responses) > 1 else Counter()
    alone = {tops[0]: count for tops, count in said.items() if len(tops) == 1}
    return Entry(
        row.id,
        str(row.meta.get("subset", "")) if isinstance(row.meta, dict) else "",
        " ".join(row.messages[-1].content[: 4 * SNIPPET].split())[:SNIPPET],
        _outcome(verdict),
        disagreement(judgements),
        float(np.std(metas)) if len(metas) > 1 else None,
        sorted(alone.items(), key=lambda each: (-each[1], each[0])),
        said.total() - sum(alone.values()),
        len(judgements),
        len(samples),
        len(row.responses),
        size,
    )


def _about(results: Path) -> dict[str, Any]:
    """What the head of the page says: the run, and the first figure of its first rule."""
    if not results.exists():
        return {"run": {}, "figure": None}
    found = json.loads(results.read_text(encoding="utf-8"))
    if not found["rules"]:
        return {"run": found["about"], "figure": None}
    rule, figures = next(iter(found["rules"].items()))
    way, sizes = next(iter(figures["ways"].items()))
    votes = found["votes"][-1]
    figure = {"rule": rule, "says": figures["says"], "way": way, "votes": votes}
    return {"run": found["about"], "figure": figure | sizes[str(votes)]["total"]}


def _values(items: Path) -> dict[str, dict[str, float]]:
    """By an item's id, its values by each rule."""
    if not items.exists():
        return {}
    with items.open(encoding="utf-8") as file:
        return {item["id"]: item["values"] for item in map(json.loads, file)}


def _details(
    row: Row, verdict: dict[str, Any], values: dict[str, dict[str, float]], meta_scale: float
) -> dict[str, Any]:
    """What an opened row shows."""
    meta = row.meta if isinstance(row.meta, dict) else {}
    several = len(row.responses) > 1
    return {
        "messages": [[message.role, message.content] for message in row.messages],
        "responses": row.responses,
        "reference": row.reference,
        "principles": row.principles,
        "label": row.label,
        "best": best_of(row.label) if several and row.label is not None else None,
        "item": meta.get("item"),
        "facts": meta.get("facts"),
        "values": values.get(str(meta.get("item"))),
        "verdict": verdict,
        "prefers": [scores and prefers(scores) for scores in _counted(verdict)],
        "weights": [] if "error" in verdict else vote_weights(verdict, meta_scale),
    }


def _block(name: str, value: object) -> str:
    """An inert element of the page: JSON, compressed, in base64."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    data = base64.b64encode(zlib.compress(text.encode("utf-8"))).decode("ascii")
    return f'<script type="application/octet-stream" id="{name}">{data}</script>\n'
