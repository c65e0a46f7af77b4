"""`python -m bench.evaluate`: a benchmark's rows judged and scored, stopped and continued."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from bench.evaluate import __main__ as command
from bench.evaluate.__main__ import main
from tests.tiny import write_model

FILES = ("rows.jsonl", "verdicts.jsonl", "results.json", "items.jsonl", "page.html")
OPTIONS = ["--k", "4", "--max-new-tokens", "6", "--force-scores"]


def entry(number: int, **changes: object) -> dict[str, object]:
    return {
        "input": f"say {number}", "output_1": f"it is {number}", "output_2": "no", "label": 1,
    } | changes  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    write_model(directory)
    return directory


def write_data(folder: Path) -> Path:
    """Two subsets of LLMBar; an entry of the second one cannot be read."""
    folder.mkdir()
    (folder / "Natural.json").write_text(json.dumps([entry(i) for i in range(3)]))
    broken = entry(4)
    del broken["output_2"]
    (folder / "Manual.json").write_text(json.dumps([entry(3, label=2), broken, entry(5)]))
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data(tmp_path / "data")


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OUT of a run that nothing has stopped."""
    root = tmp_path_factory.mktemp("whole")
    assert evaluate(write_data(root / "data"), model, root / "out") == 1
    return root / "out"


def words_of(data: Path, model: Path, out: Path) -> list[str]:
    return ["llmbar", "--data", str(data), "--model", str(model), "--out", str(out)]


def evaluate(data: Path, model: Path, out: Path, *more: str) -> int:
    return main([*words_of(data, model, out), *OPTIONS, *more])


def read(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in FILES}


def test_a_run_has_its_figures_and_names_what_it_could_not_read(whole: Path, model: Path) -> None:
    out = whole
    found = json.loads((out / "results.json").read_text())
    assert found["items"] == 5
    assert found["unread"] == {"entries": 1, "reasons": {"no 'output_2'": 1}}
    assert found["about"]["k"] == 4 and found["about"]["model"] == str(model)
    (unread,) = map(json.loads, (out / "unread.jsonl").read_text().splitlines())
    assert (unread["source"], unread["line"]) == ("Manual.json", 2)
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    assert [row["meta"]["subset"] for row in rows] == ["Manual"] * 2 + ["Natural"] * 3
    assert [row["label"] for row in rows] == [1, 0, 0, 0, 0]
    (time,) = map(json.loads, (out / "times.jsonl").read_text().splitlines())
    assert time["rows"] == 5 and time["seconds"] > 0 and "processor" in time["machine"]
    shown = (out / "results.md").read_text()
    assert shown.startswith("# LLMBar\n") and "no 'output_2'" in shown


