"""Rows in blocks, which any number of processes judge, and the joined file of their verdicts.

    OUT/lock              held by the process that plans and joins
    OUT/run.json          the rows of the run and how they are cut, as it began
    OUT/key               a hash of the options and the model, as the first judge had them
    OUT/blocks/N.jsonl    the lines of one block: written whole, or not there
    OUT/verdicts.jsonl    all lines, once every block is there
    OUT/stop              says that no other block is to be begun

A block is some rows that follow one another. Every process reads the input itself, from its start,
so that a line has the number and the errors that it has in a run of one process; it parses the rows
of others too, which costs little beside judging. A block that is there is checked, and not judged
again. Who judges which block is not decided here (`engine/cluster.py`).
"""

import dataclasses
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from engine.output import OutputError, check_line, lock
from engine.request import BadRow, Row
from engine.sample import RowOptions, count, loader, open_data
from engine.summary import Tally
from engine.verdict import Verdict, to_line

if TYPE_CHECKING:
    from engine.sample import AnyJudge

Entry = Row | BadRow
JOINED = "verdicts.jsonl"
_LOCK, _RUN, _KEY, _STOP, _BLOCKS = "lock", "run.json", "key", "stop", "blocks"


class Block(NamedTuple):
    """Rows that are judged together: which, how many, and a hash of all that they say."""

    number: int  # from 0
    rows: int
    digest: str


def plan(entries: Iterable[Entry], block_rows: int) -> list[Block]:
    """Cut entries into blocks of `block_rows`; the last one may have fewer."""
    cut: list[Block] = []
    rest = iter(entries)
    while taken := list(islice(rest, block_rows)):
        cut.append(Block(len(cut), len(taken), _digest(taken)))
    return cut


def _digest(entries: Iterable[Entry]) -> str:
    digest = hashlib.sha256()
    for entry in entries:
        error = entry.error if isinstance(entry, BadRow) else None
        digest.update(json.dumps([entry.id, entry.line, entry.digest, error]).encode())
    return digest.hexdigest()


def block_path(out: Path, number: int) -> Path:
    """Where the lines of a block are."""
    return out / _BLOCKS / f"{number:06}.jsonl"


@dataclass
class Report:
    """What has become of a block: counts over its lines, and what was computed for it, nothing
    where it was there."""

    block: Block
    tally: Tally
    usage: dict[str, Any]  # the fields of engine.generate.Usage
    naive_tokens: int


class BlockReader:
    """Reads blocks of an input. They may come in any order; one that is before the last one reads
    the input again."""

    def __init__(self, entries: Callable[[], Iterator[Entry]], block_rows: int) -> None:
        """entries: opens the input."""
        self._open, self._block_rows = entries, block_rows
        self._entries, self._next = entries(), 0

    def read(self, block: Block) -> list[Entry]:
        """The block's entries; raises ValueError where they are not those of the plan."""
        if block.number < self._next:
            self._entries, self._next = self._open(), 0
        skipped = (block.number - self._next) * self._block_rows
        found = list(islice(self._entries, skipped, skipped + block.rows))
        self._next = block.number + 1
        if len(found) != block.rows or _digest(found) != block.digest:
            raise ValueError(f"block {block.number} has other rows here than the run began with")
        return found


@dataclass(frozen=True)
class Work:
    """What a process needs to know to judge blocks."""

    options: RowOptions
    out: Path
    block_rows: int

    def load(self) -> "BlockJudge":
        """Load the judge; raises ValueError or OSError where it is not that of the run."""
        return BlockJudge(self, loader(self.options)())

    def entries(self) -> Iterator[Entry]:
        """Read the input."""
        with ExitStack() as stack:
            yield from open_data(self.options, stack)[0]


