"""engine/view.py: what a person is shown, and what no untrusted text can do to the terminal."""

import math
import re
import unicodedata
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.request import Row, make_row
from engine.verdict import RowFailure, Sample, Verdict
from engine.view import escape, render_error, render_summary, render_verdict

HARMLESS = ("Zs", "Cn", "Co")  # unprintable for Python: wide blanks, unassigned, private
ANSI = re.compile(r"\x1b\[\d+m")


def sample(scores: tuple[int, ...] | None, order: tuple[int, ...], text: str = "") -> Sample:
    invalid = None if scores else "missing"
    return Sample(order, text, scores, invalid, None, 0, "box", [], [], [])


def verdict(*samples: Sample, best: int | None, **changes: object) -> Verdict:
    votes = [each.scores for each in samples if each.scores is not None]
    sums = [sum(column) for column in zip(*votes, strict=True)]
    result = Verdict(
        id="row-1", key="k", best=best, scores=sums or None,
        mean_scores=[total / len(votes) for total in sums] or None, tie=False, k=len(samples),
        valid=len(votes), votes=len(votes), samples=list(samples),
        prompt_tokens=1, tree_tokens=1, decode_tokens=1,
    )  # fmt: skip
    return replace(result, **changes)  # type: ignore[arg-type]


ROW = make_row("Which sum is right?", ["1 + 1 = 3", "1 + 1 = 2"], id="row-1", label=1)
VERDICT = verdict(
    sample((8, 2), (0, 1), "the first one"),
    sample((1, 9), (1, 0), "turned around"),
    sample((2, 8), (0, 1), "Criteria: right 100 %\nAnalysis: [1] adds up"),
    sample(None, (1, 0), "rambling"),
    best=1,
    label=1,
    correct=True,
)


def test_a_verdict_for_a_person() -> None:
    assert render_verdict(ROW, VERDICT, 60, color=False).splitlines() == [
        "─" * 60,
        "Row row-1",
        "User",
        "  Which sum is right?",
        "Response [0]",
        "  1 + 1 = 3",
        "Response [1]",
        "  1 + 1 = 2",
        "Judgement 3 of 4, which saw [0] [1]",
        "  Criteria: right 100 %",
        "  Analysis: [1] adds up",
        "Scores, summed over the votes",
        "   [0] " + "█" * 14 + "░" * 10 + " 11  mean 3.67",
        "   [1] " + "█" * 24 + " 19  mean 6.33  <- best",
        "Best: [1], as labelled; 3 of 4 samples valid.",
        "Samples prefer: [1] 2  [0] 1; [1] leads the sum by 8 of 19.",
    ]


def test_colour_changes_nothing_but_colour() -> None:
    plain = render_verdict(ROW, VERDICT, 80, color=False)
    painted = render_verdict(ROW, VERDICT, 80, color=True)
    assert "\x1b" not in plain
    assert painted != plain and ANSI.sub("", painted) == plain


def test_the_sample_shown_agrees_with_the_verdict() -> None:
    turned = verdict(
        sample((8, 2), (0, 1), "says 0"),
        sample((5, 5), (0, 1), "says both"),
        sample((1, 9), (1, 0), "says 1"),
        best=1,
    )
    assert "Judgement 3 of 3, which saw [1] [0]" in render_verdict(ROW, turned, 80, False)
    # The sum can have a winner that no sample has: then any vote, rather than an invalid sample.
    split = verdict(sample(None, (0, 1), "nothing"), sample((8, 2), (0, 1), "says 0"), best=1)
    assert "says 0" in render_verdict(ROW, split, 80, False)


def test_no_vote() -> None:
    text = render_verdict(ROW, verdict(sample(None, (0, 1)), best=None), 80, False)
    assert "  (empty)" in text and "No valid scores: missing" in text
    assert "No verdict: no sample voted; 0 of 1 samples valid." in text
    assert "█" not in text and "prefer" not in text
    labelled = verdict(sample(None, (0, 1)), best=None, label=1, correct=False)
    text = render_verdict(ROW, labelled, 80, False)
    assert "No verdict: no sample voted, where the label says [1]; 0 of 1 samples valid." in text


def test_ties_wrong_labels_and_meta_votes() -> None:
    tied = verdict(
        sample((4, 4), (0, 1)), sample((2, 2), (0, 1)),
        best=0, tie=True, label=(0.0, 1.0), correct=False, votes=1,
    )  # fmt: skip
    text = render_verdict(ROW, tied, 80, False)
    assert "<- best (drawn from a tie)" in text
    assert "Best: [0], but the label says [1]; 2 of 2 samples valid, 1 of them voted." in text
    assert text.endswith("\nSamples prefer: tied 2.")
    for unguided, told in ((1, "; all alike would have chosen [1]."), (0, "."), (None, ".")):
        text = render_verdict(ROW, replace(tied, unguided_best=unguided), 200, False)
        assert f"2 of 2 samples valid, 1 of them voted{told}\n" in text


