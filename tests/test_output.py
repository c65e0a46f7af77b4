"""engine/output.py: one writer, whole lines, resuming."""

import io
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from engine.output import LineFacts, Output, OutputError, SampleFacts, read_line, resume
from engine.reading import read_rows
from engine.request import BadRow, Row
from engine.verdict import RowFailure, checked, to_line

DATA = b"".join(b'{"prompt": "%d", "responses": ["a"]}\n' % i for i in range(4)) + b"bad\n"


def entries(data: bytes = DATA) -> Iterator[Row | BadRow]:
    return read_rows(io.BytesIO(data), 1000)


def key(entry: Row | BadRow) -> str:
    return "key of " + entry.digest


def line_of(entry: Row | BadRow) -> bytes:
    if isinstance(entry, BadRow):
        return to_line(RowFailure(entry.id, entry.line, key(entry), entry.error))
    return checked(b'{"id":"%s","key":"%s","k":2}' % (entry.id.encode(), key(entry).encode()))


LINES = [line_of(entry) for entry in entries()]


def resumed(path: Path, data: bytes = DATA) -> tuple[int, list[LineFacts], list[Row | BadRow]]:
    """How many lines were kept, their facts, and the entries that are left to do."""
    output = Output(str(path), resume=True)
    seen: list[LineFacts] = []
    left = entries(data)
    try:
        return resume(output, left, key, lambda facts, _: seen.append(facts)), seen, list(left)
    finally:
        output.close()


def test_lines_are_appended(tmp_path: Path) -> None:
    path = tmp_path / "out"
    output = Output(str(path))
    for number, line in enumerate(LINES, 1):
        output.write(line)
        assert path.read_bytes() == b"".join(LINES[:number])  # at once, not when it is closed
    assert list(output.whole_lines()) == LINES
    output.close()


