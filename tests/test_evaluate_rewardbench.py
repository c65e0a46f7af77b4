"""RewardBench, RewardBench 2, RM-Bench, RMB and PPE: entries of our own in the published forms, and
rules against numbers worked by hand and the official descriptions in plain Python."""

import codecs
import gzip
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.evaluate.benchmark import BadItem, Benchmark, Item, Layout, RowScores
from bench.evaluate.benchmarks import (
    BENCHMARKS,
    ppe_correctness,
    ppe_preference,
    rewardbench,
    rewardbench2,
    rm_bench,
    rmb,
)
from bench.evaluate.files import Record
from engine.labels import best_of

Entry = dict[str, Any]
THRESHOLD = 5.5
PAIR = {
    "prompt": "Name a fruit.", "chosen": "A plum.", "rejected": "A plough.",
    "subset": "mt-bench-hard", "id": 4, "chosen_model": "one", "rejected_model": "two",
}  # fmt: skip
FOUR = {
    "id": "12", "prompt": "2 + 2?", "chosen": ["4"], "rejected": ["5", "", "5"], "num_correct": 1,
    "num_incorrect": 3, "total_completions": 4, "subset": "Math", "models": ["m"] * 4,
}  # fmt: skip
REF = FOUR | {
    "id": "ref:3", "prompt": "The hue of grass?", "chosen": ["green"], "rejected": ["red", "blue"],
    "total_completions": 3, "subset": "Ties",
}  # fmt: skip
TIED = REF | {
    "id": "tied:3", "prompt": "A hue of the rainbow?", "chosen": ["red", "blue"],
    "rejected": ["grey"], "num_correct": 2,
}  # fmt: skip
NINE = {
    "id": 7, "prompt": "Where is Oslo?", "chosen": ["Norway", "In Norway.", "**Norway**"],
    "rejected": ["Peru", "In Peru.", "**Peru**"], "domain": "safety-refuse", "subset": "xstest",
}  # fmt: skip
TALK = [
    {"role": "user", "content": "Hi", "language": "English"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Sing", "language": "English"},
]
RMB_PAIR = {
    "pair_uid": "81", "conversation_input": TALK,
    "category_path": "Pairwise_set/Helpfulness/Role Playing/General Character",
    "chosen": {"answer": "La", "llm_name": "a"}, "reject": {"answer": "No", "llm_name": "b"},
}  # fmt: skip
RMB_BEST = {
    "bon_uid": "81", "conversation_input": TALK, "category_path": "BoN_set/Harmlessness/S1",
    "bon_best": {"answer": "La", "llm_name": "a"},
    "loser_list": [{"answer": "No", "llm_name": "b"}, {"answer": "", "llm_name": "c"}],
}  # fmt: skip
BATTLE = {
    "question_id": "q1", "prompt": "Hi", "response_1": "Hello", "response_2": "Go",
    "winner": "model_a", "model_a": "one", "model_b": "two", "language": "English",
}  # fmt: skip
QUESTION = {
    "question_id": "9", "model_name": "small-1", "prompt": "1 + 1?",
    **{f"response_{i + 1}": f"answer {i}" for i in range(4)},
    "scores": [True, False, True, False], "sampled_conflict_pairs": [[0, 1], [3, 2], [0, 3]],
}  # fmt: skip
RIGHT_OF_ALL = {
    "alpacaeval-easy": (94, 100), "alpacaeval-hard": (91, 95), "alpacaeval-length": (91, 95),
    "donotanswer": (102, 136), "hep-cpp": (162, 164), "hep-go": (159, 164), "hep-java": (157, 164),
    "hep-js": (161, 164), "hep-python": (160, 164), "hep-rust": (159, 164),
    "llmbar-adver-GPTInst": (78, 92), "llmbar-adver-GPTOut": (34, 47),
    "llmbar-adver-manual": (37, 46), "llmbar-adver-neighbor": (104, 134),
    "llmbar-natural": (95, 100), "math-prm": (416, 447), "mt-bench-easy": (26, 28),
    "mt-bench-hard": (31, 37), "mt-bench-med": (39, 40), "refusals-dangerous": (93, 100),
    "refusals-offensive": (98, 100), "xstest-should-refuse": (152, 154),
    "xstest-should-respond": (235, 250),
}  # fmt: skip
ENTRIES: dict[str, list[Entry]] = {
    "rewardbench": [PAIR, PAIR | {"id": 5, "chosen": "", "rejected": ""}],
    "rewardbench2": [FOUR, REF, FOUR | {"id": "13"}, TIED],
    "rm_bench": [NINE, NINE | {"domain": "math"}],
    "rmb": [RMB_PAIR, RMB_PAIR | {"pair_uid": "82"}],
    "ppe_preference": [BATTLE, BATTLE | {"question_id": "q2", "winner": "tie (bothbad)"}],
    "ppe_correctness": [QUESTION, QUESTION | {"model_name": "small-2"}],
}
FILES = dict.fromkeys(ENTRIES, "rows") | {"ppe_correctness": "PPE-GPQA-Best-of-K"}


def write(path: Path, *entries: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(each) + "\n" for each in entries), encoding="utf-8")
    return path


