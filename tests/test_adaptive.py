"""The adaptive bench: replays by hand, and a small run from the command line."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import adaptive
from bench.adaptive import Recorded, RecordedSample
from engine import sample
from engine.settings import JudgeSettings

SETTINGS = JudgeSettings()
Votes = list[tuple[int, ...] | None]


def make_row(votes: Votes, label: int | None = None) -> Recorded:
    samples = [RecordedSample((0, 1) if i % 2 else (1, 0), v, 5 + i) for i, v in enumerate(votes)]
    valid = [vote for vote in votes if vote is not None]
    best = int(np.sum(valid, axis=0).argmax()) if valid else None
    return Recorded(samples, len(votes), best, label)


CLEAR: Votes = [(9, 2), (10, 1)] * 8
TURNS: Votes = [(9, 2), (10, 1), (9, 2), (10, 1), *[(1, 10)] * 12]
NONE: Votes = [None] * 16


def test_a_replay_draws_what_the_rule_says() -> None:
    drawn = [adaptive.replay(make_row(votes), 0.99, SETTINGS) for votes in (CLEAR, TURNS, NONE)]
    assert drawn == [4, 4, 16]
    assert adaptive.replay(make_row([(5, 5)] * 9), 0.99, SETTINGS) == 9


def test_agreement() -> None:
    assert adaptive.agreement(make_row(CLEAR), 4, 5.5) == 1.0
    assert adaptive.agreement(make_row(TURNS), 4, 5.5) == 0.0
    assert adaptive.agreement(make_row(NONE), 4, 5.5) == 1.0
    assert adaptive.agreement(make_row([(5, 5), *CLEAR]), 1, 5.5) == 0.5
    assert adaptive.agreement(make_row([None, *CLEAR]), 1, 5.5) == 0.0
    assert adaptive.agreement(make_row([(5,), (7,), (8,)]), 1, 5.5) == 0.0
    assert adaptive.agreement(make_row([(6,), (7,), (8,)]), 1, 5.5) == 1.0


def test_figures() -> None:
    rows = [make_row(CLEAR, 0), make_row(TURNS, 0), make_row(NONE, 1), make_row(CLEAR)]
    found = adaptive.figures(rows, 0.99, SETTINGS)
    assert found["samples"]["mean"] == (4 + 4 + 16 + 4) / 64
    assert found["tokens"] == (3 * 26 + 200) / (4 * 200)  # 5, 6, 7, 8 of 5 to 20
    assert found["agreement"]["mean"] == 0.75
    assert found["agreement_of_a_fixed_k"] == 0.75  # of 7, where 3 of the turning row's votes fell
    assert found["accuracy"] == pytest.approx(2 / 3)  # the row that turns was right before
    assert found["accuracy_of_full_k"] == pytest.approx(1 / 3)
    assert found["rows_with_all_k"] == 1


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"{}", "line 1 is no verdict"),
        (b'{"k": 2, "best": 0, "samples": []}', "line 1 has 0 of 2 samples"),
    ],
)
def test_lines_that_cannot_be_replayed(line: bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        adaptive.read_recorded([line])


def test_what_is_sampled_and_what_was_written_give_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command with its own samples, and with the lines of engine.sample for the same rows."""

    def run(main: Callable[[], Any], *options: str) -> str:
        monkeypatch.setattr(sys, "argv", ["adaptive", *options])
        main()
        return capsys.readouterr().out

    data, out = tmp_path / "rows.jsonl", tmp_path / "verdicts.jsonl"
    row = {"prompt": "copy a b", "responses": ["a b", "b"], "label": 0}
    data.write_text("".join(json.dumps({"id": str(i), **row}) + "\n" for i in range(2)))
    options = ["--data", str(data), "--k", "6", "--max-new-tokens", "120"]
    run(sample.main, *options, "--out", str(out))
    levels = ["--until-decided", "0.6", "0.99"]
    now, replayed = (
        json.loads(run(adaptive.main, *options, *levels).splitlines()[-1])
        for options in (options, ["--verdicts", str(out)])
    )
    assert now.pop("run") and replayed.pop("run")
    assert replayed == now
    assert now["rows"] == 2 and [each["until_decided"] for each in now["levels"]] == [0.6, 0.99]
