"""bench/evaluate/page.py: the page holds what the files say, and hostile text only compressed."""

import base64
import json
import math
import re
import zlib
from collections.abc import Sequence
from html.parser import HTMLParser
from itertools import combinations, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.evaluate import page
from bench.evaluate.page import Entry, disagreement, placed, sorts, vote_weights, write_page
from engine.verdict import RowFailure, Sample, Verdict, to_line
from kernels.vote import vote_ref

NASTY = (
    "</script><script>alert(1)</script>",
    "<!-- rows -->",
    "<!--<script>",
    "]]>&lt;",
    "\u2028\u2029\u202e\u2066\x00\x1b[31m\r\n",
)
hostile = st.lists(st.text() | st.sampled_from(NASTY), min_size=1, max_size=3).map("".join)


def sample(
    scores: Sequence[int] | None, text: str = "", meta: float | None = None, invalid: str = "count"
) -> Sample:
    width = 2 if scores is None else len(scores)
    return Sample(
        tuple(range(width)), text, None if scores is None else tuple(scores),
        invalid if scores is None else None, meta, 1, "box", [], [], [],
    )  # fmt: skip


def verdict(id: str, samples: Sequence[Sample], best: int | None = 0, **changes: Any) -> Verdict:
    valid = [each.scores for each in samples if each.scores is not None]
    sums = [sum(column) for column in zip(*valid, strict=True)]
    fields: dict[str, Any] = {
        "tie": False, "k": len(samples), "valid": len(valid), "votes": len(valid), "label": 0,
        "correct": best == 0,
    }  # fmt: skip
    return Verdict(
        id, "key", best, sums or None, [each / len(valid) for each in sums] or None,
        samples=list(samples), prompt_tokens=1, tree_tokens=1, decode_tokens=1, **fields | changes,
    )  # fmt: skip


def row(id: str, **changes: Any) -> dict[str, Any]:
    return {"id": id, "prompt": "which?", "responses": ["a", "b"], "label": 0} | changes


def write_run(
    out: Path, rows: Sequence[dict[str, Any]], outcomes: Sequence[Verdict | RowFailure]
) -> None:
    lines = [json.dumps(each, ensure_ascii=False) + "\n" for each in rows]
    (out / "rows.jsonl").write_bytes("".join(lines).encode("utf-8"))
    (out / "verdicts.jsonl").write_bytes(b"".join(map(to_line, outcomes)))


