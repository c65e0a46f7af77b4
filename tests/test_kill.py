"""SIGKILL `engine.sample` at any moment, resume, and get the very bytes of an uninterrupted run."""

import json
import random
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import pytest

from engine.sample import POCKET
from train.world.cases import cases

ROOT = Path(__file__).parent.parent
ROWS = 16
OPTIONS = ("--k", "4", "--max-new-tokens", "24", "--temperature", "1", "--max-batch", "12")


def write_rows(path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        for i, case in enumerate(islice(cases(8, "dev"), ROWS)):
            file.write(json.dumps({"id": f"row-{i}", **case.row()}) + "\n")
            if i == 5:
                file.write("{broken\n")


def start(data: Path, out: Path, *more: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "engine.sample", "--model", str(POCKET), "--data", str(data)]
    return subprocess.Popen(
        [*command, "--out", str(out), *OPTIONS, *more],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """The data file and the output of a run that nobody disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    data, out = folder / "rows.jsonl", folder / "out.jsonl"
    write_rows(data)
    process = start(data, out)
    _, errors = process.communicate()
    assert process.returncode == 3, errors.decode()  # too short for scores
    lines = out.read_bytes()
    assert lines.count(b"\n") == ROWS + 1
    return data, lines


def kill_and_resume(whole: tuple[Path, bytes], out: Path, rng: random.Random) -> int:
    """Kill a run at random moments until one gets through; returns how many were killed while
    their output was under way (neither empty nor complete)."""
    data, expected = whole
    under_way = 0
    for attempt in range(12):
        process = start(data, out, "--resume")
        # From the first line on, wait a little; the last attempts are left alone.
        goal = 0 if attempt == 0 else rng.randrange(len(expected))
        before = out.stat().st_size if out.exists() else 0
        while process.poll() is None and attempt < 3:
            size = out.stat().st_size if out.exists() else 0
            if size > max(before, goal):
                break
            time.sleep(0.002)
        if attempt < 3 and process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            under_way += 0 < out.stat().st_size < len(expected)
            if rng.random() < 0.5:  # as if the kill had come in the middle of a write
                with out.open("ab") as file:
                    file.write(expected[out.stat().st_size :][: rng.randrange(1, 40)])
            continue
        _, errors = process.communicate()
        assert process.returncode == 3, errors.decode()
        if out.read_bytes().count(b"\n") == ROWS + 1:
            break
    assert out.read_bytes() == expected
    return under_way


@pytest.mark.soak
def test_50_killed_runs_resume_byte_for_byte(whole: tuple[Path, bytes], tmp_path: Path) -> None:
    under_way = 0
    for seed in range(50):
        under_way += kill_and_resume(whole, tmp_path / f"{seed}.jsonl", random.Random(1000 + seed))
    assert under_way >= 50
