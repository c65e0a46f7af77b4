"""The published sets, each on a few entries of our own in its format, and whole where they are
here; and the figures of their rules, against plain Python and numbers worked by hand."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.evaluate.benchmark import BadItem, Benchmark, Item, RowScores
from bench.evaluate.benchmarks import llmbar, pandalm, plain
from engine.reading import Columns

DATA = Path(__file__).parents[2] / "shared" / "data"
NO_VOTE = (float("nan"), float("nan"))
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the published rows are not here")


def write_lines(path: Path, *entries: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(each) + "\n" for each in entries), encoding="utf-8")
    return path


def read(benchmark: Benchmark, path: Path) -> tuple[list[Item], list[BadItem]]:
    """The items and what could not be read; their ids and those of their rows are unique."""
    entries = list(benchmark.read(path, benchmark.layouts[0]))
    items = [each for each in entries if isinstance(each, Item)]
    ids = [row.id for item in items for row in item.rows]
    assert len({item.id for item in items}) == len(items)
    assert len(set(ids)) == len(ids)
    for item in items:
        json.dumps(item.facts)
    return items, [each for each in entries if isinstance(each, BadItem)]


def scores(*means: Sequence[float], by_first: Any = None) -> RowScores:
    """Of one row, in as many subsets of its samples as means are given."""
    n = len(means[0])
    given = np.zeros((2 if n == 2 else 0, len(means), n)) if by_first is None else by_first
    return RowScores(np.array(means, dtype=float), np.array(given, dtype=float))


def value(benchmark: Benchmark, name: str, item: Item, *rows: RowScores) -> list[float]:
    (rule,) = [rule for rule in benchmark.rules if rule.name == name]
    assert rule.counts(item)
    return rule.value(item, rows).tolist()


def counted(benchmark: Benchmark, name: str, items: Sequence[Item]) -> list[str]:
    (rule,) = [rule for rule in benchmark.rules if rule.name == name]
    return [item.id for item in items if rule.counts(item)]


def statistic(
    benchmark: Benchmark, name: str, items: Sequence[Item], means: Sequence[Sequence[float]]
) -> float:
    """A rule's figure of items of one row each."""
    (rule,) = [rule for rule in benchmark.rules if rule.name == name]
    values = [rule.value(i, [scores(m)])[0] for i, m in zip(items, means, strict=True)]
    assert rule.total.statistic is not None
    return rule.total.statistic(np.array(values), [item.facts for item in items])


# LLMBar


@needs_data
def test_all_of_llmbar() -> None:
    items, bad = read(llmbar.BENCHMARK, DATA / "llmbar")
    assert bad == []
    subsets = [item.subset for item in items]
    assert {name: subsets.count(name) for name in subsets} == {
        "Natural": 100, "Neighbor": 134, "GPTInst": 92, "GPTOut": 47, "Manual": 46
    }  # fmt: skip
    raw = json.loads((DATA / "llmbar" / "Natural.json").read_text(encoding="utf-8"))
    (row,) = items[subsets.index("Natural") + 7].rows
    assert row.messages[0].content == raw[7]["input"]
    assert isinstance(row.label, int)
    assert row.responses[row.label] == raw[7][f"output_{raw[7]['label']}"]


def test_llmbar_in_its_repositorys_folders(tmp_path: Path) -> None:
    entry = {"input": "Say hi.", "output_1": "hi", "output_2": "ho", "label": 1}
    for folder in ("Natural", "Adversarial/Manual"):
        write_lines(tmp_path / folder / "dataset.json", entry)
    write_lines(tmp_path / "Natural/evaluators/result.json", entry)
    write_lines(tmp_path / "MT-Bench/dataset.json", entry)
    items, bad = read(llmbar.BENCHMARK, tmp_path)
    assert [item.id for item in items] == ["Manual-1", "Natural-1"]
    assert bad == []
    with pytest.raises(ValueError, match="has no file of this set"):
        read(llmbar.BENCHMARK, tmp_path / "MT-Bench")


def test_bad_entries_of_llmbar(tmp_path: Path) -> None:
    good = {"input": "Say hi.", "output_1": "hi", "output_2": "ho", "label": 2}
    without = {key: text for key, text in good.items() if key != "output_2"}
    path = write_lines(
        tmp_path / "Manual.jsonl",
        good, without, good | {"label": 0}, good | {"label": True}, good | {"input": None}, [good],
    )  # fmt: skip
    items, bad = read(llmbar.BENCHMARK, path)
    assert [item.rows[0].label for item in items] == [1]
    assert [(each.source, each.line) for each in bad] == [("Manual.jsonl", n) for n in range(2, 7)]
    assert bad[0].error == "no 'output_2'"
    assert [each.error for each in bad[1:3]] == ["0 is none of 1, 2", "True is none of 1, 2"]