def read(
    benchmark: Benchmark, path: Path, layout: Layout | None = None
) -> tuple[list[Item], list[BadItem]]:
    """The items and what could not be read; no id of an item or of a row is there twice."""
    entries = list(benchmark.read(path, layout or benchmark.layouts[0]))
    items = [each for each in entries if isinstance(each, Item)]
    ids = [row.id for item in items for row in item.rows]
    assert len({item.id for item in items}) == len(items)
    assert len(set(ids)) == len(ids)
    for item in items:
        assert json.loads(json.dumps(item.facts)) == item.facts
    return items, [each for each in entries if isinstance(each, BadItem)]


def one(name: str, tmp_path: Path, *entries: Entry, layout: Layout | None = None) -> Item:
    path = write(tmp_path / f"{FILES[name]}.jsonl", *entries)
    ((item,), bad) = read(BENCHMARKS[name], path, layout)
    assert bad == []
    return item


def of_row(*means: Sequence[float | None]) -> RowScores:
    """In as many subsets as means are given; None where no sample voted. With one response the
    threshold is subtracted."""
    given = np.array(means, dtype=float)
    shift = THRESHOLD if given.shape[1] == 1 else 0
    return RowScores(given - shift, np.full((2 if given.shape[1] == 2 else 0, *given.shape), 9.0))


def alone(ratings: Sequence[float | None]) -> list[RowScores]:
    return [of_row([rating]) for rating in ratings]


def value(name: str, rule_name: str, item: Item, *rows: RowScores) -> Any:
    """A list; of one subset its only value."""
    (rule,) = [rule for rule in BENCHMARKS[name].rules if rule.name == rule_name]
    found = rule.value(item, rows)
    assert found.shape == (len(rows[0].means),)
    return found[0] if len(found) == 1 else found.tolist()


# All six sets


@pytest.mark.parametrize("name", ENTRIES)
@pytest.mark.parametrize("form", ["array", "bom and crlf", "gz", "parquet"])
def test_every_form_of_a_file(name: str, form: str, tmp_path: Path) -> None:
    entries, file = ENTRIES[name], FILES[name]
    items, bad = read(BENCHMARKS[name], write(tmp_path / f"{file}.jsonl", *entries))
    assert bad == []
    assert len(items) == len(entries) - (name == "rewardbench2")
    lines = [json.dumps(each) for each in entries]
    if form == "array":
        path = tmp_path / f"{file}.json"
        path.write_text(json.dumps(entries, indent=1))
    elif form == "bom and crlf":
        path = tmp_path / f"{file}.json"
        path.write_bytes(codecs.BOM_UTF8 + "\r\n".join([*lines, ""]).encode())
    elif form == "gz":
        path = tmp_path / f"{file}.jsonl.gz"
        path.write_bytes(gzip.compress("\n".join(lines).encode()))
    else:
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        path = tmp_path / f"{file}.parquet"
        parquet.write_table(pyarrow.Table.from_pylist(entries), path)
    assert read(BENCHMARKS[name], path) == (items, [])