class Blocks(HTMLParser):
    """The blocks of a page, as a parser of HTML finds them, and all other text of the page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.found: dict[str, Any] = {}
        self.name: str | None = None
        self.rest = re.sub(
            r'<script type="application/octet-stream" id="([\w-]+)">[A-Za-z0-9+/=]*</script>\n',
            lambda match: "<!-- index -->" if match[1] == "index" else "",
            path.read_bytes().decode("utf-8"),
        )
        self.feed(path.read_bytes().decode("utf-8"))
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        named = dict(attributes)
        self.name = named["id"] if named.get("type") == "application/octet-stream" else None

    def handle_data(self, data: str) -> None:
        if self.name is not None:
            self.found[self.name] = json.loads(zlib.decompress(base64.b64decode(data)))
            self.name = None

    def details(self, number: int) -> Any:
        block, place = self.found["index"]["rows"][number]["at"]
        return self.found[f"rows-{block}"][place]


def blocks(out: Path) -> Blocks:
    write_page(out)
    return Blocks(out / "page.html")


@settings(max_examples=30)
@given(
    st.lists(hostile, min_size=6, max_size=6),
    st.dictionaries(hostile, hostile | st.integers(), max_size=2),
)
def test_hostile_text_comes_back_and_stands_nowhere_else(
    texts: list[str], facts: dict[str, Any]
) -> None:
    id, prompt, first, second, said, reason = texts
    id += "!"  # an id is not empty
    with TemporaryDirectory() as folder:
        out = Path(folder)
        system = {"role": "system", "content": said}
        rows = [
            row(
                id, prompt=[system, {"role": "user", "content": prompt}],
                responses=[first, second], reference=reason, principles=said,
                meta={"item": id, "subset": said, "facts": facts},
            ),
            row("2", prompt=prompt),
        ]  # fmt: skip
        judged = verdict(id, [sample((3, 1), said), sample(None, first, invalid=reason)])
        failed = RowFailure("2", None, "key", reason or "empty")
        write_run(out, rows, [judged, failed])
        (out / "items.jsonl").write_text(json.dumps({"id": id, "values": {"official": 0.5}}))
        found = blocks(out)
        assert found.rest == page.TEMPLATE.read_text(encoding="utf-8").replace("<!-- rows -->", "")
        assert set(found.found) == {"index", "rows-0"}
        entry = found.found["index"]["rows"][0]
        assert (entry["id"], entry["subset"]) == (id, said)
        assert prompt.split()[:1] == entry["text"].split()[:1] or len(prompt) > page.SNIPPET
        details = found.details(0)
        assert details["messages"] == [["system", said], ["user", prompt]]
        assert details["responses"] == [first, second]
        assert (details["reference"], details["principles"]) == (reason, said)
        assert (details["item"], details["facts"]) == (id, facts)
        assert details["values"] == {"official": 0.5}
        assert [each["text"] for each in details["verdict"]["samples"]] == [said, first]
        assert details["verdict"]["samples"][1]["invalid"] == reason
        assert found.details(1)["verdict"]["error"] == failed.error


def test_the_same_files_give_the_same_bytes(tmp_path: Path) -> None:
    pages = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        outcomes = [verdict(f"row-{i}", [sample((i % 3, 1), "x" * i)] * 3) for i in range(9)]
        write_run(tmp_path / name, [row(each.id) for each in outcomes], outcomes)
        write_page(tmp_path / name)
        pages.append((tmp_path / name / "page.html").read_bytes())
    assert pages[0] == pages[1] and len(pages[0]) > page.TEMPLATE.stat().st_size


def test_the_page_needs_nothing_else_and_makes_markup_of_no_string() -> None:
    text = page.TEMPLATE.read_text(encoding="utf-8")
    assert "default-src 'none'" in text
    for reference in ("http:", "https:", "url(", "src=", "href", "@import", "import("):
        assert reference not in text, reference
    for sink in ("HTML", "document.write", "eval(", "Function(", "srcdoc", "DOMParser"):
        assert sink not in text, sink


@given(
    st.integers(1, 3).flatmap(
        lambda n: st.lists(st.lists(st.integers(1, 4), min_size=n, max_size=n), max_size=6)
    )
)
def test_disagreement_is_that_of_all_pairs(judgements: list[list[int]]) -> None:
    apart = []
    for a, b in combinations(judgements, 2):
        tops = [{i for i, score in enumerate(each) if score == max(each)} for each in (a, b)]
        apart.append(abs(a[0] - b[0]) / 10 if len(a) == 1 else float(tops[0] != tops[1]))
    found = disagreement(judgements)
    if not apart:
        assert found is None
    else:
        assert found is not None and math.isclose(found, sum(apart) / len(apart), abs_tol=1e-12)


def entry(id: str = "row", **changes: Any) -> Entry:
    return Entry(id, "", "", "right", None, None, [], 0, 0, 0, 2, 1)._replace(**changes)


some_value = st.none() | st.sampled_from((0.0, 0.25, 0.5, 1.0))
entries = st.lists(
    st.builds(
        entry,
        outcome=st.sampled_from(("wrong", "no verdict", "tie", "right", "no label")),
        disagreement=some_value,
        spread=some_value,
    ),
    max_size=7,
)


@given(entries)
def test_sorts(listed: list[Entry]) -> None:
    found = sorts(listed)
    for order in found.values():
        assert sorted(order) == list(range(len(listed)))

    def in_order(a: float | None, b: float | None) -> bool:
        return b is None or (a is not None and a >= b)

    for name in ("disagreement", "spread"):
        for i, j in pairwise(found[name]):
            a, b = getattr(listed[i], name), getattr(listed[j], name)
            assert in_order(a, b) and (a != b or i < j)
    outcomes = [listed[i].outcome for i in found["wrong"]]
    wrong = outcomes.count("wrong")
    assert set(outcomes[:wrong]) <= {"wrong"}
    for i, j in pairwise(found["wrong"][:wrong]):
        a, b = listed[i].disagreement, listed[j].disagreement
        assert b is None or (a is not None and a <= b)


def test_ids_are_sorted_by_their_numbers() -> None:
    ids = ["b-2", "a-10", "a-9", "a", "10", "9", "a-9-x", "²"]
    order = sorts([entry(each) for each in ids])["id"]
    assert [ids[i] for i in order] == ["9", "10", "a", "a-9", "a-9-x", "a-10", "b-2", "²"]


scores_or_none = st.none() | st.tuples(st.integers(1, 10), st.integers(1, 10))
judged = st.lists(st.tuples(scores_or_none, st.none() | st.integers(-3, 3)), min_size=1, max_size=6)


@given(judged, st.sampled_from((None, "filter", "weight")), st.integers(1, 4))
def test_weights_are_those_of_the_vote(
    given_samples: list[tuple[tuple[int, int] | None, int | None]], meta_vote: Any, k_meta: int
) -> None:
    """The vote's own specification, of the same samples, has the sums that the weights give."""
    scale = 0.5 if meta_vote == "weight" else 1.0
    samples = [
        sample(scores, meta=None if meta_vote is None or scores is None else meta)
        for scores, meta in given_samples
    ]
    valid = [each.scores is not None for each in samples]
    values = torch.tensor([[each.scores or (0, 0) for each in samples]])
    meta = None
    if meta_vote is not None:
        meta = torch.tensor([[math.nan if s.meta is None else s.meta * scale for s in samples]])
    result = vote_ref(
        values, torch.tensor([[[0, 1]] * len(samples)]), torch.tensor([valid]), torch.tensor([2]),
        torch.zeros(1), meta, k_meta if meta_vote == "filter" else None,
    )  # fmt: skip
    line = verdict("row", samples, votes=int(result.votes[0]), meta_vote=meta_vote)
    weights = vote_weights(json.loads(to_line(line)), scale)
    assert [weight > 0 for weight in weights] == result.voted[0].tolist()
    assert max(weights) <= 1
    total = (torch.tensor(weights, dtype=torch.float64)[:, None] * values[0]).sum(0)
    # The vote rounds a weight to a multiple of 2^-30; scores are at most 10.
    assert torch.allclose(total, result.total[0].double(), rtol=0, atol=len(samples) * 10 * 2**-30)