def test_what_samples_prefer_need_not_be_what_the_sum_says() -> None:
    scores = [*[(3, 4, 5)] * 15, *[(1, 9, 2)] * 6, *[(9, 2, 8)] * 4, *[(7, 7, 1)] * 7, None]
    row = make_row("p", ["a", "b", "c"])
    text = render_verdict(row, verdict(*(sample(s, (0, 1, 2)) for s in scores), best=1), 80, False)
    sums = [sum(s[i] for s in scores if s is not None) for i in range(3)]
    assert sums == [136, 171, 126]
    assert text.endswith(
        "\nSamples prefer: [2] 15  [1] 6  [0] 4  tied 7; [1] leads the sum by 35 of 171."
    )


def test_a_sample_that_was_cut_ends_in_an_ellipsis() -> None:
    text = "I think that respon"
    cut = replace(sample(None, (0, 1), text), finish="length", invalid="truncated")
    lost = render_verdict(ROW, verdict(cut, best=None), 80, False)
    assert "\n  I think that respon…\n  No valid scores: truncated\n" in lost
    forced = replace(sample((1, 2), (0, 1), text), finish="length", forced=True)
    for whole in (sample((1, 2), (0, 1), text), forced):
        assert "…" not in render_verdict(ROW, verdict(whole, best=1), 80, False)
    long = replace(cut, text="x" * 9000)
    assert render_verdict(ROW, verdict(long, best=None), 80, False).count("…") == 1


def test_a_row_decided_early() -> None:
    text = render_verdict(ROW, replace(VERDICT, k=32, k_used=4), 100, color=False)
    assert "Judgement 3 of 4, which saw [0] [1]" in text
    assert "3 of 4 samples valid, decided before the other 28." in text


def test_meta_scores() -> None:
    """The sample shown agrees with the verdict, and is the best of these for the meta model."""
    metas = (-0.5, 0.125, 3.0, None, math.nan)
    samples = [
        replace(sample(scores, order, text), meta=meta)
        for meta, scores, order, text in zip(
            metas,
            ((1, 9), (2, 8), (8, 2), None, (1, 9)),
            ((0, 1), (1, 0), (0, 1), (0, 1), (0, 1)),
            ("in order", "thought more of", "disagrees", "rambling", "no score"),
            strict=True,
        )
    ]
    text = render_verdict(ROW, verdict(*samples, best=1, votes=3), 80, color=False)
    assert "Judgement 2 of 5, which saw [1] [0]\n  thought more of\n" in text
    assert (
        "Meta scores of the samples; the highest 3 vote\n  -0.50  0.12  3.00  none  none\n" in text
    )
    assert "4 of 5 samples valid, 3 of them voted." in text


@pytest.mark.parametrize(("label", "words"), [(0, "but the label says wrong"), (1, "as labelled")])
def test_one_response(label: int, words: str) -> None:
    row = make_row("p", ["r"], label=label)
    one = verdict(
        sample((2,), (0,), "far"), sample((6,), (0,), "near"), sample((9,), (0,), "far"),
        best=0, label=label, correct=label == 1,
    )  # fmt: skip
    text = render_verdict(row, one, 80, False)
    assert "near" in text and "far" not in text
    assert f"Mean score 5.67, {words}; 3 of 3 samples valid." in text
    assert "<- best" not in text


def test_scores_below_zero_have_bars_too() -> None:
    text = render_verdict(ROW, verdict(sample((-4, 4), (0, 1)), best=1), 80, False)
    assert "   [0] " + "░" * 24 + " -4" in text
    assert "   [1] " + "█" * 24 + "  4" in text


def test_long_texts_are_cut() -> None:
    row = make_row("word " * 2000, ["x" * 5000, "line\n" * 1000], reference="r", principles="q")
    text = render_verdict(row, VERDICT, 80, False)
    assert len(text.splitlines()) < 60
    assert "  … (10,000 characters in all)" in text
    assert "Reference\n  r\nPrinciples\n  q\n" in text


def test_failures() -> None:
    failure = RowFailure("row-1", 7, "k", "too long: \x1b[31m")
    assert render_error(failure, 80, False) == r"Not judged: line 7: too long: \x1b[31m"
    text = render_verdict(ROW, failure, 80, False)
    assert text.startswith("─") and text.endswith(render_error(failure, 80, False))


