"""The judging world: every label and every check of the teacher recomputed from the texts alone."""

import hashlib
import json
import math
import random
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import cache
from itertools import islice, permutations
from pathlib import Path
from typing import Any

import pytest

from engine.formats import read_verdict
from engine.request import parse_row
from kernels.score_grammar import Reason, ScoreRules, parse_scores
from train.world import cases as world
from train.world.cases import (
    CRITERIA,
    LISTED_WEIGHTS,
    Case,
    Split,
    cases,
    judge,
    list_criteria,
    make_case,
)

SPLITS: tuple[Split, ...] = ("train", "dev", "final")
QUERY = re.compile(
    r"A (\w+) at the (\w+) this (\w+) asks: (.+)\. Open with (\w+), close with (\w+), "
    r"use (.) (.), name (\w+), mention (\w+)\.(?: PS .+)?",
    re.DOTALL,
)
RESPONSE = re.compile(
    r"(\w+) (\w+), (please|just) take (.) (.+) (.) in (\w+)\. (\w+)([.!])", re.DOTALL
)


@cache
def drawn() -> list[Case]:
    rng = random.Random(3)
    return [make_case(rng) for _ in range(3000)]


def solve(wording: str) -> str:
    """The answer to a task, from its wording."""
    task, rest = wording.split(" ", 1)
    if task == "add":
        a, b = rest.split(" and ")
        return str(int(a) + int(b))
    if task == "count":
        letter, letters = rest.split(" in ")
        return str(letters.split(" ").count(letter))
    items = rest.split(" ")
    if task == "sort":
        items = sorted(items, key=int)
    elif task == "reverse":
        items = items[::-1]
    else:
        assert task == "copy"
    return " ".join(items)


def met_by(query: str, response: str) -> tuple[bool, ...]:
    """What a response meets, in the order of CRITERIA, from the two texts."""
    asked, given = QUERY.fullmatch(query), RESPONSE.fullmatch(response)
    assert asked and given, (query, response)
    _, _, _, wording, opening, closing, left, right, name, color = asked.groups()
    said, called, manner, begin, answer, end, shade, bye, mark = given.groups()
    return (
        answer == solve(wording),
        said == opening,
        bye == closing,
        (begin, end) == (left, right),
        called == name,
        shade == color,
        mark == ".",
        manner == "please",
    )


def cues(case: Case) -> tuple[str, ...]:
    asked = QUERY.fullmatch(case.query)
    assert asked
    return asked.groups()[:3]


@cache
def cue_weights() -> dict[str, frozenset[int]]:
    """The criteria of each cue word: those that have weight in every case with that word."""
    common: dict[str, set[int]] = {}
    for case in drawn():
        weighted = {i for i, weight in enumerate(case.weights) if weight}
        for word in cues(case):
            common.setdefault(word, set(weighted)).intersection_update(weighted)
    return {word: frozenset(criteria) for word, criteria in common.items()}


def test_each_of_48_cue_words_gives_weight_to_three_criteria() -> None:
    table = cue_weights()
    assert len(table) == 48
    assert {len(criteria) for criteria in table.values()} == {3}
    for case in drawn():
        weights = [sum(i in table[word] for word in cues(case)) for i in range(len(CRITERIA))]
        assert list(case.weights) == weights
        assert sum(weights) == 9


def test_labels_follow_from_the_texts() -> None:
    table = cue_weights()
    for case in drawn():
        row = case.row()
        scores = [
            1 + sum(sum(i in table[w] for w in cues(case)) for i, ok in enumerate(met) if ok)
            for met in (met_by(case.query, response) for response in row["responses"])
        ]
        assert row["meta"]["true_scores"] == scores
        assert all(1 <= score <= 10 for score in scores)
        if len(scores) == 1:
            assert row["label"] == (1 if scores[0] >= 6 else 0)
        else:
            assert scores.count(max(scores)) == 1
            assert scores[row["label"]] == max(scores)


