"""engine/blocks.py and engine/cluster.py: however blocks are judged, killed, stopped and continued,
the joined file is what one process writes.

Without Ray the judge is one that needs no model, and blocks are judged in this process or in forks
of it; with Ray (marked soak) it is the pocket model.
"""

import errno
import importlib.util
import json
import os
import pickle
import random
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from engine import cluster, sample
from engine.blocks import Block, BlockDirectory, Work, block_path, plan
from engine.cluster import Options, Outcome, Run, _Worker, room
from engine.output import OutputError
from engine.reading import read_rows
from engine.request import BadRow, Row
from tests import forks
from tests.fake_judge import Judge, as_module
from tests.test_sample import GOOD, MIXED, row, wait_for

ROOT = Path(__file__).parent.parent
OUT = Path("out")
JOINED = OUT / "verdicts.jsonl"


@pytest.fixture(autouse=True)
def fake_judge_in_a_new_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "engine.judge", as_module())
    monkeypatch.chdir(tmp_path)
    Path("data").write_bytes(b"".join(MIXED))


def options(**given: Any) -> Options:
    values: dict[str, Any] = {"model": Path("."), "data": "data", "block_rows": 3} | given
    return Options(**values)


def alone(*words: str) -> bytes:
    """What one process writes."""
    Path("alone").unlink(missing_ok=True)
    sample.main(["--model", ".", "--data", "data", "--out", "alone", *words])
    return Path("alone").read_bytes()


def workers(
    work: Work, blocks: Sequence[Block], count: int = 2, seed: int = 0
) -> Iterator[Outcome]:
    """What actors do, without Ray: blocks go to any of them, in any order."""
    rng = random.Random(seed)
    actors = [_Worker(work, os.getcwd()) for _ in range(count)]
    for block in rng.sample(blocks, len(blocks)):
        batch = {name: [value] for name, value in block._asdict().items()}
        (outcome,) = rng.choice(actors)(batch)["outcome"]
        if (found := pickle.loads(outcome)) is not None:
            yield found


def run(run: Run = workers, **given: Any) -> tuple[int, dict[str, Any]]:
    status, summary = cluster.judge(options(**given), OUT, run)
    assert summary is not None
    return status, summary


def committed() -> dict[int, tuple[int, int]]:
    """The blocks that are there: their inodes and times of change."""
    paths = {int(path.stem): path.stat() for path in (OUT / "blocks").glob("[0-9]*")}
    return {number: (stat.st_ino, stat.st_mtime_ns) for number, stat in paths.items()}


# Blocks