@pytest.mark.parametrize("cut", [0, 1.5, 5])
def test_a_stopped_run_continues_to_the_same_bytes(
    whole: Path, data: Path, model: Path, tmp_path: Path, cut: float,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Wherever it was stopped: before any verdict, within a line, before the figures."""
    stopped = Path(shutil.copytree(whole, tmp_path / "stopped"))
    path = stopped / "verdicts.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    left = b"".join(lines[: int(cut)])
    if cut != int(cut):
        left += lines[int(cut)][:50]
    path.write_bytes(left)
    for name in FILES[2:]:
        (stopped / name).unlink()
    assert evaluate(data, model, stopped) == 1
    assert read(stopped) == read(whole)
    assert (whole / "results.md").read_text()[:400] == capsys.readouterr().out[:400]
    times = [json.loads(line) for line in (stopped / "times.jsonl").read_text().splitlines()]
    assert [time["rows"] for time in times] == [5, *([5 - int(cut)] if cut < 5 else [])]


def test_an_evaluation_of_other_rows_is_left_alone(
    whole: Path, data: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(shutil.copytree(whole, tmp_path / "out"))
    before = read(out)
    (data / "Natural.json").write_text(json.dumps([entry(9)]))
    assert evaluate(data, model, out) == 2
    assert "is an evaluation of other rows" in capsys.readouterr().err
    (data / "Natural.json").write_text(json.dumps([entry(i) for i in range(3)]))
    assert evaluate(data, model, out, "--temperature", "0.7") == 2
    assert "the options or the model changed" in capsys.readouterr().err
    assert read(out) == before


def test_the_first_entries_of_each_subset(data: Path, model: Path, tmp_path: Path) -> None:
    assert evaluate(data, model, tmp_path / "out", "--limit", "1") == 1
    lines = (tmp_path / "out" / "items.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["Manual-1", "Natural-1"]


def test_a_scalar_model_gives_its_scores_once(data: Path, tmp_path: Path) -> None:
    write_model(tmp_path / "scalar", scalar=True)
    assert main(words_of(data, tmp_path / "scalar", tmp_path / "out")) == 1
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["votes"] == [1]
    official = found["rules"]["official"]["ways"]["sum"]["1"]["total"]["value"]
    assert official == found["rules"]["vote"]["ways"]["sum"]["1"]["total"]["value"] is not None
    lines = (tmp_path / "out" / "verdicts.jsonl").read_text().splitlines()
    assert len(lines) == 5 and all(isinstance(json.loads(x)["scores"][0], float) for x in lines)


def test_rows_of_ones_own_in_a_table(model: Path, tmp_path: Path) -> None:
    table = tmp_path / "own.jsonl"
    table.write_text('{"q": "why", "a": "so", "b": "no", "y": "second"}\n')
    columns = {"prompt": "q", "responses": ["a", "b"],
               "label": {"column": "y", "values": {"first": 0, "second": 1}}}  # fmt: skip
    words = ["plain", "--data", str(table), "--columns", json.dumps(columns), "--model", str(model)]
    assert main([*words, "--out", str(tmp_path / "out"), *OPTIONS]) == 0
    (row,) = map(json.loads, (tmp_path / "out" / "rows.jsonl").read_text().splitlines())
    assert (row["id"], row["label"], row["responses"]) == ("own-1", 1, ["so", "no"])


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["rewardbench3"], "there is no benchmark 'rewardbench3': auto_j, "),
        (["llmbar", "--data", "x"], "--out is missing"),
        (["llmbar", "--out", "x"], "--data is missing"),
        (["llmbar", "--data", "nowhere", "--out", "OUT"], "nowhere"),
        (["llmbar", "--data", "DATA", "--out", "OUT", "--layout", "pairs"], "LLMBar has group"),
        (["llmbar", "--data", "DATA", "--out", "OUT", "--limit", "0"], "limit = 0"),
        (["llmbar", "--data", "DATA", "--out", "OUT", "--until-decided", ".9"], "needs all k"),
        (["llmbar", "--data", "DATA", "--out", "OUT", "--columns", "{}"], "of LLMBar are known"),
        (["judgebench", "--data", "DATA", "--out", "OUT"], "has no file of this set"),
        (["llmbar", "--data", "DATA", "--out", "DATA"], "one is within the other"),
        (["llmbar", "--data", "DATA", "--out", "FULL"], "holds something else than an evaluation"),
        (["auto_j", "--data", "FILE", "--out", "OUT"], "no entry of Auto-J pairwise: Manual.json"),
    ],
)
def test_what_the_user_got_wrong(
    words: Sequence[str], error: str, data: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    file = str(data / "Manual.json")
    full = tmp_path / "full"
    full.mkdir()
    (full / "notes.txt").touch()
    places = {"DATA": str(data), "FILE": file, "FULL": str(full), "OUT": str(tmp_path / "out")}
    assert main([places.get(word, word) for word in words]) == 2
    assert error in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_rows_longer_than_lines_of_input_may_be(model: Path, tmp_path: Path) -> None:
    """They are judged, here to say that the context is too short; none ends the run."""
    table = tmp_path / "own.jsonl"
    long = {"prompt": "x" * (1 << 20), "responses": ["a", "b"], "label": 0}
    short = {"prompt": "\u2028", "responses": ["a", "b"], "label": 0}
    table.write_text("".join(json.dumps(each) + "\n" for each in (long, short, {"id": "\u2028"})))
    words = ["plain", "--data", str(table), "--model", str(model), "--out", str(tmp_path / "out")]
    assert main([*words, *OPTIONS]) == 1
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["facts"]["failed"]["rows"] == 1 and found["unread"]["entries"] == 1
    assert found["facts"]["valid"] == 4


def test_help_names_every_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n    {name} " in shown for name in command.BENCHMARKS)
    with pytest.raises(SystemExit) as ended:
        main(["llmbar", "--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0 and "--layout" in shown and "--vote" in shown