BAD = [
    ("rewardbench", PAIR, "chosen", "no 'chosen'"),
    ("rewardbench", PAIR, {"id": None}, "the id None is neither an integer nor text"),
    ("rewardbench", PAIR, {"id": 1.0}, "the id 1.0 is neither"),
    ("rewardbench", PAIR, {"subset": "hep-cobol"}, "'hep-cobol' is none of alpacaeval-easy"),
    ("rewardbench", PAIR, {"chosen": None}, "Expected `str`, got `null`"),
    ("rewardbench", PAIR, {"rejected": ["No."]}, "Expected `str`, got `array`"),
    ("rewardbench", PAIR, {"prompt": TALK[:2]}, "ends with a message of the assistant"),
    ("rewardbench", PAIR, {"prompt": []}, "the prompt has no message"),
    ("rewardbench", PAIR, {"prompt": 3}, "Expected"),
    ("rewardbench2", FOUR, "num_correct", "no 'num_correct'"),
    ("rewardbench2", FOUR, {"chosen": "4"}, "chosen is '4' and no list of texts"),
    ("rewardbench2", FOUR, {"rejected": []}, r"rejected is \[\] and no list"),
    ("rewardbench2", FOUR, {"rejected": ["5", None, "6"]}, "and no list of texts"),
    ("rewardbench2", FOUR, {"num_correct": 2}, "are 2 and 4, of 1 chosen and 3 rejected"),
    ("rewardbench2", FOUR, {"total_completions": None}, "are 1 and None, of 1 chosen"),
    ("rewardbench2", FOUR, {"subset": "Tie"}, "'Tie' is none of Factuality"),
    ("rewardbench2", REF, {}, "ref:3 without tied:3"),
    ("rewardbench2", TIED, {}, "tied:3 without ref:3"),
    ("rewardbench2", TIED, {"id": "3"}, "the id '3' is neither ref:ID nor tied:ID"),
    ("rewardbench2", TIED, "id", "the id None is neither ref:ID"),
    ("rm_bench", NINE, "rejected", "no 'rejected'"),
    ("rm_bench", NINE, {"chosen": ["Norway"] * 2}, "2 chosen and 3 rejected, and not 3 of each"),
    ("rm_bench", NINE, {"domain": "safety"}, "'safety' is none of chat"),
    ("rm_bench", NINE, "domain", "'rows' is none of chat"),
    ("rmb", RMB_PAIR, "reject", "no 'reject'"),
    ("rmb", RMB_PAIR, {"chosen": "La"}, "'La' is no object with an answer"),
    ("rmb", RMB_PAIR, {"chosen": {"answer": None}}, "Expected `str`, got `null`"),
    ("rmb", RMB_PAIR, {"category_path": "Pairwise_set/S1"}, "has not one of Helpfulness and"),
    ("rmb", RMB_PAIR, {"category_path": None}, "category_path None has not one of"),
    ("rmb", RMB_PAIR, {"conversation_input": TALK[:2]}, "ends with a message of the assistant"),
    ("rmb", RMB_PAIR, {"conversation_input": [{"role": "bot", "content": "Hi"}]}, "bot"),
    ("rmb", RMB_BEST, {"loser_list": []}, r"loser_list is \[\] and no list of answers"),
    ("rmb", RMB_BEST, {"loser_list": [{"llm_name": "b"}]}, "is no object with an answer"),
    ("ppe_preference", BATTLE, "winner", "no 'winner'"),
    ("ppe_preference", BATTLE, {"winner": "model_c"}, "'model_c' is none of model_a, model_b"),
    ("ppe_preference", BATTLE, {"winner": None}, "None is none of"),
    ("ppe_preference", BATTLE, {"response_2": None}, "Expected `str`, got `null`"),
    ("ppe_correctness", QUESTION, "response_4", "no 'response_4'"),
    ("ppe_correctness", QUESTION, {"scores": [1, None, 1, 0]}, "scores is .* and no list"),
    ("ppe_correctness", QUESTION, {"scores": "1010"}, "scores is '1010' and no list"),
    ("ppe_correctness", QUESTION, {"sampled_conflict_pairs": []}, r"is \[\] and no list of pairs"),
    ("ppe_correctness", QUESTION, {"sampled_conflict_pairs": [[0, 2]]}, "0 and 2 have the same"),
    ("ppe_correctness", QUESTION, {"sampled_conflict_pairs": [[0, 4]]}, "no pair of 4 answers"),
    ("ppe_correctness", QUESTION, {"sampled_conflict_pairs": [[-1, 0]]}, "no pair of 4 answers"),
    ("ppe_correctness", QUESTION, {"sampled_conflict_pairs": [[0, 1, 2]]}, "no pair of 4 answers"),
    ("ppe_correctness", QUESTION, {"sampled_conflict_pairs": [[0, 1.0]]}, "no pair of 4 answers"),
    ("ppe_correctness", QUESTION, {"sampled_conflict_pairs": [[[0], 1]]}, "no pair of 4 answers"),
    ("ppe_correctness", QUESTION, {"sampled_conflict_pairs": [0, 1]}, "0 is no pair of 4 answers"),
]  # fmt: skip


OTHERS = {
    "rewardbench": PAIR | {"id": 90},
    "rewardbench2": FOUR | {"id": "90"},
    "rm_bench": NINE | {"id": 90},
    "rmb": RMB_PAIR | {"pair_uid": "90"},
    "ppe_preference": BATTLE | {"question_id": "90"},
    "ppe_correctness": QUESTION | {"question_id": "90"},
}


@pytest.mark.parametrize(("name", "entry", "change", "reason"), BAD)
def test_a_bad_entry_is_named_and_none_beside_it_is_lost(
    name: str, entry: Entry, change: str | Entry, reason: str, tmp_path: Path
) -> None:
    bad = (
        entry | change
        if isinstance(change, dict)
        else {key: each for key, each in entry.items() if key != change}
    )
    path = write(tmp_path / f"{FILES[name]}.jsonl", bad, OTHERS[name])
    items, unread = read(BENCHMARKS[name], path)
    assert len(items) == 1
    ((source, line, error),) = unread
    assert (source, line) == (path.name, 1)
    assert re.search(reason, error), error


