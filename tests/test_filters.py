"""The filters' bench: halves by hand, AUCs by brute force, and a small run."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from bench import filters
from engine.verdict import Sample, Verdict

THRESHOLD = 5.5


def verdict_of(
    samples: Sequence[tuple[tuple[int, ...] | None, float | None, int, float]],
) -> Verdict:
    """Of judgements of two responses, the first of which is the best: scores, meta score, tokens,
    mean log-prob. The first response's expected score is 2 above the one drawn."""
    made = [
        Sample((0, 1), "", scores, None if scores else "none", meta, tokens, "box", [], [logp], [],
               expected=None if scores is None else (scores[0] + 2.0, *scores[1:]))
        for scores, meta, tokens, logp in samples
    ]  # fmt: skip
    return Verdict("x", "", None, None, None, False, len(made), 0, 0, made, 0, 0, 0, label=0)


def test_each_filter_keeps_its_half() -> None:
    """With all four votes [1] wins; what each half comes to was added up by hand."""
    verdict = verdict_of([
        ((5, 4), 0.1, 9, -0.9),  # right
        ((5, 7), 0.3, 1, -0.8),
        ((6, 5), 0.9, 8, -0.1),  # right
        ((2, 9), 0.2, 2, -0.2),
    ])  # fmt: skip
    found = filters.row_curves(verdict, THRESHOLD, np.random.default_rng(0))
    assert set(found) == set(filters.NAMES) and all(list(found[f]) == [1, 2, 4] for f in found)
    at_4 = {name: sizes[4] for name, sizes in found.items() if name != "random"}
    assert at_4 == {
        "all": 0.0,  # 18 to 25
        "meta": 0.0,  # (5, 7) and (6, 5): 11 to 12
        "shortest": 0.0,
        "likeliest": 0.0,  # (6, 5) and (2, 9)
        "clearest": 0.0,  # (2, 9) and (5, 7)
        "oracle": 1.0,
        "weighed": 0.0,  # weights .45, .55, 1, .50 of leads 1, -2, 1, -7
        "standardised": 0.5,  # two against two
        "standardised, weighed": 1.0,
        "borda": 0.5,
        "borda, weighed": 1.0,
        "expected": 1.0,  # 26 to 25
    }
    assert abs(found["all"][1] - 0.5) < 0.2  # one of four, two of which are right
    trusted = verdict_of([((9, 1), 2.0, 1, 0.0), ((1, 9), 1.0, 1, 0.0), (None, None, 1, 0.0),
                          ((1, 9), np.nan, 1, 0.0)])  # fmt: skip
    found = filters.row_curves(trusted, THRESHOLD, np.random.default_rng(0))
    assert found["meta"][4] == 0.5 and found["all"][4] == 0.0  # NaN is not trusted


def test_aucs_are_those_of_all_pairs() -> None:
    rng = np.random.default_rng(1)
    for _ in range(30):
        samples = [
            ((int(a), int(b)), float(m), 1, 0.0)
            for a, b, m in zip(*rng.integers(1, 4, (3, 6)), strict=True)
        ]
        right = [a > b for (a, b), *_ in samples]
        pairs = [(i, j) for i in range(6) for j in range(6) if right[i] and not right[j]]
        for value in (filters._meta, lambda s: filters.lead(s, THRESHOLD)):
            verdict = verdict_of(samples)
            scores = [value(sample) for sample in verdict.samples]
            wins = [(scores[i] > scores[j]) + (scores[i] == scores[j]) / 2 for i, j in pairs]
            found = filters.auc_within(verdict, THRESHOLD, value)
            assert found == (pytest.approx(np.mean(wins)) if wins else None)


def test_how_far_ahead_the_best_is() -> None:
    sample = verdict_of([((5, 4), None, 1, 0.0)]).samples[0]
    for scores, expected in (((5, 4), 1), ((3, 8, 8), 0), ((2, 9, 4), 5), ((3,), 2.5), ((9,), 3.5)):
        sample.scores = scores
        assert filters.lead(sample, THRESHOLD) == expected


def test_the_command_ends_in_one_json_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = Path(__file__).parent.parent / "models"
    words = ["filters", "--meta-model", str(root / "pocket-meta"), "--model", str(root / "pocket"),
             "--rows", "6", "--k", "3", "--max-new-tokens", "250"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", words)
    filters.main()
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["rows"] == 6 and list(told["ways"]) == list(filters.NAMES)
    for sizes in told["ways"].values():
        assert list(sizes) == ["1", "2", "3"]
        for entry in sizes.values():
            low, high = entry["ci95"]
            assert 0 <= low <= entry["mean"] <= high <= 1
    assert told["ways"]["meta"]["1"]["gain"] == 0
