"""The directory of a run, OUT: one process writes to it at a time, and nothing is overwritten there
that a run did not write.

    OUT/run.json    marks it as a run's: of which command, and whether a checkpoint has been written

A new or an empty directory becomes a run's. Any other is refused, and nothing in it is changed.
"""

import fcntl
import json
import os
from pathlib import Path

from models.files import read_json
from models.weights import replace_file

MARK = "run.json"


class RunDirectory:
    """A run's directory, locked until it is closed."""

    def __init__(self, out: Path, command: str) -> None:
        """Raises ValueError where `out` is another command's, holds what is no run's, or another
        process has it; OSError where it cannot be made or read."""
        self.out, self._command = out, command
        out.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(out, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self.was_saved = self._claim()
        except BaseException:
            self.close()
            raise

    def _claim(self) -> bool:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{self.out}: another run is writing there") from None
        mark = self.out / MARK
        if mark.exists():
            found = read_json(mark)
            if found.get("command") != self._command:
                raise ValueError(
                    f"{self.out} has a run of {found.get('command')}, not of {self._command}"
                )
            return found.get("was_saved") is True
        if there := sorted(os.listdir(self.out)):
            some = ", ".join(there[:3]) + (", ..." if len(there) > 3 else "")
            raise ValueError(
                f"{self.out} holds what no run has written there ({some}): "
                "a run needs a new or an empty directory"
            )
        self._write(was_saved=False)
        return False

    def saved(self) -> None:
        """A checkpoint has been written: from now on a run without one is refused."""
        if not self.was_saved:
            self._write(was_saved=True)
            self.was_saved = True

    def _write(self, was_saved: bool) -> None:
        mark = {"command": self._command, "was_saved": was_saved}
        replace_text(self.out / MARK, json.dumps(mark) + "\n")

    def close(self) -> None:
        """Give up the lock."""
        os.close(self._descriptor)


def replace_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
