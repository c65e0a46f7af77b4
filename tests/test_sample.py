"""engine/sample.py, with a judge that needs no model: order, errors, resuming, signals, full disks.

What the real judge says stands in other files; here it only matters that every row's outcome
arrives, once, in its place, whatever happens to the process.
"""

import errno
import io
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tqdm import tqdm

from engine import sample
from engine.output import Output
from engine.reading import read_rows
from engine.request import BadRow, Row
from engine.sample import main
from engine.stopping import STOP_SIGNALS
from engine.verdict import RowFailure, Verdict
from tests.fake_judge import IN_FLIGHT, Judge, as_module

ROOT = Path(__file__).parent.parent
TIMEOUT_S = 60


def row(number: int, **fields: object) -> bytes:
    plain = {"id": f"row {number}", "prompt": str(number), "responses": ["a", "b"], "label": 0}
    return json.dumps(plain | fields).encode() + b"\n"


GOOD = [row(number) for number in range(12)]
# Bad lines at the start, in rows, between rows and at the end; rows that the judge refuses.
MIXED = [
    b"not json\n", b'{"prompt": 1}\n', row(3), b"\n", row(5, lable=1), row(6, prompt="TOO LONG"),
    row(7, meta={"m": [1]}), row(7), row(9, responses=["one"]), row(10, label=[]),
    row(11, prompt="TOO LONG"), row(12), b"torn",
]  # fmt: skip
# Long enough that a process is still at work when a test looks at it, on a busy machine too.
LONG = [*MIXED[:-1], *(row(number) for number in range(100, 180)), MIXED[-1]]


@pytest.fixture(autouse=True)
def fake_judge_in_a_new_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "engine.judge", as_module())
    monkeypatch.chdir(tmp_path)


def judge(lines: list[bytes], *options: str) -> tuple[int, bytes]:
    """Judge the lines from a file into a file; the exit status and what the file then holds."""
    Path("data").write_bytes(b"".join(lines))
    status = main(["--model", ".", "--data", "data", "--out", "out", *options])
    return status, Path("out").read_bytes()