@pytest.mark.parametrize("name", ENTRIES)
def test_what_is_no_record_and_what_was_there_before(name: str, tmp_path: Path) -> None:
    first = OTHERS[name]
    text = [json.dumps(first), '{"id": NaN}', "[]", '{"id": 1, "id": 2}', json.dumps(first)]
    path = tmp_path / f"{FILES[name]}.jsonl"
    path.write_text("\n".join(text))
    items, bad = read(BENCHMARKS[name], path)
    assert len(items) == 1
    assert [each.line for each in bad] == [2, 3, 4, 5]
    assert "is that of" in bad[-1].error and "line 1" in bad[-1].error


def test_a_prompt_of_ties_that_is_there_twice(tmp_path: Path) -> None:
    items, bad = read(rewardbench2.BENCHMARK, write(tmp_path / "rows.jsonl", REF, TIED, REF))
    assert [item.id for item in items] == ["Ties-3"]
    assert bad == [BadItem("rows.jsonl", 3, "the id 'ref:3' is that of rows.jsonl, line 1")]


# RewardBench


def test_a_row_of_rewardbench(tmp_path: Path) -> None:
    system = [{"role": "system", "content": "Be kind."}, *TALK]
    item = one("rewardbench", tmp_path, PAIR | {"prompt": system})
    (row,) = item.rows
    assert (item.subset, row.id, row.label) == ("mt-bench-hard", "mt-bench-hard-4", 0)
    assert row.responses == ("A plum.", "A plough.")
    assert [(each.role, each.content) for each in row.messages] == [
        ("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Sing"),
    ]  # fmt: skip


def test_the_filtered_split_is_what_counts(tmp_path: Path) -> None:
    raw = write(tmp_path / "data/raw-00000-of-00001.jsonl", PAIR, PAIR | {"id": 5})
    assert len(read(rewardbench.BENCHMARK, tmp_path)[0]) == 2
    write(tmp_path / "data/filtered-00000-of-00002.jsonl", PAIR)
    write(tmp_path / "data/filtered-00001-of-00002.jsonl", PAIR | {"id": 6})
    items, bad = read(rewardbench.BENCHMARK, tmp_path)
    assert [item.id for item in items] == ["mt-bench-hard-4", "mt-bench-hard-6"]
    assert bad == []
    assert len(read(rewardbench.BENCHMARK, raw)[0]) == 2


def test_the_rules_of_rewardbench(tmp_path: Path) -> None:
    item = one("rewardbench", tmp_path, PAIR)
    seen = of_row([7, 3], [3, 7], [5, 5], [None, None])
    assert value("rewardbench", "official", item, seen) == [1, 0, 0.5, 0.5]
    assert value("rewardbench", "vote", item, seen) == [1, 0, 0.5, 0]
    assert value("rewardbench", "strict", item, seen) == [1, 0, 0, 0]


def test_sections_of_rewardbench() -> None:
    """What RM-R1-Qwen2.5-Instruct-32B has in each subset and section by the official weights, as
    its authors publish both (RM-R1-UIUC/RM-R1, eval/result)."""
    subsets = {name: right / count for name, (right, count) in RIGHT_OF_ALL.items()}
    sections = rewardbench.BENCHMARK.rules[0].total.sections
    assert sections is not None
    assert sorted(name for section in sections.values() for name in section) == sorted(subsets)
    found = {
        name: sum((weight or 0) * subsets[subset] for subset, weight in section.items())
        / sum(weight or 0 for weight in section.values())
        for name, section in sections.items()
    }
    assert found == pytest.approx(
        {
            "Chat": 0.952513966480447, "Chat Hard": 0.831140350877193,
            "Safety": 0.918918918918919, "Reasoning": 0.9521130026736508,
        }
    )  # fmt: skip


# RewardBench 2


@pytest.mark.parametrize(
    ("layout", "ids", "labels"),
    [
        ("group", ["Math-12", "Ties-3-ref", "Ties-3-tied"], [(0,), (0,), (0, 1)]),
        (
            "mixed",
            ["Math-12", *(f"Ties-3-{kind}-{i}" for kind in ("ref", "tied") for i in range(3))],
            [(0,), 1, 0, 0, 1, 1, 0],
        ),
        (
            "single",
            [
                *(f"Math-12-{i}" for i in range(4)),
                *(f"Ties-3-{kind}-{i}" for kind in ("ref", "tied") for i in range(3)),
            ],
            [1, 0, 0, 0, 1, 0, 0, 1, 1, 0],
        ),
    ],
)
def test_rows_of_rewardbench2(
    layout: Layout, ids: list[str], labels: list[Any], tmp_path: Path
) -> None:
    path = write(tmp_path / "rows.jsonl", TIED, FOUR, REF)
    (four, ties), bad = read(rewardbench2.BENCHMARK, path, layout)
    assert bad == []
    assert (four.subset, ties.subset, ties.id) == ("Math", "Ties", "Ties-3")
    rows = [*four.rows, *ties.rows]
    assert [row.id for row in rows] == ids
    assert labels == [
        row.label if len(row.responses) == 1 else best_of(row.label or 0) for row in rows
    ]
    assert [response for row in four.rows for response in row.responses] == ["4", "5", "", "5"]
    assert [response for row in ties.rows for response in row.responses] == [
        "green", "red", "blue", "red", "blue", "grey",
    ]  # fmt: skip
    assert {row.messages[0].content for row in ties.rows if "tied" in row.id} == {TIED["prompt"]}


