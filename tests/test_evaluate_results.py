"""The figures of a run: totals, facts and files, against figures worked by hand and plain loops."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from bench.evaluate import facts, results, totals
from bench.evaluate.benchmark import BadItem, Benchmark, Item, RowScores, Rule, Total
from bench.evaluate.curves import SUBSETS, Values, votes_up_to
from bench.evaluate.rules import drawn
from engine.request import make_row
from tests.evaluated import failed, item, line_of, votes_of

SUBSETS_OF_ITEMS = ["b", "a", "b", "c", "a", "b"]
RIGHT = np.array([1.0, 0.0, 0.0, 1.0, 1.0, 0.0])  # a: 1/2, b: 1/3, c: 1


def of_means(chosen: Item, scores: Sequence[RowScores]) -> np.ndarray:
    assert chosen.rows[0].label is not None
    return drawn(scores[0].means, chosen.rows[0].label)


def share(values: np.ndarray, facts: Sequence[Mapping[str, Any]]) -> float:
    """A statistic that is no mean: the square of one."""
    return float(values.mean() ** 2)


def benchmark(*rules: Rule) -> Benchmark:
    counts = {"majority_tie": 12, "people": 0.5}
    return Benchmark("toy", "Toy", "nowhere", lambda path, layout: iter(()), rules,
                     facts=lambda items: counts)  # fmt: skip


@pytest.mark.parametrize(
    "total, sections, expected",
    [
        (Total(), {"a": 1 / 2, "b": 1 / 3, "c": 1.0}, (1 / 2 + 1 / 3 + 1) / 3),
        (Total(over="items"), {"a": 1 / 2, "b": 1 / 3, "c": 1.0}, 3 / 6),
        (
            Total({"x": {"a": None, "b": None}, "y": {"c": None, "gone": None}, "z": {"gone": 1}}),
            {"x": 2 / 5, "y": 1.0},
            7 / 10,
        ),
        (
            Total({"x": {"a": 9.0, "b": None}, "y": {"c": 984.0}}),  # weights of 9 and 3
            {"x": (9 / 2 + 3 / 3) / 12, "y": 1.0},
            ((9 / 2 + 3 / 3) / 12 + 1) / 2,
        ),
    ],
)
def test_totals(total: Total, sections: dict[str, float], expected: float) -> None:
    """Of means, and the same of a statistic that is one."""
    votes = votes_up_to(1)
    nothing: list[Mapping[str, Any]] = [{}] * len(RIGHT)
    statistic = total._replace(statistic=lambda values, facts: float(values.mean()))
    for values, asked in (
        (Values(np.arange(6), RIGHT[:, None, None], None), total),
        (Values(np.arange(6), RIGHT[:, None, None], RIGHT[:, None, None]), statistic),
    ):
        found = totals.intervals(values, votes, nothing, SUBSETS_OF_ITEMS, asked)
        figures, low, high = found
        assert figures.subsets == {"a": [0.5], "b": [1 / 3], "c": [1.0]}
        assert {name: each[0] for name, each in figures.sections.items()} == pytest.approx(sections)
        assert figures.total[0] == pytest.approx(expected)
        assert low.total[0] < expected < high.total[0]
        assert low.subsets["c"] == high.subsets["c"] == [1.0]  # a subset of one item
    weights = totals.item_weights(SUBSETS_OF_ITEMS, total)
    assert weights @ RIGHT == pytest.approx(expected)


def test_the_interval_is_of_items_within_subsets() -> None:
    """Its width is that of the variance within subsets; that between them adds nothing."""
    rng = np.random.default_rng(2)
    subsets = ["a"] * 300 + ["b"] * 100
    values = np.concatenate([rng.normal(0.2, 0.1, 300), rng.normal(0.8, 0.3, 100)])
    of_a, of_b = values[:300].var() / 300, values[300:].var() / 100
    for total, variance in (
        (Total(), of_a / 4 + of_b / 4),
        (Total(over="items"), of_a * 9 / 16 + of_b / 16),
    ):
        found = totals.of_means(values[:, None], subsets, total)
        width = found.high.total[0] - found.low.total[0]
        assert width == pytest.approx(2 * 1.96 * math.sqrt(variance), rel=0.1)
    pooled = totals.of_means(values[:, None], ["a"] * 400, Total())
    assert pooled.high.total[0] - pooled.low.total[0] > 1.5 * width
    columns = totals.of_means(np.stack([values, values + 1], 1), subsets, Total())
    assert columns.low.total[1] - columns.low.total[0] == pytest.approx(1)  # resampled alike


def test_a_statistic_is_taken_of_each_draw() -> None:
    """And of items and facts that belong together."""
    rng = np.random.default_rng(1)
    votes = votes_up_to(2)
    draws = rng.integers(0, 2, (40, 2, SUBSETS + 1)).astype(float)
    own = [{"number": number} for number in range(40)]
    total = Total(over="items", statistic=share)
    found = totals.of_statistic(draws, votes, own, ["a", "b"] * 20, total)
    for way in range(2):
        expected = [
            np.mean([draws[:, way, place].mean() ** 2 for place in range(SUBSETS)]),
            draws[:, way, -1].mean() ** 2,
        ]
        assert found.values.total[2 * way : 2 * way + 2].tolist() == pytest.approx(expected)
        evens = draws[::2, way, -1].mean() ** 2
        assert found.values.subsets["a"][2 * way + 1] == pytest.approx(evens)
    squares = [
        {"number": n} for n in rng.permutation(40).tolist()
    ]  # values that tell their own facts
    numbers = np.array([each["number"] for each in squares], dtype=float)[:, None, None]

    def matches(values: np.ndarray, facts: Sequence[Mapping[str, Any]]) -> float:
        return float(all(a == b["number"] for a, b in zip(values, facts, strict=True)))

    total = Total(over="items", statistic=matches)
    found = totals.of_statistic(numbers, votes_up_to(1), squares, ["a", "b"] * 20, total)
    assert found.values.total == found.low.total == found.high.total == [1.0]


def test_the_interval_of_a_statistic_is_scipys() -> None:
    rng = np.random.default_rng(4)
    values = (rng.random(150) < 0.6).astype(float)
    expected = stats.bootstrap(
        (values,), lambda x, axis: x.mean(axis=axis) ** 2, n_resamples=9999, method="percentile",
        rng=0,
    ).confidence_interval  # fmt: skip
    own: list[Mapping[str, Any]] = [{}] * 150
    found = totals.of_statistic(
        values[:, None, None], votes_up_to(1), own, ["a"] * 150, Total(statistic=share)
    )
    spread = 2 * values.mean() * values.std() / math.sqrt(150)
    error = 4 * spread * math.sqrt(0.024 / totals.RESAMPLES) / 0.054
    ends = found.low.total[0], found.high.total[0]
    assert ends == pytest.approx(tuple(expected), abs=error) and error < spread


def test_a_figure_needs_a_value_of_every_item() -> None:
    values = np.array([[1.0, np.nan], [0.0, 1.0], [1.0, 1.0]])
    found = totals.of_means(values, ["a", "b", "b"], Total())
    assert found.values.total[0] == 0.75 and np.isnan(found.values.total[1])
    assert np.isnan(found.low.total[1]) and found.values.subsets["b"].tolist() == [0.5, 1.0]


def test_facts() -> None:
    """Of three rows, all figures counted by hand."""
    items = [
        item("r0", 0, responses=("long", "s")),
        item("r1", 1, responses=("s", "long")),
        item("r2", 0, responses=("a", "bb", "cc")),
        item("r3", 1, responses=("only",)),
        item("r4"),
        item("r5", responses=("one", "two")),
    ]
    rows = [
        votes_of("r0", [(5, 3), (2, 6), (7, 7), None], tokens=[10, 20, 30, 40]),  # sums 14, 16
        votes_of("r1", [(1, 9), (9, 8)], tokens=[10, 10]),  # 10, 17; by orders 1, then 0
        votes_of("r2", [(1, 2, 3), (5, 1, 1), (1, 1, 1)]),  # 7, 4, 5
        votes_of("r3", [(4,), (6,)]),
        failed("r4"),
        votes_of("r5", [(1, 2)])._replace(scores=np.full((1, 2), np.nan), invalid=("truncated",)),
    ]
    found = facts.facts_of(items, rows)
    assert found["rows"] == 6 and found["failed"] == {"rows": 1, "reasons": {"too long": 1}}
    assert found["undecided_rows"] == 1 and (found["samples"], found["valid"]) == (12, 10)
    assert found["invalid"] == {"missing": 1, "truncated": 1}
    assert found["tied"] == 2 / 8
    # the one shown first wins, wins; loses, loses; of three, loses, loses
    first = found["first"]
    assert (first["samples"], first["won"]) == (6, 2 / 6)
    assert first["expected"] == pytest.approx((4 / 2 + 2 / 3) / 6)
    # r0: order 0 alone says 0, of (12, 10); order 1 says 1. r1: 1, then 0.
    assert found["flips"] == {"rows": 2, "share": 1.0}
    longest = found["longest"]  # r0 and r1; r2 and r5 have two of the longest
    assert (longest["rows"], longest["won"], longest["best"]) == (2, 1 / 2, 1.0)
    assert longest["expected"] == 0.5
    assert found["tokens_per_judgement"] == (100 + 20 + 30 + 20 + 10) / 12
    assert found["prompt_tokens_per_row"] == 100
    assert found["tokens_per_row"] == 100 + 180 / 5


def test_nothing_is_shared_by_nobody() -> None:
    found = facts.facts_of([item("r")], [failed("r")])
    assert found["tied"] is found["first"]["won"] is found["longest"]["ci95"] is None
    assert found["tokens_per_judgement"] is found["prompt_tokens_per_row"] is None


def test_tokens_of_fewer_votes() -> None:
    """A prompt has 60 tokens, the tree of both orders 100; judgements 10 on the average."""
    rows = [votes_of("a", [(1, 2)] * 4, tokens=[5, 15, 5, 15]), failed("b")]
    assert facts.tokens_of(rows, 2, votes_up_to(4)).tolist() == [35.0, 60.0, 70.0]


@pytest.fixture
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the statistic, which is called for each."""
    monkeypatch.setattr(totals, "RESAMPLES", 3)