def test_the_world_is_varied() -> None:
    drawn_cases = drawn()
    sizes = Counter(len(case.responses) for case in drawn_cases)
    assert sorted(sizes) == [1, 2, 3, 4]
    best = Counter(case.label for case in drawn_cases if len(case.responses) == 4)
    expected = sizes[4] / 4  # the best response stands anywhere: 5 standard deviations
    assert all(abs(best[i] - expected) < 5 * math.sqrt(expected * 0.75) for i in range(4))
    families = Counter(case.task.wording.split(" ")[0] for case in drawn_cases)
    assert sorted(families) == ["add", "copy", "count", "reverse", "sort"]
    assert min(families.values()) > 500
    kinds = {tuple(turn["role"] for turn in case.history) for case in drawn_cases}
    assert kinds == {(), ("system",), ("user", "assistant")}
    singles = [case.label for case in drawn_cases if len(case.responses) == 1]
    assert 0.25 < sum(singles) / len(singles) < 0.75


def check_work(case: Case, work: str) -> None:
    """Every step of the teacher's working, computed again."""
    asked = QUERY.fullmatch(case.query)
    assert asked
    wording = asked.group(4)
    if not wording.startswith(("add", "count")):
        assert work == solve(wording)
        return
    steps, result = work.rsplit(" so ", 1)
    assert result == solve(wording)
    if wording.startswith("add"):
        digits = ""
        for step in steps.split(" "):
            terms, total = step.split("=")
            assert sum(map(int, terms.split("+"))) == int(total)
            digits = str(int(total) % 10) + digits
        assert int(digits) == int(result) % 1000
        return
    letter, letters = wording.removeprefix("count ").split(" in ")
    seen, marks = 0, []
    for item in letters.split(" "):
        seen += item == letter
        marks.append(f"{item}={seen}")
    assert steps == " ".join(marks)


def test_the_teacher_is_right_in_every_check() -> None:
    rng = random.Random(0)
    for case in drawn()[:1500]:
        listed = list_criteria(case, rng)
        names = [name for name, _ in listed]
        text, scores = judge(case, listed)
        lines = text.split("\n")
        assert lines[0] == "Specific Criteria: " + ", ".join(f"{n} {w}" for n, w in listed)
        if "answer" in names:
            check_work(case, lines.pop(1).removeprefix("Work: "))
        assert lines[1] == "Analysis:"
        responses = case.row()["responses"]
        assert len(lines) == len(responses) + 3
        for number, (line, response) in enumerate(zip(lines[2:-1], responses, strict=True), 1):
            parts = re.fullmatch(
                rf"Response {number}: (.+) (yes|no), (.+) (yes|no), (.+) (yes|no), (.+)=(\d+)",
                line,
                re.DOTALL,
            )
            assert parts, line
            met = dict(zip(CRITERIA, met_by(case.query, response), strict=True))
            said = [parts.group(2 * i + 2) == "yes" for i in range(3)]
            assert said == [met[name] for name in names]
            assert [parts.group(2 * i + 1).split(" ")[0] for i in range(3)] == names
            points = [1] + [weight for name, weight in listed if met[name]]
            assert parts.group(7) == "+".join(map(str, points))
            assert int(parts.group(8)) == sum(points) == scores[number - 1]
        verdict = parse_scores(text.encode(), len(responses), ScoreRules(first=True), True)
        assert verdict == (Reason.VALID, tuple(scores))


def test_checks_show_what_was_asked_beside_what_was_given() -> None:
    case = next(c for c in cases(0, "train") if c.task.wording.startswith("reverse"))
    text, _ = judge(case, [("answer", 5), ("closing", 3), ("calm", 1)])
    asked, given = QUERY.fullmatch(case.query), RESPONSE.fullmatch(case.responses[0].text)
    assert asked and given
    pairs = zip(solve(asked.group(4)).split(), given.group(5).split(), strict=True)
    line = "Response 1: answer " + " ".join(f"{a}={b}" for a, b in pairs)
    assert line in text
    assert f", closing {asked.group(6)}={given.group(8)} " in text
    assert f", calm {given.group(9)} " in text


