"""Two runs beside each other, and runs beside the paper's table."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from bench.evaluate import compare, report, results, totals
from bench.evaluate.benchmark import Benchmark, Item, Rule, Total
from bench.evaluate.compare import Run, comparison, difference
from bench.evaluate.rules import best_is_drawn
from tests.evaluated import item, line_of, votes_of

NOTHING: list[Mapping[str, Any]] = [{}] * 1000
SQUARE = Total(over="items", statistic=lambda values, facts: float(values.mean() ** 2))


def test_a_difference_is_paired() -> None:
    """Sections of 20 and 60 items weigh alike; p is that of the weighed differences."""
    rng = np.random.default_rng(3)
    subsets = ["a"] * 20 + ["b"] * 60
    first = (rng.random(80) < 0.5).astype(float)
    second = np.where(rng.random(80) < 0.7, first, 1.0)
    found = difference(first, second, subsets, NOTHING, Total())
    assert found.first == pytest.approx((first[:20].mean() + first[20:].mean()) / 2)
    assert found.second == pytest.approx((second[:20].mean() + second[20:].mean()) / 2)
    assert found.low < found.second - found.first < found.high
    weights = np.repeat([1 / 40, 1 / 120], [20, 60])
    expected = stats.permutation_test(
        (weights * (second - first),), np.sum, permutation_type="samples", n_resamples=40_000, rng=0
    ).pvalue
    assert abs(found.p - expected) < 5 * np.sqrt(max(expected, 1e-4) / 10_000)
    gain = (second - first)[:20], (second - first)[20:]
    spread = np.sqrt(gain[0].var() / 20 + gain[1].var() / 60) / 2
    assert found.high - found.low == pytest.approx(2 * 1.96 * spread, rel=0.15)


def test_sections_weigh_in_the_test_as_in_the_total() -> None:
    """All six items of one gain, and as many of sixty gain as lose: by items alone p is 0.5."""
    second = np.array([1.0] * 6 + [1.0, 0.0] * 30)
    first = np.array([0.0] * 6 + [0.0, 1.0] * 30)
    found = difference(first, second, ["a"] * 6 + ["b"] * 60, NOTHING, Total())
    assert found.second - found.first == pytest.approx(0.5) and found.p < 0.1
    found = difference(first, second, ["a"] * 6 + ["b"] * 60, NOTHING, Total(over="items"))
    assert found.p > 0.3


def test_what_has_no_value_has_no_p() -> None:
    total = Total(over="items", statistic=lambda values, facts: math.nan)
    found = difference(np.zeros(3), np.ones(3), ["a"] * 3, [{}] * 3, total)
    assert math.isnan(found.first) and math.isnan(found.p)


def test_equal_runs_do_not_differ() -> None:
    values = (np.arange(30) % 3 == 0).astype(float)
    for total in (Total(), SQUARE):
        found = difference(values, values, ["a"] * 30, NOTHING, total)
        assert (found.low, found.high, found.p) == (0.0, 0.0, 1.0)


def test_a_difference_of_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    """Items are resampled with both their values; those are exchanged together too."""
    rng = np.random.default_rng(5)
    first = (rng.random(60) < 0.4).astype(float)
    second = np.where(rng.random(60) < 0.8, first, 1.0)
    found = difference(first, second, ["a"] * 60, NOTHING, SQUARE)
    assert found.first == pytest.approx(first.mean() ** 2)
    gains = []
    for _ in range(2000):
        chosen = rng.integers(60, size=60)
        gains.append(second[chosen].mean() ** 2 - first[chosen].mean() ** 2)
    spread = np.std(gains)
    error = 4 * spread * np.sqrt(0.024 * (1 / totals.RESAMPLES + 1 / 2000)) / 0.054
    assert (found.low, found.high) == pytest.approx(
        tuple(np.quantile(gains, (0.025, 0.975))), abs=error
    )

    def gain(one: np.ndarray, other: np.ndarray, axis: int) -> Any:
        return other.mean(axis) ** 2 - one.mean(axis) ** 2

    expected = stats.permutation_test(
        (first, second), gain, permutation_type="samples", n_resamples=5000, rng=0, vectorized=True
    ).pvalue
    error = 5 * np.sqrt(max(expected, 1e-3) / compare.SWAPS)
    assert abs(found.p - expected) < error
    monkeypatch.setattr(compare, "SWAPS", 50)
    assert difference(np.zeros(60), np.ones(60), ["a"] * 60, NOTHING, SQUARE).p == 1 / 51


def toy(*rules: Rule) -> Benchmark:
    return Benchmark("toy", "Toy", "nowhere", lambda path, layout: iter(()), rules)


TOY = toy(
    Rule("vote", "the vote is right", best_is_drawn),
    Rule("pairs", "none is counted", best_is_drawn, counts=lambda item: False),
)


@pytest.fixture(autouse=True)
def no_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    """As without matplotlib."""
    monkeypatch.setattr(results, "find_spec", lambda name: None)


def run(out: Path, winners: Mapping[str, int], meta: bool = False) -> Run:
    """A run whose items, of which the first response is best, were won by these."""
    out.mkdir()
    items: list[Item] = []
    lines = []
    for name, winner in winners.items():
        items.append(item(name, subset=name[0]))
        scores = [(5, 3) if winner == 0 else (3, 5)] * 2
        lines.append(line_of(votes_of(name, scores, [0.0, 0.0] if meta else None)))
    (out / "verdicts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    about = {"model": f"models/{out.name}", "meta_model": "models/meta" if meta else None}
    results.write(out, TOY, items, 0.0, 1.0 if meta else None, about)
    return Run.read(out)


def cells(text: str, start: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(start)]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_runs_are_compared_over_what_both_have(tmp_path: Path) -> None:
    first = run(tmp_path / "one", {"a1": 0, "a2": 1, "b1": 1, "b2": 1, "b3": 0})
    second = run(tmp_path / "two", {"b2": 0, "b1": 0, "a1": 0, "a2": 0, "a9": 0}, meta=True)
    text = comparison(first, second, TOY)
    assert cells(text, "| vote | sum |")[:6] == ["vote", "sum", "4", "25.0", "100.0", "+75.0"]
    assert cells(text, "| vote | sum |")[7] == "0.2500"  # 3 items moved: 2 of 8 signs
    assert "1 items are in the first run alone: b3." in text
    assert "1 items are in the second run alone: a9." in text
    assert "First: models/one, 2 votes." in text
    assert "Second: models/two, meta model models/meta, 2 votes." in text
    assert "meta weights" not in text and "| pairs |" not in text
    text = comparison(first, second, TOY, "sum", "sum, meta weights")
    assert cells(text, "| vote |")[:4] == ["vote", "sum / sum, meta weights", "4", "25.0"]
    with pytest.raises(ValueError, match="one has no way 'sum, meta weights' to vote: sum; borda"):
        comparison(first, second, TOY, "sum, meta weights")
    with pytest.raises(ValueError, match="one is no run of other"):
        comparison(first, second, TOY._replace(name="other"))


def test_an_item_of_other_rows_is_not_compared(tmp_path: Path) -> None:
    first = run(tmp_path / "one", {"a1": 0, "a2": 1})
    second = run(tmp_path / "two", {"a1": 0, "a2": 0})
    items = {**second.items, "a2": {**second.items["a2"], "digest": "of another prompt"}}
    second = Run(second.out, second.results, items)
    text = comparison(first, second, TOY)
    assert cells(text, "| vote | sum |")[:4] == ["vote", "sum", "1", "100.0"]
    assert "1 items have other rows in the second run: a2." in text


def test_many_items_alone_are_not_all_named(tmp_path: Path) -> None:
    first = run(tmp_path / "one", {f"a{i:02}": 0 for i in range(14)})
    second = run(tmp_path / "two", {"a00": 0})
    text = comparison(first, second, TOY)
    assert "13 items are in the first run alone: a01, " in text and "a10 and 3 more." in text


def results_of(
    benchmark: str, model: str, totals: Mapping[str, Mapping[str, float]], meta: str | None = None
) -> dict[str, Any]:
    ways = {
        way: {size: {"total": {"value": value}} for size, value in sizes.items()}
        for way, sizes in totals.items()
    }
    return {
        "about": {"benchmark": benchmark, "title": benchmark.upper(), "model": model,
                  "meta_model": meta},
        "votes": [1, 2, 4, 8, 16],
        "rules": {"official": {"ways": ways}, "vote": {"ways": {}}},
    }  # fmt: skip


def test_the_report() -> None:
    """The means of the paper's lines are its own; those of ours, where all four are there."""
    curve = {"1": 0.5, "2": 0.55, "4": 0.56, "8": 0.6, "16": 0.7}
    sets = ("rewardbench", "ppe_preference", "ppe_correctness", "rmb", "llmbar")
    ways = {"sum": curve, "borda": curve, "sum, meta filter 2": curve}
    runs = [results_of(name, "models/ours", ways) for name in sets]
    runs.append(results_of("rmb", "models/ours", {"sum": {"16": 0.8}}, "models/meta"))
    text = report.report(runs)
    assert cells(text, "| judge")[1:] == [*report.PAPER.values(), "Overall", "LLMBAR"]
    expected = ["85.2", "62.4", "59.5", "64.4", "67.9", ""]
    assert cells(text, "| GRM-27B, Voting@1 (quoted)")[1:] == expected
    assert cells(text, "| ours, sum @8 |")[1:] == ["60.0"] * 6
    assert cells(text, "| ours + meta, sum @16 |")[1:] == ["", "", "", "80.0", "", ""]
    ours = [line.split("|")[1].strip() for line in text.splitlines() if "| ours," in line]
    assert ours == ["ours, sum @1", "ours, sum @8", "ours, sum @16", "ours, borda @16"]
    with pytest.raises(ValueError, match="two runs are of RMB by ours"):
        report.report([*runs, runs[3]])