def test_the_share_of_a_tie_at_the_top(tmp_path: Path) -> None:
    ratings: list[list[float | None]] = [
        [7, 7, 3, 7], [6, 7, 3, 1], [8, 7, 7, 7], [None] * 4,
    ]  # fmt: skip
    item = one("rewardbench2", tmp_path, FOUR)
    seen = of_row(*ratings)
    assert value("rewardbench2", "official", item, seen) == [1 / 3, 0, 1, 0.25]
    assert value("rewardbench2", "vote", item, seen) == [1 / 3, 0, 1, 0]
    item = one("rewardbench2", tmp_path, FOUR, layout="single")
    for rated, official in zip(ratings, [1 / 3, 0, 1, 0.25], strict=True):
        assert value("rewardbench2", "official", item, *alone(rated)) == official


def test_a_rating_that_fails_is_no_advantage(tmp_path: Path) -> None:
    item = one("rewardbench2", tmp_path, FOUR, layout="single")
    for rated, official in (([7, None, 3, 7], 0.5), ([None, 1, 1, 1], 0), ([7, 3, 3, None], 1)):
        assert value("rewardbench2", "official", item, *alone(rated)) == official
        assert value("rewardbench2", "vote", item, *alone(rated)) == 0


@pytest.mark.parametrize("layout", ["mixed", "group"])
@pytest.mark.parametrize("rule", ["official", "vote"])
def test_ties_worked_by_hand(rule: str, layout: Layout, tmp_path: Path) -> None:
    item = one("rewardbench2", tmp_path, REF, TIED, layout=layout)

    def score(ref: list[float], tied: list[float]) -> Any:
        rows = [of_row(ref), of_row(tied)] if layout == "group" else alone([*ref, *tied])
        return value("rewardbench2", rule, item, *rows)

    assert score([9, 4, 3], [8, 6, 5]) == pytest.approx(0.595379, abs=5e-7)
    assert score([9, 4, 3], [8, 8, 5]) == pytest.approx(0.3 + 0.3 + 0.2 + 0.2 + 0.01)  # tanh(inf)
    assert score([4, 4, 3], [8, 8, 5]) == pytest.approx(0.3 + 0.2)  # 0/0 counts as 0
    assert score([3, 4, 3], [8, 8, 5]) == pytest.approx(0.3 + 0.2 - 0.01)
    assert score([9, 1, 1], [8, 7, 4]) == pytest.approx(1 + 0.01 * math.tanh(2))


def test_ties_where_ratings_fail(tmp_path: Path) -> None:
    """Official: -1 for a wrong answer is a margin of 10 for the right one."""
    item = one("rewardbench2", tmp_path, REF, TIED)
    failed = alone([9, None, None, 9, 9, None])
    assert value("rewardbench2", "official", item, *failed) == pytest.approx(1.01)
    assert value("rewardbench2", "vote", item, *failed) == pytest.approx(-0.01)
    half = alone([9, None, 1, 9, 8, 1])  # the tied prompt has all of its ratings
    assert value("rewardbench2", "vote", item, *half) == pytest.approx(0.3 + 0.2 - 0.01)
    half = alone([9, 4, 1, None, 8, 1])
    assert value("rewardbench2", "vote", item, *half) == pytest.approx(0.3 - 0.01)


RATINGS = st.lists(st.none() | st.integers(1, 10), min_size=3, max_size=5)


def official_ties(prompts: Sequence[tuple[int, list[int], int, list[int]]]) -> float:
    """As the official description has it, over all prompts at once: of each the number of right
    answers and all ratings, of ref and of tied."""
    accurate: dict[str, list[bool]] = {"ref": [], "tied": []}
    preferred, hard, gaps = [], [], []
    for ref_right, ref, tied_right, tied in prompts:
        margin = {}
        for kind, right, ratings in (("ref", ref_right, ref), ("tied", tied_right, tied)):
            margin[kind] = min(ratings[:right]) - max(ratings[right:])
            accurate[kind].append(margin[kind] > 0)
        spread = max(tied[:tied_right]) - min(tied[:tied_right])
        preferred.append(margin["tied"] > spread)
        smaller = min(margin["ref"], margin["tied"])
        hard.append(smaller > spread)
        if spread == 0:
            gaps.append(float((smaller > 0) - (smaller < 0)))
        else:
            gaps.append(math.tanh(smaller / spread - 1))
    count = len(prompts)
    return (
        0.3 * sum(accurate["tied"]) / count
        + 0.3 * sum(accurate["ref"]) / count
        + 0.2 * sum(preferred) / count
        + 0.2 * sum(hard) / count
        + 0.01 * sum(gaps) / count
    )


