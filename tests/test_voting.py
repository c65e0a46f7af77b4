"""The voting bench: curves against brute force, and a small run from the command line."""

import json
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from bench import voting
from bench.evaluate.curves import SUBSETS
from engine.labels import chance_correct
from engine.verdict import Sample, Verdict

ROOT = Path(__file__).parent.parent


def make_verdict(name: str, votes: list[tuple[int, ...] | None], label: int) -> Verdict:
    samples = [
        Sample((0, 1), "", scores, None if scores else "missing", None, 1, "box", [], [], [])
        for scores in votes
    ]
    return Verdict(
        name, "", None, None, None, False, len(votes), 0, 0, samples, 0, 0, 0, label=label
    )


def test_chance_correct() -> None:
    assert chance_correct([(5, 3), (2, 3)], 0, 5.5) == 1.0
    assert chance_correct([(5, 3), (2, 4)], 0, 5.5) == 0.5
    assert chance_correct([(5, 3, 5), (2, 4, 2)], [1.0, 3.0, 2.0], 5.5) == pytest.approx(1 / 3)
    assert chance_correct([(6,), (5,)], 1, 5.5) == 0.0
    assert chance_correct([(6,), (5,)], 0, 5.5) == 1.0
    assert chance_correct([], 0, 5.5) == 0.0


def test_the_curve_is_the_mean_over_subsets() -> None:
    rng = np.random.default_rng(3)
    votes = [tuple(int(x) for x in rng.integers(1, 4, 2)) if i != 2 else None for i in range(6)]
    verdicts = [make_verdict(f"x{i}", votes, 0) for i in range(40)]
    curve = voting.voting_curve(verdicts, 6, 5.5)
    assert list(curve) == [1, 2, 4, 6]
    for size, right in curve.items():
        exact = np.mean([
            chance_correct([v for i in chosen if (v := votes[i]) is not None], 0, 5.5)
            for chosen in combinations(range(6), size)
        ])  # fmt: skip
        assert abs(right.mean() - exact) < 4 * 0.5 / np.sqrt(40 * SUBSETS) + 1e-12
    assert np.ptp(curve[6]) == 0


def test_a_row_without_a_label_is_refused(tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "p", "responses": ["a", "b"]}\n')
    with pytest.raises(ValueError, match="line 1: no label"):
        voting.read_labelled(data, "final", 10, 0)


def test_the_command_ends_in_one_json_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["voting", "--rows", "3", "--k", "2", "--max-new-tokens", "30",
             "--temperatures", "0", "1", "--plot", str(tmp_path / "curve.png")]  # fmt: skip
    monkeypatch.setattr(sys, "argv", words)
    voting.main()
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["rows"] == 3
    assert [list(run["accuracy"]) for run in figures["runs"]] == [["1"], ["1", "2"]]
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
