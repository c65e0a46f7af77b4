"""The published sets, each on a few entries of our own in its format, and whole where they are
here; and the figures of their rules, against plain Python and numbers worked by hand."""

import gzip
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from bench.evaluate.benchmark import BadItem, Benchmark, Item, RowScores
from bench.evaluate.benchmarks import (
    auto_j,
    helpsteer2,
    helpsteer3,
    hh,
    judgebench,
    llmbar,
    pandalm,
    plain,
    realmistake,
    ultrafeedback,
)
from bench.evaluate.rules import macro, roc_auc
from engine.reading import Columns
from tests.test_evaluate_files import LOCKED

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


# JudgeBench


def judged(pair_id: str, label: str, source: str = "livecodebench") -> dict[str, str]:
    return {
        "pair_id": pair_id, "source": source, "question": "2+2?", "response_A": "4",
        "response_B": "5", "label": label,
    }  # fmt: skip


def test_entries_of_judgebench(tmp_path: Path) -> None:
    """Of a folder the answers of GPT-4o, by either of the published names."""
    name = "dataset=judgebench,response_model=gpt-4o-2024-05-13"
    write_lines(
        tmp_path / f"{name}.jsonl",
        judged("a", "A>B", "mmlu-pro-law"), judged("b", "B>A", "livebench-math"),
        judged("c", "A=B"), judged("d", "A>B", "other"),
    )  # fmt: skip
    write_lines(tmp_path / "data" / "gpt-00000-of-00001.jsonl", judged("e", "A>B"))
    write_lines(tmp_path / f"{name},judge_name=x,judge_model=y.jsonl", judged("f", "A>B"))
    claude = write_lines(tmp_path / "claude-00000-of-00001.jsonl", judged("g", "A>B"))
    items, bad = read(judgebench.BENCHMARK, tmp_path)
    assert [(item.id[-1], item.subset, item.rows[0].label) for item in items] == [
        ("e", "Coding", 0), ("a", "Knowledge", 0), ("b", "Math", 1)
    ]  # fmt: skip
    assert [each.line for each in bad] == [3, 4]
    assert bad[0].error == "'A=B' is none of A>B, B>A"
    assert len(read(judgebench.BENCHMARK, claude)[0]) == 1


@pytest.mark.parametrize("label", ["A>B", "B>A"])
def test_both_orders_of_judgebench(label: str, tmp_path: Path) -> None:
    """Every pair of verdicts: right +1, wrong -1, a tie or none 0, and the sum is above 0."""
    (item,), _ = read(judgebench.BENCHMARK, write_lines(tmp_path / "a", judged("a", label)))
    right, wrong = ((2, 1), (1, 2)) if label == "A>B" else ((1, 2), (2, 1))
    verdicts = {right: 1, wrong: -1, (3, 3): 0, NO_VOTE: 0}
    for first, one in verdicts.items():
        for second, two in verdicts.items():
            seen = scores(right, by_first=[[first], [second]])
            assert value(judgebench.BENCHMARK, "official", item, seen) == [one + two > 0]


# ReaLMistake


def mistake(name: str, label: str, model: str = "org/m") -> dict[str, Any]:
    about = {"id": name, "task_name": "sums", "llm_response_model": model}
    return {"input": "2+2?", "llm_response": "4", "error_label": label, "metadata": about}


def test_entries_of_realmistake(tmp_path: Path) -> None:
    (tmp_path / "data.zip").write_bytes(LOCKED)
    items, bad = read(realmistake.BENCHMARK, tmp_path / "data.zip")
    assert [(item.id, item.subset, item.rows[0].label) for item in items] == [
        ("realmistake-a", "sum m", 1), ("realmistake-b", "sum m", 0)
    ]  # fmt: skip
    assert bad == []
    path = write_lines(
        tmp_path / "m.jsonl", mistake("a", "errors"), mistake("b", "error") | {"metadata": {}}
    )
    items, bad = read(realmistake.BENCHMARK, path)
    assert items == []
    assert [each.error for each in bad] == ["'errors' is none of error, no_error", "no 'id'"]