def run(out: Path, *, meta_scale: float | None = None) -> tuple[dict[str, Any], str]:
    """A run of four items, three of them judged, the third with two rows."""
    out.mkdir()
    double = Item("i2", "b", tuple(make_row("p", ["x", "y"], id=f"i2-{i}", label=0)
                                   for i in range(2)), {"pairs": 2})  # fmt: skip

    def both(chosen: Item, scores: Sequence[RowScores]) -> np.ndarray:
        return np.prod([drawn(each.means, 0) for each in scores], axis=0)

    items = [item("i0"), item("i1", subset="b"), double, item("i3", subset="c")]
    rows = [
        votes_of("i0", [(5, 3), (2, 6), None, (4, 4)], [1.0, 0.0, math.nan, -1.0]),
        votes_of("i1", [(9, 3), (8, 6), (4, 4), (4, 3)], [0.0] * 4),
        votes_of("i2-0", [(9, 3), (8, 6), (4, 4), (4, 3)], [0.0] * 4),
        votes_of("i2-1", [(9, 3), (3, 9), (4, 5), (5, 4)], [0.0] * 4),
        failed("i3"),
    ]
    lines = "".join(json.dumps(line_of(row)) + "\n" for row in rows)
    (out / "verdicts.jsonl").write_text(lines)
    (out / "unread.jsonl").write_text(json.dumps(BadItem("f", 3, "no label")._asdict()) + "\n")
    (out / "times.jsonl").write_text('{"rows": 2, "seconds": 3.0, "tokens": 9}\n'
                                     '{"rows": 3, "seconds": 4.5, "tokens": 9}\n')  # fmt: skip
    rules = (Rule("all", "every row is right", both),
             Rule("squared", "its square", both, Total(over="items", statistic=share)))  # fmt: skip
    results.write(out, benchmark(*rules), items, 0.0, meta_scale, {"model": "m", "k": 4})
    return json.loads((out / "results.json").read_text()), (out / "results.md").read_text()