class BlockJudge:
    """A judge that has a block's lines written, or checks those that are there."""

    def __init__(self, work: Work, judge: "AnyJudge") -> None:
        self._work, self._judge = work, judge
        self._sampling = work.options.judging
        self._reader = BlockReader(work.entries, work.block_rows)
        # No row has a part in this one: what is left are the options and the model.
        _agree(work.out, self._key(BadRow(None, 0, "", "")))

    def __call__(self, block: Block) -> Report | None:
        """Judge a block that is not there; None where none is to be begun."""
        if (self._work.out / _STOP).exists():
            return None
        entries, path = self._reader.read(block), block_path(self._work.out, block.number)
        before = dataclasses.asdict(self._judge.usage)
        report = Report(block, Tally(), {}, 0)
        if path.exists():
            self._check(path, entries, report)
        else:
            lines = self._lines(entries, report)
            _replace(path, lambda temporary: temporary.write_bytes(b"".join(lines)))
        after = dataclasses.asdict(self._judge.usage)
        report.usage = {name: value - before[name] for name, value in after.items()}
        return report

    def _lines(self, entries: Sequence[Entry], report: Report) -> list[bytes]:
        lines = []
        outcomes = self._judge.rows(entries, **self._sampling)
        for entry, outcome in zip(entries, outcomes, strict=True):
            lines.append(to_line(outcome))
            if isinstance(outcome, Verdict):
                report.naive_tokens += outcome.prompt_tokens + outcome.decode_tokens
            count(report.tally, self._judge, outcome, entry, self._work.options.seed)
        return lines

    def _check(self, path: Path, entries: Sequence[Entry], report: Report) -> None:
        rest, number = iter(entries), 0
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                entry = next(rest, None)
                facts = check_line(line, f"{path} line {number}", entry, self._key)
                assert entry is not None
                count(report.tally, self._judge, facts, entry, self._work.options.seed)
        if number < len(entries):
            raise OutputError(f"{path} has {number} lines of {len(entries)}")

    def _key(self, entry: Entry) -> str:
        return self._judge.key(entry, **self._sampling)


def _agree(out: Path, key: str) -> None:
    """Put the key there if there is none; raises ValueError where there is another."""
    path = out / _KEY
    temporary = out / f".{_KEY}.{secrets.token_hex(8)}.tmp"
    try:
        with temporary.open("w", encoding="ascii") as file:
            file.write(key + "\n")
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileExistsError):
            os.link(temporary, path)  # unlike a rename it takes nothing away
    finally:
        temporary.unlink(missing_ok=True)
    if path.read_text(encoding="ascii") != key + "\n":
        raise ValueError(
            f"{out} was begun with other options, another model, or on another kind of machine: "
            "a judge of this kind writes other lines"
        )


class BlockDirectory:
    """OUT, locked until it is closed."""

    def __init__(self, out: Path) -> None:
        """Raises ValueError where `out` holds what is no run's, or another process has it; OSError
        where it cannot be made or read."""
        self.out = out
        out.mkdir(parents=True, exist_ok=True)
        if not (out / _RUN).exists():
            there = [name for name in os.listdir(out) if name != _LOCK and not _is_torn(name)]
            if there:
                raise ValueError(
                    f"{out} holds what no run has written there ({min(there)}): a run needs a new "
                    "or an empty directory"
                )
        # A file, not the directory: shared file systems lock what is open for writing.
        self._descriptor = os.open(out / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            lock(self._descriptor, str(out))
        except BaseException:
            self.close()
            raise
        (out / _STOP).unlink(missing_ok=True)
        for folder in (out, out / _BLOCKS):
            for name in filter(_is_torn, os.listdir(folder) if folder.exists() else []):
                (folder / name).unlink(missing_ok=True)

    def claim(self, blocks: Sequence[Block], block_rows: int) -> None:
        """Note what is to be done; raises ValueError where it is not what the run began with."""
        digest = hashlib.sha256("".join(block.digest for block in blocks).encode()).hexdigest()
        rows = sum(block.rows for block in blocks)
        ours = {"block_rows": block_rows, "rows": rows, "digest": digest}
        path = self.out / _RUN
        if not path.exists():
            text = json.dumps(ours) + "\n"
            _replace(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
        (self.out / _BLOCKS).mkdir(exist_ok=True)
        try:
            found = json.loads(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path} is damaged: {error}") from None
        if found != ours:
            began = found.get("block_rows") if isinstance(found, dict) else None
            what = f"blocks of {began} rows, not of {block_rows}" if began != block_rows else "rows"
            raise ValueError(f"{self.out} was begun with other {what}")

    def stop(self) -> None:
        """Have no other block begun."""
        (self.out / _STOP).touch()

    def join(self, blocks: Iterable[Block]) -> None:
        """Write the joined file; every block has to be there."""

        def write(temporary: Path) -> None:
            with temporary.open("wb") as joined:
                for block in blocks:
                    with block_path(self.out, block.number).open("rb") as lines:
                        shutil.copyfileobj(lines, joined)

        _replace(self.out / JOINED, write)

    def close(self) -> None:
        """Give up the lock."""
        os.close(self._descriptor)


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    from models.weights import replace_file  # loads torch: not for --help

    replace_file(path, write)


def _is_torn(name: str) -> bool:
    """Whether it is a file that a killed process has begun."""
    return name.startswith(".") and name.endswith(".tmp")