def test_criteria_are_drawn_in_proportion_to_their_weight() -> None:
    case = next(c for c in drawn() if sorted(c.weights)[-3:] == [2, 2, 3])
    weights = {name: w for name, w in zip(CRITERIA, case.weights, strict=True) if w}
    exact: Counter[frozenset[str]] = Counter()
    for order in permutations(weights, 3):  # successive draws without replacement
        chance, left = 1.0, 9
        for name in order:
            chance *= weights[name] / left
            left -= weights[name]
        exact[frozenset(order)] += chance  # type: ignore[assignment]
    rng = random.Random(1)
    draws = 6000
    counts: Counter[frozenset[str]] = Counter()
    for _ in range(draws):
        listed = list_criteria(case, rng)
        assert [weight for _, weight in listed] == [5, 3, 1]
        hidden = [weights[name] for name, _ in listed]
        assert hidden == sorted(hidden, reverse=True)
        counts[frozenset(name for name, _ in listed)] += 1
    assert math.isclose(sum(exact.values()), 1)
    assert counts.keys() <= exact.keys()
    for names, chance in exact.items():
        assert abs(counts[names] - draws * chance) < 5 * math.sqrt(draws * chance)


def test_no_row_is_in_two_splits() -> None:
    rows: dict[str, set[str]] = {split: set() for split in SPLITS}
    for seed in range(3):
        for split in SPLITS:
            for case in islice(cases(seed, split), 60):
                content = [case.query, sorted(r.text for r in case.responses)]
                rows[split].add(hashlib.sha256(json.dumps(content).encode()).hexdigest())
                turned = replace(case, responses=case.responses[::-1], history=())
                assert case.split == turned.split == split
    assert all(len(found) == 180 for found in rows.values())
    assert len(set().union(*rows.values())) == 540


def test_split_shares() -> None:
    shares: Counter[str] = Counter(case.split for case in drawn())
    for split, expected in (("train", 216 / 256), ("dev", 20 / 256), ("final", 20 / 256)):
        slack = 5 * math.sqrt(3000 * expected * (1 - expected))
        assert abs(shares[split] - 3000 * expected) < slack


def test_novel_combinations_never_stand_in_train() -> None:
    train = {cues(case) for case in islice(cases(0, "train"), 1500)}
    held_out = [case for case in islice(cases(0, "final"), 250)]
    novel = {cues(case) for case in held_out if case.novel}
    assert 10 <= len(novel) < 60  # one in nine of 250
    assert novel.isdisjoint(train)
    assert all(case.row()["meta"]["novel"] == case.novel for case in held_out)
    assert {case.novel for case in drawn() if cues(case) in novel} <= {True}


def test_the_world_does_not_change() -> None:
    """The shipped model and its figures rest on these very rows."""
    rng = random.Random(0)
    digest = hashlib.sha256()
    for split in SPLITS:
        for case in islice(cases(0, split), 20):
            digest.update(json.dumps([case.row(), judge(case, list_criteria(case, rng))]).encode())
    assert digest.hexdigest()[:16] == "5595ede164efea9b"