def test_the_figures_of_realmistake(tmp_path: Path) -> None:
    """4 errors, judged error, error, none, nothing; 3 without, judged none, error, nothing."""
    labels = ["error"] * 4 + ["no_error"] * 3
    path = write_lines(
        tmp_path / "m.jsonl", *(mistake(str(i), label) for i, label in enumerate(labels))
    )
    items, _ = read(realmistake.BENCHMARK, path)
    means = [(-2.0,), (0.0,), (1.0,), NO_VOTE[:1], (2.0,), (-1.0,), NO_VOTE[:1]]
    found = {rule.name: rule for rule in realmistake.BENCHMARK.rules}
    right = [found["accuracy"].value(i, [scores(m)])[0] for i, m in zip(items, means, strict=True)]
    assert right == [1, 1, 0, 0, 1, 0, 0]
    figures = {
        name: statistic(realmistake.BENCHMARK, name, items, means)
        for name in ("official", "precision", "recall", "voted", "roc_auc")
    }
    # Of 3 said to have an error 2 have one; of 4 that have one 2 are said to. With no vote as a
    # wrong one it is 2 of 4, and 2 of 4. Of 12 pairs, with
    # scores -2, 0, 1, 0 for errors and 2, -1, 0 for none, 4 + 1 + 1 are in order and 2 tied.
    assert figures == pytest.approx(
        {"official": 4 / 7, "precision": 2 / 3, "recall": 1 / 2, "voted": 1 / 2, "roc_auc": 7 / 12}
    )
    assert np.isnan(roc_auc(np.ones(2), [{"gold": 1.0}, {"gold": 1.0}]))


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([0.0, 0.5, 1.0]))))
def test_macro_figures_are_those_of_the_definition(pairs: list[tuple[float, float]]) -> None:
    """Each class by itself, counted one entry at a time."""
    classes = sorted({each for pair in pairs for each in pair})
    assume(classes)
    figures = []
    for c in classes:
        hits = said = there = 0
        for predicted, gold in pairs:
            hits += predicted == gold == c
            said += predicted == c
            there += gold == c
        precision = hits / said if said else 0.0
        recall = hits / there if there else 0.0
        f1 = 2 * precision * recall / (precision + recall) if hits else 0.0
        figures.append((precision, recall, f1))
    for index in range(3):
        found = macro(index)(np.array([p for p, _ in pairs]), [{"gold": g} for _, g in pairs])
        assert found == pytest.approx(sum(each[index] for each in figures) / len(figures))


@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), max_size=12))
def test_roc_auc_is_the_share_of_pairs_in_order(pairs: list[tuple[int, bool]]) -> None:
    right = [score for score, label in pairs if label]
    wrong = [score for score, label in pairs if not label]
    assume(right and wrong)
    wins = sum(1.0 if r > w else 0.5 if r == w else 0.0 for r in right for w in wrong)
    found = roc_auc(np.array([s for s, _ in pairs]), [{"gold": float(label)} for _, label in pairs])
    assert found == pytest.approx(wins / len(right) / len(wrong))


# Auto-J


def test_auto_j(tmp_path: Path) -> None:
    entry = {"scenario": "chitchat", "prompt": "Hi?", "response 1": "x", "response 2": "y"}
    path = write_lines(
        tmp_path / "testdata_pairwise.jsonl",
        entry | {"label": 0}, entry | {"label": 1}, entry | {"label": 2},
        entry | {"label": 3}, entry | {"label": 0, "scenario": "chat"}, entry,
    )  # fmt: skip
    write_lines(tmp_path / "testdata_critique.jsonl", {"prompt": "Hi?"})
    items, bad = read(auto_j.BENCHMARK, tmp_path)
    assert [item.rows[0].label for item in items] == [0, 1, (1.0, 1.0)]
    assert {item.subset for item in items} == {"General Communication"}
    assert [each.line for each in bad] == [4, 5, 6]
    assert len(auto_j.GROUP_OF) == 58
    assert path.is_file()

    one, two, tie = (2, 1), (1, 2), (3, 3)
    meanings = {one: 0, two: 1, tie: 2, NO_VOTE: None}
    for gold, item in enumerate(items):
        for first, a in meanings.items():
            for second, b in meanings.items():
                seen = scores(first, by_first=[[first], [second]])
                both = a is not None and a == b
                assert value(auto_j.BENCHMARK, "consistency", item, seen) == [both]
                assert value(auto_j.BENCHMARK, "official", item, seen) == [both and a == gold]
                assert value(auto_j.BENCHMARK, "ties", item, seen) == [a == gold]
    assert len(counted(auto_j.BENCHMARK, "vote", items)) == 2


# HelpSteer


