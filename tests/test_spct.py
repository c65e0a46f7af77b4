"""The paper's chain in small: every stage runs, and none runs twice."""

import json
from pathlib import Path

import pytest

from bench import spct


def test_the_whole_chain_in_small(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["--smoke", "--out", str(tmp_path)]
    assert spct.main(words) == 0
    told = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert told["smoke"] and set(told["grpo"]) == set(spct.SHOWN)
    results = json.loads((tmp_path / "results.json").read_text())
    assert [found["judge"] for found in results] == ["base", "rft", "grpo"]
    for found in results:
        assert found["tokens_per_sample"] > 20 and found["meta_tokens_per_sample"] > 20
        assert set(found["votes"]["all"]) == {"1", "2"}
        for way in spct.SHOWN:  # one vote is a vote, whoever weighs it
            assert found["votes"][way]["1"]["mean"] == found["votes"]["all"]["1"]["mean"]
    table = (tmp_path / "table.md").read_text()
    assert table.count("\n") == 2 + 3 * len(spct.SHOWN) and "| grpo | borda, weighed |" in table
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")

    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}
    names = {"base.json", "rft.json", "grpo.json"}
    assert spct.main(words) == 0
    lines = [json.loads(x) for x in capfd.readouterr().err.splitlines() if x.startswith("{")]
    assert [line["steps_run"] for line in lines if "steps_run" in line] == [0, 0, 0]
    assert {path.name for path, time in before.items() if path.stat().st_mtime_ns == time} == names
    assert json.loads((tmp_path / "results.json").read_text()) == results