SUMMARY = {
    "rows": 5, "errors": 1, "interrupted": False, "seconds": 2.0, "accuracy": 0.75,
    "accuracy_95": (0.3, 0.95), "accuracy_of_decided": 0.75, "unguided_accuracy": None,
    "ties": 3, "ties_agreed": 2, "valid_share": 0.9, "forced": 2, "undecided": 1,
    "invalid": {"missing": 3, "count": 1}, "cut_while_thinking": 0, "unread_line": "Score: 7\x1b",
    "first_wins": 0.6, "first_wins_95": (0.5, 0.7), "first_wins_expected": 0.5,
    "tokens_computed": 1000, "tokens_naive": 4200, "tokens_per_second": 500.0,
}  # fmt: skip


def test_summary() -> None:
    text = " ".join(render_summary(SUMMARY, 80).splitlines())
    assert "5 rows in 2.0 s; 1 not judged; 75% agree with the label" in text
    assert "interval 30% to 95%); 2 of 3 ties agree; 1 without a verdict; 90.0% of" in text
    assert "samples valid; 2 of them had their scores forced; the others: 3" in text
    assert r"missing, 1 count; their commonest line of scores: Score: 7\x1b; the" in text
    assert "the response shown first wins 60% of judgements" in text
    assert "(95 % interval 50% to 70%; 50% expected)." in text
    assert "1,000 tokens computed at 500 tokens/s" in text
    assert "would compute 4,200 (4.2 times as many)." in text
    guided = render_summary(SUMMARY | {"unguided_accuracy": 0.5}, 200)
    assert "interval 30% to 95%); 50% would without the meta model; 2 of" in guided
    some = render_summary(SUMMARY | {"accuracy_of_decided": 1.0}, 200)
    assert "95%); 100% of those with a verdict do; 2 of 3 ties" in some
    none = render_summary(SUMMARY | {"accuracy": 0.0, "accuracy_of_decided": None}, 200)
    assert "label" not in none and "1 without a verdict" in none
    empty = SUMMARY | {"accuracy": None, "accuracy_95": None, "valid_share": None, "rows": 0}
    empty |= {
        "accuracy_of_decided": None,
        "ties": 0,
        "forced": 0,
        "undecided": 0,
        "invalid": {},
        "unread_line": None,
        "first_wins": None,
    }
    empty |= {"tokens_computed": 0, "tokens_naive": 0, "interrupted": True}
    assert render_summary(empty, 80).startswith("0 rows in 2.0 s; interrupted; 1 not judged.\n0 ")


# Hostile text


def test_escape() -> None:
    assert escape("a\tb\r\nc\nd\re") == "a    b\nc\nd\\re"
    assert escape("\x00\x1b[2J\x7f\x9b") == r"\x00\x1b[2J\x7f\x9b"
    assert escape("\u202eabc\u2066\u200f\ufeff\u2028\udc80") == (
        r"\u202eabc\u2066\u200f\ufeff\u2028\udc80"
    )
    untouched = "é ﬁ 漢字 नमस्\u200dते \U0001f469\u200d\U0001f4bb \u3000"
    assert escape(untouched) == untouched


@given(st.text(max_size=60), st.text(max_size=200), st.integers(40, 100))
def test_no_text_steers_the_terminal(word: str, text: str, width: int) -> None:
    row = Row(f"id{word}", ROW.messages, (text, word), 1, text, word, None, "")
    shown = render_verdict(row, verdict(sample((1, 2), (0, 1), text), best=1), width, color=False)
    for character in shown:
        category = unicodedata.category(character)
        assert character in "\n\u200c\u200d" or character.isprintable() or category in HARMLESS
    assert all(len(line) <= width for line in shown.split("\n"))
    assert not ANSI.search(shown)


def test_other_votes_are_named() -> None:
    """Sums of points have two decimals; one response keeps its score, whatever the rule."""
    changed = {"scores": [0.75, 2.25], "mean_scores": [0.25, 0.75], "vote": "borda"}
    text = render_verdict(ROW, replace(VERDICT, **changed), 80, color=False)  # type: ignore[arg-type]
    assert "Responses scored lower, summed over the votes" in text
    assert "2.25  mean 0.75  <- best" in text and "leads the sum by 1.50 of 2.25" in text
    weighed = verdict(
        replace(sample((7,), (0,)), meta=0.5), replace(sample((9,), (0,)), meta=-1.0), best=0,
        vote="borda", meta_vote="weight", scores=[9.0], mean_scores=[7.36],
    )  # fmt: skip
    text = render_verdict(make_row("q", ["a"], id="row-1"), weighed, 80, color=False)
    assert "the higher, the more a vote weighs" in text
    assert "Scores, summed over the votes" in text and "Mean score 7.36" in text