def test_helpsteer3(tmp_path: Path) -> None:
    turns = [{"role": role, "content": role} for role in ("user", "assistant", "user")]
    entry = {"domain": "code", "context": turns, "response1": "x", "response2": "y"}

    def preferred(overall: Any, *people: int) -> dict[str, Any]:
        each = [{"score": score, "reasoning": ""} for score in people]
        return entry | {"overall_preference": overall, "individual_preference": each}

    write_lines(
        tmp_path / "preference" / "validation.jsonl",
        preferred(-3, -2, -3, 1), preferred(2, 1, 3, 2), preferred(0, 0, 1, -1),
        preferred(4), preferred(1) | {"context": turns[:2]}, preferred(None),
    )  # fmt: skip
    for other in ("preference/train.jsonl", "feedback/validation.jsonl"):
        write_lines(tmp_path / other, {"context": turns})
    items, bad = read(helpsteer3.BENCHMARK, tmp_path)
    assert [item.rows[0].label for item in items] == [0, 1, (1.0, 1.0)]
    assert [message.content for message in items[0].rows[0].messages] == [
        "user", "assistant", "user"
    ]  # fmt: skip
    assert [each.line for each in bad] == [4, 5, 6]
    assert len(counted(helpsteer3.BENCHMARK, "vote", items)) == 2
    # Rows -, -, + and +, +, + and 0, +, -: 1 + 3 + 0 of 9 pairs of people agree. Of 6 people in
    # rows with a majority 5 say it; the other two agree in 1 + 3 cases, 3 times with a third.
    assert helpsteer3.people(items) == {
        "people_majority": 5 / 6,
        "people_others": 3 / 4,
        "people_another": 4 / 9,
        "without_preference": 1,
    }


def test_preferences_of_helpsteer2(tmp_path: Path) -> None:
    prompt = "Hi\nyou\n<extra_id_1>Assistant\nHo.\n\nHo.\n<extra_id_1>User\nWhy?"
    entry = {"prompt": prompt, "response_1": "x", "response_2": "y", "split": "val"}
    write_lines(
        tmp_path / "preference" / "preference.jsonl",
        entry | {"preference_strength": -1}, entry | {"preference_strength": 3, "split": "train"},
        entry | {"preference_strength": 0}, entry | {"preference_strength": -100},
    )  # fmt: skip
    write_lines(tmp_path / "validation.jsonl", {"prompt": prompt})
    items, bad = read(helpsteer2.BENCHMARK, tmp_path)
    assert [(item.subset, item.rows[0].label) for item in items] == [("val", 0), ("val", (1, 1))]
    assert [(message.role, message.content) for message in items[0].rows[0].messages] == [
        ("user", "Hi\nyou"), ("assistant", "Ho.\n\nHo."), ("user", "Why?")
    ]  # fmt: skip
    assert [each.line for each in bad] == [4]


def test_ratings_of_helpsteer2(tmp_path: Path) -> None:
    path = tmp_path / "validation.jsonl"
    write_lines(
        path,
        *({"prompt": p, "response": r, "helpfulness": h} for p, r, h in (
            ("a", "1", 4), ("a", "2", 2), ("b", "3", 1), ("c", "4", 0), ("c", "5", 0),
            ("c", "6", 3), ("c", "7", 9), ("d", "8", 1),
        )),
    )  # fmt: skip
    items, bad = read(helpsteer2.BENCHMARK, path)
    assert [(item.rows[0].responses, item.rows[0].label) for item in items] == [
        (("1", "2"), (4.0, 2.0)), (("4", "5"), (0.0, 0.0))
    ]  # fmt: skip
    assert [(each.line, each.error) for each in bad] == [
        (3, "a rating without another of its prompt after it"),
        (6, "9 is none of 0, 1, 2, 3, 4"),
        (8, "a rating without another of its prompt after it"),
    ]


# UltraFeedback