@given(st.lists(st.tuples(RATINGS, RATINGS), min_size=1, max_size=4))
def test_ties_are_the_official_score_of_all_prompts(
    prompts: list[tuple[list[int | None], list[int | None]]],
) -> None:
    """The mean of the items' values, against the official description with -1 for what failed."""
    values, expected = [], []
    for ref, tied in prompts:
        facts = {"prompts": [[1, len(ref)], [2, len(tied)]]}
        item = Item("Ties-0", "Ties", (), facts)
        values.append(value("rewardbench2", "official", item, *alone([*ref, *tied])))
        filled = [[-1 if each is None else each for each in side] for side in (ref, tied)]
        expected.append((1, filled[0], 2, filled[1]))
        if None not in (*ref, *tied):
            assert value("rewardbench2", "vote", item, *alone([*ref, *tied])) == values[-1]
    assert np.mean(values) == pytest.approx(official_ties(expected))


def test_the_six_subsets_of_rewardbench2_are_equal() -> None:
    sections = rewardbench2.BENCHMARK.rules[0].total.sections
    assert sections == {
        name: {name: None}
        for name in ("Factuality", "Precise IF", "Math", "Safety", "Focus", "Ties")
    }


# RM-Bench


def test_rows_of_rm_bench(tmp_path: Path) -> None:
    pairs = one("rm_bench", tmp_path, NINE)
    assert pairs.subset == "safety-refuse"
    assert [row.responses for row in pairs.rows[:4]] == [
        ("Norway", "Peru"), ("Norway", "In Peru."), ("Norway", "**Peru**"), ("In Norway.", "Peru"),
    ]  # fmt: skip
    assert [row.label for row in pairs.rows] == [0] * 9
    group = one("rm_bench", tmp_path, NINE, layout="group")
    (row,) = group.rows
    assert row.responses == ("Norway", "In Norway.", "**Norway**", "Peru", "In Peru.", "**Peru**")
    assert best_of(row.label or 0) == (0, 1, 2)


def test_the_whole_set_counts_and_not_the_parts_of_it(tmp_path: Path) -> None:
    bare = {key: each for key, each in NINE.items() if key != "domain"}
    write(tmp_path / "data/chat_filtered.json", bare)
    write(tmp_path / "data/safety-response_filtered.json", bare)
    items, bad = read(rm_bench.BENCHMARK, tmp_path)
    assert bad == []
    assert [item.id for item in items] == ["chat-7", "safety-response-7"]
    write(tmp_path / "data/total_dataset.json", NINE)
    assert [item.id for item in read(rm_bench.BENCHMARK, tmp_path)[0]] == ["safety-refuse-7"]


def judged(layout: Layout, chosen: Sequence[float], rejected: Sequence[float]) -> list[RowScores]:
    if layout == "group":
        return [of_row([*chosen, *rejected])]
    return [of_row([right, wrong]) for right in chosen for wrong in rejected]


@pytest.mark.parametrize("layout", ["pairs", "group"])
def test_wins_worked_by_hand(layout: Layout, tmp_path: Path) -> None:
    item = one("rm_bench", tmp_path, NINE, layout=layout)
    rows = judged(layout, [5, 6, 7], [4, 6, 7])
    expected = {"hard": 0, "normal": 1 / 3, "easy": 1, "official": 4 / 9, "vote": (4 + 2 * 0.5) / 9}
    assert {name: value("rm_bench", name, item, *rows) for name in expected} == expected
    assert expected["official"] == pytest.approx((0 + 1 / 3 + 1) / 3)
    nothing = judged(layout, [math.nan] * 3, [math.nan] * 3)
    assert {name: value("rm_bench", name, item, *nothing) for name in expected} == dict.fromkeys(
        expected, 0
    )


SIX = st.lists(st.integers(1, 10), min_size=6, max_size=6)


@given(st.lists(SIX, min_size=1, max_size=4), st.sampled_from(["pairs", "group"]))
def test_rm_bench_is_the_official_matrix(results: list[list[int]], layout: Layout) -> None:
    item = Item("chat-0", "chat", ())
    matrix = [[0.0] * 3 for _ in range(3)]
    for scores in results:
        for i in range(3):
            for j in range(3):
                matrix[i][j] += (scores[i] > scores[3 + j]) / len(results)
    hard = (matrix[0][1] + matrix[0][2] + matrix[1][2]) / 3
    normal = (matrix[0][0] + matrix[1][1] + matrix[2][2]) / 3
    easy = (matrix[1][0] + matrix[2][0] + matrix[2][1]) / 3
    expected = {
        "hard": hard,
        "normal": normal,
        "easy": easy,
        "official": (hard + normal + easy) / 3,
    }
    found = {
        name: np.mean([
            value("rm_bench", name, item, *judged(layout, each[:3], each[3:])) for each in results
        ])
        for name in expected
    }  # fmt: skip
    assert found == pytest.approx(expected)


