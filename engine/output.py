"""The durable output file: one writer, one write per line, and resuming where a run was cut off.

A run may be killed at any byte. What it leaves is whole lines and at most one torn line at the end.
Resuming checks every whole line, by its hash and against the input, cuts the torn one, and appends;
nothing in the file changes before the check is through. What a line holds is not decided here.
"""

import errno
import fcntl
import os
import select
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from engine.request import BadRow, Row
from engine.verdict import RowFailure, is_as_written, to_line


class OutputError(ValueError):
    """An output file that must not be written to, and why."""


class Output:
    """An append-only sink of lines: a file, exclusively locked, or standard output (`-`)."""

    def __init__(self, path: str, *, resume: bool = False) -> None:
        """Open and lock `path`, creating it if need be.

        Raises OutputError when another writer holds it, when it holds something and `resume` is
        not set, or when `resume` is set for what is no regular file; OSError when it cannot be
        opened.
        """
        self.path = path
        if path == "-":
            self._descriptor = os.dup(1)
        else:
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
            self._descriptor = os.open(path, flags, 0o666)
        status = os.fstat(self._descriptor)
        self._is_file = path != "-" and stat.S_ISREG(status.st_mode)
        try:
            if resume and not self._is_file:
                raise OutputError(f"--resume needs a file to resume, not {path}")
            if self._is_file:
                lock(self._descriptor, path)
                self._end = os.fstat(self._descriptor).st_size  # the end of the last whole line
                if self._end and not resume:
                    raise OutputError(f"{path} is not empty: --resume continues it")
        except OutputError:
            os.close(self._descriptor)
            raise

    def whole_lines(self) -> Iterator[bytes]:
        """The complete lines that the file holds, newlines included."""
        with Path(self.path).open("rb") as file:
            for line in file:
                if line.endswith(b"\n"):
                    yield line

    def cut(self, size: int) -> None:
        """Keep the first `size` bytes of the file: its whole lines."""
        os.ftruncate(self._descriptor, size)
        self._end = size

    def write(self, line: bytes) -> None:
        """Append one line with one write; after an OSError the file again ends in a whole line."""
        rest = memoryview(line)
        try:
            while rest:  # one turn, unless a pipe is slow or the disk is full
                try:
                    rest = rest[os.write(self._descriptor, rest) :]
                except BlockingIOError:  # a pipe that does not block, and is full
                    select.select([], [self._descriptor], [])
        except OSError as error:
            if self._is_file:
                os.ftruncate(self._descriptor, self._end)
            raise OSError(error.errno, error.strerror, self.path) from None
        if self._is_file:
            self._end += len(line)

    def close(self) -> None:
        """Bring the file to the disk and give up the lock."""
        try:
            if self._is_file:
                os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)


def lock(descriptor: int, path: str) -> None:
    """Lock an open file until it is closed; raises OutputError where another process has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise
        raise OutputError(f"{path} is being written by another process") from None


class SampleFacts(msgspec.Struct):
    """What the closing summary needs of a sample in an output line."""

    order: list[int] = []
    text: str = ""
    scores: list[float] | None = None
    invalid: str | None = None
    forced: bool = False


class LineFacts(msgspec.Struct):
    """What resuming and the closing summary need of an output line; the rest is skipped."""

    id: str | None = None
    line: int | None = None
    key: str | None = None
    error: str | None = None
    k: int = 0
    valid: int = 0
    votes: int = 0
    correct: bool | None = None
    unguided_correct: bool | None = None
    agrees: bool | None = None
    k_used: int | None = None
    samples: list[SampleFacts] = []


def read_line(line: bytes) -> LineFacts:
    """The facts of one output line; raises ValueError for what is no such line."""
    try:
        return msgspec.json.decode(line, type=LineFacts)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise ValueError(f"not an output line: {error}") from None


def resume(
    output: Output,
    entries: Iterator[Row | BadRow],
    key: Callable[[Row | BadRow], str],
    seen: Callable[[LineFacts, Row | BadRow], None],
) -> int:
    """Check every whole line of the file by itself and against the input, then cut off a torn one.

    Takes one entry from `entries` for each line, so that what is left of them is what is left to
    do, and hands each line's facts and its entry to `seen`. `key` gives an entry's key under the
    present options and model. Returns the number of lines. Raises OutputError naming the first line
    that this input would not give; the file is then as it was.
    """
    size = number = 0
    for number, line in enumerate(output.whole_lines(), 1):
        entry = next(entries, None)
        facts = check_line(line, f"{output.path} line {number}", entry, key)
        assert entry is not None
        seen(facts, entry)
        size += len(line)
    output.cut(size)
    return number


def check_line(
    line: bytes, place: str, entry: Row | BadRow | None, key: Callable[[Row | BadRow], str]
) -> LineFacts:
    """The facts of a line that an earlier run has written for this entry, None where there is no
    more. Raises OutputError naming the place where it would not be written now."""
    try:
        facts = read_line(line)
    except ValueError as error:
        raise OutputError(f"{place} is {error}") from None
    if not is_as_written(line):
        raise OutputError(
            f"{place} is not as it was written: its check is missing or of other content"
        )
    if entry is None:
        raise OutputError(f"{place} has no row in the input: the data changed")
    if isinstance(entry, BadRow):
        same = line == to_line(RowFailure(entry.id, entry.line, key(entry), entry.error))
    else:
        same = facts.id == entry.id and facts.key == key(entry)
        same = same and (facts.error is None or facts.line == entry.line)
    if not same:
        raise OutputError(
            f"{place} is not what line {entry.line} of the input gives now: the data, the "
            "options or the model changed"
        )
    return facts