def test_ultrafeedback_in_both_forms(tmp_path: Path) -> None:
    def scored(*given: Any) -> dict[str, Any]:
        answers = [{"response": f"r{i}", "overall_score": each} for i, each in enumerate(given)]
        return {"source": "flan", "instruction": "Hi?", "completions": answers}

    def pair(chosen: float, rejected: float) -> dict[str, Any]:
        sides = {
            name: [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": name}]
            for name in ("chosen", "rejected")
        }
        golds = {"score_chosen": chosen, "score_rejected": rejected}
        return {"prompt": "Hi?", "prompt_id": "same", "messages": [], **sides, **golds}

    write_lines(tmp_path / "test_prefs-00000-of-00001.jsonl", pair(8, 3), pair(5, 5))
    write_lines(tmp_path / "flan.jsonl", scored(7.5, 7.5, 3, 1), scored(2), scored(2, "N/A"))
    for name in ("train_prefs-0", "test_gen-0", "test_sft-0"):
        write_lines(tmp_path / f"{name}.jsonl", pair(8, 3))
    items, bad = read(ultrafeedback.BENCHMARK, tmp_path)
    assert [item.subset for item in items] == ["flan", "test_prefs", "test_prefs"]
    assert items[1].rows[0].responses == ("chosen", "rejected")
    assert [item.rows[0].label for item in items] == [(7.5, 7.5, 3, 1), (8, 3), (5, 5)]
    assert [each.line for each in bad] == [2, 3]
    assert counted(ultrafeedback.BENCHMARK, "pairs", items) == [items[0].id, items[1].id]
    # Five pairs are told apart: 0 > 2, 0 > 3, 1 > 2, 1 > 3, 2 > 3.
    seen = scores([4, 3, 2, 1], [1, 2, 3, 4], [9, 1, 1, 1], [5, 5, 5, 5], [float("nan")] * 4)
    assert value(ultrafeedback.BENCHMARK, "pairs", items[0], seen) == pytest.approx(
        [1, 0, (2 + 3 / 2) / 5, 1 / 2, 0]
    )


# HH


def talk(*turns: str) -> str:
    return "".join(f"\n\n{'Human' if t[0] == 'h' else 'Assistant'}: {t}" for t in turns)


@pytest.mark.parametrize(
    ("chosen", "rejected", "history", "replies"),
    [
        (["h1", "a1"], ["h1", "a2"], ["h1"], ("a1", "a2")),
        (["h1", "a1", "h2", "a2"], ["h1", "a1", "h2", "a3"], ["h1", "a1", "h2"], ("a2", "a3")),
        (["h1", "a1", "a2"], ["h1", "a3"], ["h1"], ("a1\n\na2", "a3")),
        (["h1", "h2", "a1"], ["h1", "h2", "a2"], ["h1\n\nh2"], ("a1", "a2")),
        (["h1", "a1"], ["h1", "a1"], ["h1"], ("a1", "a1")),
        # One goes on after the other's reply, and two that part at the human's second turn.
        (["h1", "a1", "h2", "a2"], ["h1", "a1"], ["h1"], ("a1" + talk("h2", "a2"), "a1")),
        (
            ["h1", "a1", "h2", "a2"], ["h1", "a1", "h3", "a3"],
            ["h1"], ("a1" + talk("h2", "a2"), "a1" + talk("h3", "a3")),
        ),
        (["h1", "a ", "h2"], ["h1", "a "], ["h1"], ("a " + talk("h2"), "a ")),
    ],
)  # fmt: skip
def test_conversations_of_hh(
    chosen: list[str], rejected: list[str], history: list[str], replies: tuple[str, str],
    tmp_path: Path,
) -> None:  # fmt: skip
    pair = {"chosen": talk(*chosen), "rejected": talk(*rejected)}
    path = tmp_path / "helpful-base" / "test.jsonl.gz"
    path.parent.mkdir()
    path.write_bytes(gzip.compress(json.dumps(pair).encode()))
    write_lines(tmp_path / "helpful-base" / "train.jsonl", pair)
    (item,), bad = read(hh.BENCHMARK, tmp_path)
    assert bad == []
    assert (item.id, item.subset) == ("helpful-base/test-1", "helpful-base")
    (row,) = item.rows
    assert [message.content for message in row.messages] == history
    assert [message.role for message in row.messages] == ["user", "assistant", "user"][
        : len(history)
    ]
    assert (row.responses, row.label) == (replies, 0)


def test_transcripts_that_are_none(tmp_path: Path) -> None:
    good = talk("h1", "a1")
    path = write_lines(
        tmp_path / "test.jsonl",
        {"chosen": "Hi.", "rejected": good}, {"chosen": talk("h2", "a1"), "rejected": good},
        {"chosen": talk("h1"), "rejected": good}, {"chosen": good}, {"chosen": 1, "rejected": good},
        {"chosen": talk("a1", "h1"), "rejected": talk("a1", "h2")}, {"chosen": "", "rejected": ""},
    )  # fmt: skip
    items, bad = read(hh.BENCHMARK, path)
    assert items == []
    assert [each.line for each in bad] == [1, 2, 3, 4, 5, 6, 7]
    assert bad[1].error == "two transcripts that differ before the first reply"
    assert bad[3].error == "no 'rejected'"