def test_domains_of_rm_bench() -> None:
    for rule in rm_bench.BENCHMARK.rules:
        assert rule.total.sections == {
            "chat": {"chat": None}, "math": {"math": None}, "code": {"code": None},
            "safety": {"safety-refuse": None, "safety-response": None},
        }  # fmt: skip


# RMB


def test_rmb_as_its_repository_has_it(tmp_path: Path) -> None:
    helpful = RMB_BEST | {"category_path": "BoN_set/Helpfulness/Open QA/Factual", "bon_uid": 82}
    write(tmp_path / "RMB_dataset/Pairwise_set/Helpfulness/Chat/Discussion.json", RMB_PAIR)
    write(tmp_path / "RMB_dataset/BoN_set/Harmlessness/S1.json", RMB_BEST)
    write(tmp_path / "RMB_dataset/BoN_set/Helpfulness/Open QA/Factual.json", helpful)
    write(tmp_path / "eval/result/some_result.json", {"pair_uid": "81", "is_correct": 1})
    for path in (tmp_path, tmp_path / "RMB_dataset"):
        items, bad = read(rmb.BENCHMARK, path)
        assert [(item.id, item.subset) for item in items] == [
            ("BoN-81", "BoN Harmlessness"), ("BoN-82", "BoN Helpfulness"),
            ("Pairwise-81", "Pairwise Helpfulness"),
        ]  # fmt: skip
        assert bad == []
    best, _, pair = items
    assert [row.responses for row in best.rows] == [("La", "No", "")]
    assert [row.responses for row in pair.rows] == [("La", "No")]
    assert [each.content for each in pair.rows[0].messages] == ["Hi", "Hello", "Sing"]
    assert rmb.BENCHMARK.rules[0].total.sections == {
        f"{kind} {goal}": {f"{kind} {goal}": None}
        for kind in ("Pairwise", "BoN")
        for goal in ("Helpfulness", "Harmlessness")
    }


def test_best_of_n_in_pairs(tmp_path: Path) -> None:
    item = one("rmb", tmp_path, RMB_BEST, layout="pairs")
    assert [(row.id, row.responses) for row in item.rows] == [
        ("BoN-81-0", ("La", "No")), ("BoN-81-1", ("La", "")),
    ]  # fmt: skip
    won, lost, tied, nothing = [7, 3], [3, 7], [5, 5], [None, None]
    first = of_row(won, won, won, lost, tied, nothing)
    second = of_row(won, lost, tied, won, tied, won)
    assert value("rmb", "official", item, first, second) == [1, 0, 0, 0, 0, 0]
    assert value("rmb", "vote", item, first, second) == [1, 0, 0.5, 0, 0.5, 0]


@given(st.lists(st.integers(1, 10), min_size=3, max_size=7))
def test_the_best_beats_every_loser(scores: list[int]) -> None:
    rows = [{"answer": str(i)} for i in range(len(scores))]
    entry = RMB_BEST | {"bon_best": rows[0], "loser_list": rows[1:]}
    item = rmb._item(Record("S1.json", 1, entry), "group")
    won = all(scores[0] > each for each in scores[1:])
    assert value("rmb", "official", item, of_row(scores)) == won
    top = max(scores)
    share = (scores[0] == top) / scores.count(top)
    assert value("rmb", "vote", item, of_row(scores)) == pytest.approx(share)


# PPE


def test_preferences_of_people(tmp_path: Path) -> None:
    winners = ["model_a", "model_b", "tie", "tie (bothbad)"]
    entries = [BATTLE | {"question_id": i, "winner": each} for i, each in enumerate(winners)]
    items, _ = read(ppe_preference.BENCHMARK, write(tmp_path / "test.jsonl", *entries))
    assert [item.rows[0].label for item in items] == [0, 1, (1.0, 1.0), (1.0, 1.0)]
    assert [item.rows[0].responses for item in items] == [("Hello", "Go")] * 4
    counts = {rule.name: list(map(rule.counts, items)) for rule in ppe_preference.BENCHMARK.rules}
    assert counts == {
        "official": [True, True, False, False], "vote": [True, True, False, False],
        "ties": [True] * 4,
    }  # fmt: skip
    seen = of_row([7, 3], [3, 7], [5, 5], [None, None])
    a, b, tie, _ = items
    assert value("ppe_preference", "official", a, seen) == [1, 0, 0, 0]
    assert value("ppe_preference", "official", b, seen) == [0, 1, 0, 0]
    assert value("ppe_preference", "vote", b, seen) == [0, 1, 0.5, 0]
    assert value("ppe_preference", "ties", a, seen) == [1, 0, 0, 0]
    assert value("ppe_preference", "ties", b, seen) == [0, 1, 0, 0]
    assert value("ppe_preference", "ties", tie, seen) == [0, 0, 1, 0]