@pytest.mark.usefixtures("few_resamples")
def test_a_run(tmp_path: Path) -> None:
    """By the sum: i0 11 to 13, wrong; i1 right; i2 right and drawn, 1/2; i3 failed, wrong."""
    found, told = run(tmp_path / "out")
    assert found["about"] == {"model": "m", "k": 4, "benchmark": "toy", "title": "Toy"}
    assert found["items"] == 4 and found["rules"]["all"]["items"] == {"a": 1, "b": 2, "c": 1}
    assert found["unread"] == {"entries": 1, "reasons": {"no label": 1}}
    assert found["votes"] == [1, 2, 4] and list(found["rules"]) == ["all", "squared"]
    ways = found["rules"]["all"]["ways"]
    assert list(ways) == ["sum", "borda"] and list(ways["sum"]) == ["1", "2", "4"]
    at_4 = ways["sum"]["4"]
    assert {name: each["value"] for name, each in at_4["subsets"].items()} == {
        "a": 0.0, "b": 0.75, "c": 0.0,
    }  # fmt: skip
    assert at_4["sections"] == at_4["subsets"]
    assert at_4["total"] == {"value": 0.25, "low": round(1 / 6, 6), "high": round(1 / 3, 6)}
    squared = found["rules"]["squared"]["ways"]["sum"]["4"]["total"]["value"]
    assert squared == round((1.5 / 4) ** 2, 6)
    lines = [json.loads(line) for line in (tmp_path / "out" / "items.jsonl").open()]
    assert [line["values"]["all"] for line in lines] == [0.0, 1.0, 0.5, 0.0]
    assert len({line.pop("digest") for line in lines}) == 4
    assert lines[2] == {
        "id": "i2", "subset": "b", "values": {"all": 0.5, "squared": 0.5},
        "by_way": {name: {"sum": 0.5, "borda": 0.5} for name in ("all", "squared")},
        "votes": 8, "valid": 8, "ties": 1, "errors": [], "facts": {"pairs": 2},
    }  # fmt: skip
    assert lines[3]["errors"] == ["too long"] and lines[0]["valid"] == 3
    assert (tmp_path / "out" / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert "| sum | " in told and "| 25.0 | 16.7 to 33.3 |" in told
    assert "1 entries could not be read" in told and "1 rows could not be judged" in told
    assert "| majority tie | 12 |" in told and "| people | 50.0 % |" in told
    assert "| seconds of a row | 1.5 |" in told and "1.5" not in json.dumps(found)


@pytest.mark.usefixtures("few_resamples")
def test_the_figures_are_a_function_of_the_lines(tmp_path: Path) -> None:
    for name in ("one", "other"):
        run(tmp_path / name, meta_scale=0.5)
    for file in ("results.json", "items.jsonl", "results.md"):
        one, other = ((tmp_path / name / file).read_bytes() for name in ("one", "other"))
        assert one == other


@pytest.mark.usefixtures("few_resamples")
def test_a_meta_model_adds_ways(tmp_path: Path) -> None:
    """Two votes of i0 are kept, 7 to 9, or all three weighed by 1, e^-0.5 and e^-1."""
    found, told = run(tmp_path / "out", meta_scale=0.5)
    ways = found["rules"]["all"]["ways"]
    assert [name for name in ways if name.startswith("sum")] == [
        "sum, meta filter", "sum", "sum, meta weights",
        "sum, meta filter 1", "sum, meta filter 2", "sum, meta filter 4",
    ]  # fmt: skip
    assert list(ways["sum, meta filter 2"]) == ["2", "4"]

    def of_a(way: str) -> float:
        value: float = ways[way]["4"]["subsets"]["a"]["value"]
        return value

    assert of_a("sum, meta filter") == of_a("sum, meta filter 2") == 0.0
    assert of_a("sum, meta filter 1") == 1.0
    weights = 1.0, math.exp(-0.5)
    assert (weights[0] * 2 < weights[1] * 4) == (of_a("sum, meta weights") == 0.0)
    judge, both = found["tokens_per_item"].values()
    assert all(both[size] == 2 * judge[size] for size in judge)
    assert "the best of 4 by the meta model" in told


def test_verdicts_of_other_rows_are_refused(tmp_path: Path) -> None:
    (tmp_path / "verdicts.jsonl").write_text(json.dumps(line_of(votes_of("x", [(1, 2)]))) + "\n")
    for items, place in (([item("x"), item("y")], 2), ([item("y")], 1)):
        with pytest.raises(ValueError, match=f"from line {place} on"):
            results.write(tmp_path, benchmark(Rule("v", "", of_means)), items, 0.0, None, {})
    with pytest.raises(ValueError, match="no item"):
        results.write(tmp_path, benchmark(Rule("v", "", of_means)), [], 0.0, None, {})
