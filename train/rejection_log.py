"""The files that rejective fine-tuning writes as it samples, and what was done before it stopped.

A row's lines in a file are one write, its line of progress another, after them: a killed run
continues with the next row.
"""

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from engine.output import Output
from train.checkpoint import sha256
from train.rejection import FATES, HINTED_FATES, ROW_FATES, Fate, HintedFate, RowFate
from train.settings import differences

TRAJECTORIES, JUDGEMENTS = "trajectories.jsonl", "judgements.jsonl"


class _Header(msgspec.Struct):
    """The first line of progress."""

    settings: dict[str, Any]


class Done(msgspec.Struct, kw_only=True):
    """A row's line of progress. `ends`: bytes of trajectories, and of judgements, up to and with
    this row's."""

    id: str | None
    row: RowFate
    samples: list[Fate] = []
    hinted: HintedFate | None = None
    error: str | None = None
    ends: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Lines:
    """What a row adds to the two files."""

    trajectories: list[bytes]
    judgements: list[bytes]


class Counts:
    """How many rows and judgements had which fate."""

    def __init__(self) -> None:
        self._rows: Counter[RowFate] = Counter()
        self._samples: Counter[Fate] = Counter()
        self._hinted: Counter[HintedFate] = Counter()

    def add(self, done: Done) -> None:
        """Count a row."""
        self._rows[done.row] += 1
        self._samples.update(done.samples)
        if done.hinted is not None:
            self._hinted[done.hinted] += 1

    @property
    def kept(self) -> int:
        """Trajectories kept."""
        return self._samples["kept"] + self._hinted["kept"]

    def table(self) -> dict[str, Any]:
        """All counts; `all` is the sum of those beside it."""
        return {
            "trajectories": self.kept,
            "rows": {"all": self._rows.total()} | {f: self._rows[f] for f in ROW_FATES},
            "samples": {"all": self._samples.total()} | {f: self._samples[f] for f in FATES},
            "hinted": {"all": self._hinted.total()}
            | {f: self._hinted[f] for f in HINTED_FATES if f != "too_easy"},
        }


class RejectionLog:
    """Trajectories, judgements and progress, locked, and what an earlier run has done of them."""

    def __init__(self, out: Path) -> None:
        names = (TRAJECTORIES, JUDGEMENTS, "progress.jsonl")
        with ExitStack() as stack:
            outputs = [
                stack.enter_context(closing(Output(str(out / name), resume=True))) for name in names
            ]
            self.close = stack.pop_all().close
        self._files, self._progress = outputs[:2], outputs[2]
        self._ends = (0, 0)

    def resume(self, settings: dict[str, Any]) -> list[Done]:
        """The rows that are done; cuts off what is torn. Raises ValueError, and changes nothing,
        where they were done with other settings or the files are not such a run's."""
        path, sizes = self._progress.path, [Path(file.path).stat().st_size for file in self._files]
        lines = list(self._progress.whole_lines())
        if not lines and any(sizes):
            full = next(f.path for f, size in zip(self._files, sizes, strict=True) if size)
            raise ValueError(f"{full} is not empty, and {path} is")
        read: list[Any] = []
        for number, line in enumerate(lines, 1):
            try:
                read.append(msgspec.json.decode(line, type=Done if number > 1 else _Header))
            except msgspec.MsgspecError as error:
                raise ValueError(f"{path}, line {number}: {error}") from None
        if len(lines) < 2:  # no row is done, so nothing is lost
            for file in (*self._files, self._progress):
                file.cut(0)
            self._progress.write(msgspec.json.encode(_Header(settings=settings)) + b"\n")
            return []
        if read[0].settings != settings:
            differ = differences(read[0].settings, settings)
            raise ValueError(f"{path} was made with other settings: {differ}")
        done = self._whole(read[1:], sizes)
        self._ends = done[-1].ends if done else (0, 0)
        for file, end in zip(self._files, self._ends, strict=True):
            file.cut(end)
        self._progress.cut(sum(map(len, lines[: len(done) + 1])))
        return done

    def _whole(self, done: Sequence[Done], sizes: Sequence[int]) -> list[Done]:
        """Those whose lines are in the files: after a kill all are, after a power cut some may not
        be. Raises ValueError where ends are none of lines."""
        found, last = [], (0, 0)
        with ExitStack() as stack:
            files = [stack.enter_context(Path(file.path).open("rb")) for file in self._files]
            for number, each in enumerate(done, 2):
                for file, end, before, size in zip(files, each.ends, last, sizes, strict=True):
                    file.seek(max(0, end - 1))
                    if end < before or (0 < end <= size and file.read(1) != b"\n"):
                        raise ValueError(
                            f"{self._progress.path}, line {number}: "
                            f"{end} is not where a line of {file.name} ends"
                        )
                last = each.ends
                if all(end <= size for end, size in zip(each.ends, sizes, strict=True)):
                    found.append(each)
        return found

    def write(self, done: Done, lines: Lines) -> None:
        """Append a row: its lines, then its line of progress."""
        texts = b"".join(lines.trajectories), b"".join(lines.judgements)
        for file, text in zip(self._files, texts, strict=True):
            if text:
                file.write(text)
        first, second = self._ends
        self._ends = done.ends = first + len(texts[0]), second + len(texts[1])
        self._progress.write(msgspec.json.encode(done) + b"\n")


def easy_rows(progress: Path, data: Path) -> frozenset[str]:
    """The ids of the rows of a file that were judged right each time, from the progress of a run
    over it. Raises ValueError where the progress is not one over that file."""
    header, *lines = progress.read_bytes().splitlines() or [b""]
    try:
        made_with = msgspec.json.decode(header, type=_Header).settings
        done = [msgspec.json.decode(line, type=Done) for line in lines]
    except msgspec.MsgspecError as error:
        raise ValueError(f"{progress}: {error}") from None
    if made_with.get("data") != sha256(data):
        raise ValueError(f"{progress} is not about {data}")
    return frozenset(each.id for each in done if each.row == "too_easy" and each.id is not None)
