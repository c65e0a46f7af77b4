"""engine/labels.py: labels as people write them, and whether scores agree with one."""

from typing import Any

import pytest

from engine.labels import (
    agrees,
    best_of,
    chance_right,
    gold_index,
    is_correct,
    is_right,
    read_label,
)


@pytest.mark.parametrize(
    ("label", "n", "read"),
    [
        (0, 2, 0), (1, 2, 1), ("1", 2, 1), (1.0, 2, 1), ("B", 2, 1), ("C", 3, 2), (" 2 ", 3, 2),
        ("A>B", 2, 0), ("B>A", 2, 1), ("A>>B", 2, 0), ("B > A", 2, 1), ("A=B", 2, (1.0, 1.0)),
        ("tie", 3, (1.0, 1.0, 1.0)), ([0.5, 0.5], 2, (0.5, 0.5)), ([1, 2], 2, (1.0, 2.0)),
        ([2], 3, (0.0, 0.0, 1.0)), ([0, 2], 3, (1.0, 0.0, 1.0)), (None, 3, None),
        (0, 1, 0), (1, 1, 1), (True, 1, 1), (False, 1, 0), ("1", 1, 1), (0.0, 1, 0),
        ("error", 1, 0), ("no_error", 1, 1), ("Correct", 1, 1), ("wrong", 1, 0), (None, 1, None),
    ],
)  # fmt: skip
def test_labels_as_people_write_them(label: Any, n: int, read: Any) -> None:
    assert read_label(label, n) == read


@pytest.mark.parametrize(
    ("label", "n", "message"),
    [
        (2, 2, "label 2 is no index of 2 responses"), (-1, 2, "label -1"), (True, 2, "label True"),
        (0.5, 2, "label 0.5"), ("C", 2, "label 'C'"), ("A>A", 2, "label 'A>A'"), ({}, 2, "label"),
        ("A>B", 3, "label 'A>B'"), ([True, 0], 2, "True"), ([], 2, r"label \[\]"), ("", 2, "''"),
        ([1.0], 2, "1 gold scores for 2 responses"), ([1.0, 2.0, 3.0], 2, "3 gold scores"),
        ([0, 0], 3, "2 gold scores"), ([0, 3], 4, None), ([0, 4], 4, "2 gold scores"),
        (["0", "1"], 2, "label"), (10**4000, 2, "label 1000"), ("9999", 2, "label '9999'"),
        (2, 1, "neither 0 .wrong. nor 1"), ([0.5], 1, "neither 0"), ("maybe", 1, "'maybe' is nei"),
        ([], 1, "neither 0"),
    ],
)  # fmt: skip
def test_labels_that_say_nothing(label: Any, n: int, message: str | None) -> None:
    if message is None:
        assert read_label(label, n) is not None
        return
    with pytest.raises(ValueError, match=message) as error:
        read_label(label, n)
    assert len(str(error.value)) < 300


def test_best_responses() -> None:
    assert best_of(3) == (3,) and gold_index(3) == 3
    assert best_of([-2.0, -1.0, -3.0]) == (1,) and gold_index([-2.0, -1.0, -3.0]) == 1
    assert best_of([1.0, 0.0, 1.0]) == (0, 2)


@pytest.mark.parametrize(
    ("best", "means", "label", "correct", "agreement"),
    [
        (0, [8.0, 2.0], 0, True, None), (1, [2.0, 8.0], 0, False, None),
        (None, None, 0, False, None), (0, [8.0, 2.0], None, None, None),
        (1, [2.0, 8.0], (1.0, 3.0), True, None),
        (1, [2.0, 8.0, 2.0], (0.0, 1.0, 1.0), None, True),
        (0, [8.0, 2.0, 2.0], (0.0, 1.0, 1.0), None, False), (None, None, (1.0, 1.0), None, False),
        (0, [6.0], 1, True, None), (0, [5.5], 1, False, None), (0, [5.0], 0, True, None),
    ],
)  # fmt: skip
def test_a_vote(best: Any, means: Any, label: Any, correct: Any, agreement: Any) -> None:
    assert is_correct(best, means, label, 5.5) is correct
    assert agrees(best, label) is agreement


def test_a_judgement_and_the_chance_of_one() -> None:
    for scores, label, chance in (
        ((8, 2), 0, 1.0), ((5, 5), 0, 0.5), ((5, 5, 1), 2, 0.0), ((5, 5, 5), 1, 1 / 3),
        ((5, 5, 1), (1.0, 1.0, 0.0), 1.0), ((5, 1, 5), (1.0, 1.0, 0.0), 0.5), ((6,), 1, 1.0),
        ((5,), 1, 0.0), ((5,), 0, 1.0),
    ):  # fmt: skip
        assert chance_right(scores, label, 5.5) == pytest.approx(chance)
        assert is_right(scores, label, 5.5) == (chance == 1)
    assert not is_right(None, 0, 5.5)
