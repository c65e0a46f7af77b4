"""train/sources.py: labelled rows of a file, and which of them are held out for evaluation."""

import hashlib
import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.request import Row, make_row
from train.sources import hold_out, labelled_rows


def row(prompt: int, number: int = 0) -> Row:
    return make_row(f"task {prompt}", ["a", "b"], id=f"{prompt}-{number}", label=0)


def prompts(rows: list[Row]) -> set[str]:
    return {each.messages[0].content for each in rows}


def rank(each: Row) -> str:
    turns = [[message.role, message.content] for message in each.messages]
    return hashlib.sha256(json.dumps(turns).encode()).hexdigest()


# Rows as the numbers of their prompts, five of them or more, some of which have several rows.
SETS = st.lists(st.integers(0, 20), min_size=5, max_size=60).filter(lambda n: len(set(n)) >= 5)


def rows_of(numbers: list[int]) -> list[Row]:
    return [row(prompt, number) for number, prompt in enumerate(numbers)]


@given(numbers=SETS, most=st.integers(1, 12), data=st.data())
def test_sides_are_disjoint_and_complete_in_any_order(
    numbers: list[int], most: int, data: st.DataObject
) -> None:
    rows = rows_of(numbers)
    try:
        training, evaluation = hold_out(rows, most)
    except ValueError as error:
        assert f"more than the {min(most, len(rows) // 5)} rows" in str(error)
        assert min(Counter(numbers).values()) > most  # a fifth alone always has room for one
        return
    assert Counter(each.id for each in training + evaluation) == Counter(each.id for each in rows)
    assert not prompts(training) & prompts(evaluation)
    assert 0 < len(evaluation) <= min(most, len(rows) // 5)
    assert training == [each for each in rows if each in training]
    again = hold_out(data.draw(st.permutations(rows)), most)
    assert again[1] == evaluation
    assert sorted(each.id for each in again[0]) == sorted(each.id for each in training)


@given(size=st.integers(5, 60), most=st.integers(1, 12))
def test_conversations_of_one_row_are_held_out_by_their_hash(size: int, most: int) -> None:
    """Those with the lowest; of a larger set, what is held out no more has the highest of them."""
    rows = [row(prompt) for prompt in range(size)]
    _, evaluation = hold_out(rows, most)
    assert evaluation == sorted(rows, key=rank)[: min(most, size // 5)]
    more = hold_out([*rows, *(row(prompt) for prompt in range(size, 2 * size))], most)[1]
    kept = [each for each in evaluation if each in more]
    assert kept == evaluation[: len(kept)]


def test_a_conversation_that_does_not_fit_is_passed_over() -> None:
    """Where the first in the order of hashes has more than a fifth of the rows."""
    ranked = sorted((row(prompt) for prompt in range(5)), key=rank)
    first = int(ranked[0].messages[0].content.split()[1])
    rows = [*ranked[1:], *(row(first, number) for number in range(4))]
    training, evaluation = hold_out(rows, 10)
    assert evaluation == [ranked[1]] and len(training) == 7


def test_too_few_conversations_are_told() -> None:
    with pytest.raises(ValueError, match=r"^4 distinct prompts are too few .* 5: .*--eval-data"):
        hold_out(rows_of([0, 1, 2, 3, 3, 3, 3, 3, 3, 3]), 2)
    with pytest.raises(ValueError, match=r"^0 distinct prompts are too few"):
        hold_out([], 2)
    with pytest.raises(ValueError, match=r"each prompt has more than the 1 rows .*--eval-data"):
        hold_out(rows_of([0, 1, 2, 3, 4] * 2), 1)


def test_reasons_name_file_and_line(tmp_path: Path) -> None:
    """Of a label that is an empty list too."""
    path = tmp_path / "rows.jsonl"
    good = {"prompt": "p", "responses": ["a", "b"], "label": 1}
    bad = [good | {"responses": [], "label": []}, good | {"label": []},
           good | {"responses": ["a"], "label": []}]  # fmt: skip
    lines = [json.dumps(each).encode() for each in [good, *bad]]
    path.write_bytes(b"\n".join([*lines, b'{"prompt": 1, "prompt": 2}', b"\xff", b""]))
    rows, left_out = labelled_rows(path)
    assert [each.label for each in rows] == [1]
    reasons = ["0 responses", r"label [] is no index", "label [] is neither", "is repeated",
               "not UTF-8"]  # fmt: skip
    for number, reason in enumerate(reasons, 2):
        assert [r for r in left_out if r.startswith(f"{path}, line {number}: ") and reason in r]
    assert left_out.total() == len(left_out) == 5
    path.write_bytes(b"\n".join(lines[1:]))
    with pytest.raises(ValueError, match=r"no row with a label: 1 x .*rows\.jsonl, line 1: 0 resp"):
        labelled_rows(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"rows\.jsonl holds no row with a label: it is empty"):
        labelled_rows(path)