def test_judges_are_told_apart_by_path_and_options() -> None:
    ways = {"sum": {"16": 0.5}}
    runs = [results_of("rmb", "a/model", ways), results_of("llmbar", "b/model", ways)]
    names = [line.split("|")[1].strip() for line in report.report(runs).splitlines()]
    assert names[-2:] == ["a/model, sum @16", "b/model, sum @16"]
    runs[1]["about"] |= {"model": "a/model", "temperature": 0.0}
    names = [line.split("|")[1].strip() for line in report.report(runs).splitlines()]
    assert names[-2:] == ["model, sum @16", "model, temperature 0.0, sum @16"]


@pytest.mark.parametrize("name, figures", list(report.QUOTED.items()))
def test_quoted_means_are_those_of_the_quoted_figures(
    name: str, figures: tuple[float, ...]
) -> None:
    """But for what rounding takes: a slip in a digit would show."""
    assert len(figures) == 5 and abs(sum(figures[:4]) / 4 - figures[4]) <= 0.1 + 1e-9


@pytest.mark.parametrize("command, wrong", [(compare.main, ["x", "y"]), (report.main, [])])
def test_the_commands_refuse(command: Callable[[Sequence[str]], None], wrong: list[str]) -> None:
    with pytest.raises((OSError, ValueError)):
        command(wrong)


def test_the_commands_print(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path / "one", {"a1": 0})
    report.main([str(tmp_path / "one")])
    assert cells(capsys.readouterr().out, "| one, sum @2 |")[-1] == "100.0"
    with pytest.raises(ValueError, match="'toy', which is no benchmark"):
        compare.main([str(tmp_path / "one"), str(tmp_path / "one")])