@pytest.mark.parametrize("block_rows", [1, 3, 5, 12, 100])
def test_the_joined_file_is_that_of_one_process(block_rows: int) -> None:
    """Errors and their lines included, in whatever order blocks are judged."""
    status, summary = run(partial(workers, seed=block_rows), block_rows=block_rows)
    assert status == 1 and JOINED.read_bytes() == alone()
    assert summary["blocks"] == summary["blocks_done"] == len(committed()) == -(-12 // block_rows)
    sizes = [block_path(OUT, number).read_bytes().count(b"\n") for number in sorted(committed())]
    assert set(sizes[:-1]) <= {block_rows} and sum(sizes) == 12


def test_the_summary_is_that_of_one_process(capfd: pytest.CaptureFixture[str]) -> None:
    _, summary = run()
    alone()
    expected = json.loads(capfd.readouterr().err.splitlines()[-1])
    for name, value in expected.items():
        if name not in ("seconds", "tokens_per_second", "usage"):
            assert summary[name] == pytest.approx(value), name
    assert summary["usage"] == expected["usage"] and summary["usage"]["decode_tokens"] > 0


def test_a_directory_is_read_as_one_file() -> None:
    """In the order of names, whatever form its files have; lines are counted on, and an id that
    another file has is an error."""
    whole = alone()
    Path("files").mkdir()
    for name, lines in (("b.jsonl", MIXED[5:]), ("a.jsonl", MIXED[:5]), ("README.md", GOOD)):
        (Path("files") / name).write_bytes(b"".join(lines))
    run(data="files")
    assert JOINED.read_bytes() == whole
    sample.main(["--model", ".", "--data", "files", "--out", "alone-too"])
    assert Path("alone-too").read_bytes() == whole


def test_no_rows() -> None:
    Path("data").write_bytes(b"\n")
    assert run()[0] == 0 and JOINED.read_bytes() == b"" == alone()


def test_no_row_with_a_verdict() -> None:
    Path("data").write_bytes(row(1, prompt="UNREAD") + row(2, prompt="CUT"))
    assert run()[0] == 3


# Killed and continued


def commit_until_killed(delay_s: float) -> None:
    """In a fork: a run whose judge takes its time."""
    os.environ["FAKE_DELAY_S"] = str(delay_s)
    cluster.judge(options(data="many"), OUT, partial(workers, count=1))


def test_a_killed_run_loses_nothing_and_repeats_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [*MIXED[:-1], *(row(number) for number in range(100, 150)), MIXED[-1]]
    Path("many").write_bytes(b"".join(lines))
    process = forks.start(commit_until_killed, 0.02)
    wait_for(lambda: (OUT / "blocks").exists() and len(committed()) >= 4)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL and not JOINED.exists()
    before = committed()
    assert 4 <= len(before) < 20
    (OUT / "blocks" / ".000019.jsonl.abc.tmp").write_bytes(b"half a li")  # of another one
    judged: list[str | None] = []

    class Counting(Judge):
        def _judge(self, entry: Row | BadRow, options: dict[str, Any]) -> Any:
            judged.append(entry.id)
            return super()._judge(entry, options)

    monkeypatch.setattr(sys.modules["engine.judge"], "Judge", Counting)
    status, summary = run(data="many")
    assert (status, summary["blocks"], summary["rows"]) == (1, 21, 62)
    after = committed()
    assert {number: after[number] for number in before} == before and len(after) == 21
    assert len(judged) == 62 - sum(
        block_path(OUT, number).read_bytes().count(b"\n") for number in before
    )
    Path("data").write_bytes(Path("many").read_bytes())
    assert JOINED.read_bytes() == alone()
    judged.clear()
    run(data="many")  # all is there
    assert judged == [] and committed() == after


def test_a_block_is_committed_whole_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full, say, when two are written."""
    synced: list[int] = []

    def fsync(descriptor: int) -> None:
        synced.append(descriptor)
        if len(synced) > 7:  # run.json and two blocks, each with its directory, and the key
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(ValueError, match="No space left"):
        patch.setattr(os, "fsync", fsync)
        run(partial(workers, count=1))
    assert len(committed()) == len(list((OUT / "blocks").iterdir())) == 2
    assert run()[0] == 1 and JOINED.read_bytes() == alone()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_run_that_can_be_continued(number: signal.Signals) -> None:
    def interrupted(work: Work, blocks: Sequence[Block]) -> Iterator[Outcome]:
        for done, outcome in enumerate(workers(work, blocks), 1):
            yield outcome
            if done == 2:
                os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    status, summary = run(interrupted)
    assert status == 128 + number and signal.getsignal(number) == before
    assert summary["interrupted"] and summary["blocks_done"] == len(committed()) == 2
    assert not JOINED.exists()
    first = committed()
    assert run()[0] == 1 and first.items() <= committed().items()
    assert JOINED.read_bytes() == alone()


# Refused


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"seed": 1}, "other options, another model"),
        ({"k": 3}, "other options, another model"),
        ({"block_rows": 4}, "blocks of 3 rows, not of 4"),
        ({"data": "other"}, "with other rows"),
    ],
)
def test_another_run_in_the_same_directory(changed: dict[str, Any], words: str) -> None:
    Path("other").write_bytes(b"".join([GOOD[0], *MIXED[1:]]))
    run()
    block_path(OUT, 1).unlink()
    JOINED.unlink()
    before = committed()
    with pytest.raises(ValueError, match=words):
        run(**changed)
    assert committed() == before and not JOINED.exists()
    run()
    assert JOINED.read_bytes() == alone()


def test_a_worker_with_another_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of another kind, say: no lines of both are in one file."""
    run()
    block_path(OUT, 0).unlink()
    monkeypatch.setattr(Judge, "key", lambda self, row, **options: "other")
    with pytest.raises(ValueError, match="another kind of machine"):
        run()
    assert 0 not in committed()


@pytest.mark.parametrize("where", ["data", "model"])
def test_a_worker_that_has_other_files(where: str) -> None:
    def elsewhere(work: Work, blocks: Sequence[Block]) -> Iterator[Outcome]:
        if where == "data":
            Path("data").write_bytes(b"".join(MIXED).replace(b'"one"', b'"two"'))
            return workers(work, blocks)
        return workers(Work(options(model=Path("nowhere")), work.out, 3), blocks)

    words = "has other rows here" if where == "data" else "nowhere is no model directory"
    with pytest.raises(ValueError, match=words):
        run(elsewhere)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda lines: [line.replace(b'"k":8', b'"k":9') for line in lines], "line 2 is not as it"),
        (lambda lines: [lines[1], lines[0], lines[2]], "line 1 is not what line"),
        (lambda lines: lines[:2], "has 2 lines of 3"),
        (lambda lines: [*lines, lines[0]], "line 4 has no row"),
        (lambda lines: [*lines[:2], lines[2][:-9]], "line 3 is not an output line"),
    ],
)  # fmt: skip
def test_a_block_that_is_not_as_it_was_written(damage: Any, words: str) -> None:
    run()
    path = block_path(OUT, 2)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(damage(lines)))
    with pytest.raises(ValueError, match=words):
        run()


def test_one_run_at_a_time() -> None:
    first = BlockDirectory(OUT)
    with pytest.raises(OutputError, match="out is being written by another process"):
        run()
    first.close()
    assert run()[0] == 1