def run_main(monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", ["world", *options])
    assert world.main() == 0


def test_the_command_line_writes_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first, again, other, dev = (tmp_path / name for name in ("a", "b", "c", "d"))
    run_main(monkeypatch, "--rows", "30", "--seed", "4", "--out", str(first))
    run_main(monkeypatch, "--rows", "30", "--seed", "4", "--out", str(again))
    run_main(monkeypatch, "--rows", "30", "--seed", "5", "--out", str(other))
    run_main(monkeypatch, "--rows", "30", "--seed", "4", "--split", "dev", "--out", str(dev))
    assert first.read_bytes() == again.read_bytes() != other.read_bytes()
    for path, split, seed in ((first, "final", 4), (other, "final", 5), (dev, "dev", 4)):
        lines = path.read_bytes().splitlines()
        rows = [parse_row(line) for line in lines]
        assert [row.id for row in rows] == [f"{split}-{seed}-{i}" for i in range(30)]
        expected = [case.row() for case in islice(cases(seed, split), 30)]  # type: ignore[arg-type]
        assert [list(row.responses) for row in rows] == [row["responses"] for row in expected]
        assert [row.label for row in rows] == [row["label"] for row in expected]
        assert [row.meta for row in rows] == [row["meta"] for row in expected]


def test_judgements_beside_rows_are_one_judgement_in_three_forms(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The rows are those without judgements. Scores read from the direct form and the best response
    from the index are those of the full form; of several that are best the index names any."""
    options = ("--rows", "120", "--seed", "4", "--split", "train")
    run_main(monkeypatch, *options, "--out", str(tmp_path / "rows"))
    forms: dict[str, list[dict[str, Any]]] = {}
    for kind in ("full", "direct", "index"):
        run_main(monkeypatch, *options, "--judgements", kind, "--out", str(tmp_path / kind))
        lines = (tmp_path / kind).read_text().splitlines()
        forms[kind] = [json.loads(line) for line in lines]
    plain = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    ties = Counter[bool]()
    for row, *lines in zip(plain, *forms.values(), strict=True):
        full, direct, index = (line.pop("judgement") for line in lines)
        assert lines == [row] * 3
        n = len(row["responses"])
        reason, scores = parse_scores(full.encode(), n, ScoreRules(first=True), True)
        assert reason == Reason.VALID
        assert full.startswith("Specific Criteria: ") and full.endswith("\n" + direct)
        assert direct == f"Scores: \\boxed{{{', '.join(map(str, scores))}}}"
        assert index.split("\n")[:-1] == full.split("\n")[:-1]
        reason, read = read_verdict("rating", index, n, 1, 10, True)
        assert reason == Reason.VALID
        if n == 1:
            assert read == scores
            continue
        assert sorted(read) == [1] * (n - 1) + [10]
        best = [i for i in range(n) if scores[i] == max(scores)]
        assert read.index(10) in best
        if len(best) > 1:
            ties[read.index(10) == best[0]] += 1
    assert min(ties.values()) > 3 and len(ties) == 2


def test_principles_of_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The oracle's weigh most of a case's hidden weights, the wrong ones least; the fixed ones are
    the same for all."""
    options = ("--rows", "60", "--seed", "4", "--split", "dev")
    found = {}
    for kind in ("oracle", "fixed", "wrong"):
        run_main(monkeypatch, *options, "--principles", kind, "--out", str(tmp_path / kind))
        lines = (tmp_path / kind).read_text().splitlines()
        found[kind] = [json.loads(line)["principles"] for line in lines]
    assert len(set(found["fixed"])) == 1 < len(set(found["oracle"]))
    for case, text in zip(islice(cases(4, "dev"), 60), found["oracle"], strict=True):
        listed = [(name, int(weight)) for name, weight in re.findall(r"(\w+) (\d)", text)]
        hidden = dict(zip(CRITERIA, case.weights, strict=True))
        assert [weight for _, weight in listed] == list(LISTED_WEIGHTS)
        assert [hidden[name] for name, _ in listed] == sorted(case.weights, reverse=True)[:3]
    for case, text in zip(islice(cases(4, "dev"), 60), found["wrong"], strict=True):
        hidden = dict(zip(CRITERIA, case.weights, strict=True))
        weights = [hidden[name] for name in re.findall(r"(\w+) \d", text)]
        assert weights == sorted(case.weights)[:3]


def test_the_command_line_writes_to_standard_output_in_any_locale(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "train.world.cases", "--rows", "40", "--split", "train"],
        cwd=Path(__file__).parent.parent,
        env={"PATH": "", "LC_ALL": "C", "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=True,
    )
    rows = [parse_row(line) for line in done.stdout.splitlines()]
    assert [row.id for row in rows] == [f"train-0-{i}" for i in range(40)]
