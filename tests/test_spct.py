"""The paper's chain in small: every stage runs, and none runs twice; and what its figures are."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import filters, spct, statistics, study
from engine.sample import POCKET
from engine.verdict import Sample, Verdict, to_line

pytestmark = pytest.mark.xdist_group("spct")  # groups come first, and the chain is long
JUDGES = ("base", "large", "rft", "grpo", "direct", "index")


def greedy_tokens(out: Path, judge: str) -> float:
    """Tokens of a row judged greedily, in a single order: prompt and judgement."""
    folder = out if judge in ("base", "large") else out / "seed-0" / "verdicts"
    lines = [json.loads(x) for x in (folder / f"{judge}-greedy.jsonl").open(encoding="utf-8")]
    written = [line["samples"][0]["tokens"] for line in lines]
    return sum(written + [line["usage"]["prompt_tokens"] for line in lines]) / len(lines)


@pytest.mark.parametrize(
    "more", [[], pytest.param(["--ablations"], marks=pytest.mark.soak)], ids=str
)
def test_the_whole_chain_in_small(
    more: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(statistics, "BOOTSTRAPS", 20)
    monkeypatch.setattr(spct, "LONGEST", 250)
    words = ["--smoke", "--out", str(tmp_path), "--large", str(POCKET), *more]
    trainings = 10 if more else 6
    assert spct.main(words) == 0
    out, err = capfd.readouterr()
    told = json.loads(out.splitlines()[-1])
    assert told["smoke"] and told["seeds"] == [0]
    results = results_in(tmp_path)
    assert results["differences"] == told["differences"]
    judges = results["judges"]
    assert set(judges) == {*JUDGES, "scalar"} and set(judges["scalar"]["accuracy"]) == {"greedy"}
    assert set(judges["scalar"]) == {"accuracy"}  # it writes nothing: no costs, rather than 0
    for name in JUDGES:
        found, ways = judges[name], study.PLAIN + (study.GUIDED if name == "grpo" else ())
        ways += ("expected",) if name == "direct" else ()
        assert found["tokens_per_judgement"] > 5 and 0 <= found["invalid"] <= 1
        assert found["greedy_tokens_per_row"] == pytest.approx(greedy_tokens(tmp_path, name))
        assert set(found["accuracy"]) == {*ways, "greedy"}
        for way in ways:  # one vote is a vote, whoever weighs it
            assert found["accuracy"][way]["1"] == found["accuracy"]["all"]["1"]
            assert set(found["accuracy"][way]) == {"1", "2"}
            assert len(found["accuracy"][way]["2"]["seeds"]) == 1
    table = (tmp_path / "results.md").read_text()
    assert "| grpo | borda, weighed |" in table and "| grpo over base, 1 vote |" in table
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert sum("steps_run" in line for line in err.splitlines()) == trainings

    assert (tmp_path / "ablations.md").exists() == bool(more)
    judged = {path: path.read_bytes() for path in (tmp_path / "seed-0" / "verdicts").iterdir()}
    assert len(judged) == 8
    (tmp_path / "outcomes" / "seed-0.npz").unlink()  # it is made anew, of what has been judged
    assert spct.main(words) == 0
    lines = [json.loads(x) for x in capfd.readouterr().err.splitlines() if x.startswith("{")]
    assert [line["steps_run"] for line in lines if "steps_run" in line] == [0] * trainings
    assert sum(line["usage"]["decode_tokens"] for line in lines if "usage" in line) == 0
    assert all(path.read_bytes() == content for path, content in judged.items())
    assert results_in(tmp_path) == results

    elsewhere = tmp_path / "elsewhere"  # the outcomes are enough
    shutil.copytree(tmp_path / "outcomes", elsewhere / "outcomes")
    assert spct.main(["--smoke", "--out", str(elsewhere), "--large", str(POCKET)]) == 0
    assert results_in(elsewhere) == results
    assert not (elsewhere / "seed-0").exists()
    capfd.readouterr()
    shutil.copy(elsewhere / "outcomes" / "seed-0.npz", elsewhere / "outcomes" / "seed-1.npz")
    assert spct.main(["--smoke", "--out", str(elsewhere), "--seeds", "0", "1"]) == 1
    assert "seed-1.npz is of other settings" in capfd.readouterr().err


def results_in(folder: Path) -> dict[str, Any]:
    """Without where and when they were made."""
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    assert found.pop("run")["machine"]["processor"]
    return found


def verdict(row: int, samples: list[tuple[int, int] | None]) -> Verdict:
    """Of judgements of two responses, the first of which is the best."""
    made = [
        Sample((0, 1), f"c{i % 2}\nx", scores, None if scores else "none", float(i), 7, "box",
               [], [-1.0], [], expected=scores and (scores[0] + 0.5, scores[1]))
        for i, scores in enumerate(samples)
    ]  # fmt: skip
    return Verdict(str(row), "", 0, [1, 2], [1.0, 2.0], False, len(made), 0, 1, made, 9, 5,
                   7 * len(made), label=0)  # fmt: skip


def test_figures_of_verdict_lines(tmp_path: Path) -> None:
    """The same as of the verdicts themselves."""
    rows = [verdict(0, [(9, 1), (1, 9), None, (5, 5)]), verdict(1, [(9, 1), (8, 1), (7, 1), None])]
    path = tmp_path / "verdicts.jsonl"
    path.write_bytes(b"".join(map(to_line, rows)))
    rng = np.random.default_rng(0)
    names = (*study.PLAIN, *study.GUIDED, "expected")
    rng = np.random.default_rng(0)
    curves = [filters.row_curves(row, 5.5, rng, 0.5) for row in rows]
    found = study.accuracies(study.read_verdicts(path), 5.5, 0.5, expects=True)
    assert list(found) == list(names)
    for name, sizes in found.items():
        assert list(sizes) == [1, 2, 4]
        for size, values in sizes.items():
            assert values.tolist() == [curve[name][size] for curve in curves]
    assert found["meta"][4].tolist() == [0.0, 1.0]  # meta scores are places: (1, 9) and (5, 5)
    assert set(study.accuracies(rows, 5.5)) == set(study.PLAIN)  # without a meta model
    greedy = tmp_path / "greedy.jsonl"
    singles = [verdict(0, [(5, 5)]), verdict(1, [None]), verdict(2, [(9, 1)])]
    greedy.write_bytes(b"".join(map(to_line, singles)))
    judged = study.judged(path, greedy, 5.5, 1, 0.5)
    assert judged.arrays["greedy"][1].tolist() == [[0.5, 0.0, 1.0]]
    study.save(tmp_path / "a.npz", {"a b": judged, "c": judged}, "key")
    stored = study.load(tmp_path / "a.npz", "key")
    assert list(stored) == ["a b", "c"]
    both = study.joined([judged, stored["c"]])
    assert both.facts == judged.facts and judged.facts["tokens_per_judgement"] == 7
    for way, of_sizes in judged.arrays.items():
        for votes, array in of_sizes.items():
            assert both.arrays[way][votes].tolist() == np.tile(array, (2, 1)).tolist()
    with pytest.raises(ValueError, match=r"a\.npz is of other settings"):
        study.load(tmp_path / "a.npz", "another")
    np.savez(tmp_path / "old.npz", about=json.dumps({"key": "key", "judges": {}}))
    with pytest.raises(ValueError, match=r"old\.npz is of another version"):
        study.load(tmp_path / "old.npz", "key")
    facts = study.facts_of(rows, 5.5)
    assert facts["invalid"] == 2 / 8 and facts["right"] == 4 / 8
    assert facts["criteria_entropy"] == pytest.approx(math.log(2))
    greedy.write_text('{"id": "x", "error": "too long"}\n')
    with pytest.raises(ValueError, match=r"greedy\.jsonl: row x: too long"):
        study.read_verdicts(greedy)


def test_differences_are_paired() -> None:
    """Two judges that differ by a tenth on every row: no interval is left of the rows' spread."""
    rows = np.linspace(0, 1, 50)[None]
    first = study.Judged({"all": {1: rows + 0.1}})
    second = study.Judged({"all": {1: np.repeat(rows, 3, 0)}})
    judges = {"a": first, "b": second}
    pairs: dict[str, tuple[study.Point, study.Point]] = {
        "a over b": (("a", "all", 1), ("b", "all", 1)),
        "a over none": (("a", "all", 1), ("c", "all", 1)),
        "a at 2": (("a", "all", 2), ("b", "all", 1)),
    }
    ((name, found),) = study.orderings(judges, pairs).items()
    assert name == "a over b" and found["seeds"] == pytest.approx([0.1] * 3)
    assert found["ci95"] == pytest.approx((0.1, 0.1))
    low, high = statistics.seed_interval(rows)
    assert 0.3 < low < 0.5 < high < 0.7