@given(st.lists(st.tuples(some_value, st.integers(1, 9)), max_size=12))
def test_a_large_run_keeps_the_rows_that_disagree_most(
    rows: list[tuple[float | None, int]],
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "BLOCK_BYTES", 8)
        patch.setattr(page, "MOST_BYTES", 24)
        found = placed([entry(disagreement=value, size=size) for value, size in rows])
    by_value = sorted(
        found, key=lambda each: (each.disagreement is None, -(each.disagreement or 0))
    )
    kept = [each for each in by_value if each.at is not None]
    assert kept == by_value[: len(kept)]
    assert sum(each.size for each in kept) <= 24
    assert len(kept) == len(found) or sum(each.size for each in by_value[: len(kept) + 1]) > 24
    places = [each.at for each in found if each.at is not None]
    for (block, place), after in pairwise(places):
        filled = sum(each.size for each in kept if each.at is not None and each.at[0] == block)
        assert after == (block, place + 1) or (after == (block + 1, 0) and filled >= 8)
    assert not places or places[0] == (0, 0)


def test_every_row_is_where_the_list_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(page, "MOST_BYTES", 8000)
    disagree = [sample((1, 2)), sample((2, 1))]
    outcomes = [verdict(f"row-{i}", disagree if i % 2 else disagree[:1] * 2) for i in range(40)]
    write_run(tmp_path, [row(each.id) for each in outcomes], outcomes)
    found = blocks(tmp_path)
    listed = found.found["index"]["rows"]
    kept = [i for i, each in enumerate(listed) if each["at"] is not None]
    assert [each["id"] for each in listed] == [each.id for each in outcomes]
    assert len(found.found) > 3 and 20 > len(kept) > 5 and all(i % 2 for i in kept)
    assert sum(len(rows) for name, rows in found.found.items() if name != "index") == len(kept)
    for i in kept:
        assert found.details(i)["verdict"]["id"] == listed[i]["id"]


