"""Plant the faults of tests/FAULTS.md, one after another, and see the tests that it names turn red.

    python -m tests.faults [WORD]     only faults whose title or file has this word

A fault is planted in a copy of the repository. It counts as found if each of its tests fails. The
exit status is 1 if one was not found, or if the text that it changes is no longer there.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
_FAULT = re.compile(
    r"^### (?P<title>.+?)\n+`(?P<file>[^`]+)`\n+```diff\n(?P<diff>.+?)^```\n+Red: (?P<tests>.+?)$",
    re.M | re.S,
)


class Fault(NamedTuple):
    title: str
    file: str
    old: str
    new: str
    tests: list[str]  # file::function
    in_triton: bool  # its tests run under the interpreter

    def plant(self, root: Path) -> None:
        """Raises ValueError unless the text stands in the file exactly once."""
        path = root / self.file
        text = path.read_text()
        if text.count(self.old) != 1:
            raise ValueError(f"{self.title}: {self.file} has its text {text.count(self.old)} times")
        path.write_text(text.replace(self.old, self.new))


def read_faults(text: str) -> Iterator[Fault]:
    """The faults of a page like FAULTS.md."""
    for section in re.split(r"^(?=## )", text, flags=re.M):
        for found in _FAULT.finditer(section):
            lines = found["diff"].splitlines()
            old, new = (
                "\n".join(line[1:] for line in lines if line[:1] in (" ", sign)) for sign in "-+"
            )
            tests = re.findall(r"`([^`]+::[^`]+)`", found["tests"])
            in_triton = "in Triton" in section.splitlines()[0]
            yield Fault(found["title"], found["file"], old, new, tests, in_triton)


def copy_repository(to: Path) -> None:
    tracked = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.check_output(tracked, cwd=ROOT, text=True).splitlines():
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, to / name)


def green(fault: Fault, root: Path) -> list[str]:
    """The fault's tests that do not fail in this copy."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if fault.in_triton:
        environment["TRITON_INTERPRET"] = "1"
    marks = ["-m", "triton and not gpu" if fault.in_triton else "not triton and not gpu"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--tb=no", "-rfE", *marks, *fault.tests],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
    )
    red = set(re.findall(r"^(?:FAILED|ERROR) ([^\[\s]+)", run.stdout, re.M))
    if run.returncode < 0:  # a wrong address may end the process
        return []
    if run.returncode not in (0, 1):
        raise ValueError(
            f"pytest ends with {run.returncode}: {run.stdout[-300:]}{run.stderr[-300:]}"
        )
    return [test for test in fault.tests if test not in red]


def main(word: str = "") -> int:
    missed = 0
    for fault in read_faults((ROOT / "tests/FAULTS.md").read_text()):
        if word not in fault.title and word not in fault.file:
            continue
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            copy_repository(root)
            try:
                fault.plant(root)
                still = green(fault, root)
                verdict = f"NOT FOUND by {', '.join(still)}" if still else "found"
            except ValueError as error:
                verdict = f"NOT TESTED, {error}"
        missed += verdict != "found"
        print(f"{fault.file}: {fault.title}: {verdict}", flush=True)
    return min(missed, 1)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