def test_a_non_empty_file_is_refused_without_resume(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.touch()
    Output(str(path)).close()
    path.write_bytes(b"torn")
    with pytest.raises(OutputError, match="not empty"):
        Output(str(path))
    assert path.read_bytes() == b"torn"


def test_only_one_writer(tmp_path: Path) -> None:
    path = tmp_path / "out"
    first = Output(str(path))
    for again in (False, True):
        with pytest.raises(OutputError, match="another process"):
            Output(str(path), resume=again)
    first.close()
    Output(str(path)).close()


def test_only_a_file_can_be_resumed(tmp_path: Path) -> None:
    for path in ("-", "/dev/null"):
        with pytest.raises(OutputError, match="--resume needs a file"):
            Output(path, resume=True)
    with pytest.raises(FileNotFoundError):
        Output(str(tmp_path / "missing" / "out"))


def test_standard_output(capfd: pytest.CaptureFixture[str]) -> None:
    output = Output("-")
    output.write(b"line\n")
    output.close()
    print("still open", flush=True)
    assert capfd.readouterr().out == "line\nstill open\n"


def test_a_pipe_that_does_not_block(tmp_path: Path) -> None:
    """As a parent such as Node leaves it: what it has no room for waits for the reader."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    lines = [bytes([65 + i]) * 50_000 + b"\n" for i in range(5)]
    with ThreadPoolExecutor(1) as pool:
        path = f"/dev/fd/{writer}"
        output = Output(path)
        os.set_blocking(output._descriptor, False)
        written = pool.submit(output.write, b"".join(lines))
        read = b""
        while len(read) < sum(map(len, lines)):
            time.sleep(0.001)
            read += os.read(reader, 9_000)
        written.result()
        output.close()
    os.close(reader)
    os.close(writer)
    assert read == b"".join(lines)


def test_a_full_device() -> None:
    output = Output("/dev/full")
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        output.write(b"line\n")
    output.close()


def test_a_full_disk_leaves_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "out"
    code = """
import resource, sys
from engine.output import Output
resource.setrlimit(resource.RLIMIT_FSIZE, (25, 25))
output = Output(sys.argv[1])
for _ in range(3):
    try:
        output.write(b"123456789\\n")
    except OSError as error:
        print(error)
        output.write(b"abcd\\n")
"""
    done = subprocess.run(
        [sys.executable, "-c", code, path], capture_output=True, text=True, check=True, timeout=60
    )
    assert "File too large" in done.stdout and str(path) in done.stdout
    assert path.read_bytes() == b"123456789\n" * 2 + b"abcd\n"


# Resuming


@pytest.mark.parametrize("kept", range(len(LINES) + 1))
@pytest.mark.parametrize("tail", [b"", b"{", LINES[0][:-1], b'{"id":\x00'])
def test_whole_lines_are_kept_and_a_torn_one_is_cut(tmp_path: Path, kept: int, tail: bytes) -> None:
    path = tmp_path / "out"
    path.write_bytes(b"".join(LINES[:kept]) + tail)
    count, seen, left = resumed(path)
    assert count == len(seen) == kept
    assert [entry.line for entry in left] == list(range(kept + 1, len(LINES) + 1))
    assert path.read_bytes() == b"".join(LINES[:kept])


def test_writing_goes_on_behind_the_cut(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_bytes(LINES[0] + b"torn")
    output = Output(str(path), resume=True)
    resume(output, entries(), key, lambda facts, entry: None)
    output.write(LINES[1])
    output.close()
    assert path.read_bytes() == LINES[0] + LINES[1]


def rewritten(line: bytes, old: bytes, new: bytes) -> bytes:
    """The line with another content, and the check of that."""
    record, _, _ = line.rpartition(b',"check"')
    return checked((record + b"}").replace(old, new))


def change_key(lines: list[bytes]) -> None:
    lines[1] = rewritten(lines[1], b"key of", b"key or")


def change_id(lines: list[bytes]) -> None:
    lines[1] = rewritten(lines[1], b'{"id":"', b'{"id":"0')


def change_to_a_failure(lines: list[bytes]) -> None:
    lines[1] = rewritten(lines[1], b"}", b',"line":9,"error":"too long"}')


def change_a_figure(lines: list[bytes]) -> None:
    lines[1] = lines[1].replace(b'"k":2', b'"k":3')


def change_the_end_of_the_line(lines: list[bytes]) -> None:
    lines[1] = lines[1].replace(b"\n", b"\r\n")


def drop_fields(lines: list[bytes]) -> None:
    lines[1] = lines[1].replace(b',"k":2', b"")


def drop_the_check(lines: list[bytes]) -> None:
    lines[1] = lines[1].rpartition(b',"check"')[0] + b"}\n"


def change_to_nonsense(lines: list[bytes]) -> None:
    lines[1] = b"nonsense\n"


def change_to_nesting(lines: list[bytes]) -> None:
    lines[1] = b'{"x":' * 100_000 + b"\n"


def drop(lines: list[bytes]) -> None:
    del lines[1]


@pytest.mark.parametrize(
    "change",
    [
        change_key, change_id, change_to_a_failure, change_to_nonsense, change_to_nesting, drop,
        change_a_figure, change_the_end_of_the_line, drop_fields, drop_the_check,
    ],
)  # fmt: skip
def test_a_line_that_this_input_would_not_give(
    tmp_path: Path, change: Callable[[list[bytes]], None]
) -> None:
    lines = list(LINES)
    change(lines)
    path = tmp_path / "out"
    path.write_bytes(b"".join(lines) + b"torn")
    with pytest.raises(OutputError, match="out line 2 ") as error:
        resumed(path)
    is_altered = change.__name__ in (
        "change_a_figure", "change_the_end_of_the_line", "drop_fields", "drop_the_check",
    )  # fmt: skip
    assert ("not as it was written" in str(error.value)) == is_altered
    assert path.read_bytes() == b"".join(lines) + b"torn"


def test_a_failure_of_the_judge_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "out"
    rows = list(entries())
    path.write_bytes(LINES[0] + to_line(RowFailure(rows[1].id, 2, key(rows[1]), "too long")))
    assert resumed(path)[0] == 2


def test_changed_data(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_bytes(b"".join(LINES))
    lines = DATA.splitlines(keepends=True)
    with pytest.raises(OutputError, match="line 5 has no row in the input"):
        resumed(path, b"".join(lines[:4]))
    with pytest.raises(OutputError, match="line 5 is not what line 5 of the input gives now"):
        resumed(path, b"".join([*lines[:4], b"worse\n"]))
    with pytest.raises(OutputError, match="line 1 is not what line 1"):
        resumed(path, b"".join([lines[1], lines[0], *lines[2:]]))
    with pytest.raises(OutputError, match="line 5 is not what line 6"):  # a blank line came in
        resumed(path, b"".join([*lines[:2], b"\n", *lines[2:]]))
    assert resumed(path, DATA + lines[0].replace(b"0", b"9"))[0] == 5
    assert path.read_bytes() == b"".join(LINES)


# Counting


def test_facts_of_a_line() -> None:
    line = (
        b'{"id":"a","key":"b","best":null,"k":8,"valid":7,"votes":6,"correct":true,"samples":'
        b'[{"order":[1,0],"text":"x","scores":[2,7],"invalid":null,"tokens":3}]}'
    )
    sample = SampleFacts([1, 0], "x", [2, 7], None)
    facts = LineFacts("a", None, "b", None, 8, 7, 6, True, samples=[sample])
    assert read_line(line) == facts
    assert read_line(b'{"k":8,"k_used":4}') == LineFacts(k=8, k_used=4)
    for bad in (b"", b"[]", b'{"k":"8"}', b'{"k":8', b"\xff"):
        with pytest.raises(ValueError, match="not an output line"):
            read_line(bad)