def test_llmbar_is_right_in_each_order(tmp_path: Path) -> None:
    entry = {"input": "Say hi.", "output_1": "hi", "output_2": "ho", "label": 2}
    ((item,), _) = read(llmbar.BENCHMARK, write_lines(tmp_path / "Manual.json", entry))
    by_first = [[[1, 2], [1, 2], [2, 2], NO_VOTE], [[3, 4], [5, 4], [1, 2], [1, 2]]]
    seen = scores([2, 3], [3, 3], [1, 2], [1, 2], by_first=by_first)
    assert value(llmbar.BENCHMARK, "official", item, seen) == [1, 0.5, 0.5, 0.5]
    assert value(llmbar.BENCHMARK, "vote", item, seen) == [1, 0.5, 1, 1]


# PandaLM


def panda(idx: int, said: Sequence[Any], **other: Any) -> dict[str, Any]:
    entry = {f"annotator{i}": each for i, each in enumerate(said, 1)}
    return entry | {
        "idx": idx, "cmp_key": "a_b", "instruction": "Greet.", "input": "", "response1": "Hi.",
        "response2": "Ho.", **other,
    }  # fmt: skip


@needs_data
def test_all_of_pandalm() -> None:
    """The numbers of each label are those that its authors state."""
    items, bad = read(pandalm.BENCHMARK, DATA / "pandalm")
    assert bad == []
    golds = [item.facts["gold"] for item in items]
    assert [golds.count(gold) for gold in (0.5, 1.0, 0.0)] == [105, 422, 472]
    assert sum("True" in item.rows[0].responses for item in items) == 6
    raw = json.loads((DATA / "pandalm" / "testset-v1.json").read_text(encoding="utf-8"))
    votes = [[each[name] for name in pandalm.ANNOTATORS] for each in raw]
    pairs = [(v[i], v[j]) for v in votes for i, j in ((0, 1), (0, 2), (1, 2))]
    people = pandalm.people(items)
    assert people["people_another"] == pytest.approx(sum(a == b for a, b in pairs) / len(pairs))


def test_the_majority_of_pandalm(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "testset-v1.json",
        panda(1, [1, 2, 1]), panda(2, [2, 2, 2]), panda(3, [0, 1, 0]), panda(4, [0, 1, 2]),
        panda(5, [1, 1, 3]), panda(2, [1, 1, 1]), panda(6, [1, 1]),
        panda(7, ["2", "0", "2"], input="a friend", response1=True),
    )  # fmt: skip
    items, bad = read(pandalm.BENCHMARK, path)
    assert [item.rows[0].label for item in items] == [0, 1, (1.0, 1.0), None, 1]
    assert [item.facts["gold"] for item in items] == [1.0, 0.0, 0.5, None, 0.0]
    assert items[4].rows[0].messages[0].content == "Greet.\n\na friend"
    assert items[4].rows[0].responses == ("True", "Ho.")
    assert [each.error for each in bad] == [
        "3 is none of 0, 1, 2",
        "the id 'pandalm-2' is that of testset-v1.json, line 2",
        "no 'annotator3'",
    ]
    assert len(counted(pandalm.BENCHMARK, "official", items)) == 4
    assert len(counted(pandalm.BENCHMARK, "winners", items)) == 3
    # Of 15 pairs of people 1 + 3 + 1 + 0 + 1 agree. In 6 cases the other two agree, in 3 a third
    # person with them. Of 12 choices in rows with a majority 9 are the majority's.
    assert pandalm.people(items) == {
        "people_majority": 9 / 12,
        "people_others": 3 / 6,
        "people_another": 6 / 15,
        "without_majority": 1,
        "majority_tie": 1,
    }