def test_outcomes(tmp_path: Path) -> None:
    one = [sample((2, 1), meta=1.0), sample((2, 1), meta=3.0), sample((1, 1)), sample(None)]
    cases: list[tuple[str, Verdict | RowFailure, dict[str, Any]]] = [
        ("right", verdict("a", one), {}),
        ("wrong", verdict("b", one, 1), {}),
        ("tie", verdict("c", one, tie=True), {}),
        ("no verdict", verdict("d", [sample(None)]), {}),
        ("no verdict", RowFailure("e", None, "key", "too long"), {}),
        ("no label", verdict("f", one, label=None, correct=None), {"label": None}),
        ("right", verdict("g", one, label=(1.0, 1.0), correct=None, agrees=True), {"label": "tie"}),
    ]
    write_run(tmp_path, [row(o.id or "", **changes) for _, o, changes in cases],
              [outcome for _, outcome, _ in cases])  # fmt: skip
    found = blocks(tmp_path)
    listed = found.found["index"]["rows"]
    assert [each["outcome"] for each in listed] == [outcome for outcome, _, _ in cases]
    first = listed[0]
    assert (first["preferred"], first["tied"], first["valid"], first["k"]) == ([[0, 2]], 1, 3, 4)
    assert first["spread"] == 1.0 and listed[3]["spread"] is None
    assert [found.details(i)["best"] for i in (0, 5, 6)] == [[0], None, [0, 1]]
    assert found.details(0)["prefers"] == [[0], [0], [0, 1], None]
    assert found.found["index"]["about"] == {"run": {}, "figure": None}


def test_the_head_has_the_first_rule_at_all_votes(tmp_path: Path) -> None:
    write_run(tmp_path, [row("a")], [verdict("a", [sample((2, 1))])])
    figures = {
        "says": "says so",
        "ways": {
            "sum": {str(k): {"total": {"value": k / 100, "low": 0, "high": 1}} for k in (1, 8)}
        },
    }
    results = {
        "about": {"title": "T", "model": "M"},
        "votes": [1, 8],
        "rules": {"official": figures, "vote": {}},
    }
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert blocks(tmp_path).found["index"]["about"] == {
        "run": {"title": "T", "model": "M"},
        "figure": {
            "rule": "official", "says": "says so", "way": "sum", "votes": 8, "value": 0.08,
            "low": 0, "high": 1,
        },
    }  # fmt: skip


def test_verdicts_of_other_rows_are_an_error_and_missing_ones_none(tmp_path: Path) -> None:
    write_run(tmp_path, [row("a"), row("b")], [verdict("a", [sample((2, 1))])])
    assert len(blocks(tmp_path).found["index"]["rows"]) == 1
    write_run(tmp_path, [row("a")], [verdict("b", [sample((2, 1))])])
    with pytest.raises(ValueError, match=r"line 1 of verdicts\.jsonl is of 'b', not 'a'"):
        write_page(tmp_path)