def test_a_directory_of_something_else() -> None:
    OUT.mkdir()
    (OUT / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match=r"no run has written there \(thesis.tex\)"):
        run()
    assert os.listdir(OUT) == ["thesis.tex"]


def test_blocks_without_an_outcome() -> None:
    """Ray has lost one, say."""
    with pytest.raises(OSError, match="blocks without an outcome: 1"):
        run(lambda work, blocks: workers(work, blocks[1:]))
    assert not JOINED.exists()


# The command line


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ([], "--out DIR is needed"),
        (["--out", "out", "--data", "-"], "cannot be read by every worker"),
        (["--out", "out", "--workers", "0"], "workers = 0"),
        (["--out", "out", "--block-rows", "0"], "block_rows = 0"),
        (["--out", "out", "--k", "0"], "k = 0"),
        (["--out", "out"], r"needs the package ray[data]"),
    ],
)
def test_what_the_user_got_wrong(
    words: list[str],
    error: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert cluster.main(["--model", ".", *words]) == 2
    assert error in capsys.readouterr().err and not OUT.exists()


def test_room_for_workers() -> None:
    assert room(options(), {"CPU": 8.0}) == (8, 0)
    assert room(options(cpus=4), {"CPU": 8.0}) == (2, 0)
    assert room(options(), {"CPU": 8.0, "GPU": 2.0}) == (2, 1)
    assert room(options(device="cpu"), {"CPU": 8.0, "GPU": 2.0}) == (8, 0)
    assert room(options(workers=1), {"CPU": 8.0, "GPU": 2.0}) == (1, 1)
    with pytest.raises(ValueError, match="room for 2 workers of 4 processors"):
        room(options(cpus=4, workers=3), {"CPU": 8.0})
    with pytest.raises(ValueError, match=r"room for 0 workers .* \(8 processors, 0 GPUs\)"):
        room(options(device="cuda"), {"CPU": 8.0})


def test_blocks_of_a_plan_are_all_that_there_is() -> None:
    def entries() -> Iterator[Row | BadRow]:
        with Path("data").open("rb") as file:
            yield from read_rows(file)

    blocks = plan(entries(), 5)
    assert [(block.number, block.rows) for block in blocks] == [(0, 5), (1, 5), (2, 2)]
    assert len({block.digest for block in blocks}) == 3
    assert isinstance(next(workers(Work(options(), Path("x"), 5), blocks)), str)  # no such folder


# Ray


def start_on_ray(*words: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "engine.cluster", *words, "--out", str(OUT.absolute())]
    command += ["--data", str(Path("data").absolute()), "--workers", "2", "--block-rows", "4"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=Path("errors").open("wb"))


def busy_workers(root: int) -> list[int]:
    """The processes below this one that judge a block."""
    parents, names = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            parents[int(folder.name)] = int(fields[1])
            names[int(folder.name)] = (folder / "cmdline").read_bytes()
        except OSError:  # it has ended
            continue
    below = {root}
    while more := {pid for pid, parent in parents.items() if parent in below} - below:
        below |= more
    return sorted(pid for pid in below if names[pid].startswith(b"ray::MapWorker("))


@pytest.mark.soak
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray[data]")
@pytest.mark.parametrize("stop", [False, True])
def test_ray_with_a_worker_killed(stop: bool) -> None:
    """In mid-run, and then, with stop, the run itself by SIGTERM, which is continued: the same
    bytes as one process writes."""
    rows = [json.loads(line) for line in (ROOT / "engine" / "rows.jsonl").open()]
    lines = [row(number, **rows[number % len(rows)] | {"id": f"{number}"}) for number in range(60)]
    lines[7:7] = [b"not json\n", b"\n", lines[3]]
    Path("data").write_bytes(b"".join(lines))
    words = ["--k", "4", "--max-new-tokens", "150"]
    one = [sys.executable, "-m", "engine.sample", *words, "--out", str(Path("alone").absolute())]
    one += ["--data", str(Path("data").absolute())]
    assert subprocess.run(one, cwd=ROOT, check=False, stderr=subprocess.DEVNULL).returncode == 1

    process = start_on_ray(*words)
    wait_for(lambda: (OUT / "blocks").exists() and len(committed()) >= 3)
    victim, *others = busy_workers(process.pid)
    assert len(others) == 1
    os.kill(victim, signal.SIGKILL)
    before = committed()
    if stop:
        wait_for(lambda: len(committed()) >= 6)
        process.terminate()
        assert process.wait(120) == 128 + signal.SIGTERM
        assert not JOINED.exists() and 6 <= len(committed()) < 16
        before = committed()
        process = start_on_ray(*words)
    assert process.wait(300) == 1, Path("errors").read_text()
    assert JOINED.read_bytes() == Path("alone").read_bytes()
    assert before.items() <= committed().items() and len(committed()) == 16
    summary = json.loads(Path("errors").read_text().splitlines()[-1])
    assert (summary["rows"], summary["errors"], summary["blocks_done"]) == (62, 2, 16)
