"""Commands and functions in forks of this process, where all that they need is imported: a new
process takes seconds for it."""

import multiprocessing
import os
import runpy
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def start(
    function: Callable[..., object],
    *arguments: Any,
    streams: Mapping[str, int] | None = None,
    environment: Mapping[str, str] | None = None,
    forgotten: Sequence[str] = (),
) -> BaseProcess:
    """Call a function in a fork. streams: descriptors for its "stdout" and "stderr"; environment:
    variables beside those that there are; forgotten: packages that it imports anew."""

    def run() -> None:
        os.environ.update(environment or {})
        for name, descriptor in (streams or {}).items():
            number = ("stdin", "stdout", "stderr").index(name)
            os.dup2(descriptor, number)
            setattr(sys, name, open(number, "w", encoding="utf-8", closefd=False))  # noqa: SIM115
        for module in list(sys.modules):
            if module.split(".")[0] in forgotten:
                del sys.modules[module]
        function(*arguments)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def command(*words: str) -> None:
    """In a fork: what `python -m` does with these words, in the repository."""
    os.chdir(ROOT)
    sys.argv[1:] = words[1:]
    sys.modules.pop(words[0], None)
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)