def test_the_figures_of_pandalm(tmp_path: Path) -> None:
    """Gold 1, 1, 2, 2, tie, tie; said 1, tie, 2, 1, tie, and nothing, which is a tie."""
    gold = (1, 1, 2, 2, 0, 0)
    path = write_lines(tmp_path / "t.json", *(panda(i, [g] * 3) for i, g in enumerate(gold)))
    items, _ = read(pandalm.BENCHMARK, path)
    means = [(3, 1), (2, 2), (1, 5), (2, 1), (7, 7), NO_VOTE]
    found = {
        name: [value(pandalm.BENCHMARK, name, i, scores(m))[0]
               for i, m in zip(items, means, strict=True)]
        for name in ("official", "voted")
    }  # fmt: skip
    assert found == {"official": [1, 0, 1, 0, 1, 1], "voted": [1, 0, 1, 0, 1, 0]}
    figures = [statistic(pandalm.BENCHMARK, name, items, means)
               for name in ("precision", "recall", "f1")]  # fmt: skip
    # Of 1: 1 of 2 said, 1 of 2 there. Of 2: 1 of 1, 1 of 2. Of ties: 2 of 3, 2 of 2.
    assert figures == pytest.approx(
        [(1 / 2 + 1 + 2 / 3) / 3, (1 / 2 + 1 / 2 + 1) / 3, (1 / 2 + 2 / 3 + 4 / 5) / 3]
    )
    winners = [value(pandalm.BENCHMARK, "winners", i, scores(m))[0]
               for i, m in zip(items[:4], means, strict=False)]  # fmt: skip
    assert winners == [1, 0.5, 1, 0]


# Rows of one's own


def test_rows_of_ones_own(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "mine.jsonl",
        {"id": "a", "prompt": "Hi?", "responses": ["x", "y"], "label": 1, "subset": "s"},
        {"prompt": "Hi?", "responses": ["x", "y"], "label": "tie", "meta": {"subset": 3}},
        {"prompt": "Hi?", "chosen": "x", "rejected": "y", "source": "z", "subset": "t"},
        {"prompt": "Hi?", "responses": ["x"], "label": "wrong"},
        {"prompt": "Hi?", "responses": ["x", "y", "z"], "label": [2, 5, 5]},
        {"prompt": "Hi?", "responses": ["x", "y"]},
        {"prompt": "Hi?", "responses": ["x", "y"], "label": 1, "sub": "s"},
        {"id": "a", "prompt": "Hi?", "responses": ["x", "y"], "label": 1},
    )
    items, bad = read(plain.BENCHMARK, path)
    assert [item.id for item in items] == ["a", "mine-2", "mine-3", "mine-4", "mine-5"]
    assert [item.subset for item in items] == ["s", "3", "t", "mine", "mine"]
    assert items[2].rows[0].meta == {"source": "z"}
    assert [each.line for each in bad] == [6, 7, 8]
    assert bad[0].error == "no label"
    assert counted(plain.BENCHMARK, "vote", items) == ["a", "mine-3", "mine-4", "mine-5"]
    assert counted(plain.BENCHMARK, "ties", items) == ["a", "mine-2", "mine-3"]

    a, tie, _, single, three = items
    pairs = scores([1, 2], [2, 1], [2, 2], NO_VOTE)
    assert value(plain.BENCHMARK, "vote", a, pairs) == [1, 0, 0.5, 0]
    assert value(plain.BENCHMARK, "strict", a, pairs) == [1, 0, 0, 0]
    assert value(plain.BENCHMARK, "ties", a, pairs) == [1, 0, 0, 0]
    assert value(plain.BENCHMARK, "ties", tie, pairs) == [0, 0, 1, 0]
    for name in ("vote", "strict"):
        ones = scores([-0.5], [0], [0.5], [float("nan")])
        assert value(plain.BENCHMARK, name, single, ones) == [1, 1, 0, 0]
    threes = scores([1, 2, 3], [3, 2, 1], [3, 3, 1], [3, 3, 3])
    assert value(plain.BENCHMARK, "vote", three, threes) == [1, 0, 0.5, pytest.approx(2 / 3)]
    assert value(plain.BENCHMARK, "strict", three, threes) == [1, 0, 0, 0]


def test_tables_and_folders_of_ones_own(tmp_path: Path) -> None:
    """The same id in two files is no other's, and each column has its place."""
    entry = {"n": 7, "q": "Hi?", "a": "x", "b": 2.5, "better": "2", "subset": "s"}
    for name in ("one.jsonl", "deep/two.json"):
        write_lines(tmp_path / name, entry)
    columns = Columns.parse(
        '{"id": "n", "prompt": "q", "responses": ["a", "b"],'
        ' "label": {"column": "better", "values": {"1": 0, "2": 1}}}'
    )
    benchmark = plain.BENCHMARK._replace(read=partial(plain.read, columns=columns))
    items, bad = read(benchmark, tmp_path)
    assert bad == []
    assert [item.id for item in items] == ["deep/two.json:7", "one.jsonl:7"]
    assert [item.subset for item in items] == ["s", "s"]
    assert items[0].rows[0].responses == ("x", "2.5")
    assert items[0].rows[0].label == 1
