"""Verdicts as other published judges write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.formats import FORMATS, read_verdict
from kernels.score_grammar import Outcome, Reason

TIE, LOST = (Reason.VALID, (5, 5)), (Reason.MISSING, ())
FIRST, SECOND = (Reason.VALID, (5, 1)), (Reason.VALID, (1, 5))
# Scores are from 1 to 5. Every expected value was written by hand.
CASES: list[tuple[str, str, int, Outcome]] = [
    ("pairwise", "The first is right.\n<answer>[[A]]</answer>", 2, FIRST),
    ("pairwise", "My final verdict is: [[B]].", 2, SECOND),
    ("pairwise", "[[A]] or [[B]]? I choose [[B]]", 2, SECOND),
    ("pairwise", "[[C]]", 2, TIE),
    ("pairwise", "[[C]]", 3, (Reason.VALID, (1, 1, 5))),
    ("pairwise", "[[D]]", 3, (Reason.RANGE, ())),
    ("pairwise", "<think>[[A]]</think>\n[[B]]", 2, SECOND),
    ("pairwise", "[[B]]\n<think>[[A]]", 2, SECOND),
    ("pairwise", "[A] [[a]] [[AB]]", 2, LOST),
    ("pairwise", "Good. Rating: [[4]]", 1, (Reason.VALID, (4,))),
    ("pairwise", "[[2]], no: [[ 4 ]]", 1, (Reason.VALID, (4,))),
    ("pairwise", "[[7]]", 1, (Reason.RANGE, ())),
    ("pairwise", "[[4.5]]", 1, (Reason.NOT_AN_INTEGER, ())),
    ("pairwise", "[[A]]", 1, (Reason.NOT_AN_INTEGER, ())),
    ("pairwise", "[4]", 1, LOST),
    ("pairwise", "[[4]]", 2, LOST),
    ("answer-tags", "<think>7 and 3</think><answer>4</answer><answer>2</answer>", 2,
     (Reason.VALID, (4, 2))),
    ("answer-tags", "<answer> 4, 2 </answer>", 2, (Reason.VALID, (4, 2))),
    ("answer-tags", "<answer>1</answer><answer>4</answer><answer>2</answer>", 2,
     (Reason.VALID, (4, 2))),
    ("answer-tags", "<answer>4</answer>", 2, (Reason.COUNT, ())),
    ("answer-tags", "<answer>4.5</answer><answer>2</answer>", 2, (Reason.NOT_AN_INTEGER, ())),
    ("answer-tags", "<answer>7</answer><answer>2</answer>", 2, (Reason.RANGE, ())),
    ("answer-tags", "<answer>4</answer", 2, LOST),
    ("json", '{"thoughts": "{}", "scores": {"model-2": 2, "model-1": 4}, "best-to-worst": []}', 2,
     (Reason.VALID, (4, 2))),
    ("json", '```json\n{"scores": {"Model-1": "4", "model-2": 2.0}}\n```', 2,
     (Reason.VALID, (4, 2))),
    ("json", 'A draft: {"scores": {"model-1": 1, "model-2": 1}} and {"scores": {"model-1": 4, '
     '"model-2": 2}}', 2, (Reason.VALID, (4, 2))),
    ("json", '{"scores": {"model-1": 4, "model-3": 2}}', 2, (Reason.COUNT, ())),
    ("json", '{"scores": {"model-1": 4, "MODEL-1": 3, "model-2": 2}}', 2, (Reason.COUNT, ())),
    ("json", '{"scores": {"model-1": true, "model-2": 2}}', 2, (Reason.NOT_AN_INTEGER, ())),
    ("json", '{"scores": {"model-1": 4, "model-2": NaN}}', 2, (Reason.NOT_AN_INTEGER, ())),
    ("json", '{"scores": [4, 2]}', 2, LOST),
    ("json", '{"scores": {"model-1": 4', 2, LOST),
    ("rating", "Feedback: good. [RESULT] 4", 1, (Reason.VALID, (4,))),
    ("rating", "Feedback: [RESULT] 2? no. [RESULT] (4)", 1, (Reason.VALID, (4,))),
    ("rating", "[RESULT] 9", 1, (Reason.RANGE, ())),
    ("rating", "[RESULT] 4", 2, (Reason.COUNT, ())),
    ("rating", "[RESULT] B", 2, SECOND),
    ("rating", "[RESULT] A", 1, (Reason.NOT_AN_INTEGER, ())),
    ("rating", "[RESULT] Bad", 2, LOST),
]  # fmt: skip


@pytest.mark.parametrize(("format", "text", "n", "expected"), CASES)
def test_written_cases(format: str, text: str, n: int, expected: Outcome) -> None:
    assert read_verdict(format, text, n, 1, 5, True) == expected
    cut = (Reason.TRUNCATED, ()) if expected == LOST else expected
    assert read_verdict(format, text, n, 1, 5, False) == cut


@given(
    st.sampled_from([*FORMATS]),
    st.one_of(
        st.text(max_size=60),
        st.lists(
            st.sampled_from(
                [*'{}[],:"', "[[A]]", "[[4]]", "[[", "]]", "<answer>", "</answer>", "4", "scores",
                 "\n", '"scores": {', '"model-1": 3', "[RESULT] ", "B", "<think>", "</think>",
                 "9" * 5000, "[" * 5000, "-1", "1e9"]
            ),
            max_size=12,
        ).map("".join),
    ),
    st.integers(1, 4),
)  # fmt: skip
def test_no_text_crashes_a_reader(format: str, text: str, n: int) -> None:
    reason, scores = read_verdict(format, text, n, 1, 5, True)
    assert len(scores) == (n if reason == Reason.VALID else 0)
    assert all(1 <= score <= 5 for score in scores)