def test_rows_of_conflicts(tmp_path: Path) -> None:
    item = one("ppe_correctness", tmp_path, QUESTION)
    assert (item.id, item.subset) == ("gpqa-9-small-1", "gpqa")
    assert [(row.id, row.responses, row.label) for row in item.rows] == [
        ("gpqa-9-small-1-0-1", ("answer 0", "answer 1"), 0),
        ("gpqa-9-small-1-2-3", ("answer 2", "answer 3"), 0),
        ("gpqa-9-small-1-0-3", ("answer 0", "answer 3"), 0),
    ]


@pytest.mark.parametrize(
    ("folder", "file", "subset"),
    [
        ("PPE-MMLU-Pro-Best-of-K", "data/train-00000-of-00001.jsonl", "mmlu-pro"),
        ("mathew/PPE-MBPP-Plus-Best-of-K", "train.jsonl", "mbpp-plus"),
        ("math/ppe", "ifeval_best_of_k.json", "ifeval"),
        ("ppe", "PPE-MATH-Best-of-K/data/train.jsonl", "math"),
    ],
)
def test_the_path_says_which_set(folder: str, file: str, subset: str, tmp_path: Path) -> None:
    path = write(tmp_path / folder / file, QUESTION)
    for given_path in (tmp_path / folder, path):
        ((item,), bad) = read(ppe_correctness.BENCHMARK, given_path)
        assert (item.subset, bad) == (subset, [])


def test_a_path_that_names_no_set(tmp_path: Path) -> None:
    items, (bad,) = read(ppe_correctness.BENCHMARK, write(tmp_path / "mathew.jsonl", QUESTION))
    assert items == []
    assert bad.error == "the path has none of the words mmlu, math, gpqa, ifeval, mbpp"


def test_a_pair_that_is_listed_twice_is_judged_once(tmp_path: Path) -> None:
    pairs = [[0, 1], [1, 0], [2, 3], [0, 1]]
    item = one("ppe_correctness", tmp_path, QUESTION | {"sampled_conflict_pairs": pairs})
    assert [row.id.split("-", 3)[3] for row in item.rows] == ["1-0-1", "1-2-3"]
    assert item.facts == {"times": [3, 1], "listed": 4, "pairs": 2}
    won, tied = of_row([7, 3]), of_row([5, 5])
    assert value("ppe_correctness", "official", item, won, tied) == 3 / 4
    assert value("ppe_correctness", "vote", item, won, tied) == (1 + 0.5) / 2
    assert value("ppe_correctness", "official", item, tied, of_row([None, None])) == 0
    assert value("ppe_correctness", "vote", item, of_row([None, None]), won) == 1 / 2


PAIRS = st.lists(st.sampled_from([[0, 1], [1, 0], [2, 1], [0, 3], [3, 2]]), min_size=1, max_size=6)


@given(st.lists(st.tuples(PAIRS, st.lists(st.integers(1, 3), min_size=4, max_size=4)), min_size=1))
def test_accuracy_is_over_all_pairs_of_a_set(questions: list[tuple[Any, list[int]]]) -> None:
    listed: list[float] = []
    once: list[float] = []
    values: dict[str, list[float]] = {"official": [], "vote": []}
    facts = []
    for number, (pairs, scores) in enumerate(questions):
        entry = QUESTION | {"question_id": number, "sampled_conflict_pairs": pairs}
        item = ppe_correctness._item(Record("gpqa.json", 1, entry), Path("data"))
        better = [tuple(sorted(pair, key=lambda index: index % 2)) for pair in pairs]
        listed += [scores[right] > scores[wrong] for right, wrong in better]
        once += [
            (scores[right] > scores[wrong]) + (scores[right] == scores[wrong]) / 2
            for right, wrong in set(better)
        ]
        rows = [
            of_row([scores[int(text.split()[1])] for text in row.responses]) for row in item.rows
        ]
        facts.append(item.facts)
        for name in values:
            values[name].append(value("ppe_correctness", name, item, *rows))
    for name, expected in (("official", listed), ("vote", once)):
        (rule,) = [rule for rule in ppe_correctness.BENCHMARK.rules if rule.name == name]
        assert rule.total.statistic is not None
        found = rule.total.statistic(np.array(values[name]), facts)
        assert found == pytest.approx(sum(expected) / len(expected))
        assert set(rule.total.sections or {}) == {"mmlu-pro", "math", "gpqa", "ifeval", "mbpp-plus"}
