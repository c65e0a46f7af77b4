"""engine/summary.py: what a run amounts to, from outcomes or from the lines of an earlier run."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from engine.output import LineFacts, SampleFacts, read_line
from engine.summary import Tally, wilson
from engine.verdict import RowFailure, Sample, Verdict, to_line

Scores = tuple[int, ...] | None


def sample(order: tuple[int, ...], scores: Scores, reason: str = "", text: str = "") -> Sample:
    invalid = None if scores else reason
    return Sample(order, text, scores, invalid, None, 1, "eos", [1], [0.0], [0.0])


def verdict(
    samples: Sequence[Sample],
    correct: bool | None = None,
    agrees: bool | None = None,
    unguided_correct: bool | None = None,
) -> Verdict:
    valid = sum(each.scores is not None for each in samples)
    return Verdict(
        id="r", key="k", best=0 if valid else None, scores=[1, 2], mean_scores=[1.0, 2.0],
        tie=False, k=len(samples), valid=valid, votes=valid, samples=list(samples),
        prompt_tokens=1, tree_tokens=1, decode_tokens=1, correct=correct, agrees=agrees,
        unguided_correct=unguided_correct,
    )  # fmt: skip


OUTCOMES: list[Verdict | RowFailure] = [
    verdict([sample((0, 1), (9, 2)), sample((1, 0), (9, 2))], True, unguided_correct=True),
    verdict([sample((0, 1), (2, 2)), sample((1, 0), (1, 5))], False, unguided_correct=False),
    verdict([sample((0, 1), None, "missing", "so\n**Scores:** 7, 8\n"),
             sample((1, 0), None, "missing", "I give it \\boxed{3}.\n**Scores:** 7, 8")], False),
    verdict([sample((0, 1), (3, 1)), sample((1, 0), None, "truncated", "<think>hm")], None, True),
    verdict([replace(sample((0, 1), (3, 1)), forced=True),
             sample((1, 0), None, "truncated", "<think>a</think>")]),
    RowFailure("x", 6, "k", "too long"),
]  # fmt: skip


def test_the_sum_of_two_tallies() -> None:
    whole, *parts = Tally(), Tally(), Tally(), Tally()
    for place, outcome in enumerate(OUTCOMES):
        whole.add(outcome)
        parts[place // 2].add(outcome)
    assert parts[0] + parts[1] + parts[2] == whole
    assert sum(parts[1:], parts[0]).facts() == whole.facts()


def test_counts() -> None:
    tally = Tally()
    for outcome in OUTCOMES:
        tally.add(outcome)
    facts = tally.facts()
    expected = {
        "rows": 6, "errors": 1, "undecided": 1, "samples": 10, "valid": 6, "valid_share": 0.6,
        "forced": 1, "invalid": {"missing": 2, "truncated": 2}, "cut_while_thinking": 1,
        "unread_line": "**Scores:** 7, 8", "labelled": 3, "correct": 1, "accuracy": 1 / 3,
        "accuracy_of_decided": 0.5, "unguided_accuracy": 0.5, "ties": 1, "ties_agreed": 1,
        "agreement": 0.5, "first_wins": 4 / 5, "first_wins_expected": 0.5,
    }  # fmt: skip
    assert {name: facts[name] for name in expected} == expected
    assert set(facts) - set(expected) == {"accuracy_95", "first_wins_95"}
    assert facts["first_wins_95"] == wilson(4, 5)
    assert not tally.is_in_vain


def test_lines_count_as_their_outcomes_do() -> None:
    ours, read = Tally(), Tally()
    for outcome in OUTCOMES:
        ours.add(outcome)
        read.add(read_line(to_line(outcome)))
    assert ours.facts() == read.facts()


def test_a_prompt_may_open_thinking() -> None:
    texts = ("hm", "hm</think>So", "</think><think>", "")
    lost = verdict([sample((0, 1), None, "truncated", text) for text in texts])
    for opens, count in ((False, 1), (True, 3)):
        tally = Tally()
        tally.add(lost, opens)
        assert tally.facts()["cut_while_thinking"] == count


def test_in_vain() -> None:
    lost = verdict([sample((0, 1), None, "missing")])
    for outcomes, in_vain in (
        ([lost], True), ([lost, OUTCOMES[-1]], True), ([OUTCOMES[-1]], False), ([], False),
        ([lost, OUTCOMES[0]], False),
    ):  # fmt: skip
        tally = Tally()
        for outcome in outcomes:
            tally.add(outcome)
        assert tally.is_in_vain == in_vain


def test_nothing_is_shared_by_nobody() -> None:
    facts = Tally().facts()
    assert facts["valid_share"] is facts["accuracy_95"] is facts["first_wins"] is None
    tally = Tally()
    tally.add(LineFacts(k=32, k_used=6, valid=6, votes=6, samples=[SampleFacts()] * 6))
    assert tally.samples == 6


def test_the_interval_is_wilsons() -> None:
    """Against figures of Newcombe (1998), table I."""
    for successes, n, low, high in (
        (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718), (29, 29, 0.8830, 1.0),
    ):  # fmt: skip
        assert wilson(successes, n) == pytest.approx((low, high), abs=6e-5)


def test_a_line_that_is_known_is_counted_when_no_other_is_kept() -> None:
    tally, line = Tally(), "  Score: " + "7" * 100
    lost = [f"score {i}" for i in range(1000)]
    for text in (line, *lost, line, line, "one score more"):
        tally.add(verdict([sample((0, 1), None, "missing", text)]))
    assert tally.unread.most_common(1) == [(line.strip()[:80], 3)] and len(tally.unread) == 1000
