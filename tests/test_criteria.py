"""The criteria bench: the teacher makes no mistakes, and mistakes are seen."""

import random
from collections import Counter
from itertools import islice

from bench.criteria import count
from train.world.cases import CRITERIA, cases, judge, list_criteria


def test_the_teacher_is_right_and_a_slip_is_seen() -> None:
    rng = random.Random(0)
    counts: Counter[str] = Counter()
    slips: Counter[str] = Counter()
    for case in islice(cases(4, "dev"), 60):
        order = tuple(range(len(case.responses)))
        text = judge(case, list_criteria(case, rng))[0]
        count(case, order, text, counts)
        count(case, order, text.replace(" yes,", " no,", 1), slips)
    assert counts["unparsed"] == 0 and counts["judgements"] == 60
    assert counts["right"] == counts["checks"] > 300
    assert counts["right sums"] == counts["sums"] > 60
    assert sum(counts[f"listed {name}"] for name in CRITERIA) == counts["listed"] == 180
    assert counts["weighted"] > 0.97 * counts["listed"]
    assert slips["right"] < slips["checks"] and slips["right sums"] < slips["sums"]


def test_another_order_is_followed() -> None:
    case = next(case for case in cases(5, "dev") if len(case.responses) == 3)
    counts: Counter[str] = Counter()
    text = judge(case, list_criteria(case, random.Random(1)))[0]
    lines = text.split("\n")
    shown = {line.split(":")[0]: line for line in lines}
    order = (2, 0, 1)
    moved = [
        shown[f"Response {order[int(line.split()[1][0]) - 1] + 1}"].replace(
            f"Response {order[int(line.split()[1][0]) - 1] + 1}", line.split(":")[0]
        )
        if line.startswith("Response ")
        else line
        for line in lines
    ]
    count(case, order, "\n".join(moved), counts)
    assert counts["right"] == counts["checks"] == 9


def test_nonsense_is_counted_as_unparsed() -> None:
    case = next(cases(6, "dev"))
    counts: Counter[str] = Counter()
    for text in ("", "Specific Criteria: taste 5", "Response 9: x yes, 1=1\nScores: \\boxed{}"):
        count(case, (0,), text, counts)
    assert counts["unparsed"] == 3