def start(*options: str, delay_s: float = 0.0, **popen: Any) -> subprocess.Popen[bytes]:
    """The command line in a process of its own, with the judge that needs no model."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "FAKE_DELAY_S": str(delay_s)}
    command = [sys.executable, "-m", "tests.fake_judge", "--model", ".", *options]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, **popen)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


def num_lines(path: str = "out") -> int:
    return Path(path).read_bytes().count(b"\n") if Path(path).exists() else 0


# Lines


def test_lines_come_in_input_order(capfd: pytest.CaptureFixture[str]) -> None:
    status, out = judge(GOOD, "--k", "4")
    assert status == 0
    fields = [json.loads(line) for line in out.splitlines()]
    assert [each["id"] for each in fields] == [f"row {number}" for number in range(12)]
    assert all(each["k"] == len(each["samples"]) == 4 for each in fields)
    captured = capfd.readouterr()
    assert captured.out == ""
    summary = json.loads(captured.err.splitlines()[-1])
    assert (summary["rows"], summary["errors"], summary["valid_share"]) == (12, 0, 1.0)
    assert summary["accuracy"] == sum(each["correct"] for each in fields) / 12
    assert summary["tokens_computed"] == 12 * (10 + 4 * 5 + 1)
    assert summary["tokens_naive"] == 12 * 4 * (10 + 5)
    assert summary["interrupted"] is False


def test_bad_lines_stand_in_their_places() -> None:
    status, out = judge(MIXED)
    assert status == 1
    fields = [json.loads(line) for line in out.splitlines()]
    found = [(each.get("line"), each.get("id"), each.get("error", "")) for each in fields]
    expected = [
        (1, None, "not JSON"), (2, None, "prompt"), (None, "row 3", ""), (5, "row 5", "lable"),
        (6, "row 6", "9000 tokens"), (None, "row 7", ""), (8, "row 7", "is that of line 7"),
        (None, "row 9", ""), (10, "row 10", "no index"), (11, "row 11", "9000 tokens"),
        (None, "row 12", ""), (13, None, "without its newline"),
    ]  # fmt: skip
    assert [each[:2] for each in found] == [each[:2] for each in expected]
    for (_, _, error), (_, _, words) in zip(found, expected, strict=True):
        assert words in error
    assert all(len(each["key"]) == 64 for each in fields)
    assert fields[5]["row_meta"] == {"m": [1]}
    assert [list(each) for each in fields[:2]] == [["line", "key", "error", "check"]] * 2


@pytest.mark.parametrize("lines", [[], [b"bad\n"], [b"bad\n"] * 5, [b"\n", b" \r\n"]])
def test_inputs_without_a_row(lines: list[bytes]) -> None:
    status, out = judge(lines)
    bad = lines.count(b"bad\n")
    assert (status, out.count(b"\n")) == (1 if bad else 0, bad)


def test_nothing_varies_from_run_to_run() -> None:
    _, first = judge(MIXED)
    os.remove("out")
    assert judge(MIXED)[1] == first


def test_a_row_over_the_limit_is_an_error_line() -> None:
    status, out = judge([*GOOD[:2], row(5, prompt="x" * 2000), GOOD[3]], "--max-row-bytes", "1000")
    assert status == 1
    assert [("error" in json.loads(line)) for line in out.splitlines()] == [
        False,
        False,
        True,
        False,
    ]


def test_standard_streams() -> None:
    _, expected = judge(MIXED)
    process = start("--data", "-", "--out", "-", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    out, err = process.communicate(b"".join(MIXED), TIMEOUT_S)
    assert (process.returncode, out) == (1, expected)
    assert json.loads(err)["rows"] == 12


def test_a_run_in_vain_says_so(capfd: pytest.CaptureFixture[str]) -> None:
    """Rows were judged and no sample had scores: another status, and one sentence."""
    rows = [row(i, prompt="UNREAD") for i in range(3)]
    assert judge(rows, "--k", "4")[0] == 3
    summary, said = capfd.readouterr().err.strip().splitlines()
    assert json.loads(summary)["unread_line"] == "**Scores:** 7"
    assert said == (
        "error: no row got a verdict: none of 12 samples has scores that could be read (12 missing)"
        ". Try another --template, or --force-scores; --show-prompt shows what the judge is asked."
    )
    os.remove("out")
    assert judge([row(0, prompt="CUT")])[0] == 3
    said = capfd.readouterr().err
    assert "(8 truncated). Try a larger --max-new-tokens, another --template, or --force" in said
    os.remove("out")
    assert judge([*rows, *GOOD[5:6]], "--k", "4")[0] == 0


def test_a_run_that_only_thinks_says_what_helps(capfd: pytest.CaptureFixture[str]) -> None:
    rows = [row(0, prompt="UNREAD"), row(1, prompt="THINKS")]
    assert judge(rows, "--k", "4")[0] == judge(rows, "--k", "4", "--resume")[0] == 3
    said, again = capfd.readouterr().err.splitlines()[1::2]
    assert said == again
    assert said == (
        "error: no row got a verdict: none of 8 samples has scores that could be read (4 missing, "
        "4 truncated, 4 of these while thinking). Try a larger --max-new-tokens, "
        """--chat-template-kwargs '{"enable_thinking": false}', or --force-scores."""
    )


def test_options_reach_the_judge() -> None:
    Path("template.jinja").touch()
    judge(GOOD[:1], "--template", "template.jinja", "--dtype", "float32", "--max-batch", "7",
          "--chat-template", "chat.jinja", "--chat-template-kwargs", '{"enable_thinking": false}',
          "--cache-bytes", "1048576", "--date", "2025-01-31", "--anchor", "",
          "--anchor-nonce", "off", "--score-min", "0",
          "--score-max", "5", "--threshold", "2.5", "--format", "boxed")  # fmt: skip
    assert Judge.loaded == {
        "directory": Path("."), "template": Path("template.jinja"), "dtype": "float32",
        "device": "auto", "numerics": "portable", "max_batch": 7, "cache_bytes": 1 << 20,
        "memory_fraction": None, "meta": None, "chat_template": Path("chat.jinja"),
        "chat_template_kwargs": {"enable_thinking": False}, "date": "2025-01-31",
        "settings": {"anchor": None, "anchor_nonce": False, "score_min": 0, "score_max": 5,
                     "threshold": 2.5, "format": "boxed"},
    }  # fmt: skip


# Laziness


class Feed:
    """An endless input of lines that looks at the output as it is read, and ends with SIGINT."""

    def __init__(self, make: Callable[[int], bytes], stop_at: int) -> None:
        self.make, self.stop_at = make, stop_at
        self.given = 0
        self.behind: list[int] = []  # at each line: how many of those before it had no outcome yet

    def ready(self) -> bool:
        return True

    def readline(self, limit: int) -> bytes:
        self.behind.append(self.given - num_lines())
        self.given += 1
        if self.given == self.stop_at:
            os.kill(os.getpid(), signal.SIGINT)
        return self.make(self.given)


@pytest.mark.parametrize("make", [row, lambda number: b"bad\n"], ids=["rows", "bad lines"])
def test_an_endless_input_is_read_only_as_far_as_needed(
    make: Callable[[int], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    feed = Feed(make, 200)
    monkeypatch.setattr(sample, "Pipe", lambda *_: feed)
    handlers = [signal.getsignal(number) for number in STOP_SIGNALS]
    assert main(["--model", ".", "--data", "-", "--out", "out"]) == 130
    assert feed.given == 200 and num_lines() == 199  # the signal came while line 200 was read
    assert max(feed.behind) <= IN_FLIGHT
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == handlers


class Greedy(Judge):
    """Takes all that there is before it judges, as the real one does with lines that are no row."""

    def _rows(
        self, rows: Iterable[Row | BadRow | None], options: dict[str, Any]
    ) -> Iterator[Verdict | RowFailure]:
        taken: list[Row | BadRow] = []
        for row in rows:
            if row is not None:
                taken.append(row)
                continue
            yield from (self._judge(each, options) for each in taken)
            taken.clear()
        yield from (self._judge(each, options) for each in taken)


def test_bad_lines_past_a_row_do_not_heap_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["engine.judge"], "Judge", Greedy)
    monkeypatch.setattr(sample, "_MOST_TAKEN", 20)
    waiting: list[int] = []

    def counted(*given: Any) -> Iterator[Row | BadRow]:
        for number, entry in enumerate(read_rows(*given)):
            waiting.append(number - num_lines())
            yield entry

    monkeypatch.setattr(sample, "read_rows", counted)
    status, out = judge([GOOD[0], *[b"bad\n"] * 99])
    assert (status, out.count(b"\n")) == (1, 100)
    assert max(waiting) == 19


def test_a_verdict_comes_as_soon_as_it_is_there() -> None:
    """While the pipe stays open: after one row, after several, and after half a line."""
    process = start("--data", "-", "--out", "out", stdin=subprocess.PIPE)
    assert process.stdin is not None and process.stderr is not None
    rows = iter(GOOD)
    given = 0
    for data in (next(rows), next(rows) + next(rows), b"\n \n" + next(rows) + GOOD[5][:9]):
        process.stdin.write(data)
        process.stdin.flush()
        given += data.strip().count(b"\n") + (not data.endswith(GOOD[5][:9]))
        wait_for(lambda: num_lines() == given)  # noqa: B023
    process.stdin.write(GOOD[5][9:])
    process.stdin.close()
    assert process.wait(TIMEOUT_S) == 0 and num_lines() == 5
    process.stderr.close()


# Resuming


def test_resuming_at_any_byte_gives_the_same_file() -> None:
    _, whole = judge(MIXED)
    ends = [index + 1 for index, byte in enumerate(whole) if byte == ord("\n")]
    cuts = {0, 1, len(whole), *ends[::3], *(end - 1 for end in ends[1::3]),
            *(end + 3 for end in ends[2:-1:3])}  # fmt: skip
    for cut in sorted(cuts):
        Path("out").write_bytes(whole[:cut])
        assert judge(MIXED, "--resume") == (1, whole), cut


def test_a_resumed_run_reports_on_the_whole_file(capfd: pytest.CaptureFixture[str]) -> None:
    judge(MIXED)
    first = json.loads(capfd.readouterr().err)
    assert judge(MIXED, "--resume")[0] == 1  # the error lines are still there
    second = json.loads(capfd.readouterr().err)
    for name in ("rows", "errors", "samples", "valid", "labelled", "correct", "accuracy_95"):
        assert first[name] == second[name]
    assert second["tokens_computed"] == second["tokens_naive"] == 0


@pytest.mark.parametrize(
    "options",
    [
        ["--k", "4"], ["--temperature", "0.6"], ["--top-p", "0.9"], ["--top-k", "5"],
        ["--min-p", "0.1"], ["--max-new-tokens", "9"], ["--orders", "fixed"],
        ["--max-orders", "2"], ["--seed", "1"], ["--deterministic"], ["--stop", "eos"],
        ["--until-decided", "0.99"], ["--attention", "torch"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_resuming_with_changed_options_is_refused(
    options: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    _, whole = judge(GOOD)
    Path("out").write_bytes(whole[:-10])
    capfd.readouterr()
    assert judge(GOOD, "--resume", *options) == (2, whole[:-10])
    assert "out line 1 is not what line 1 of the input gives now" in capfd.readouterr().err


def test_resuming_with_changed_data_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    _, whole = judge(MIXED)
    for place, changed, line in ((0, b"not yaml\n", 1), (8, row(9, responses=["two"]), 8)):
        lines = [*MIXED[:place], changed, *MIXED[place + 1 :]]
        assert judge(lines, "--resume") == (2, whole)
        assert f"out line {line} is not what line {place + 1}" in capfd.readouterr().err
    assert judge(MIXED[:5], "--resume") == (2, whole)


def test_an_output_that_holds_something_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    _, whole = judge(GOOD)
    Judge.loaded = None
    assert judge(GOOD) == (2, whole)
    assert "--resume continues it" in capfd.readouterr().err
    assert Judge.loaded is None  # refused before a model is loaded


def test_two_writers() -> None:
    output = Output("out")
    assert judge(GOOD) == (2, b"")
    output.close()
    assert judge(GOOD)[0] == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--data", "missing"], "missing"),
        (["--data", "."], "directory"),
        (["--data", "data", "--out", "no/out"], "no/out"),
        (["--data", "data", "--model", "nowhere"], "nowhere is no model directory"),
        (["--data", "data", "--resume"], "--resume needs --out"),
        (["--data", "data", "--k", "0"], "k = 0 is not an integer of at least 1"),
        (["--data", "data", "--drain-seconds", "-1"], "--drain-seconds -1.0"),
        (["--data", "data", "--out", "-", "--resume"], "--resume needs a file"),
        (["--data", "data", "--chat-template-kwargs", "{thinking: no}"], "are not JSON"),
        (["--data", "data", "--max-row-bytes", "0"], "--max-row-bytes 0"),
        (["--data", "data", "--max-row-bytes", str(2**63)], "is not from 1 to 1073741824"),
    ],
)
def test_what_the_user_got_wrong(
    options: list[str], words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("data").write_bytes(GOOD[0])
    assert main(["--model", ".", *options]) == 2
    captured = capfd.readouterr()
    assert captured.err.startswith("error: ") and words in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    "options",
    [["--orders", "shuffled"], ["--k", "many"], ["--lable", "1"]],
)
def test_options_that_do_not_parse(options: list[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(options)
    assert error.value.code == 2


# Signals


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_drains(number: signal.Signals) -> None:
    _, whole = judge(LONG)
    os.remove("out")
    process = start("--data", "data", "--out", "out", delay_s=0.1)
    wait_for(lambda: num_lines() >= 3)
    seen = num_lines()
    process.send_signal(number)
    _, err = process.communicate(timeout=TIMEOUT_S)
    out = Path("out").read_bytes()
    assert process.returncode == 128 + number
    said, summary = err.decode().strip().splitlines()
    assert "finishing the rows under way" in said and json.loads(summary)["interrupted"] is True
    assert whole.startswith(out) and out.endswith(b"\n") and out != whole
    assert num_lines() >= seen + IN_FLIGHT - 1  # rows in flight were finished
    assert judge(LONG, "--resume") == (1, whole)


def test_a_signal_drains_a_run_that_waits_for_input() -> None:
    process = start("--data", "-", "--out", "out", stdin=subprocess.PIPE)
    assert process.stdin is not None and process.stderr is not None
    process.stdin.write(b"".join(GOOD[:4]))
    process.stdin.flush()
    wait_for(lambda: num_lines() == 4)
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(TIMEOUT_S) == 130  # the pipe is still open
    process.stdin.close()
    process.stderr.close()
    assert num_lines() == 4


def test_a_drain_that_takes_too_long_drops_what_is_under_way() -> None:
    _, whole = judge(GOOD)
    Path("out").unlink()
    process = start("--data", "data", "--out", "out", "--drain-seconds", "0.3", delay_s=2.0)
    wait_for(lambda: num_lines() >= 1)
    process.terminate()
    _, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 128 + signal.SIGTERM
    _, dropped, summary = err.decode().strip().splitlines()
    assert dropped == "rows under way that were dropped: 3"
    assert json.loads(summary)["interrupted"] is True
    assert whole.startswith(Path("out").read_bytes())
    assert num_lines() == 1  # three more, had the drain waited
    assert judge(GOOD, "--resume") == (0, whole)


def test_a_signal_that_a_library_swallows_while_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **options: Any) -> Judge:
        with suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
        return Judge()

    monkeypatch.setattr(Judge, "load", load)
    assert judge(GOOD) == (143, b"")


def test_a_signal_while_libraries_are_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """The import is not disturbed, and nothing is loaded after it."""

    class Library(ModuleType):
        has_come = False

        @property
        def Judge(self) -> type[Judge]:
            os.kill(os.getpid(), signal.SIGINT)
            self.has_come = True
            return Judge

    library = Library("engine.judge")
    monkeypatch.setitem(sys.modules, "engine.judge", library)
    Judge.loaded = None
    assert judge(GOOD) == (130, b"")
    assert library.has_come and Judge.loaded is None


def test_a_signal_in_the_first_imports() -> None:
    """It ends the process as it does one that never heard of it: without a traceback."""
    Path("tqdm.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    environment = os.environ | {"PYTHONPATH": f".:{ROOT}"}
    command = [sys.executable, "-m", "engine.sample", "--help"]
    done = subprocess.run(command, env=environment, capture_output=True, timeout=TIMEOUT_S)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, b"", b"")


def test_a_signal_while_loading(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Judge, "load", lambda *_, **options: os.kill(os.getpid(), signal.SIGHUP))
    assert judge(GOOD) == (129, b"")
    assert capfd.readouterr().err == ""


def test_a_second_signal_kills() -> None:
    Path("data").write_bytes(b"".join(GOOD))
    process = start("--data", "data", "--out", "out", delay_s=1.0)
    wait_for(lambda: num_lines() >= 1)
    while process.poll() is None:  # two signals at once would count as one
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)
    process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == -signal.SIGINT
    assert num_lines() < 1 + IN_FLIGHT


def test_kill_and_resume_is_byte_identical() -> None:
    _, whole = judge(LONG)
    os.remove("out")
    draws = random.Random(0)
    for _ in range(3):
        wanted = num_lines() + draws.randint(1, 9)
        process = start("--data", "data", "--out", "out", "--resume", delay_s=0.03)
        wait_for(lambda: num_lines() >= wanted)  # noqa: B023
        process.kill()
        process.communicate(timeout=TIMEOUT_S)
        assert process.returncode == -signal.SIGKILL
    assert whole.startswith(Path("out").read_bytes())
    assert judge(LONG, "--resume") == (1, whole)


# Standard streams


@pytest.mark.parametrize(
    ("closed", "options", "status", "words"),
    [
        (0, ["--data", "data", "--out", "out"], 0, b""),
        (1, ["--data", "data", "--out", "out"], 0, b""),
        (2, ["--data", "data", "--out", "out"], 0, b""),
        (0, ["--data", "-", "--out", "out"], 2, b"error: standard input is closed\n"),
        (1, ["--data", "data", "--out", "-"], 2, b"error: standard output is closed\n"),
        (1, ["--data", "data"], 2, b"error: standard output is closed\n"),
    ],
)
def test_closed_streams(closed: int, options: list[str], status: int, words: bytes) -> None:
    """What is opened afterwards does not take their place."""
    _, whole = judge(GOOD)
    os.remove("out")
    process = start(*options, preexec_fn=lambda: os.close(closed))
    _, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == status and (status == 0 or err == words)
    if status == 0:
        assert Path("out").read_bytes() == whole
    assert (err == b"") == (closed == 2)


@pytest.mark.parametrize("out", [[], ["--out", "-"]], ids=["for a person", "lines"])
def test_a_reader_that_has_gone(out: list[str]) -> None:
    Path("data").write_bytes(b"".join(GOOD))
    reader, writer = os.pipe()
    os.close(reader)
    process = start("--data", "data", *out, stdout=writer)
    os.close(writer)
    _, err = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, err) == (128 + signal.SIGPIPE, b"")


def test_a_person_with_a_full_disk() -> None:
    Path("data").write_bytes(GOOD[0])
    with Path("/dev/full").open("wb") as full:
        process = start("--data", "data", stdout=full)
    _, err = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, err) == (1, b"error: [Errno 28] No space left on device\n")


# Full disks


def test_a_full_device(capfd: pytest.CaptureFixture[str]) -> None:
    Path("data").write_bytes(GOOD[0])
    assert main(["--model", ".", "--data", "data", "--out", "/dev/full"]) == 1
    err = capfd.readouterr().err
    assert err.startswith("error: ") and "No space left on device: '/dev/full'" in err


def test_a_disk_that_fails_in_the_end(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fails(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fails)
    status, out = judge(GOOD)
    assert (status, out.count(b"\n")) == (1, 12)
    assert capfd.readouterr().err.splitlines()[-1].startswith("error: [Errno 5] ")


def test_a_full_disk_keeps_whole_lines() -> None:
    _, whole = judge(GOOD)
    os.remove("out")
    limit = len(whole) // 2 + 9  # within a line

    def limit_file_size() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    process = start("--data", "data", "--out", "out", preexec_fn=limit_file_size)
    _, err = process.communicate(timeout=TIMEOUT_S)
    out = Path("out").read_bytes()
    assert process.returncode == 1 and b"error: " in err and b"File too large" in err
    assert whole.startswith(out) and out.endswith(b"\n") and 0 < len(out) < limit
    assert judge(GOOD, "--resume") == (0, whole)


# For a person


def test_the_bundled_rows_are_the_default(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bundled = tmp_path / "rows.jsonl"
    bundled.write_bytes(b"".join(MIXED))
    monkeypatch.setattr(sample, "BUNDLED_ROWS", bundled)
    assert main([]) == 1
    assert Judge.loaded is not None and Judge.loaded["directory"] == sample.POCKET
    captured = capfd.readouterr()
    assert captured.err == ""
    for text in (
        "Row row 3",
        "Row row 12",
        "<- best",
        "8 of 8 samples valid",
        "Not judged: line 1",
    ):
        assert text in captured.out
    places = [captured.out.index(f"Row row {number}\n") for number in (3, 6, 7, 9, 11, 12)]
    assert places == sorted(places)
    assert "a naive sampler" in captured.out and "tokens/s" in captured.out
    assert "\x1b" not in captured.out
    assert max(len(line) for line in captured.out.splitlines()) <= 100


def test_colour_on_a_terminal() -> None:
    Path("data").write_bytes(row(0, responses=["\x1b[2Jclear", "b"]))
    parent, child = os.openpty()
    process = start("--data", "data", stdout=child)
    os.close(child)
    shown = b""
    while True:
        try:
            shown += os.read(parent, 1 << 16)
        except OSError:  # the other end is closed
            break
    os.close(parent)
    process.communicate(timeout=TIMEOUT_S)
    assert b"\x1b[1m" in shown
    assert b"\x1b[2J" not in shown and rb"\x1b[2Jclear" in shown


def test_the_progress_bar_says_how_many_samples_are_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()

    class Bar(tqdm):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options | {"disable": False, "file": shown, "mininterval": 0})

    monkeypatch.setattr(sample, "tqdm", Bar)
    judge([GOOD[0], row(1, prompt="UNREAD"), b"bad\n"], "--k", "2")
    assert (
        shown.getvalue().rstrip().endswith("50% of samples valid]") and "3row" in shown.getvalue()
    )


@pytest.mark.parametrize(("variable", "painted"), [(None, True), ("", True), ("1", False)])
def test_no_color(
    variable: str | None,
    painted: bool,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    if variable is not None:
        monkeypatch.setenv("NO_COLOR", variable)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    Path("data").write_bytes(GOOD[0])
    assert main(["--model", ".", "--data", "data"]) == 0
    assert ("\x1b[" in capfd.readouterr().out) == painted
